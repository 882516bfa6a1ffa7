# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Dataset and loader of stage 1: caption pairs."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Optional

import torch
import xxhash
from composer.core import DataSpec

from llm2clip.config import CaptionDataConfig, CaptionPairConfig, CaptionStreamConfig
from llm2clip.data.captions import draw_pair, text_id
from llm2clip.data.loader import all_caption_keys, build_loader, stream_arguments
from llm2clip.data.schema import CAPTION, SAMPLE_ID
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.data.text_batches import count_tokens, split_packed
from llm2clip.errors import ConfigError, under
from llm2clip.ranks import is_first


class CaptionPairDataset(SafeDataset):
    """Tokenised caption pairs; `CaptionContrastive` documents the batches.

    In training, `draw_pair` draws a direction and two captions each time a sample is read, and the
    instruction precedes the query.  In evaluation, a missing caption has ``text_id`` 0, and its pair does not
    count.

    Args:
        config: Streams and caption pairs.
        tokenizer: A `CaptionTokenizer`.
        global_batch_size, seed: As for `SafeDataset`.
        train: Shuffle, with each global batch from one stream.  Otherwise deliver one fixed pair per sample
            without instruction, as caption retrieval accuracy is defined.

    Raises:
        ConfigError, ValueError: A direction is invalid, or a dataset or column is missing.
    """

    def __init__(
        self, config: CaptionDataConfig, tokenizer: Any, global_batch_size: int, seed: int, *, train: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.pairs = stream_pairs(config, train=train)
        streams: dict[str, VerifiedStream] = {}
        for name, stream in config.streams.items():
            columns = pair_columns(self.pairs[name])
            with under(f'streams.{name}'):
                streams[name] = VerifiedStream(columns=columns, **stream_arguments(stream))
        super().__init__(streams, config, global_batch_size, seed, train=train,
                         batching_method='per_stream' if train else 'random')

    def __getitem__(self, index: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(index)
        pairs = self.pairs[self.stream_name(index)]
        seed = self.sample_seed(sample)
        if self.train:
            pair, query, positive, positive_key = draw_pair(sample, pairs, seed)
            instruction = self.tokenizer.instruction if pair.instruction is None else pair.instruction
        else:
            pair, = pairs
            query_key, positive_key = pair.keys
            query = sample[CAPTION + query_key]
            positive = sample[CAPTION + positive_key]
            instruction = ''
        # Side -> text and the instruction before it.
        texts = {'query': (query, instruction), 'positive': (positive, '')}
        if any(direction.has_negative for direction in pairs):
            negative = ''
            if pair.negative is not None:
                negative = sample[CAPTION + pair.negative]
            elif pair.random_negative:
                # From the same shard, since others may not be local; empty if the shard has no other sample.
                shard, position = map(int, self.spanner[index])
                size = int(self.samples_per_shard[shard])
                if size > 1:
                    distance = 1 + xxhash.xxh64_intdigest('another', seed=seed) % (size - 1)
                    neighbor = index - position + (position + distance) % size
                    negative = self.get_item(neighbor)[CAPTION + positive_key]
            texts['negative'] = negative, ''

        entries: dict[str, Any] = {'index': index, 'sample_id': sample[SAMPLE_ID]}
        for side, (text, prefix) in texts.items():
            entries[f'{side}_text_id'] = text_id(text)
            entries[side] = self.tokenizer.placeholder()
            if text.strip():
                entries[side], = self.tokenizer.tokenize([text], prefix)
        return entries

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        padded: dict[str, torch.Tensor] = {}
        for side in ('query', 'positive', 'negative'):
            if side in samples[0]:
                texts = [sample.pop(side) for sample in samples]
                for name, value in self.tokenizer.pad(texts).items():
                    padded[f'{side}_{name}'] = value
                padded[f'{side}_cut'] = torch.tensor([text.cut for text in texts])
        return super().collate(samples) | padded


def build_caption_pair_loader(
    config: CaptionDataConfig, tokenizer: Any, global_batch_size: int, seed: int, *, train: bool,
    microbatch_tokens: Optional[int] = None,
) -> DataSpec:
    """Build the loader of stage 1 from a `CaptionPairDataset`, which has the same arguments.

    In training, a microbatch has at most `microbatch_tokens`.
    """
    dataset = CaptionPairDataset(config, tokenizer, global_batch_size, seed, train=train)
    split_batch = partial(split_packed, max_tokens=microbatch_tokens) if train else None
    return build_loader(dataset, split_batch=split_batch, get_num_tokens_in_batch=count_tokens)


def stream_pairs(config: CaptionDataConfig, *, train: bool) -> dict[str, Sequence[CaptionPairConfig]]:
    """Return the directions of each stream.

    Without configured pairs, training pairs any two captions of a sample, and evaluation the first two keys
    of the dataset, which must have two (see `drop_single_captions`).  In training, a dataset with one caption
    per sample pairs each caption with itself.  An invalid direction is a ConfigError.
    """
    pairs: dict[str, Sequence[CaptionPairConfig]] = {}
    for name, stream in config.streams.items():
        if stream.pairs:
            with under(f'streams.{name}.pairs'):
                pairs[name] = _checked(stream.pairs, train=train)
        elif config.pairs:
            with under('pairs'):
                pairs[name] = _checked(config.pairs, train=train)
        else:
            with under(f'streams.{name}'):
                keys = all_caption_keys(stream, 'pairs')
            if not train:
                pairs[name] = [CaptionPairConfig(keys[:1], keys[1:2])]
            else:
                pairs[name] = [CaptionPairConfig(keys, keys if len(keys) > 1 else None)]
    return pairs


def _checked(pairs: Sequence[CaptionPairConfig], *, train: bool) -> Sequence[CaptionPairConfig]:
    """The same directions; a ConfigError if a part would be ignored, or evaluation cannot use them."""
    for i, pair in enumerate(pairs):
        positives = pair.positive or []
        if len(positives) == 1 and positives[0] in pair.query:
            raise ConfigError(
                f'a caption cannot be its own positive; both sides are {positives[0]!r} (with positive: '
                'null, dropout makes two vectors of it)', f'[{i}]')
        if pair.negative is not None and pair.random_negative:
            raise ConfigError('expected negative or random_negative, got both', f'[{i}]')
    if train:
        return pairs
    first = pairs[0]
    if len(pairs) > 1 or len(first.query) > 1 or len(first.keys) != 2:
        raise ConfigError('evaluation needs one pair with one caption key per side')
    return pairs


def pair_columns(pairs: Sequence[CaptionPairConfig]) -> list[str]:
    """Return the caption columns that directions need, sorted."""
    keys: set[Optional[str]] = set()
    for pair in pairs:
        keys.update((*pair.keys, pair.negative))
    keys.discard(None)
    return sorted(f'{CAPTION}{key}' for key in keys)


def drop_single_captions(config: CaptionDataConfig) -> Optional[CaptionDataConfig]:
    """Return `eval_data` without streams of single captions, which have no pairs; None if no stream is left.

    The first rank prints the names of those that are left out.
    """
    streams: dict[str, CaptionStreamConfig] = {}
    for name, stream in config.streams.items():
        with under(f'streams.{name}'):
            if stream.pairs or config.pairs or len(all_caption_keys(stream, 'pairs')) > 1:
                streams[name] = stream
            elif is_first():
                print(f'eval_data.streams: {name} has one caption per sample, so no pairs: not evaluated',
                      flush=True)
    return dataclasses.replace(config, streams=streams) if streams else None
