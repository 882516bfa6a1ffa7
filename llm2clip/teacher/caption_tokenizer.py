# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Caption -> tokens, and which of them are the caption's own."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from llm2clip.config import ConfigError, TextEncoderConfig

__all__ = ['CaptionTokenizer', 'Tokenized', 'Tokens']

Tokens = dict[str, torch.Tensor]
_SENTINEL = '\u2063caption\u2063'
_SPACE = '\u2003'
# Llama 3.2's template would otherwise write the day's date into every caption.
_TEMPLATE_DATE = '26 Jul 2024'


class Tokenized(NamedTuple):
    """One text's tokens."""

    ids: list[int]
    start: int
    """How many at the start are not the caption's own."""
    cut: int
    """How many of the caption's tokens were cut off to keep `max_length`."""


class CaptionTokenizer:
    """Captions -> `input_ids`, `attention_mask` and `embed_mask`, padded on the right.

    A text is laid out as ``[BOS or template header][instruction][caption][end token]``; `embed_mask` marks the caption
    and the end token, which are what pooling sees.  The caption is tokenised by itself, so that its tokens are the
    same with and without an instruction; it loses white space at its ends where the chat template takes it away.  The
    end token is the chat template's; without a template, texts whose end token is pooled end with EOS, and others with
    their last word.

    Args:
        tokenizer: The LLM's own tokenizer.  Without a pad token it pads with the end token, which the mask hides.
        config: `chat_template`, `pooling`, `max_length` and `instruction` are used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TextEncoderConfig) -> None:
        self.tokenizer = tokenizer
        self.max_length = config.max_length
        self.instruction = config.instruction
        self.trims = (False, False)
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad_id = next((i for i in candidates if isinstance(i, int)), 0)
        self.header, self.footer = self._frame(config)
        if self._room('') < 1:
            raise ConfigError(f'text_encoder.max_length: {self.max_length} leaves no room for a caption beside '
                              f'{len(self.header) + len(self.footer)} tokens of the template')

    def _frame(self, config: TextEncoderConfig) -> tuple[list[int], list[int]]:
        if config.chat_template and not self.tokenizer.chat_template:
            raise ConfigError('text_encoder.chat_template is on, but the tokenizer has no chat template')
        if config.chat_template is False or not self.tokenizer.chat_template:
            return self._plain_frame(config.pooling)
        message = [{'role': 'user', 'content': f'{_SPACE}{_SENTINEL}{_SPACE}'}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False, date_string=_TEMPLATE_DATE)
        before, after = str(text).split(_SENTINEL)
        self.trims = not before.endswith(_SPACE), not after.startswith(_SPACE)
        before, after = before.removesuffix(_SPACE), after.removeprefix(_SPACE)
        footer = self.plain(after.rstrip())
        special = next((i for i, token in enumerate(footer) if token in self.tokenizer.all_special_ids), len(footer))
        return self.plain(before), footer[:special + 1]

    def _plain_frame(self, pooling: str) -> tuple[list[int], list[int]]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if pooling == 'last' and not isinstance(eos, int):
            raise ConfigError('text_encoder.pooling: last needs an end token, and the tokenizer has none')
        header = [bos] if isinstance(bos, int) and bos in self.tokenizer('').input_ids else []
        return header, [eos] if pooling == 'last' and isinstance(eos, int) else []

    def _room(self, instruction: str) -> int:
        return self.max_length - len(self.header) - len(self.plain(instruction)) - len(self.footer)

    def plain(self, text: str) -> list[int]:
        """Token ids without BOS, EOS or template."""
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def tokenize(self, texts: Sequence[str], instruction: str = '') -> list[Tokenized]:
        """Token ids of each text.

        Args:
            texts: Captions.
            instruction: Text before each of them that is read but not pooled.

        Raises:
            ValueError: A text is empty, or the instruction leaves it no room.
        """
        prefix, room = self.header + self.plain(instruction), self._room(instruction)
        if room < 1:
            raise ValueError(f'max_length {self.max_length} leaves no room for a caption after {len(prefix)} tokens of '
                             'template and instruction')
        empty = [i for i, text in enumerate(texts) if not text.strip()]
        if empty:
            raise ValueError(f'caption {empty[0]} of the batch is empty')
        captions = self.tokenizer(self._trimmed(texts, instruction), add_special_tokens=False).input_ids
        return [Tokenized(prefix + ids[:room] + self.footer, len(prefix), max(0, len(ids) - room)) for ids in captions]

    def _trimmed(self, texts: Sequence[str], instruction: str) -> list[str]:
        start, end = self.trims
        texts = [text.rstrip() if end else text for text in texts]
        return [text.lstrip() for text in texts] if start and not instruction else texts

    def placeholder(self) -> Tokenized:
        """One token that stands where a sample has no text."""
        return Tokenized([self.pad_id], 0, 0)

    def pad(self, tokens: Sequence[Tokenized]) -> Tokens:
        """Tokens -> three ``(B, T)`` tensors."""
        length = max(len(text.ids) for text in tokens)
        input_ids = torch.full((len(tokens), length), self.pad_id, dtype=torch.long)
        attention_mask, embed_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        for row, text in enumerate(tokens):
            input_ids[row, :len(text.ids)] = torch.tensor(text.ids)
            attention_mask[row, :len(text.ids)] = 1
            embed_mask[row, text.start:len(text.ids)] = 1
        return {'input_ids': input_ids, 'attention_mask': attention_mask, 'embed_mask': embed_mask}

    def __call__(self, texts: Sequence[str], instruction: str = '') -> Tokens:
        """Tokenise and pad B captions."""
        return self.pad(self.tokenize(texts, instruction))
