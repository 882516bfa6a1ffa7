# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Data of the MNTP warm start: single texts, some of their tokens masked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec

from llm2clip.config import CaptionDataConfig, ConfigError, MNTPConfig
from llm2clip.data.captions import draw_caption
from llm2clip.data.loader import Another, build_text_loader
from llm2clip.data.schema import SAMPLE_ID, caption_column

__all__ = ['build_masked_text_loader', 'mask_tokens', 'texts_of_streams']

IGNORED = -100


def mask_tokens(
    ids: Sequence[int], start: int, mask_id: int, probability: float, seed: int
) -> tuple[list[int], list[int]]:
    """Mask some of a text's own tokens, at least one.

    Args:
        ids: The text's tokens.
        start: First token that may be masked.  The first of all never is: nothing stands before it.
        mask_id: Token that takes their place.
        probability: Of each token.
        seed: Decides which.

    Returns:
        Tokens and labels: the original token where one is masked, -100 elsewhere.
    """
    start = max(start, 1)
    rng = np.random.default_rng(seed)
    masked = rng.random(len(ids) - start) < probability
    masked[rng.integers(len(masked))] |= not masked.any()
    tokens, labels = list(ids), [IGNORED] * len(ids)
    for position in (np.flatnonzero(masked) + start).tolist():
        labels[position], tokens[position] = tokens[position], mask_id
    return tokens, labels


def texts_of_streams(config: CaptionDataConfig, key: str) -> list[dict[str, float]]:
    """Caption key -> weight of each stream.

    Raises:
        ConfigError: One has none.
    """
    texts = []
    for name, stream in config.streams.items():
        chosen = config.texts if stream.texts is None else stream.texts
        mix = {name: weight for name, weight in chosen.items() if weight}
        if not mix or min(mix.values()) < 0:
            raise ConfigError(f'{key}.texts: expected caption keys with weights, at least one above 0 '
                              f'(or {key}.streams.{name}.texts)')
        texts.append(mix)
    return texts


def build_masked_text_loader(
    config: CaptionDataConfig, tokenizer: Any, mntp: MNTPConfig, global_batch_size: int, seed: int, key: str
) -> DataSpec:
    """Loader of the warm start's batches; `MaskedNextTokenPrediction` says what is in them.

    Each time a sample is seen, one of its texts is drawn and masked anew.

    Args:
        config: Streams and texts.
        tokenizer: A `CaptionTokenizer`.
        mntp: What is masked, and how.
        global_batch_size: Texts per step over all ranks.
        seed: Seed of the choice of texts and of the masks.
        key: Where `config` stands in the configuration.
    """
    if not 0 < mntp.mask_probability < 1:
        raise ConfigError(f'mntp.mask_probability: {mntp.mask_probability} is not between 0 and 1')
    if not tokenizer.plain(mntp.mask_token):
        raise ConfigError('mntp.mask_token: expected a text of at least one token')
    texts = texts_of_streams(config, key)
    columns = [[caption_column(k) for k in mix] for mix in texts]
    mask_id = tokenizer.plain(mntp.mask_token)[0]

    def make(sample: dict[str, Any], stream: int, sample_seed: int, another: Another) -> dict[str, Any]:
        del another
        _, text = draw_caption(sample, texts[stream], sample_seed)
        tokenized, = tokenizer.tokenize([text])
        if len(tokenized.ids) < 2:
            raise ValueError(f'sample {sample[SAMPLE_ID]!r} is a single token, {text!r}: nothing stands before it')
        ids, labels = mask_tokens(tokenized.ids, tokenized.start, mask_id, mntp.mask_probability, sample_seed)
        return {'text': tokenized._replace(ids=ids), 'labels': labels}

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = tokenizer.pad([sample['text'] for sample in samples])
        labels = torch.full_like(batch['input_ids'], IGNORED)
        for row, sample in enumerate(samples):
            labels[row, :len(sample['labels'])] = torch.tensor(sample['labels'])
        return {'input_ids': batch['input_ids'], 'attention_mask': batch['attention_mask'], 'labels': labels,
                'cut': torch.tensor([sample['text'].cut for sample in samples])}

    return build_text_loader(make, collate, columns, config, global_batch_size, seed, True, key)
