# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Dataset and loader of stage 2: images, or vectors of them, with text embeddings or captions."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from composer.core import DataSpec

from llm2clip.config import DatasetConfig, ImageDataConfig, ImageStreamConfig
from llm2clip.data.captions import draw_captions, text_id
from llm2clip.data.images import decode_pixels, pixels_needed, seeded, train_transform
from llm2clip.data.loader import (
    all_caption_keys,
    all_keys,
    build_loader,
    positive_weights,
    stream_arguments,
)
from llm2clip.data.schema import CAPTION, EMBEDDING, IMAGE, SAMPLE_ID
from llm2clip.data.streams.paired_stream import PairedRow, PairedStream, are_stored_alike
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.vectors import dequantize, float_vectors, stored_vector, text_embedding
from llm2clip.errors import ConfigError, under
from llm2clip.modeling.image_processing_llm2clip import resize_and_crop

_MAX_INT64 = (1 << 63) - 1


class ImageTextDataset(SafeDataset):
    """Images, each with text embeddings or captions; `ComposerLLM2CLIP` documents the batches.

    If the streams have image embeddings, these are read instead of images.  In training, an image is cropped
    at random, and captions are drawn, each time it is read.  In evaluation, an image has all captions; a
    missing one is an empty text with a zero embedding and ``text_id`` 0.

    Args:
        config: Streams, caption weights and crops.
        image_size: Side of the vision tower's square input, in pixels.
        global_batch_size, seed: As for `SafeDataset`.
        train: Drawn captions and a random crop, shuffled; else every caption and a centre crop, in order.
        captions: Deliver captions instead of their embeddings.

    Raises:
        ConfigError, ValueError: A dataset or caption is missing, or a teacher is ambiguous or unknown.
    """

    def __init__(
        self, config: ImageDataConfig, image_size: int, global_batch_size: int, seed: int, *, train: bool,
        captions: bool = False,
    ) -> None:
        self.image_size = image_size
        self.captions_per_image = config.captions_per_image
        self.captions = captions
        self.image_embeddings = reads_image_embeddings(config)
        self.transform = train_transform(
            image_size, config.crop_scale, config.color_jitter, config.grayscale, config.horizontal_flip)
        self.shortest_side = pixels_needed(image_size, config.crop_scale[0])
        # Caption key -> weight, of each stream.
        self.mixes: dict[str, dict[str, float]] = {}
        for name, stream in config.streams.items():
            with under(f'streams.{name}'):
                self.mixes[name] = caption_mix(stream, config)
        self.caption_keys = list(dict.fromkeys(itertools.chain.from_iterable(self.mixes.values())))
        streams: dict[str, PairedStream] = {}
        for name, stream in config.streams.items():
            keys = self.mixes[name] if train else self.caption_keys
            with under(f'streams.{name}'):
                streams[name] = paired_stream(stream, config, keys, in_loop=captions)
        super().__init__(streams, config, global_batch_size, seed, train=train)
        # Vectors stay as stored if all streams have the same storage type, and are float32 otherwise.
        self.images_as_stored = len({stream.encodings[0] for stream in streams.values()}) == 1
        self.texts_as_stored = are_stored_alike(streams.values())

    def __getitem__(self, index: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(index)
        entries = {'index': index, 'sample_id': sample[SAMPLE_ID]}
        if self.train:
            return entries | self._with_drawn_captions(sample, index)
        return entries | self._with_all_captions(sample, index)

    def _with_drawn_captions(self, sample: PairedRow, index: int) -> dict[str, Any]:
        """Random crop, or vector of the image, and drawn captions (on a first axis, if several)."""
        seed = self.sample_seed(sample)
        mix = self.mixes[self.stream_name(index)]
        captions: Mapping[str, Any] = sample
        if self.image_embeddings:
            captions = _stand_ins(sample, index, mix)
            entries: dict[str, Any] = self._image_embedding(sample)
        else:
            pixels = decode_pixels(sample[IMAGE], sample[SAMPLE_ID], self.shortest_side)
            entries = {'pixel_values': seeded(self.transform, pixels, seed)}

        texts: list[dict[str, Any]] = []
        for key, caption in draw_captions(captions, mix, self.captions_per_image, seed):
            text: dict[str, Any] = {'caption': caption}
            if not self.captions:
                text = text_embedding(sample.text_embeddings, key, self.texts_as_stored)
            text['text_id'] = torch.tensor(text_id(caption))
            texts.append(text)
        entries |= texts[0] if len(texts) == 1 else _stacked(texts)
        entries['sample_seed'] = seed & _MAX_INT64
        return entries

    def _with_all_captions(self, sample: PairedRow, index: int) -> dict[str, Any]:
        """Centre crop, or vector of the image, and every caption."""
        captions: Mapping[str, Any] = sample
        if self.image_embeddings:
            captions = _stand_ins(sample, index, self.caption_keys)
            entries: dict[str, Any] = self._image_embedding(sample)
        else:
            pixels = decode_pixels(sample[IMAGE], sample[SAMPLE_ID])
            entries = {'pixel_values': resize_and_crop(pixels, self.image_size)}

        texts: list[dict[str, Any]] = []
        for key in self.caption_keys:
            caption = captions[CAPTION + key]
            text: dict[str, Any] = {'caption': caption}
            if not self.captions:
                text = text_embedding(sample.text_embeddings, key, self.texts_as_stored)
            # Position and key make an id unique, even if two samples have the same text.
            text['text_id'] = torch.tensor(text_id(f'{index}/{key}') if caption.strip() else 0)
            texts.append(text)
        return entries | _stacked(texts)

    def _image_embedding(self, sample: PairedRow) -> dict[str, torch.Tensor]:
        """``image_embedding`` ``(D,)`` of the image."""
        stored = stored_vector(sample, IMAGE, 'image_embedding')
        if self.images_as_stored:
            return stored
        return {'image_embedding': dequantize(stored, 'image_embedding').float()}


def build_image_loader(
    config: ImageDataConfig, image_size: int, global_batch_size: int, seed: int, *, train: bool,
    captions: bool = False,
) -> DataSpec:
    """Build the loader of stage 2 from an `ImageTextDataset`, which has the same arguments."""
    dataset = ImageTextDataset(config, image_size, global_batch_size, seed, train=train, captions=captions)
    return build_loader(
        dataset, split_batch=split_columns if captions else None, microbatch_transforms=float_vectors)


def reads_image_embeddings(config: ImageDataConfig) -> bool:
    """Return whether the streams have image embeddings; a ConfigError if only some have."""
    without = [name for name, stream in config.streams.items() if stream.image_embeddings is None]
    if without and len(without) < len(config.streams):
        raise ConfigError('required but not set, since other datasets have them',
                          f'streams.{without[0]}.image_embeddings')
    return not without


def _stand_ins(sample: PairedRow, index: int, keys: Collection[str]) -> dict[str, str]:
    """Texts in place of the captions of a sample that has only vectors: empty where the vector is zero, as it
    is for a missing caption, and otherwise unique, which sample ids of several datasets need not be."""
    row = sample.text_embeddings[0]
    captions: dict[str, str] = {SAMPLE_ID: sample[SAMPLE_ID]}
    for key in keys:
        captions[CAPTION + key] = f'{index}/{key}' if row[EMBEDDING + key].any() else ''
    return captions


def _stacked(texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Values of several texts of one image, stacked on a new first axis; strings in a list."""
    columns: dict[str, Any] = {}
    for name, first in texts[0].items():
        values = [text[name] for text in texts]
        columns[name] = torch.stack(values) if isinstance(first, torch.Tensor) else values
    return columns


def split_columns(batch: dict[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """Split a batch into microbatches; for K captions per image, ``caption`` has K columns of B texts."""
    parts: list[dict[str, Any]] = []
    for start in range(0, len(batch['index']), microbatch_size):
        rows = slice(start, start + microbatch_size)
        part = {name: values[rows] for name, values in batch.items()}
        if 'caption' in batch and not isinstance(batch['caption'][0], str):
            part['caption'] = [column[rows] for column in batch['caption']]
        parts.append(part)
    return parts


def caption_mix(stream: ImageStreamConfig, config: ImageDataConfig) -> dict[str, float]:
    """Return caption key -> weight above 0 of a stream; without configured weights, all weights are equal."""
    weights = positive_weights(stream.caption_weights, config.caption_weights)
    if weights:
        return weights
    if stream.image_embeddings is None:
        return dict.fromkeys(all_caption_keys(stream, 'caption_weights'), 1.0)
    embeddings, *_ = teacher_embeddings(stream.embeddings, config.teachers).values()
    return dict.fromkeys(all_keys(embeddings, EMBEDDING, 'caption_weights'), 1.0)


def paired_stream(
    stream: ImageStreamConfig, config: ImageDataConfig, keys: Collection[str], *, in_loop: bool
) -> PairedStream:
    """Return the stream of a dataset of `config`.

    Args:
        stream: Folders and remotes of the dataset.
        config: The teachers to read (unset, the only one).
        keys: Captions that the dataset must have, or that must have embeddings.
        in_loop: Read no embeddings dataset.

    Raises:
        ConfigError: A teacher is ambiguous or unknown.
    """
    text_embeddings: dict[str, DatasetConfig] = {}
    if not in_loop:
        text_embeddings = teacher_embeddings(stream.embeddings, config.teachers)
    arguments = stream_arguments(stream)
    if stream.image_embeddings is None:
        columns = [IMAGE, *(CAPTION + key for key in keys)]
    else:
        arguments |= {'local': stream.image_embeddings.local, 'remote': stream.image_embeddings.remote,
                      'source': DatasetConfig(stream.local, stream.remote)}
        columns = [EMBEDDING + IMAGE]
    return PairedStream(
        text_embeddings=text_embeddings.values(), columns=columns,
        embedding_columns=[EMBEDDING + key for key in keys], **arguments)


def teacher_embeddings(
    text_embeddings: Mapping[str, DatasetConfig], teachers: Sequence[str]
) -> dict[str, DatasetConfig]:
    """Return the embeddings datasets of `teachers`, or the only one; otherwise raise a ConfigError."""
    names = ', '.join(text_embeddings) or 'none'
    if not teachers and len(text_embeddings) != 1:
        raise ConfigError('expected the embeddings dataset of one teacher, or a choice by `teachers`; there '
                          f'are {len(text_embeddings)} ({names}); null removes one', 'embeddings')
    chosen: dict[str, DatasetConfig] = {}
    for teacher in teachers or text_embeddings:
        if teacher not in text_embeddings:
            raise ConfigError(f'there is no embeddings dataset of {teacher!r}, only of {names}', 'embeddings')
        chosen[teacher] = text_embeddings[teacher]
    return chosen
