# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Dataset and loader of stage 2: images, or vectors of them, with text embeddings or captions."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

import torch
from composer.core import DataSpec

from llm2clip.config import DatasetConfig, ImageDataConfig, ImageStreamConfig
from llm2clip.data.augmentations import pixels_needed, seeded, train_transform
from llm2clip.data.captions import caption_of, draw, draw_captions, text_id
from llm2clip.data.images import decode_pixels
from llm2clip.data.loader import all_caption_keys, build_loader, stream_arguments
from llm2clip.data.schema import CAPTION, EMBEDDING, IMAGE, SAMPLE_ID, embedding_keys, read_columns
from llm2clip.data.streams.paired_stream import PairedStream
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.vectors import concatenate, float_vectors, stored_vector, vectors_of
from llm2clip.errors import ConfigError
from llm2clip.modeling.image_processing_llm2clip import resize_and_crop


def build_image_loader(
    config: ImageDataConfig, image_size: int, global_batch_size: int, seed: int, train: bool, key: str,
    captions: bool = False,
) -> DataSpec:
    """Build the loader of stage 2; `ComposerLLM2CLIP` documents its batches after ``microbatch_transforms``.

    If the streams have image embeddings, these are read instead of images, and the vector of one view is
    drawn.  In training, an image is cropped at random and one of its captions is drawn each time it is read.
    Several captions per image get an axis of their own.  In evaluation, an image has all captions; a missing
    one is an empty text with a zero embedding and ``text_id`` 0.

    Args:
        config: Streams, caption weights and crops.
        image_size: Side of the vision tower's square input, in pixels.
        global_batch_size, seed, key: As for `build_loader`.
        train: Drawn captions and a random crop, shuffled; else every caption and a centre crop, in order.
        captions: Deliver captions instead of their embeddings.
    """
    image_embeddings = reads_image_embeddings(config, key)
    mixes = [stream_mix(config, name, key) for name in config.streams]
    caption_keys = list(dict.fromkeys(itertools.chain(*mixes)))
    required = None if train else caption_keys
    streams: dict[str, PairedStream] = {}
    for name, stream in config.streams.items():
        streams[name] = paired_stream(name, stream, config, key, in_loop=captions, keys=required)
    samples = _ImageTextSamples(config, image_size, streams, mixes, caption_keys, captions, image_embeddings)
    return build_loader(
        streams, samples.train if train else samples.evaluation, config, global_batch_size, seed, train, key,
        split_batch=split_columns if captions else None, microbatch_transforms=float_vectors)


@dataclasses.dataclass
class _ImageTextSamples:
    """Batch entries of the samples of stage 2; each method is a `make` of `SafeDataset`."""

    config: ImageDataConfig
    image_size: int
    streams: Mapping[str, PairedStream]
    mixes: Sequence[Mapping[str, float]]  # caption key -> weight, of each stream
    caption_keys: Sequence[str]
    captions: bool  # deliver captions, not their embeddings
    image_embeddings: bool  # the samples have vectors, not images

    def __post_init__(self) -> None:
        config = self.config
        self.transform = train_transform(
            self.image_size, config.crop_scale, config.color_jitter, config.grayscale, config.horizontal_flip)
        self.shortest_side = pixels_needed(self.image_size, config.crop_scale[0])

    def train(self, dataset: SafeDataset, sample: Any, at: int) -> dict[str, Any]:
        """Return a random crop and drawn captions."""
        seed = dataset.sample_seed(sample)
        mix = self.mixes[dataset.stream_of(at)]
        captioned = _with_captions(sample, at, mix) if self.image_embeddings else sample
        texts: list[dict[str, Any]] = []
        for key, caption in draw_captions(captioned, mix, self.config.captions_per_image, seed):
            if self.captions:
                text = {'caption': caption}
            else:
                text = caption_embedding(sample.text_embeddings, key, self.streams)
            texts.append(text | {'text_id': torch.tensor(text_id(caption))})

        if self.image_embeddings:
            views = embedding_keys(sample)
            view = views[draw([1] * len(views), seed, 'view')]
            entries: dict[str, Any] = _image_embedding(sample, view, self.streams)
        else:
            pixels = decode_pixels(sample[IMAGE], sample[SAMPLE_ID], self.shortest_side)
            entries = {'pixel_values': seeded(self.transform, pixels, seed)}
        entries.update(_stacked(texts) if len(texts) > 1 else texts[0])
        entries['sample_seed'] = seed & (1 << 63) - 1
        return entries

    def evaluation(self, dataset: SafeDataset, sample: Any, at: int) -> dict[str, Any]:
        """Return the centre crop and every caption."""
        if self.image_embeddings:
            captioned = _with_captions(sample, at, self.caption_keys)
            entries: dict[str, Any] = _image_embedding(sample, IMAGE, self.streams)
        else:
            captioned = sample
            pixels = decode_pixels(sample[IMAGE], sample[SAMPLE_ID])
            entries = {'pixel_values': resize_and_crop(pixels, self.image_size)}

        texts = [captioned[CAPTION + caption_of(key)] for key in self.caption_keys]
        if self.captions:
            entries['caption'] = texts
        else:
            rows = sample.text_embeddings
            entries |= _stacked([caption_embedding(rows, key, self.streams) for key in self.caption_keys])
        # Position and key make an id unique, even if two samples have the same text.
        ids = [text_id(f'{at}/{key}') if text.strip() else 0 for key, text in zip(self.caption_keys, texts)]
        entries['text_id'] = torch.tensor(ids)
        return entries


def reads_image_embeddings(config: ImageDataConfig, key: str) -> bool:
    """Return whether the streams have image embeddings; a ConfigError if only some have."""
    without = [name for name, stream in config.streams.items() if stream.image_embeddings is None]
    if without and len(without) < len(config.streams):
        raise ConfigError(f'{key}.streams.{without[0]}.image_embeddings: required but not set, since other '
                          f'datasets of {key} have them')
    return bool(config.streams) and not without


def _with_captions(sample: Any, at: int, keys: Iterable[str]) -> dict[str, str]:
    """Stand-in for the captions of a sample that has only vectors: empty where the vector is zero, as it is
    for a missing caption, and otherwise unique, which sample ids of several datasets need not be."""
    row = sample.text_embeddings[0]
    captions: dict[str, str] = {SAMPLE_ID: sample[SAMPLE_ID]}
    for key in keys:
        captions[CAPTION + caption_of(key)] = f'{at}/{key}' if row[EMBEDDING + key].any() else ''
    return captions


def _image_embedding(sample: Any, key: str, streams: Mapping[str, PairedStream]) -> dict[str, torch.Tensor]:
    """``image_embedding`` ``(D,)`` of an image or a view of it, as stored if all streams have the same
    storage type, and otherwise in float32."""
    stored = stored_vector(sample, key, 'image_embedding')
    if len({stream.storages[0] for stream in streams.values()}) == 1:
        return stored
    return {'image_embedding': vectors_of(stored, 'image_embedding').float()}


def caption_embedding(
    rows: Sequence[Mapping[str, Any]], key: str, streams: Mapping[str, PairedStream]
) -> dict[str, torch.Tensor]:
    """``text_embedding`` ``(D,)`` of one caption, from the sample's rows of the embeddings datasets.

    If every stream has one embeddings dataset and all have the same storage type, the vector stays as stored.
    Otherwise it is float32, and the vectors of several teachers are scaled to length 1 and concatenated.
    """
    stored = [stored_vector(row, key) for row in rows]
    if len(stored) == 1 and len({stream.storages[1] for stream in streams.values()}) == 1:
        return stored[0]
    return {'text_embedding': concatenate([vectors_of(vector).float() for vector in stored])}


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


def stream_mix(config: ImageDataConfig, name: str, key: str) -> dict[str, float]:
    """Return caption key -> weight above 0 of a stream; without configured weights, all weights are equal."""
    stream = config.streams[name]
    caption_weights, where = config.caption_weights, key
    if stream.caption_weights is not None:
        caption_weights, where = stream.caption_weights, f'{key}.streams.{name}'
    if caption_weights:
        mix = {caption: weight for caption, weight in caption_weights.items() if weight}
        if not mix:
            raise ConfigError(f'{where}.caption_weights: expected caption keys with weights, at least one '
                              'above 0')
        return mix
    if stream.image_embeddings is None:
        return dict.fromkeys(all_caption_keys(name, stream, key, 'caption_weights'), 1.0)
    text_embeddings = embeddings_of_teachers(stream.embeddings, config.teachers, name, key)
    return equal_weights(next(iter(text_embeddings.values())), key)


def equal_weights(embeddings: DatasetConfig, key: str) -> dict[str, float]:
    """Caption key -> 1 of each caption in an embeddings dataset."""
    if embeddings.remote is not None:
        raise ConfigError(f'{key}.caption_weights: expected caption keys, since the embeddings dataset '
                          f'{embeddings.remote} is in a remote, and which ones it has is not known yet')
    return dict.fromkeys(embedding_keys(read_columns(embeddings.local)), 1.0)


def paired_stream(
    name: str, stream: ImageStreamConfig, config: ImageDataConfig, key: str, in_loop: bool = False,
    keys: Optional[Sequence[str]] = None,
) -> PairedStream:
    """Open the stream of one dataset in ``key.streams``, and check its columns.

    Args:
        name, stream: Name of the dataset, and its folders and remotes.
        config, key: Caption weights and the teachers to read (unset, the only one), and their key for errors.
        in_loop: Read no embeddings dataset.
        keys: Captions that must have embeddings; by default the captions with a weight.

    Raises:
        ConfigError, ValueError: A dataset or caption is missing, or a teacher is ambiguous or unknown.
    """
    text_embeddings: dict[str, DatasetConfig] = {}
    if not in_loop:
        text_embeddings = embeddings_of_teachers(stream.embeddings, config.teachers, name, key)
    if keys is None:
        keys = list(stream_mix(config, name, key))
    if stream.image_embeddings is None:
        arguments = stream_arguments(name, stream, key)
        # Vectors of prompts and parts have keys of their own, captions in the loop have not.
        captions = keys if in_loop else list(map(caption_of, keys))
        columns = [IMAGE, *dict.fromkeys(CAPTION + caption for caption in captions)]
    else:
        vectors = dataclasses.replace(
            stream, local=stream.image_embeddings.local, remote=stream.image_embeddings.remote)
        arguments = stream_arguments(f'{name}.image_embeddings', vectors, key)
        columns = [EMBEDDING + IMAGE]
    return checked_stream(arguments, text_embeddings, columns, keys)


def embeddings_of_teachers(
    text_embeddings: Mapping[str, DatasetConfig], teachers: Sequence[str], name: str, key: str
) -> dict[str, DatasetConfig]:
    """Embeddings datasets of `teachers`, or the only one; `name` and `key` are for error messages."""
    if not teachers and len(text_embeddings) != 1:
        raise ConfigError(f'{key}.teachers: dataset {name} has embeddings datasets of {len(text_embeddings)} '
                          f'teachers ({", ".join(text_embeddings) or "none"}); say which one to read')
    for teacher in teachers:
        if teacher not in text_embeddings:
            raise ConfigError(f'{key}.streams.{name}.embeddings: there is no embeddings dataset of {teacher!r}, '
                              f'only of {", ".join(text_embeddings) or "nobody"}')
    return {teacher: text_embeddings[teacher] for teacher in teachers or text_embeddings}


def checked_stream(
    arguments: Mapping[str, Any], text_embeddings: Mapping[str, DatasetConfig], columns: Sequence[str],
    keys: Sequence[str]
) -> PairedStream:
    """Stream of a dataset with `columns` and its embeddings datasets with `keys`; local ones are checked."""
    embedding_columns = [EMBEDDING + key for key in keys]
    if arguments['remote'] is None:
        read_columns(arguments['local'], [SAMPLE_ID, *columns])
    for embeddings in text_embeddings.values():
        if embeddings.remote is None:
            read_columns(embeddings.local, [SAMPLE_ID, *embedding_columns])
    folders = [(embeddings.local, embeddings.remote) for embeddings in text_embeddings.values()]
    return PairedStream(
        text_embeddings=folders, columns=columns, embedding_columns=embedding_columns, **arguments)
