# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2's data: images with the teacher's embeddings of their captions."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import torch
import xxhash
from composer.core import DataSpec

from llm2clip.config import ConfigError, ImageDataConfig, ImageStreamConfig
from llm2clip.data.captions import draw
from llm2clip.data.images import decode_pixels
from llm2clip.data.paired_stream import PairedStream, columns_of, read_fingerprint
from llm2clip.data.schema import IMAGE, SAMPLE_ID, caption_column, check_dataset, embedding_column, embedding_dim
from llm2clip.data.streaming import SeededDataset, build_loader, stream_arguments, streaming_dataset
from llm2clip.data.transforms import eval_transform, pixels_needed, seeded, train_transform
from llm2clip.data.vectors import read_vector
from llm2clip.preprocessing import Preprocessing

__all__ = ['EvalImageDataset', 'TrainImageDataset', 'build_image_loader', 'paired_stream', 'sidecar_teacher']


class TrainImageDataset(SeededDataset):
    """A randomly cropped image and the embedding of one caption, drawn each time the sample is seen.

    Args:
        streams: Paired streams.
        caption_mix: Caption key -> weight.
        transform: Random transform, uint8 pixels -> normalised.
        pixels_needed: Shortest side that it needs; larger images may be decoded at a fraction of their size.
        **kwargs: Passed to SeededDataset.
    """

    def __init__(
        self,
        streams: Sequence[PairedStream],
        caption_mix: Mapping[str, float],
        transform: Any,
        pixels_needed: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(streams, **kwargs)
        self.pixels_needed = pixels_needed
        self.keys = list(caption_mix)
        self.weights = list(caption_mix.values())
        self.transform = transform

    def __getitem__(self, at: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(at)
        seed = self.sample_seed(sample)
        key = self.keys[draw(self.weights, seed)]
        image = decode_pixels(sample[IMAGE], sample[SAMPLE_ID], self.pixels_needed)
        return {
            'index': at,
            'sample_id': sample[SAMPLE_ID],
            'pixel_values': seeded(self.transform, image, seed),
            'text_embedding': torch.from_numpy(read_vector(sample, key)),
        }


class EvalImageDataset(SeededDataset):
    """An image and the embeddings of all its captions, with an id for each text.

    Args:
        streams: Paired streams.
        caption_keys: Captions that belong to an image.
        transform: Uint8 pixels -> normalised.
        merge_equal_texts: Give captions of the same wording the same id.
        **kwargs: Passed to SeededDataset.
    """

    def __init__(
        self,
        streams: Sequence[PairedStream],
        caption_keys: Sequence[str],
        transform: Any,
        merge_equal_texts: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(streams, **kwargs)
        self.keys = list(caption_keys)
        self.transform = transform
        self.merge_equal_texts = merge_equal_texts

    def __getitem__(self, at: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(at)
        texts = [sample[caption_column(key)] for key in self.keys]
        names = texts if self.merge_equal_texts else [f'{at}/{key}' for key in self.keys]
        vectors = [torch.from_numpy(read_vector(sample, key)) for key in self.keys]
        return {
            'index': at,
            'sample_id': sample[SAMPLE_ID],
            'pixel_values': self.transform(decode_pixels(sample[IMAGE], sample[SAMPLE_ID])),
            'text_embedding': torch.stack(vectors),
            'text_id': torch.tensor([xxhash.xxh64_intdigest(name) >> 1 for name in names]),
        }


def paired_stream(
    name: str, stream: ImageStreamConfig, teacher: Optional[str], keys: Sequence[str], key: str
) -> PairedStream:
    """The stream of one configured dataset, its columns checked.

    Args:
        name: Of the dataset.
        stream: Where it and its sidecars are.
        teacher: Whose sidecar to read; None, the only one.
        keys: Captions that must have embeddings.
        key: Where the dataset's group stands in the configuration.

    Raises:
        ConfigError: The dataset or its sidecar is missing, or which sidecar is meant is not clear.
        ValueError: A caption has no column or no embedding.
    """
    arguments = stream_arguments(name, stream, key)
    if teacher is None and len(stream.embeddings) != 1:
        raise ConfigError(f'{key}.embeddings: dataset {name} has sidecars of {len(stream.embeddings)} teachers '
                          f'({", ".join(stream.embeddings) or "none"}); say which one to read')
    sidecar = stream.embeddings.get(teacher or next(iter(stream.embeddings)))
    if sidecar is None:
        raise ConfigError(f'{key}.streams.{name}.embeddings: there is no sidecar of {teacher!r}, only of '
                          f'{", ".join(stream.embeddings)}')
    columns, embedding_columns = [caption_column(k) for k in keys], [embedding_column(k) for k in keys]
    if stream.remote is None:
        check_dataset(stream.local, [SAMPLE_ID, IMAGE, *columns])
    if sidecar.remote is None:
        check_dataset(sidecar.local, [SAMPLE_ID, *embedding_columns])
    return PairedStream(embeddings=sidecar.local, embeddings_remote=sidecar.remote, columns=columns,
                        embedding_columns=embedding_columns, **arguments)


def sidecar_teacher(data: DataSpec) -> tuple[dict[str, Any], int]:
    """The teacher that all sidecars of a loader's dataset come from, and the width of its vectors.

    Raises:
        ValueError: Two sidecars come from different teachers.
    """
    dataset = streaming_dataset(data)
    teachers, dim = [], 0
    for stream_id, stream in enumerate(dataset.streams):
        assert isinstance(stream, PairedStream)
        folder = stream.sidecar.local
        teachers.append((folder, read_fingerprint(folder)['teacher']))
        dim = embedding_dim(columns_of(dataset.shards[dataset.shard_offset_per_stream[stream_id]].sidecar))
    for folder, teacher in teachers[1:]:
        check_same_teacher(teacher, teachers[0][1], f'sidecar {folder}', f'sidecar {teachers[0][0]}')
    return teachers[0][1], dim


def check_same_teacher(found: Mapping[str, Any], expected: Mapping[str, Any], what: str, reference: str) -> None:
    """Raise a ValueError that names the first field in which two teachers differ."""
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise ValueError(f'{what} comes from another teacher than {reference}: {name} is {found.get(name)!r}, '
                             f'expected {expected.get(name)!r}')


def build_image_loader(
    config: ImageDataConfig,
    preprocessing: Preprocessing,
    global_batch_size: int,
    seed: int,
    train: bool,
    key: str,
    merge_equal_texts: bool = False,
) -> DataSpec:
    """Loader of stage 2's batches; `ComposerLLM2CLIP` says what is in them.

    Args:
        config: Streams, caption mix and crops.
        preprocessing: Of the vision tower.
        global_batch_size: Samples a step over all ranks.
        seed: Seed of caption choice and crops.
        train: One drawn caption and a random crop, shuffled; otherwise every caption and a centre crop, in order.
        key: Where `config` stands in the configuration.
        merge_equal_texts: In evaluation, captions of the same wording are one text.
    """
    mix = {name: weight for name, weight in config.caption_mix.items() if weight}
    if not mix or min(mix.values()) < 0:
        raise ConfigError(f'{key}.caption_mix: expected caption keys with weights, at least one above 0')
    streams = [paired_stream(name, stream, config.embeddings, list(mix), key)
               for name, stream in config.streams.items()]

    def make(**kwargs: Any) -> Union[TrainImageDataset, EvalImageDataset]:
        if train:
            transform = train_transform(preprocessing, config.crop_scale, config.color_jitter, config.grayscale)
            needed = pixels_needed(preprocessing.image_size, config.crop_scale[0])
            return TrainImageDataset(streams, mix, transform, needed, seed=seed, **kwargs)
        return EvalImageDataset(streams, list(mix), eval_transform(preprocessing), merge_equal_texts, seed=seed,
                                **kwargs)

    return build_loader(make, config, config.streams, global_batch_size, train, key)
