# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Dataset and loader of inheritance: CLIP's text features as targets, with text embeddings beside them."""

import dataclasses
from typing import Any

from composer.core import DataSpec

from llm2clip.config import ImageStreamConfig, InheritanceDataConfig
from llm2clip.data.captions import draw
from llm2clip.data.image_text_dataset import (
    caption_embedding,
    checked_stream,
    embeddings_of_teachers,
    equal_weights,
)
from llm2clip.data.loader import build_loader, stream_arguments
from llm2clip.data.schema import EMBEDDING
from llm2clip.data.streams.paired_stream import PairedStream
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.vectors import float_vectors, stored_vector, vectors_of


def build_target_loader(
    config: InheritanceDataConfig, global_batch_size: int, seed: int, train: bool, key: str
) -> DataSpec:
    """Build the loader of inheritance; `ComposerInheritance` documents its batches.

    Each time a sample is read, one of the captions with a target is drawn.  A sample without a target is
    delivered, but has ``counted`` False.

    Args:
        config: Streams and caption weights.
        global_batch_size, seed, key: As for `build_loader`.
        train: Drawn captions, shuffled; else the first caption of each sample that has a target, in order.
    """
    streams: dict[str, PairedStream] = {}
    mixes: list[dict[str, float]] = []
    for name, stream in target_streams(config, key).items():
        streams[name], mix = target_stream(name, stream, config, key)
        mixes.append(mix)

    def make(dataset: SafeDataset, sample: Any, at: int) -> dict[str, Any]:
        mix = mixes[dataset.stream_of(at)]
        targets = {caption: vectors_of(stored_vector(sample, caption)).float() for caption in mix}
        with_target = [caption for caption, target in targets.items() if target.any()]
        candidates = with_target or list(mix)
        caption = candidates[0]
        if train:
            weights = [mix[candidate] for candidate in candidates]
            caption = candidates[draw(weights, dataset.sample_seed(sample))]
        entries: dict[str, Any] = caption_embedding(sample.text_embeddings, caption, streams)
        entries['target'] = targets[caption]
        entries['counted'] = bool(with_target)
        return entries

    return build_loader(
        streams, make, config, global_batch_size, seed, train, key, microbatch_transforms=float_vectors)


def target_streams(config: InheritanceDataConfig, key: str) -> dict[str, ImageStreamConfig]:
    """Return the streams of `config`, with the targets as main datasets and the teachers' vectors beside them."""
    streams: dict[str, ImageStreamConfig] = {}
    for name, stream in config.streams.items():
        target = embeddings_of_teachers(stream.embeddings, [config.target], name, key)[config.target]
        teachers = {teacher: value for teacher, value in stream.embeddings.items() if teacher != config.target}
        text_embeddings = embeddings_of_teachers(teachers, config.teachers, name, key)
        streams[name] = dataclasses.replace(
            stream, local=target.local, remote=target.remote, embeddings=text_embeddings)
    return streams


def target_stream(
    name: str, stream: ImageStreamConfig, config: InheritanceDataConfig, key: str
) -> tuple[PairedStream, dict[str, float]]:
    """Open one of `target_streams`, check its columns, and return it with its caption key -> weight.

    Raises:
        ConfigError, ValueError: The targets are missing, or a caption has no vector in an embeddings dataset.
    """
    caption_weights = config.caption_weights if stream.caption_weights is None else stream.caption_weights
    if caption_weights:
        mix = {caption: weight for caption, weight in caption_weights.items() if weight}
    else:
        mix = equal_weights(stream, key)
    arguments = stream_arguments(f'{name}.embeddings.{config.target}', stream, key)
    columns = [EMBEDDING + caption for caption in mix]
    return checked_stream(arguments, stream.embeddings, columns, list(mix)), mix
