# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Data loaders of stage 1, for caption pairs or masked texts, and the microbatches of their batches."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from composer.core import DataSpec
from composer.utils import dist
from torch.nn.utils.rnn import pad_sequence

from llm2clip.config import CaptionDataConfig, CaptionPairConfig, CaptionStreamConfig, ConfigError, MNTPConfig
from llm2clip.data.captions import draw_captions, draw_pair, text_id
from llm2clip.data.loader import all_caption_keys, build_loader, stream_arguments
from llm2clip.data.schema import CAPTION, NEGATIVE, SAMPLE_ID, read_columns
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.remote_code.text_encoder_llm2clip import pack

_IGNORED = -100
_IDS, _MASK = 'input_ids', 'attention_mask'

# -------------------------------------------------------------------------------------------- Caption pairs


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

    return _build_text_loader(make, collate, columns, config, global_batch_size, seed, train, key,
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


# --------------------------------------------------------------------------------------------- Masked texts


def build_masked_text_loader(
    config: CaptionDataConfig, tokenizer: Any, mntp: MNTPConfig, global_batch_size: int, seed: int, key: str
) -> DataSpec:
    """Build the loader of the MNTP warm start; `MaskedNextTokenPrediction` documents its batches.

    Each time a sample is read, one of its texts is drawn and masked.  A single token is a ValueError.

    Args:
        config: Streams and the weights of their texts.
        tokenizer: A `CaptionTokenizer`.
        mntp: Mask token and masking probability.
        global_batch_size, seed, key: As for `build_loader`.
    """
    mask_ids = tokenizer.plain(mntp.mask_token)
    if not mask_ids:
        raise ConfigError('mntp.mask_token: expected a text of at least one token')
    mixes = texts_of_streams(config, key)
    columns = [[CAPTION + caption for caption in mix] for mix in mixes]

    def make(dataset: SafeDataset, sample: dict[str, Any], at: int) -> dict[str, Any]:
        sample_seed = dataset.sample_seed(sample)
        (_, text), = draw_captions(sample, mixes[dataset.stream_of(at)], 1, sample_seed)
        tokenized, = tokenizer.tokenize([text])
        if len(tokenized.ids) < 2:
            raise ValueError(f'sample {sample[SAMPLE_ID]!r} is a single token, {text!r}: nothing stands before it')
        ids, labels = _mask_tokens(
            tokenized.ids, tokenized.start, mask_ids[0], mntp.mask_probability, sample_seed)
        return {'text': tokenized._replace(ids=ids), 'labels': labels}

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = tokenizer.pad([sample['text'] for sample in samples])
        labels = [torch.tensor(sample['labels']) for sample in samples]
        return {'input_ids': batch['input_ids'], 'attention_mask': batch['attention_mask'],
                'labels': pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
                'cut': torch.tensor([sample['text'].cut for sample in samples])}

    return _build_text_loader(make, collate, columns, config, global_batch_size, seed, True, key)


def texts_of_streams(config: CaptionDataConfig, key: str) -> list[dict[str, float]]:
    """Return caption key -> weight of each stream; raise a ConfigError if a stream has no weight above 0."""
    mixes: list[dict[str, float]] = []
    for name, stream in config.streams.items():
        weights = config.texts if stream.texts is None else stream.texts
        mix = {caption: weight for caption, weight in weights.items() if weight}
        if not mix:
            raise ConfigError(f'{key}.texts: expected caption keys with weights, at least one above 0 '
                              f'(or {key}.streams.{name}.texts)')
        mixes.append(mix)
    return mixes


def _mask_tokens(
    ids: Sequence[int], start: int, mask_id: int, probability: float, seed: int
) -> tuple[list[int], list[int]]:
    """Mask at least one token from `start` on; return the tokens, and labels that hold the masked originals.
    The first token of the text is never masked, since no token precedes it."""
    start = max(start, 1)
    rng = np.random.default_rng(seed)
    masked = rng.random(len(ids) - start) < probability
    masked[rng.integers(len(masked))] |= not masked.any()
    tokens = list(ids)
    labels = [_IGNORED] * len(ids)
    for position in (np.flatnonzero(masked) + start).tolist():
        labels[position] = tokens[position]
        tokens[position] = mask_id
    return tokens, labels


def _build_text_loader(
    make: Callable[[SafeDataset, Any, int], dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]], columns: Sequence[Sequence[str]],
    config: CaptionDataConfig, global_batch_size: int, seed: int, train: bool, key: str,
    batching_method: str = 'random',
) -> DataSpec:
    """Build a loader of the samples from `make`, batched by `collate`, with their positions and ids added.
    `columns` are checked in each local stream; the other arguments are those of `build_loader`."""
    streams: dict[str, VerifiedStream] = {}
    for (name, stream), needed in zip(config.streams.items(), columns):
        streams[name] = VerifiedStream(**stream_arguments(name, stream, key))
        if stream.remote is None:
            read_columns(stream.local, [SAMPLE_ID, *needed])

    def collate_all(samples: list[dict[str, Any]]) -> dict[str, Any]:
        index = torch.tensor([sample['index'] for sample in samples])
        ids = [sample['sample_id'] for sample in samples]
        return {'index': index, 'sample_id': ids} | collate(samples)

    return build_loader(
        streams, make, config, global_batch_size, seed, train, key, collate_all, batching_method,
        split_batch=split_packed if train else None, get_num_tokens_in_batch=_count_tokens)


def _count_tokens(batch: dict[str, Any]) -> dict[str, int]:
    """Numbers of tokens in a padded or packed batch for Composer: without padding, and those with a loss."""
    total = 0
    for side in text_sides(batch):
        if side + _MASK in batch:
            total += int(batch[side + _MASK].sum())
        else:
            total += batch[side + _IDS].numel()
    if 'labels' not in batch:
        return {'total': total, 'loss_generating': total}
    return {'total': total, 'loss_generating': int((batch['labels'] >= 0).sum())}


def text_sides(batch: dict[str, Any]) -> list[str]:
    """Return the prefixes of a batch's texts: ``query_``, ``positive_``, …; one empty prefix if packed."""
    return [key.removesuffix(_IDS) for key in batch if key.endswith(_IDS)]


def split_packed(batch: dict[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """Split a batch by `split_by_length`, and pack the texts of each part into one row by `pack_sides`."""
    packed: list[dict[str, Any]] = []
    for part in split_by_length(batch, microbatch_size):
        lengths: list[int] = []
        for side in text_sides(part):
            lengths += part[side + _MASK].sum(1).tolist()
        packed.append(pack_sides(part, lengths))
    return packed


def pack_sides(batch: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    """Pack all texts of a stage-1 batch into one row without padding, as `pack` describes.

    Args:
        batch: Batch with padded texts.
        lengths: Number of tokens of each text, side after side in the order of the batch.
    """
    sides = text_sides(batch)
    first = sides[0]
    names: list[str] = []
    for name, value in batch.items():
        if name.startswith(first) and isinstance(value, torch.Tensor) and value.ndim == 2:
            names.append(name.removeprefix(first))
    longest = max(batch[side + _MASK].shape[1] for side in sides)
    others = dict(batch)
    texts: dict[str, torch.Tensor] = {}
    for name in names:
        values = [others.pop(side + name) for side in sides]
        if name != _MASK:
            texts[name] = torch.cat([F.pad(value, (0, longest - value.shape[1])) for value in values])
    packed = pack(texts, lengths)
    if torch.cuda.is_initialized():  # copies from pinned memory to the GPU are asynchronous
        for name, value in packed.items():
            if isinstance(value, torch.Tensor):
                packed[name] = torch.empty_like(value, pin_memory=True).copy_(value)
    return others | packed


def split_by_length(batch: dict[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """Split a batch into parts, each side's texts sorted by decreasing length, and trim each part's padding.

    The tensors of a side stay aligned.  Sides are sorted independently, so a part mixes texts of different
    samples.  This suits a loss per text, or `GradCache`, which uses the loss of the whole batch.

    Args:
        batch: Tensors ``(B,)`` and ``(B, T)`` and lists of length B; each side has an ``attention_mask``,
            padded on the right.
        microbatch_size: Samples per part; the last may be smaller.  A batch up to this size stays unchanged.
    """
    n = len(batch['index'])
    if n <= microbatch_size:
        return [batch]
    sides = text_sides(batch)
    order = {side: batch[side + _MASK].sum(1).argsort(descending=True, stable=True) for side in sides}
    parts: list[dict[str, Any]] = []
    for start in range(0, n, microbatch_size):
        stop = start + microbatch_size
        rows = {side: order[side][start:stop] for side in sides}
        length = {side: int(batch[side + _MASK][rows[side]].sum(1).max()) for side in sides}
        part: dict[str, Any] = {}
        for name, value in batch.items():
            side = max((side for side in sides if name.startswith(side)), key=len, default=None)
            if side is None:
                part[name] = value[start:stop]
            elif isinstance(value, list):
                part[name] = [value[row] for row in rows[side].tolist()]
            elif value.ndim == 1:
                part[name] = value[rows[side]]
            else:
                part[name] = value[rows[side], :length[side]]
        parts.append(part)
    return parts
