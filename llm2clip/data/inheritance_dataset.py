# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Dataset and loader of inheritance: CLIP's text features as targets, with text embeddings beside them."""

import dataclasses
from collections.abc import Collection
from typing import Any

from composer.core import DataSpec

from llm2clip.config import ImageStreamConfig, InheritanceDataConfig
from llm2clip.data.captions import draw
from llm2clip.data.image_text_dataset import teacher_embeddings
from llm2clip.data.loader import all_keys, build_loader, positive_weights, stream_arguments
from llm2clip.data.schema import EMBEDDING, SAMPLE_ID
from llm2clip.data.streams.paired_stream import PairedStream, are_stored_alike
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.vectors import dequantize, float_vectors, stored_vector, text_embedding
from llm2clip.errors import under


class InheritanceDataset(SafeDataset):
    """Text embeddings with their targets; `ComposerInheritance` documents the batches.

    Each time a sample is read, one of the captions with a target is drawn.  A sample without a target is
    delivered, but has ``counted`` False.

    Args:
        config: Streams and caption weights.
        global_batch_size, seed: As for `SafeDataset`.
        train: Drawn captions, shuffled; else the first caption of each sample that has a target, in order.

    Raises:
        ConfigError, ValueError: The targets are missing, or a caption has no vector in an embeddings dataset.
    """

    def __init__(
        self, config: InheritanceDataConfig, global_batch_size: int, seed: int, *, train: bool
    ) -> None:
        # Caption key -> weight, of each stream.
        self.mixes: dict[str, dict[str, float]] = {}
        streams: dict[str, PairedStream] = {}
        for name, stream in target_streams(config).items():
            with under(f'streams.{name}'):
                self.mixes[name] = target_mix(stream, config)
                streams[name] = target_stream(stream, config, self.mixes[name])
        super().__init__(streams, config, global_batch_size, seed, train=train)
        self.texts_as_stored = are_stored_alike(streams.values())

    def __getitem__(self, index: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(index)
        mix = self.mixes[self.stream_name(index)]
        targets = {caption: dequantize(stored_vector(sample, caption)).float() for caption in mix}
        with_target = [caption for caption, target in targets.items() if target.any()]
        candidates = with_target or list(mix)
        caption = candidates[0]
        if self.train:
            weights = [mix[candidate] for candidate in candidates]
            caption = candidates[draw(weights, self.sample_seed(sample))]
        entries = {'index': index, 'sample_id': sample[SAMPLE_ID]}
        entries |= text_embedding(sample.text_embeddings, caption, self.texts_as_stored)
        entries['target'] = targets[caption]
        entries['counted'] = bool(with_target)
        return entries


def build_target_loader(
    config: InheritanceDataConfig, global_batch_size: int, seed: int, *, train: bool
) -> DataSpec:
    """Build the loader of inheritance from an `InheritanceDataset`, which has the same arguments."""
    dataset = InheritanceDataset(config, global_batch_size, seed, train=train)
    return build_loader(dataset, microbatch_transforms=float_vectors)


def target_streams(config: InheritanceDataConfig) -> dict[str, ImageStreamConfig]:
    """Return the streams of `config`, each with the targets as its main dataset and the embeddings datasets
    of the teachers."""
    streams: dict[str, ImageStreamConfig] = {}
    for name, stream in config.streams.items():
        with under(f'streams.{name}'):
            target = teacher_embeddings(stream.embeddings, [config.target])[config.target]
            others = dict(stream.embeddings)
            del others[config.target]
            text_embeddings = teacher_embeddings(others, config.teachers)
        streams[name] = dataclasses.replace(
            stream, local=target.local, remote=target.remote, embeddings=text_embeddings)
    return streams


def target_mix(stream: ImageStreamConfig, config: InheritanceDataConfig) -> dict[str, float]:
    """Return caption key -> weight above 0 of one of `target_streams`."""
    weights = positive_weights(stream.caption_weights, config.caption_weights)
    return weights or dict.fromkeys(all_keys(stream, EMBEDDING, 'caption_weights'), 1.0)


def target_stream(
    stream: ImageStreamConfig, config: InheritanceDataConfig, keys: Collection[str]
) -> PairedStream:
    """Return the stream of one of `target_streams`, which must have the vectors `keys`."""
    columns = [EMBEDDING + key for key in keys]
    return PairedStream(
        text_embeddings=stream.embeddings.values(), columns=columns, embedding_columns=columns,
        **stream_arguments(stream))
