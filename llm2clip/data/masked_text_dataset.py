# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Dataset and loader of the MNTP warm start: masked texts."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Optional

import numpy as np
import torch
from composer.core import DataSpec
from torch.nn.utils.rnn import pad_sequence

from llm2clip.config import CaptionDataConfig, MNTPConfig
from llm2clip.data.captions import draw_captions
from llm2clip.data.loader import build_loader, positive_weights, stream_arguments
from llm2clip.data.schema import CAPTION, SAMPLE_ID
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.data.text_batches import count_tokens, split_packed
from llm2clip.errors import ConfigError, under

_IGNORED = -100


class MaskedTextDataset(SafeDataset):
    """Tokenised texts with masked tokens, for training; `MaskedNextTokenPrediction` documents the batches.

    Each time a sample is read, one of its texts is drawn and masked.  A single token is a ValueError.

    Args:
        config: Streams and the weights of their texts.
        tokenizer: A `CaptionTokenizer`.
        mntp: Mask token and masking probability.
        global_batch_size, seed: As for `SafeDataset`.
    """

    def __init__(
        self, config: CaptionDataConfig, tokenizer: Any, mntp: MNTPConfig, global_batch_size: int, seed: int
    ) -> None:
        self.tokenizer = tokenizer
        self.mask_id = tokenizer.plain(mntp.mask_token)[0]
        self.mask_probability = mntp.mask_probability
        self.mixes = text_mixes(config)
        streams: dict[str, VerifiedStream] = {}
        for name, stream in config.streams.items():
            columns = [CAPTION + caption for caption in self.mixes[name]]
            with under(f'streams.{name}'):
                streams[name] = VerifiedStream(columns=columns, **stream_arguments(stream))
        super().__init__(streams, config, global_batch_size, seed, train=True)

    def __getitem__(self, index: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(index)
        seed = self.sample_seed(sample)
        (_, text), = draw_captions(sample, self.mixes[self.stream_name(index)], 1, seed)
        tokenized, = self.tokenizer.tokenize([text])
        if len(tokenized.ids) < 2:
            raise ValueError(
                f'sample {sample[SAMPLE_ID]!r} is a single token, {text!r}: nothing stands before it')
        ids, labels = _mask_tokens(tokenized.ids, tokenized.start, self.mask_id, self.mask_probability, seed)
        return {
            'index': index,
            'sample_id': sample[SAMPLE_ID],
            'text': tokenized._replace(ids=ids),
            'labels': labels,
        }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [sample.pop('text') for sample in samples]
        labels = [torch.tensor(sample.pop('labels')) for sample in samples]
        padded = self.tokenizer.pad(texts)
        return super().collate(samples) | {
            'input_ids': padded['input_ids'],
            'attention_mask': padded['attention_mask'],
            'labels': pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
            'cut': torch.tensor([text.cut for text in texts]),
        }


def build_masked_text_loader(
    config: CaptionDataConfig, tokenizer: Any, mntp: MNTPConfig, global_batch_size: int, seed: int,
    microbatch_tokens: Optional[int] = None,
) -> DataSpec:
    """Build the loader of the MNTP warm start from a `MaskedTextDataset`, which has the same arguments.

    A microbatch has at most `microbatch_tokens`.
    """
    dataset = MaskedTextDataset(config, tokenizer, mntp, global_batch_size, seed)
    split_batch = partial(split_packed, max_tokens=microbatch_tokens)
    return build_loader(dataset, split_batch=split_batch, get_num_tokens_in_batch=count_tokens)


def text_mixes(config: CaptionDataConfig) -> dict[str, dict[str, float]]:
    """Return caption key -> weight of each stream; raise a ConfigError if a stream has no weight above 0."""
    mixes: dict[str, dict[str, float]] = {}
    for name, stream in config.streams.items():
        with under(f'streams.{name}'):
            mixes[name] = positive_weights(stream.texts, config.texts)
            if not mixes[name]:
                raise ConfigError('expected a caption key with a weight above 0, here or for all datasets',
                                  'texts')
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
