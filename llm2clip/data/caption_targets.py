# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Inheritance's data: of each caption the teacher's vector, and that of CLIP's own text tower as its target."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer.core import DataSpec

from llm2clip.config import ConfigError, ImageStreamConfig, InheritanceDataConfig
from llm2clip.data.captions import draw
from llm2clip.data.image_embeddings import caption_embedding, one_storage
from llm2clip.data.loader import SeededDataset, build_loader, stream_arguments
from llm2clip.data.schema import EMBEDDING, SAMPLE_ID, check_dataset, embedding_column, read_columns
from llm2clip.data.streams.paired_stream import PairedSidecars
from llm2clip.data.vectors import float_vectors, stored_vector, vectors_of

__all__ = ['CaptionTargetDataset', 'build_target_loader', 'target_stream', 'target_streams']


class CaptionTargetDataset(SeededDataset):
    """The teacher's vector of one of a sample's captions and its target, drawn each time the sample is seen.

    Drawn are captions that have a target; a sample without one is delivered all the same, but does not count.

    Args:
        streams: Sidecars of targets, with those of the teachers.
        caption_mixes: Caption key -> weight, for each stream.
        train: Draw; otherwise the first caption that has a target.
        **kwargs: Passed to SeededDataset.
    """

    def __init__(
        self, streams: Sequence[PairedSidecars], caption_mixes: Sequence[Mapping[str, float]], train: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(streams, **kwargs)
        self.mixes, self.train = caption_mixes, train
        self.as_stored = one_storage(self)

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
            **caption_embedding(sample.sidecars, key, self.as_stored),
            'target': targets[key],
            'counted': bool(there),
        }


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
        sidecars = dict(stream.embeddings)
        where = f'{key}.streams.{name}.embeddings'
        for needed in (config.target, *config.teachers):
            if needed not in sidecars:
                raise ConfigError(f'{where}: there is no sidecar of {needed!r}, only of '
                                  f'{", ".join(sidecars) or "nobody"}')
        target = sidecars.pop(config.target)
        if not config.teachers and len(sidecars) != 1:
            raise ConfigError(f'{key}.teachers: dataset {name} has sidecars of {len(sidecars)} teachers '
                              f'({", ".join(sidecars) or "none"}) beside {config.target}; say which one to read')
        result[name] = dataclasses.replace(
            stream, local=target.local, remote=target.remote,
            embeddings={teacher: sidecars[teacher] for teacher in config.teachers or sidecars})
    return result


def target_stream(name: str, stream: ImageStreamConfig, config: InheritanceDataConfig, key: str,
                  keep_open: bool = False) -> tuple[PairedSidecars, dict[str, float]]:
    """One of `target_streams`, its columns checked, and what is drawn from it: caption key -> weight.

    Args:
        name: Of the dataset.
        stream: Where its sidecars are.
        config: The caption mix.
        key: Where `config` stands in the configuration.
        keep_open: As for `PairedStream`.

    Raises:
        ConfigError: A sidecar is missing, or nothing is drawn.
        ValueError: A caption has no vector in a sidecar.
    """
    for teacher, sidecar in {config.target: stream, **stream.embeddings}.items():
        if sidecar.remote is None and not Path(sidecar.local, 'index.json').is_file():
            raise ConfigError(f'{key}.streams.{name}.embeddings.{teacher}.local: there is no sidecar in '
                              f'{sidecar.local}')
    configured = config.caption_mix if stream.caption_mix is None else stream.caption_mix
    if not configured and stream.remote is not None:
        raise ConfigError(f'{key}.caption_mix: expected caption keys, since the sidecar {stream.remote} is in a '
                          'remote, and which ones it has is not known yet')
    mix = {caption: weight for caption, weight in configured.items() if weight} if configured else {
        name.removeprefix(EMBEDDING): 1.0 for name in read_columns(stream.local) if name.startswith(EMBEDDING)}
    columns = [embedding_column(caption) for caption in mix]
    for sidecar in (stream, *stream.embeddings.values()):
        if sidecar.remote is None:
            check_dataset(sidecar.local, [SAMPLE_ID, *columns])
    return PairedSidecars(sidecars=[(sidecar.local, sidecar.remote) for sidecar in stream.embeddings.values()],
                          embedding_columns=columns, keep_open=keep_open, **stream_arguments(name, stream, key)), mix


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
    opened = [target_stream(name, stream, config, key, keep_open=config.cache_limit is None)
              for name, stream in streams.items()]
    paired, mixes = [stream for stream, _ in opened], [mix for _, mix in opened]
    return build_loader(
        lambda **kwargs: CaptionTargetDataset(paired, mixes, train, seed=seed, **kwargs), config, streams,
        global_batch_size, train, key, microbatch_transforms=float_vectors)
