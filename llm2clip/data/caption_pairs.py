# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 1's data: two captions of one thing, or a pair of texts, tokenised."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Optional

import torch
from composer.core import DataSpec
from composer.utils import dist

from llm2clip.config import CaptionDataConfig, CaptionPairConfig, ConfigError
from llm2clip.data.captions import draw_pair, text_id
from llm2clip.data.loader import Another, all_caption_keys, build_text_loader
from llm2clip.data.schema import caption_column

__all__ = ['build_caption_pair_loader', 'pairs_of_streams', 'with_two_captions']


def build_caption_pair_loader(
    config: CaptionDataConfig, tokenizer: Any, global_batch_size: int, seed: int, train: bool, key: str
) -> DataSpec:
    """Loader of stage 1's batches; `CaptionContrastive` says what is in them.

    In training a direction and two captions are drawn each time a sample is seen, as `draw_pair` says, and the
    directions' instructions stand before the queries.  In evaluation a caption that the sample lacks has the
    ``text_id`` 0, and the pair does not count.

    Args:
        config: Streams and pairs.
        tokenizer: A `CaptionTokenizer`.
        global_batch_size: Pairs per step over all ranks.
        seed: Seed of the caption choice.
        train: Shuffle and drop the last incomplete batch.  Otherwise: one fixed pair of captions per sample, no
            instruction, as caption retrieval accuracy is defined; samples that lack one of them do not count.
        key: Where `config` stands in the configuration.
    """
    pairs_of, columns = pairs_of_streams(config, train, key)

    def make(sample: dict[str, Any], stream: int, sample_seed: int, another: Another) -> dict[str, Any]:
        pairs = pairs_of[stream]
        if train:
            pair, query, positive, positive_key = draw_pair(sample, pairs, sample_seed)
            instruction = tokenizer.instruction if pair.instruction is None else pair.instruction
        else:
            pair, = pairs
            assert pair.positive is not None
            positive_key, = pair.positive
            query, positive = (sample[caption_column(key)] for key in (*pair.query, positive_key))
            instruction = ''
        sides = {'query': query, 'positive': positive}
        if any(other.has_negative for other in pairs):
            negative, owner = pair.negative, sample
            if pair.random_negative:
                negative, owner = positive_key, another(sample_seed)
            sides['negative'] = owner[caption_column(negative)] if negative and owner else ''
        result: dict[str, Any] = {}
        for side, text in sides.items():
            there = text.strip()
            result[side] = tokenizer.tokenize([text], instruction if side == 'query' else '')[0] if there \
                else tokenizer.placeholder()
            result[f'{side}_text_id'] = text_id(there and text)
        return result

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for side in ('query', 'positive', 'negative'):
            if side in samples[0]:
                texts = [sample[side] for sample in samples]
                batch.update({f'{side}_{name}': value for name, value in tokenizer.pad(texts).items()})
                batch[f'{side}_cut'] = torch.tensor([text.cut for text in texts])
                batch[f'{side}_text_id'] = torch.tensor([sample[f'{side}_text_id'] for sample in samples])
        return batch

    return build_text_loader(make, collate, columns, config, global_batch_size, seed, train, key,
                             batching_method='per_stream' if train else 'random')


def pairs_of_streams(
    config: CaptionDataConfig, train: bool, key: str
) -> tuple[list[Sequence[CaptionPairConfig]], list[list[str]]]:
    """The directions of each stream, and the columns that they take.

    Without pairs, any two captions of a sample in training, and in evaluation the first two keys of the dataset.  In
    training, a dataset with one caption per sample pairs it with itself.

    Raises:
        ConfigError: A direction makes no sense, or there is one caption per sample to evaluate on.
    """
    pairs: list[Sequence[CaptionPairConfig]] = []
    for name, stream in config.streams.items():
        chosen, where = (config.pairs, f'{key}.pairs') if stream.pairs is None else (
            stream.pairs, f'{key}.streams.{name}.pairs')
        if not chosen:
            keys = all_caption_keys(name, stream, key, 'pairs')
            if len(keys) < 2 and not train:
                raise ConfigError(f'{key}.streams.{name}: {stream.local} has one caption per sample, expected two')
            both = CaptionPairConfig(keys, keys if len(keys) > 1 else None)
            chosen = [both if train else CaptionPairConfig(keys[:1], keys[1:2])]
        _check_pairs(chosen, train, where)
        pairs.append(chosen)
    columns = [sorted({caption_column(k) for pair in chosen
                       for k in (*pair.keys, *([pair.negative] if pair.negative else []))})
               for chosen in pairs]
    return pairs, columns


def with_two_captions(config: CaptionDataConfig, key: str) -> Optional[CaptionDataConfig]:
    """`config` without the streams that have one caption per sample, which are no pairs to evaluate on; None without
    any other."""
    streams = {name: stream for name, stream in config.streams.items() if stream.pairs or config.pairs
               or len(all_caption_keys(name, stream, key, 'pairs')) > 1}
    if (single := [name for name in config.streams if name not in streams]) and dist.get_global_rank() == 0:
        print(f'{key}.streams: {", ".join(single)} has one caption per sample, so no pairs: not evaluated', flush=True)
    return dataclasses.replace(config, streams=streams) if streams else None


def _check_pairs(pairs: Sequence[CaptionPairConfig], train: bool, where: str) -> None:
    for i, pair in enumerate(pairs):
        if not pair.query or pair.positive == []:
            raise ConfigError(f'{where}[{i}]: query and positive each need a caption key')
        for query in pair.query:
            if pair.positive == [query]:
                raise ConfigError(f'{where}[{i}]: a caption cannot be its own positive; both sides are {query!r} '
                                  '(with positive: null, dropout makes two vectors of it)')
        if pair.negative is not None and pair.random_negative:
            raise ConfigError(f'{where}[{i}]: expected negative or random_negative, got both')
    if any(pair.weight < 0 for pair in pairs) or not any(pair.weight > 0 for pair in pairs):
        raise ConfigError(f'{where}: expected weights, at least one above 0')
    if not train and (len(pairs) > 1 or len(pairs[0].query) > 1 or len(pairs[0].positive or []) != 1):
        raise ConfigError(f'{where}: evaluation needs one pair with one caption key per side')
