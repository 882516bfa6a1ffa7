# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Data of the trainings that read the teacher's embeddings of captions: with images for stage 2, and with the features
of CLIP's own text tower for inheritance."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import torch
from composer.core import DataSpec
from streaming import StreamingDataset

from llm2clip.config import ConfigError, DatasetConfig, ImageDataConfig, ImageStreamConfig, InheritanceDataConfig
from llm2clip.data.captions import captions_of, draw, draw_captions, text_id
from llm2clip.data.image_processing_llm2clip import resize_and_crop
from llm2clip.data.images import decode_pixels, pixels_needed, seeded, train_transform
from llm2clip.data.loader import all_caption_keys, build_loader, stream_arguments
from llm2clip.data.schema import (
    EMBEDDING,
    IMAGE,
    SAMPLE_ID,
    caption_column,
    check_dataset,
    embedding_column,
    read_columns,
)
from llm2clip.data.streams.paired_stream import PairedReader, PairedStream, columns_of
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.vectors import concatenate, float_vectors, stored_vector, vectors_of

__all__ = [
    'TrainImageDataset', 'build_image_loader', 'build_target_loader', 'paired_stream', 'split_columns', 'stream_mix',
    'target_stream', 'target_streams',
]


# ---------------------------------------------------------------------------------------------------------------------
# Images with embeddings
# ---------------------------------------------------------------------------------------------------------------------


class TrainImageDataset(SafeDataset):
    """A randomly cropped image and the embeddings of some of its captions, drawn each time the sample is seen: of one,
    or of several on an axis of their own.

    Where a stream has no sidecar, the captions themselves.

    Args:
        streams: Paired streams.
        caption_mixes: Caption key -> weight, for each stream.
        transform: Random transform, pixels in uint8 -> those of the tower's size.
        pixels_needed: Shortest side that it needs; larger images may be decoded at a fraction of their size.
        captions_per_image: How many are drawn.
        captions: Deliver the captions beside their embeddings.
        **kwargs: Passed to SafeDataset.
    """

    def __init__(
        self,
        streams: Sequence[PairedStream],
        caption_mixes: Sequence[Mapping[str, float]],
        transform: Any,
        pixels_needed: Optional[int] = None,
        captions_per_image: int = 1,
        captions: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(streams, **kwargs)
        self.pixels_needed, self.captions = pixels_needed, captions
        self.as_stored = _one_storage(self)
        self.captions_per_image = captions_per_image
        self.mixes = caption_mixes
        self.transform = transform

    def __getitem__(self, at: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample: Any = super().__getitem__(at)
        seed = self.sample_seed(sample)
        drawn = draw_captions(sample, self.mixes[self.stream_of(at)], self.captions_per_image, seed)
        texts = [
            {**(_caption_embedding(sample.sidecars, key, self.as_stored) if sample.sidecars else {}),
             **({'caption': caption} if self.captions or not sample.sidecars else {}),
             'text_id': torch.tensor(text_id(caption))} for key, caption in drawn]
        image = decode_pixels(sample[IMAGE], sample[SAMPLE_ID], self.pixels_needed)
        return {
            'index': at,
            'sample_id': sample[SAMPLE_ID],
            'pixel_values': seeded(self.transform, image, seed),
            **(_stacked(texts) if len(texts) > 1 else texts[0]),
            'sample_seed': seed & (1 << 63) - 1,
        }


class _EvalImageDataset(SafeDataset):
    """An image and the embeddings of all its captions, or the captions without a sidecar, with an id for each text.

    A caption that is absent is an empty text, its embedding is zero, and so is its id.

    Args:
        streams: Paired streams.
        caption_keys: Captions that belong to an image.
        image_size: Side of the square that the vision tower sees.
        captions: Deliver the captions beside their embeddings.
        **kwargs: Passed to SafeDataset.
    """

    def __init__(
        self,
        streams: Sequence[PairedStream],
        caption_keys: Sequence[str],
        image_size: int,
        captions: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(streams, **kwargs)
        self.as_stored = _one_storage(self)
        self.keys = list(caption_keys)
        self.image_size, self.captions = image_size, captions

    def __getitem__(self, at: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample: Any = super().__getitem__(at)
        texts = [sample[caption_column(key)] for key in self.keys]
        vectors = [_caption_embedding(sample.sidecars, key, self.as_stored) for key in self.keys if sample.sidecars]
        return {
            'index': at,
            'sample_id': sample[SAMPLE_ID],
            'pixel_values': resize_and_crop(decode_pixels(sample[IMAGE], sample[SAMPLE_ID]), self.image_size),
            **(_stacked(vectors) if vectors else {}),
            **({'caption': texts} if self.captions or not vectors else {}),
            'text_id': torch.tensor([text_id(text.strip() and f'{at}/{key}') for key, text in zip(self.keys, texts)]),
        }

    def caption_and_pixels(self, at: int) -> tuple[str, torch.Tensor]:
        """The first caption that there is and the picture ``(3, H, W)`` in uint8, to look at."""
        sample = super().__getitem__(at)
        caption = next(iter(captions_of(sample, self.keys).values()), '')
        return caption, decode_pixels(sample[IMAGE], sample[SAMPLE_ID])


def _caption_embedding(rows: Sequence[Mapping[str, Any]], key: str, as_stored: bool) -> dict[str, torch.Tensor]:
    """One caption's ``text_embedding`` ``(D,)``, by the sample's rows of the sidecars; int8 `as_stored`, with its
    scale, or as float32.  Those of several teachers have length 1 each and stand one after the other."""
    stored = [stored_vector(row, key) for row in rows]
    if as_stored:
        return stored[0]
    return {'text_embedding': concatenate([vectors_of(one).float() for one in stored])}


def _stacked(texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What belongs to several texts of one image, on an axis of its own; strings in a list."""
    columns = {name: [text[name] for text in texts] for name in texts[0]}
    return {name: torch.stack(values) if isinstance(values[0], torch.Tensor) else values
            for name, values in columns.items()}


def _one_storage(dataset: StreamingDataset) -> bool:
    """Whether each stream has one sidecar, and all of them store vectors the same way."""
    kinds = set()
    for first in dataset.shard_offset_per_stream:
        shard = dataset.shards[first]
        assert isinstance(shard, PairedReader)
        kinds.add(tuple(next(kind for kind in columns_of(sidecar).values() if kind.startswith('ndarray')).split(':')[1]
                        for sidecar in shard.sidecars))
    return len(kinds) == 1 and len(kinds.pop()) == 1


def build_image_loader(
    config: ImageDataConfig,
    image_size: int,
    global_batch_size: int,
    seed: int,
    train: bool,
    key: str,
    online: bool = False,
    captions: bool = False,
) -> DataSpec:
    """Loader of stage 2's batches; `ComposerLLM2CLIP` says what is in them after its ``microbatch_transforms``.

    Args:
        config: Streams, caption mix and crops.
        image_size: Side of the square that the vision tower sees.
        global_batch_size: Samples per step over all ranks.
        seed: Seed of caption choice and crops.
        train: Drawn captions and a random crop, shuffled; otherwise every caption and a centre crop, in order.
        key: Where `config` stands in the configuration.
        online: Deliver captions in place of their embeddings.
        captions: Deliver them beside their embeddings.
    """
    mixes = [stream_mix(config, name, key) for name in config.streams]
    keys = list(dict.fromkeys(name for mix in mixes for name in mix))
    streams = [paired_stream(name, stream, config.teachers, list(mix) if train else keys, key, online)
               for (name, stream), mix in zip(config.streams.items(), mixes)]

    def make(**kwargs: Any) -> Union[TrainImageDataset, _EvalImageDataset]:
        if train:
            transform = train_transform(image_size, config.crop_scale, config.color_jitter, config.grayscale,
                                        config.horizontal_flip)
            needed = pixels_needed(image_size, config.crop_scale[0])
            return TrainImageDataset(streams, mixes, transform, needed, config.captions_per_image,
                                     captions, seed=seed, **kwargs)
        return _EvalImageDataset(streams, keys, image_size, captions, seed=seed, **kwargs)

    columns = train and (online or captions) and config.captions_per_image > 1
    return build_loader(make, config, config.streams, global_batch_size, train, key,
                        split_batch=split_columns if columns else None, microbatch_transforms=float_vectors)


def split_columns(batch: dict[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """Split a batch whose ``caption`` may be K columns of B texts, as images with K captions each have them."""
    parts = [slice(start, start + microbatch_size) for start in range(0, len(batch['index']), microbatch_size)]
    return [{name: [column[rows] for column in values] if name == 'caption' and not isinstance(values[0], str)
             else values[rows] for name, values in batch.items()} for rows in parts]


def stream_mix(config: ImageDataConfig, name: str, key: str) -> dict[str, float]:
    """Caption key -> weight of a stream, those that are never drawn left out; without a mix, all equally often.

    Raises:
        ConfigError: Nothing is drawn.
    """
    caption_mix, where = config.caption_mix, key
    if (own := config.streams[name].caption_mix) is not None:
        caption_mix, where = own, f'{key}.streams.{name}'
    if not caption_mix:
        return dict.fromkeys(all_caption_keys(name, config.streams[name], key, 'caption_mix'), 1.0)
    mix = {caption: weight for caption, weight in caption_mix.items() if weight}
    if not mix:
        raise ConfigError(f'{where}.caption_mix: expected caption keys with weights, at least one above 0')
    return mix


def paired_stream(
    name: str, stream: ImageStreamConfig, teachers: Sequence[str], keys: Sequence[str], key: str, online: bool = False,
) -> PairedStream:
    """The stream of one configured dataset, its columns checked.

    Args:
        name: Of the dataset.
        stream: Where it and its sidecars are.
        teachers: Whose sidecars to read; none, that of the only one.
        keys: Captions that must have embeddings.
        key: Where the dataset's group stands in the configuration.
        online: Read no sidecar.

    Raises:
        ConfigError: The dataset or its sidecar is missing, or which sidecar is meant is not clear.
        ValueError: A caption has no column or no embedding.
    """
    arguments = stream_arguments(name, stream, key)
    sidecars = {} if online else _of_teachers(stream.embeddings, teachers, name, key)
    return _checked_stream(arguments, sidecars, [IMAGE, *map(caption_column, keys)], keys)


def _of_teachers(
    sidecars: Mapping[str, DatasetConfig], teachers: Sequence[str], name: str, key: str
) -> dict[str, DatasetConfig]:
    """The sidecars of these teachers, or the only one; `name` and `key` are for messages."""
    if not teachers and len(sidecars) != 1:
        raise ConfigError(f'{key}.teachers: dataset {name} has sidecars of {len(sidecars)} teachers '
                          f'({", ".join(sidecars) or "none"}); say which one to read')
    for teacher in teachers:
        if teacher not in sidecars:
            raise ConfigError(f'{key}.streams.{name}.embeddings: there is no sidecar of {teacher!r}, only of '
                              f'{", ".join(sidecars) or "nobody"}')
    return {teacher: sidecars[teacher] for teacher in teachers or sidecars}


def _checked_stream(
    arguments: Mapping[str, Any], sidecars: Mapping[str, DatasetConfig], columns: Sequence[str], keys: Sequence[str]
) -> PairedStream:
    """A dataset with these columns, and its sidecars with embeddings of these captions; checked where they are here."""
    embeddings = [embedding_column(k) for k in keys]
    if arguments['remote'] is None:
        check_dataset(arguments['local'], [SAMPLE_ID, *columns])
    for sidecar in sidecars.values():
        if sidecar.remote is None:
            check_dataset(sidecar.local, [SAMPLE_ID, *embeddings])
    return PairedStream(sidecars=[(sidecar.local, sidecar.remote) for sidecar in sidecars.values()], columns=columns,
                        embedding_columns=embeddings, **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Features of CLIP's text tower with embeddings
# ---------------------------------------------------------------------------------------------------------------------


class _CaptionTargetDataset(SafeDataset):
    """The teacher's vector of one of a sample's captions and its target, drawn each time the sample is seen.

    Drawn are captions that have a target; a sample without one is delivered all the same, but does not count.

    Args:
        streams: Sidecars of targets, with those of the teachers.
        caption_mixes: Caption key -> weight, for each stream.
        train: Draw; otherwise the first caption that has a target.
        **kwargs: Passed to SafeDataset.
    """

    def __init__(
        self, streams: Sequence[PairedStream], caption_mixes: Sequence[Mapping[str, float]], train: bool, **kwargs: Any,
    ) -> None:
        super().__init__(streams, **kwargs)
        self.mixes, self.train = caption_mixes, train
        self.as_stored = _one_storage(self)

    def __getitem__(self, at: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample: Any = super().__getitem__(at)
        mix = self.mixes[self.stream_of(at)]
        targets = {key: vectors_of(stored_vector(sample, key)).float() for key in mix}
        there = [key for key, target in targets.items() if target.any()]
        among = there or list(mix)
        key = among[draw([mix[key] for key in among], self.sample_seed(sample)) if self.train else 0]
        return {
            'index': at,
            'sample_id': sample[SAMPLE_ID],
            **_caption_embedding(sample.sidecars, key, self.as_stored),
            'target': targets[key],
            'counted': bool(there),
        }


def build_target_loader(
    config: InheritanceDataConfig, global_batch_size: int, seed: int, train: bool, key: str
) -> DataSpec:
    """Loader of inheritance's batches; `ComposerInheritance` says what is in them after its ``microbatch_transforms``.

    Args:
        config: Streams and caption mix.
        global_batch_size: Samples per step over all ranks.
        seed: Seed of the caption choice.
        train: Drawn captions, shuffled; otherwise the first caption of each sample that has a target, in order.
        key: Where `config` stands in the configuration.
    """
    streams = target_streams(config, key)
    opened = [target_stream(name, stream, config, key) for name, stream in streams.items()]
    paired, mixes = [stream for stream, _ in opened], [mix for _, mix in opened]
    return build_loader(
        lambda **kwargs: _CaptionTargetDataset(paired, mixes, train, seed=seed, **kwargs), config, streams,
        global_batch_size, train, key, microbatch_transforms=float_vectors)


def target_streams(config: InheritanceDataConfig, key: str) -> dict[str, ImageStreamConfig]:
    """The streams as they are read: each begins with the targets, beside which lie the teachers' vectors.

    Args:
        config: The configured streams, of which these are parts.
        key: Where `config` stands in the configuration.

    Raises:
        ConfigError: A sidecar is not named, or it is not clear which is meant.
    """
    result = {}
    for name, stream in config.streams.items():
        target = _of_teachers(stream.embeddings, [config.target], name, key)[config.target]
        others = {teacher: sidecar for teacher, sidecar in stream.embeddings.items() if teacher != config.target}
        result[name] = dataclasses.replace(stream, local=target.local, remote=target.remote,
                                           embeddings=_of_teachers(others, config.teachers, name, key))
    return result


def target_stream(
    name: str, stream: ImageStreamConfig, config: InheritanceDataConfig, key: str
) -> tuple[PairedStream, dict[str, float]]:
    """One of `target_streams`, its columns checked, and what is drawn from it: caption key -> weight.

    Args:
        name: Of the dataset.
        stream: Where its sidecars are.
        config: The caption mix.
        key: Where `config` stands in the configuration.

    Raises:
        ConfigError: The targets are missing, or nothing is drawn.
        ValueError: A caption has no vector in a sidecar.
    """
    configured = config.caption_mix if stream.caption_mix is None else stream.caption_mix
    if not configured and stream.remote is not None:
        raise ConfigError(f'{key}.caption_mix: expected caption keys, since the sidecar {stream.remote} is in a '
                          'remote, and which ones it has is not known yet')
    mix = {caption: weight for caption, weight in configured.items() if weight} if configured else {
        name.removeprefix(EMBEDDING): 1.0 for name in read_columns(stream.local) if name.startswith(EMBEDDING)}
    arguments = stream_arguments(f'{name}.embeddings.{config.target}', stream, key)
    return _checked_stream(arguments, stream.embeddings, [embedding_column(caption) for caption in mix], list(mix)), mix
