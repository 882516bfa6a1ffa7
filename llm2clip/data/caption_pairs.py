# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 1's data: two captions of one thing, or a pair of texts, tokenised."""

from collections.abc import Sequence
from typing import Any

import torch
from composer.core import DataSpec

from llm2clip.config import CaptionDataConfig, CaptionPairConfig, ConfigError
from llm2clip.data.captions import draw_pair, text_id
from llm2clip.data.loader import (
    SeededDataset,
    all_caption_keys,
    build_loader,
    count_tokens,
    split_by_length,
    text_streams,
)
from llm2clip.data.schema import SAMPLE_ID, caption_column
from llm2clip.data.streams.verified_stream import VerifiedStream

__all__ = ['CaptionPairDataset', 'build_caption_pair_loader', 'pairs_of_streams']


class CaptionPairDataset(SeededDataset):
    """Draws a direction and two captions of a sample each time it is seen, as `draw_pair` says.

    In evaluation a caption that the sample lacks has the ``text_id`` 0, and the pair does not count.

    Args:
        streams: Caption or image datasets.
        pairs: The directions of each stream.
        tokenizer: A `CaptionTokenizer`.
        train: Draw, and put the directions' instructions before the queries.  Otherwise: the first caption key of each
            side of the only direction, without instruction.
        **kwargs: Passed to SeededDataset.
    """

    def __init__(
        self,
        streams: Sequence[VerifiedStream],
        pairs: Sequence[Sequence[CaptionPairConfig]],
        tokenizer: Any,
        train: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(streams, **kwargs)
        self.pairs = pairs
        self.tokenizer = tokenizer
        self.train = train

    def __getitem__(self, at: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(at)
        pairs = self.pairs[self.stream_of(at)]
        if self.train:
            pair, query, positive = draw_pair(sample, pairs, self.sample_seed(sample))
            instruction = self.tokenizer.instruction if pair.instruction is None else pair.instruction
        else:
            pair, = pairs
            query, positive = (sample[caption_column(keys[0])] for keys in (pair.query, pair.positive))
            instruction = ''
        result: dict[str, Any] = {'index': at, 'sample_id': sample[SAMPLE_ID]}
        sides = {'query': query, 'positive': positive}
        if any(other.negative for other in pairs):
            sides['negative'] = sample[caption_column(pair.negative)] if pair.negative else ''
        for side, text in sides.items():
            there = text.strip()
            result[side] = self.tokenizer.tokenize([text], instruction if side == 'query' else '')[0] if there \
                else self.tokenizer.placeholder()
            result[f'{side}_text_id'] = text_id(there and text)
        return result


def build_caption_pair_loader(
    config: CaptionDataConfig, tokenizer: Any, global_batch_size: int, seed: int, train: bool, key: str
) -> DataSpec:
    """Loader of stage 1's batches; `CaptionContrastive` says what is in them.

    Args:
        config: Streams and pairs.
        tokenizer: A `CaptionTokenizer`.
        global_batch_size: Pairs per step over all ranks.
        seed: Seed of the caption choice.
        train: Shuffle and drop the last incomplete batch.  Otherwise: one fixed pair of captions per sample, no
            instruction, as caption retrieval accuracy is defined; samples that lack one of them do not count.
        key: Where `config` stands in the configuration.
    """
    pairs, columns = pairs_of_streams(config, train, key)
    streams = text_streams(config, columns, key)

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {'index': torch.tensor([sample['index'] for sample in samples]),
                                 'sample_id': [sample['sample_id'] for sample in samples]}
        for side in ('query', 'positive', 'negative'):
            if side in samples[0]:
                texts = [sample[side] for sample in samples]
                batch.update({f'{side}_{name}': value for name, value in tokenizer.pad(texts).items()})
                batch[f'{side}_cut'] = torch.tensor([text.cut for text in texts])
                batch[f'{side}_text_id'] = torch.tensor([sample[f'{side}_text_id'] for sample in samples])
        return batch

    return build_loader(
        lambda **kwargs: CaptionPairDataset(streams, pairs, tokenizer, train, seed=seed, **kwargs), config,
        config.streams, global_batch_size, train, key, collate, batching_method='per_stream' if train else 'random',
        split_batch=split_by_length if train else None, get_num_tokens_in_batch=count_tokens)


def pairs_of_streams(
    config: CaptionDataConfig, train: bool, key: str
) -> tuple[list[Sequence[CaptionPairConfig]], list[list[str]]]:
    """The directions of each stream, and the columns that they take.

    Without pairs, any two captions of a sample in training, and in evaluation the first two keys of the dataset.

    Raises:
        ConfigError: A direction makes no sense.
    """
    pairs: list[Sequence[CaptionPairConfig]] = []
    for name, stream in config.streams.items():
        chosen, where = (config.pairs, f'{key}.pairs') if stream.pairs is None else (
            stream.pairs, f'{key}.streams.{name}.pairs')
        if not chosen:
            keys = all_caption_keys(name, stream, key, 'pairs')
            if len(keys) < 2:
                raise ConfigError(f'{key}.streams.{name}: {stream.local} has one caption per sample, expected two')
            chosen = [CaptionPairConfig(keys, keys) if train else CaptionPairConfig(keys[:1], keys[1:2])]
        _check_pairs(chosen, train, where)
        pairs.append(chosen)
    columns = [sorted({caption_column(k) for pair in chosen
                       for k in (*pair.query, *pair.positive, *([pair.negative] if pair.negative else []))})
               for chosen in pairs]
    return pairs, columns


def _check_pairs(pairs: Sequence[CaptionPairConfig], train: bool, where: str) -> None:
    for i, pair in enumerate(pairs):
        if not pair.query or not pair.positive:
            raise ConfigError(f'{where}[{i}]: query and positive each need a caption key')
        for query in pair.query:
            if pair.positive == [query]:
                raise ConfigError(f'{where}[{i}]: a caption cannot be its own positive; both sides are {query!r}')
    if any(pair.weight < 0 for pair in pairs) or not any(pair.weight > 0 for pair in pairs):
        raise ConfigError(f'{where}: expected weights, at least one above 0')
    if not train and (len(pairs) > 1 or len(pairs[0].query) > 1 or len(pairs[0].positive) > 1):
        raise ConfigError(f'{where}: evaluation needs one pair with one caption key per side')
