# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Dataset and loader of the MNTP warm start: masked texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec
from torch.nn.utils.rnn import pad_sequence

from llm2clip.config import CaptionDataConfig, MNTPConfig
from llm2clip.data.captions import draw_captions
from llm2clip.data.schema import CAPTION, SAMPLE_ID
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.text_batches import build_text_loader
from llm2clip.errors import ConfigError

_IGNORED = -100


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

    return build_text_loader(make, collate, columns, config, global_batch_size, seed, True, key)


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
