# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Data loaders of stage 1, for caption pairs or masked texts, and the split of their batches into microbatches."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from composer.core import DataSpec
from composer.utils import dist

from llm2clip.config import CaptionDataConfig, CaptionPairConfig, ConfigError, MNTPConfig
from llm2clip.data.captions import draw_captions, draw_pair, text_id
from llm2clip.data.loader import all_caption_keys, build_loader, stream_arguments
from llm2clip.data.schema import CAPTION, NEGATIVE, SAMPLE_ID, read_columns
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.remote_code.text_encoder_llm2clip import pack

_IGNORED = -100
_IDS, _MASK = 'input_ids', 'attention_mask'


# ---------------------------------------------------------------------------------------------------------------------
# Caption pairs
# ---------------------------------------------------------------------------------------------------------------------


def build_caption_pair_loader(
    config: CaptionDataConfig, tokenizer: Any, global_batch_size: int, seed: int, train: bool, key: str
) -> DataSpec:
    """Build the loader of caption pairs; `CaptionContrastive` documents its batches.

    In training, `draw_pair` draws a direction and two captions each time a sample is read, and the instruction
    precedes the query.  In evaluation, a missing caption has ``text_id`` 0, and its pair does not count.

    Args:
        config: Streams and caption pairs.
        tokenizer: A `CaptionTokenizer`.
        global_batch_size: Pairs per step over all ranks.
        seed: Seed of the caption choice.
        train: Shuffle and drop the last incomplete batch.  Otherwise deliver one fixed pair per sample without
            instruction, as caption retrieval accuracy is defined.
        key: Configuration key of `config`, for error messages.

    Raises:
        ConfigError, ValueError: A direction is invalid, or a dataset or column is missing.
    """
    pairs_of, columns = pairs_of_streams(config, train, key)

    def make(dataset: SafeDataset, sample: dict[str, Any], at: int) -> dict[str, Any]:
        pairs, sample_seed = pairs_of[dataset.stream_of(at)], dataset.sample_seed(sample)
        if train:
            pair, query, positive, positive_key = draw_pair(sample, pairs, sample_seed)
            instruction = tokenizer.instruction if pair.instruction is None else pair.instruction
        else:
            pair, = pairs
            assert pair.positive is not None
            positive_key, = pair.positive
            query, positive = (sample[CAPTION + key] for key in (*pair.query, positive_key))
            instruction = ''
        sides = {'query': query, 'positive': positive}
        if any(other.has_negative for other in pairs):
            negative, owner = pair.negative, sample
            if pair.random_negative:
                negative, owner = positive_key, dataset.another(at, sample_seed)
            sides['negative'] = owner[CAPTION + negative] if negative and owner else ''
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

    return _build_text_loader(make, collate, columns, config, global_batch_size, seed, train, key,
                              batching_method='per_stream' if train else 'random')


def pairs_of_streams(
    config: CaptionDataConfig, train: bool, key: str
) -> tuple[list[Sequence[CaptionPairConfig]], list[list[str]]]:
    """Return the directions of each stream, and the caption columns that they need.

    Without configured pairs, training pairs any two captions of a sample, with the hard negative of the query if the
    dataset has one per caption, and evaluation the first two keys of the dataset.  In training, a dataset with one
    caption per sample pairs each caption with itself.

    Raises:
        ConfigError: A direction is invalid, or an evaluation dataset has one caption per sample.
    """
    pairs: list[Sequence[CaptionPairConfig]] = []
    for name, stream in config.streams.items():
        chosen, where = (config.pairs, f'{key}.pairs') if stream.pairs is None else (
            stream.pairs, f'{key}.streams.{name}.pairs')
        if not chosen:
            keys = all_caption_keys(name, stream, key, 'pairs')
            if len(keys) < 2 and not train:
                raise ConfigError(f'{key}.streams.{name}: {stream.local} has one caption per sample, expected two')
            positives = keys if len(keys) > 1 else None
            if not train:
                chosen = [CaptionPairConfig(keys[:1], keys[1:2])]
            elif CAPTION + NEGATIVE + keys[0] in read_columns(stream.local):
                chosen = [CaptionPairConfig([query], positives, NEGATIVE + query) for query in keys]
            else:
                chosen = [CaptionPairConfig(keys, positives)]
        for i, pair in enumerate(chosen):
            if pair.positive is not None and pair.positive in ([query] for query in pair.query):
                raise ConfigError(f'{where}[{i}]: a caption cannot be its own positive; both sides are '
                                  f'{pair.positive[0]!r} (with positive: null, dropout makes two vectors of it)')
            if pair.negative is not None and pair.random_negative:
                raise ConfigError(f'{where}[{i}]: expected negative or random_negative, got both')
        if not train and (len(chosen) > 1 or len(chosen[0].query) > 1 or len(chosen[0].positive or []) != 1):
            raise ConfigError(f'{where}: evaluation needs one pair with one caption key per side')
        pairs.append(chosen)
    columns = [sorted({CAPTION + k for pair in chosen
                       for k in (*pair.keys, *([pair.negative] if pair.negative else []))})
               for chosen in pairs]
    return pairs, columns


def with_two_captions(config: CaptionDataConfig, key: str) -> Optional[CaptionDataConfig]:
    """Return `config` without single-caption streams, which have no pairs to evaluate; None if no stream is left."""
    streams = {name: stream for name, stream in config.streams.items() if stream.pairs or config.pairs
               or len(all_caption_keys(name, stream, key, 'pairs')) > 1}
    if (single := [name for name in config.streams if name not in streams]) and dist.get_global_rank() == 0:
        print(f'{key}.streams: {", ".join(single)} has one caption per sample, so no pairs: not evaluated', flush=True)
    return dataclasses.replace(config, streams=streams) if streams else None


# ---------------------------------------------------------------------------------------------------------------------
# Masked texts
# ---------------------------------------------------------------------------------------------------------------------


def build_masked_text_loader(
    config: CaptionDataConfig, tokenizer: Any, mntp: MNTPConfig, global_batch_size: int, seed: int, key: str
) -> DataSpec:
    """Build the loader of the MNTP warm start; `MaskedNextTokenPrediction` documents its batches.

    Each time a sample is read, one of its texts is drawn and masked.  A text of a single token is a ValueError.

    Args:
        config: Streams and the weights of their texts.
        tokenizer: A `CaptionTokenizer`.
        mntp: Mask token and masking probability.
        global_batch_size: Texts per step over all ranks.
        seed: Seed of the text choice and of the masks.
        key: Configuration key of `config`, for error messages.
    """
    if not tokenizer.plain(mntp.mask_token):
        raise ConfigError('mntp.mask_token: expected a text of at least one token')
    texts = texts_of_streams(config, key)
    columns = [[CAPTION + k for k in mix] for mix in texts]
    mask_id = tokenizer.plain(mntp.mask_token)[0]

    def make(dataset: SafeDataset, sample: dict[str, Any], at: int) -> dict[str, Any]:
        sample_seed = dataset.sample_seed(sample)
        (_, text), = draw_captions(sample, texts[dataset.stream_of(at)], 1, sample_seed)
        tokenized, = tokenizer.tokenize([text])
        if len(tokenized.ids) < 2:
            raise ValueError(f'sample {sample[SAMPLE_ID]!r} is a single token, {text!r}: nothing stands before it')
        ids, labels = _mask_tokens(tokenized.ids, tokenized.start, mask_id, mntp.mask_probability, sample_seed)
        return {'text': tokenized._replace(ids=ids), 'labels': labels}

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = tokenizer.pad([sample['text'] for sample in samples])
        labels = torch.full_like(batch['input_ids'], _IGNORED)
        for row, sample in enumerate(samples):
            labels[row, :len(sample['labels'])] = torch.tensor(sample['labels'])
        return {'input_ids': batch['input_ids'], 'attention_mask': batch['attention_mask'], 'labels': labels,
                'cut': torch.tensor([sample['text'].cut for sample in samples])}

    return _build_text_loader(make, collate, columns, config, global_batch_size, seed, True, key)


def texts_of_streams(config: CaptionDataConfig, key: str) -> list[dict[str, float]]:
    """Return caption key -> weight of each stream; raise a ConfigError if a stream has no weight above 0."""
    texts = []
    for name, stream in config.streams.items():
        chosen = config.texts if stream.texts is None else stream.texts
        mix = {name: weight for name, weight in chosen.items() if weight}
        if not mix:
            raise ConfigError(f'{key}.texts: expected caption keys with weights, at least one above 0 '
                              f'(or {key}.streams.{name}.texts)')
        texts.append(mix)
    return texts


def _mask_tokens(
    ids: Sequence[int], start: int, mask_id: int, probability: float, seed: int
) -> tuple[list[int], list[int]]:
    """Mask at least one token from `start` on; return the tokens, and labels that hold the masked originals.
    The first token of the text is never masked, since no token precedes it."""
    start = max(start, 1)
    rng = np.random.default_rng(seed)
    masked = rng.random(len(ids) - start) < probability
    masked[rng.integers(len(masked))] |= not masked.any()
    tokens, labels = list(ids), [_IGNORED] * len(ids)
    for position in (np.flatnonzero(masked) + start).tolist():
        labels[position], tokens[position] = tokens[position], mask_id
    return tokens, labels


def _build_text_loader(
    make: Callable[[SafeDataset, Any, int], dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    columns: Sequence[Sequence[str]],
    config: CaptionDataConfig,
    global_batch_size: int,
    seed: int,
    train: bool,
    key: str,
    batching_method: str = 'random',
) -> DataSpec:
    """Build a loader of the samples from `make`, batched by `collate`, with their positions and ids added.
    `columns` are checked in each local stream; the other arguments are those of `build_loader`."""
    streams = {}
    for (name, stream), needed in zip(config.streams.items(), columns):
        streams[name] = VerifiedStream(**stream_arguments(name, stream, key))
        if stream.remote is None:
            read_columns(stream.local, [SAMPLE_ID, *needed])

    def collate_all(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {'index': torch.tensor([sample['index'] for sample in samples]),
                'sample_id': [sample['sample_id'] for sample in samples], **collate(samples)}

    return build_loader(streams, make, config, global_batch_size, seed, train, key, collate_all, batching_method,
                        split_batch=split_packed if train else None, get_num_tokens_in_batch=_count_tokens)


def _count_tokens(batch: dict[str, Any]) -> dict[str, int]:
    """Numbers of tokens in a padded or packed batch for Composer: all without padding, and those with a loss."""
    total = sum(int(batch[side + _MASK].sum()) if side + _MASK in batch else batch[side + _IDS].numel()
                for side in text_sides(batch))
    return {'total': total, 'loss_generating': int((batch['labels'] >= 0).sum()) if 'labels' in batch else total}


def text_sides(batch: dict[str, Any]) -> list[str]:
    """Return the prefixes of a batch's texts: ``query_``, ``positive_``, …, or one empty prefix if they are packed."""
    return [key.removesuffix(_IDS) for key in batch if key.endswith(_IDS)]


def split_packed(batch: dict[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """Split a batch by `split_by_length`, and pack the texts of each part into one row by `pack_sides`."""
    return [pack_sides(part, [n for side in text_sides(part) for n in part[side + _MASK].sum(1).tolist()])
            for part in split_by_length(batch, microbatch_size)]


def pack_sides(batch: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    """Pack all texts of a stage-1 batch into one row without padding, as `pack` describes.

    Args:
        batch: Batch with padded texts.
        lengths: Number of tokens of each text, side after side in the order of the batch.
    """
    sides = text_sides(batch)
    names = [name.removeprefix(sides[0]) for name, value in batch.items()
             if name.startswith(sides[0]) and isinstance(value, torch.Tensor) and value.ndim == 2]
    longest = max(batch[side + _MASK].shape[1] for side in sides)
    texts = {name: torch.cat([F.pad(batch[side + name], (0, longest - batch[side + name].shape[1])) for side in sides])
             for name in names if name != _MASK}
    padded = {side + name for side in sides for name in names}
    packed = pack(texts, lengths)
    if torch.cuda.is_initialized():  # copies from pinned memory to the GPU are asynchronous
        packed = {name: torch.empty_like(value, pin_memory=True).copy_(value) if isinstance(value, torch.Tensor)
                  else value for name, value in packed.items()}
    return {**{name: value for name, value in batch.items() if name not in padded}, **packed}


def split_by_length(batch: dict[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """Split a batch into parts, with each side's texts sorted by decreasing length, and trim the padding of each part.

    The tensors of a side stay aligned.  Sides are sorted independently, so a part mixes texts of different samples.
    This suits a loss per text, or `GradCache`, which uses the loss of the whole batch.

    Args:
        batch: Tensors ``(B,)`` and ``(B, T)`` and lists of length B; each side has an ``attention_mask``, padded on
            the right.
        microbatch_size: Samples per part; the last may be smaller.  A batch up to this size is returned unchanged.
    """
    n = len(batch['index'])
    if n <= microbatch_size:
        return [batch]
    sides = text_sides(batch)
    order = {side: batch[side + _MASK].sum(1).argsort(descending=True, stable=True) for side in sides}
    parts: list[dict[str, Any]] = []
    for start in range(0, n, microbatch_size):
        rows = {side: order[side][start:start + microbatch_size] for side in sides}
        length = {side: int(batch[side + _MASK][rows[side]].sum(1).max()) for side in sides}
        part = {}
        for key, value in batch.items():
            side = max((side for side in sides if key.startswith(side)), key=len, default=None)
            if side is None:
                part[key] = value[start:start + microbatch_size]
            elif isinstance(value, list):
                part[key] = [value[row] for row in rows[side].tolist()]
            else:
                part[key] = value[rows[side]] if value.ndim == 1 else value[rows[side], :length[side]]
        parts.append(part)
    return parts
