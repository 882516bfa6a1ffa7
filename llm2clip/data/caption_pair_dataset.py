# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Dataset and loader of stage 1: caption pairs."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Optional

import torch
from composer.core import DataSpec
from composer.utils import dist

from llm2clip.config import CaptionDataConfig, CaptionPairConfig, CaptionStreamConfig
from llm2clip.data.captions import draw_pair, text_id
from llm2clip.data.loader import all_caption_keys
from llm2clip.data.schema import CAPTION, NEGATIVE, read_columns
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.text_batches import build_text_loader
from llm2clip.errors import ConfigError


def build_caption_pair_loader(
    config: CaptionDataConfig, tokenizer: Any, global_batch_size: int, seed: int, train: bool, key: str
) -> DataSpec:
    """Build the loader of caption pairs; `CaptionContrastive` documents its batches.

    In training, `draw_pair` draws a direction and two captions each time a sample is read, and the instruction
    precedes the query.  In evaluation, a missing caption has ``text_id`` 0, and its pair does not count.

    Args:
        config: Streams and caption pairs.
        tokenizer: A `CaptionTokenizer`.
        global_batch_size, seed, key: As for `build_loader`.
        train: Shuffle and drop the last incomplete batch.  Otherwise deliver one fixed pair per sample
            without instruction, as caption retrieval accuracy is defined.

    Raises:
        ConfigError, ValueError: A direction is invalid, or a dataset or column is missing.
    """
    pairs_of_stream, columns = pairs_of_streams(config, train, key)

    def make(dataset: SafeDataset, sample: dict[str, Any], at: int) -> dict[str, Any]:
        sample_seed = dataset.sample_seed(sample)
        pairs = pairs_of_stream[dataset.stream_of(at)]
        if train:
            pair, query, positive, positive_key = draw_pair(sample, pairs, sample_seed)
            instruction = tokenizer.instruction if pair.instruction is None else pair.instruction
            instructions = {'query': instruction}
        else:
            pair, = pairs
            assert pair.positive is not None
            positive_key = pair.positive[0]
            query = sample[CAPTION + pair.query[0]]
            positive = sample[CAPTION + positive_key]
            instructions = {}
        sides = {'query': query, 'positive': positive}
        if any(direction.has_negative for direction in pairs):
            sides['negative'] = ''
            if pair.random_negative:
                other = dataset.another(at, sample_seed)
                if other is not None:
                    sides['negative'] = other[CAPTION + positive_key]
            elif pair.negative is not None:
                sides['negative'] = sample[CAPTION + pair.negative]

        entries: dict[str, Any] = {}
        for side, text in sides.items():
            if text.strip():
                entries[side] = tokenizer.tokenize([text], instructions.get(side, ''))[0]
                entries[f'{side}_text_id'] = text_id(text)
            else:
                entries[side] = tokenizer.placeholder()
                entries[f'{side}_text_id'] = 0
        return entries

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
    """Return the directions of each stream, and the caption columns that they need.

    Without configured pairs, training pairs any two captions of a sample, with the hard negative of the query
    if the dataset has one per caption, and evaluation the first two keys of the dataset.  In training, a
    dataset with one caption per sample pairs each caption with itself.

    Raises:
        ConfigError: A direction is invalid, or an evaluation dataset has one caption per sample.
    """
    pairs_of_stream: list[Sequence[CaptionPairConfig]] = []
    columns: list[list[str]] = []
    for name, stream in config.streams.items():
        pairs, where = config.pairs, f'{key}.pairs'
        if stream.pairs is not None:
            pairs, where = stream.pairs, f'{key}.streams.{name}.pairs'
        if not pairs:
            pairs = _default_pairs(name, stream, train, key)
        keys: set[str] = set()
        for i, pair in enumerate(pairs):
            if pair.positive is not None and pair.positive in ([query] for query in pair.query):
                raise ConfigError(f'{where}[{i}]: a caption cannot be its own positive; both sides are '
                                  f'{pair.positive[0]!r} (with positive: null, dropout makes two vectors of it)')
            if pair.negative is not None and pair.random_negative:
                raise ConfigError(f'{where}[{i}]: expected negative or random_negative, got both')
            keys.update(pair.keys)
            if pair.negative:
                keys.add(pair.negative)
        if not train and (len(pairs) > 1 or len(pairs[0].query) > 1 or len(pairs[0].positive or []) != 1):
            raise ConfigError(f'{where}: evaluation needs one pair with one caption key per side')
        pairs_of_stream.append(pairs)
        columns.append(sorted(CAPTION + caption for caption in keys))
    return pairs_of_stream, columns


def _default_pairs(name: str, stream: CaptionStreamConfig, train: bool, key: str) -> list[CaptionPairConfig]:
    """Directions of a dataset for which none are configured, as `pairs_of_streams` describes them."""
    keys = all_caption_keys(name, stream, key, 'pairs')
    if not train and len(keys) < 2:
        raise ConfigError(f'{key}.streams.{name}: {stream.local} has one caption per sample, expected two')
    if not train:
        return [CaptionPairConfig(keys[:1], keys[1:2])]
    positives = keys if len(keys) > 1 else None
    if CAPTION + NEGATIVE + keys[0] in read_columns(stream.local):
        return [CaptionPairConfig([query], positives, NEGATIVE + query) for query in keys]
    return [CaptionPairConfig(keys, positives)]


def with_two_captions(config: CaptionDataConfig, key: str) -> Optional[CaptionDataConfig]:
    """Return `config` without single-caption streams, which have no pairs to evaluate; None without any left."""
    streams: dict[str, CaptionStreamConfig] = {}
    single: list[str] = []
    for name, stream in config.streams.items():
        if stream.pairs or config.pairs or len(all_caption_keys(name, stream, key, 'pairs')) > 1:
            streams[name] = stream
        else:
            single.append(name)
    if single and dist.get_global_rank() == 0:
        print(f'{key}.streams: {", ".join(single)} has one caption per sample, so no pairs: not evaluated', flush=True)
    return dataclasses.replace(config, streams=streams) if streams else None
