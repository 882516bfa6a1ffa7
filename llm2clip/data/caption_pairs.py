# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 1's data: two captions of one thing, tokenised."""

from collections.abc import Sequence
from typing import Any

import torch
from composer.core import DataSpec
from streaming import Stream

from llm2clip.config import CaptionDataConfig, ConfigError
from llm2clip.data.captions import draw
from llm2clip.data.schema import SAMPLE_ID, caption_column, check_dataset
from llm2clip.data.streaming import SeededDataset, build_loader, stream_arguments

__all__ = ['CaptionPairDataset', 'build_caption_pair_loader']


class CaptionPairDataset(SeededDataset):
    """Draws one of `pairs` for a sample each time it is seen.

    Args:
        streams: Caption or image datasets.
        pairs: [query key, positive key] choices, equally likely.
        tokenize: ``(texts, query) -> [(ids, start)]``.
        **kwargs: Passed to SeededDataset.
    """

    def __init__(self, streams: Sequence[Stream], pairs: Sequence[Sequence[str]], tokenize: Any, **kwargs: Any) -> None:
        super().__init__(streams, **kwargs)
        self.pairs = [tuple(pair) for pair in pairs]
        self.tokenize = tokenize

    def __getitem__(self, at: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(at)
        query, positive = self.pairs[draw([1] * len(self.pairs), self.sample_seed(sample))]
        result: dict[str, Any] = {'index': at}
        for side, key in (('query', query), ('positive', positive)):
            text = sample[caption_column(key)]
            if not text.strip():
                raise ValueError(f'caption {key!r} of sample {sample[SAMPLE_ID]!r} is empty')
            result[side], = self.tokenize([text], side == 'query')
        return result


def build_caption_pair_loader(
    config: CaptionDataConfig, tokenizer: Any, global_batch_size: int, seed: int, train: bool, key: str
) -> DataSpec:
    """Loader of stage 1's batches; `CaptionContrastive` says what is in them.

    Args:
        config: Streams and caption pairs.
        tokenizer: A `CaptionTokenizer`.
        global_batch_size: Pairs a step over all ranks.
        seed: Seed of the caption choice.
        train: Shuffle and drop the last incomplete batch.
        key: Where `config` stands in the configuration.
    """
    if not config.caption_pairs or any(len(pair) != 2 for pair in config.caption_pairs):
        raise ConfigError(f'{key}.caption_pairs: expected a list of [query key, positive key]')
    columns = sorted({caption_column(name) for pair in config.caption_pairs for name in pair})
    streams = []
    for name, stream in config.streams.items():
        arguments = stream_arguments(name, stream, key)
        if stream.remote is None:
            check_dataset(stream.local, [SAMPLE_ID, *columns])
        streams.append(Stream(**arguments))

    def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {'index': torch.tensor([sample['index'] for sample in samples])}
        for side in ('query', 'positive'):
            padded = tokenizer.pad([sample[side] for sample in samples])
            batch.update({f'{side}_{name}': value for name, value in padded.items()})
        return batch

    return build_loader(
        lambda **kwargs: CaptionPairDataset(streams, config.caption_pairs, tokenizer.tokenize, seed=seed, **kwargs),
        config, global_batch_size, train, key, collate, batching_method='per_stream' if train else 'random')
