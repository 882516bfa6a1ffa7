# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""An LLM as a text encoder: caption -> tokens -> bidirectional attention -> pooled vector.

Exports with remote code hold a copy of this file.  So it imports nothing of this package, and no more than torch and
transformers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Optional

import torch
import torch.distributed
import torch.nn as nn
from transformers import PreTrainedTokenizerBase

__all__ = [
    'POOLINGS', 'CaptionTokenizer', 'TextEncoder', 'Tokenized', 'Tokens', 'encode_texts', 'encode_tokens', 'last_pool',
    'mean_pool', 'token_batches', 'weighted_mean_pool',
]

Tokens = dict[str, torch.Tensor]
_SENTINEL = '\u2063caption\u2063'
_SPACE = '\u2003'
# Llama 3.2's template would otherwise write the day's date into every caption.
_TEMPLATE_DATE = '26 Jul 2024'


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


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
        config: Of the text encoder; `chat_template`, `pooling`, `max_length` and `instruction` are used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
        self.tokenizer = tokenizer
        self.max_length = config.max_length
        self.instruction = config.instruction
        self.trims = (False, False)
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad_id = next((i for i in candidates if isinstance(i, int)), 0)
        self.header, self.footer = self._frame(config)
        if self._room('') < 1:
            raise ValueError(f'text_encoder.max_length: {self.max_length} leaves no room for a caption beside '
                             f'{len(self.header) + len(self.footer)} tokens of the template')

    def _frame(self, config: Any) -> tuple[list[int], list[int]]:
        if config.chat_template and not self.tokenizer.chat_template:
            raise ValueError('text_encoder.chat_template is on, but the tokenizer has no chat template')
        if config.chat_template is False or not self.tokenizer.chat_template:
            return self._plain_frame(config.pooling)
        message = [{'role': 'user', 'content': f'{_SPACE}{_SENTINEL}{_SPACE}'}]
        try:
            text = self.tokenizer.apply_chat_template(message, tokenize=False, date_string=_TEMPLATE_DATE)
            before, after = str(text).split(_SENTINEL)
        except Exception as error:
            raise ValueError(f'{self.tokenizer.name_or_path}: its chat template cannot be used ({error}), expected one '
                             'that shows a message once') from error
        self.trims = not before.endswith(_SPACE), not after.startswith(_SPACE)
        before, after = before.removesuffix(_SPACE), after.removeprefix(_SPACE)
        footer = self.plain(after.rstrip())
        special = next((i for i, token in enumerate(footer) if token in self.tokenizer.all_special_ids), len(footer))
        return self.plain(before), footer[:special + 1]

    def _plain_frame(self, pooling: str) -> tuple[list[int], list[int]]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if pooling == 'last' and not isinstance(eos, int):
            raise ValueError('text_encoder.pooling: last needs an end token, and the tokenizer has none')
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


# ---------------------------------------------------------------------------------------------------------------------
# Vectors
# ---------------------------------------------------------------------------------------------------------------------


def mean_pool(hidden: torch.Tensor, embed_mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that `embed_mask` marks.

    Args:
        hidden: ``(B, T, D)``.
        embed_mask: ``(B, T)``, 1 for the caption's own tokens, or any weights.

    Returns:
        ``(B, D)`` in float32.
    """
    weights = embed_mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def weighted_mean_pool(hidden: torch.Tensor, embed_mask: torch.Tensor) -> torch.Tensor:
    """Mean in which the caption's i-th token weighs i (SGPT, Muennighoff 2022, eq. 2); shapes as in `mean_pool`."""
    return mean_pool(hidden, embed_mask.cumsum(1) * embed_mask)


def last_pool(hidden: torch.Tensor, embed_mask: torch.Tensor) -> torch.Tensor:
    """The last token that `embed_mask` marks; shapes as in `mean_pool`."""
    positions = torch.arange(embed_mask.shape[1], device=embed_mask.device)
    last = (embed_mask * positions).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last].float()


POOLINGS = {'mean': mean_pool, 'weighted_mean': weighted_mean_pool, 'last': last_pool}


class TextEncoder(nn.Module):
    """Bidirectional LLM with pooling.

    Args:
        llm: The decoder without its language-model head, optionally wrapped by peft.
        config: `bidirectional` and `pooling` are used.
    """

    def __init__(self, llm: Any, config: Any) -> None:
        super().__init__()
        if config.pooling not in POOLINGS:
            raise ValueError(f'text_encoder.pooling: {config.pooling!r} is not one of {", ".join(POOLINGS)}')
        self.llm = llm
        self.config = config
        self.pool = POOLINGS[config.pooling]
        self._layer_names = set(getattr(llm, '_no_split_modules', None) or ())

    @property
    def llm_embed_dim(self) -> int:
        return self.llm.config.hidden_size

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Shard every decoder layer on its own."""
        return type(module).__name__ in self._layer_names

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """With `fsdp.activation_checkpointing`, recompute every decoder layer on its own."""
        return self.fsdp_wrap_fn(module)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, embed_mask: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """``(B, T)`` tokens -> ``(B, llm_embed_dim)`` vectors in float32, not normalised.

        Without `embed_mask`, the tokens' states ``(B, T, llm_embed_dim)``.
        """
        mask = self._every_token_sees_every_token(attention_mask) if self.config.bidirectional else attention_mask
        states = self.llm(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return states if embed_mask is None else self.pool(states, embed_mask)

    def _every_token_sees_every_token(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """``(B, 1, T, T)`` additive mask that hides padding only; transformers passes it on as it is, also to layers
        with a sliding window."""
        dtype = self.llm.dtype
        assert isinstance(dtype, torch.dtype)
        if torch.is_autocast_enabled(attention_mask.device.type):
            dtype = torch.get_autocast_dtype(attention_mask.device.type)
        hidden = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
        hidden.masked_fill_(attention_mask == 0, torch.finfo(dtype).min)
        return hidden[:, None, None, :].expand(-1, 1, attention_mask.shape[1], -1)


def token_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices, longest text first, grouped so that a padded batch holds at most `batch_tokens` tokens.

    No text is shorter than nine tenths of the longest in its batch, which keeps padding near 4 % also when there are
    few texts.  The largest batch of a job is its first one, so that one that does not fit in memory fails at once.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[batch[0]] if batch else 0
        if batch and ((len(batch) + 1) * longest > batch_tokens or 10 * lengths[index] < 9 * longest):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def encode_tokens(
    encoder: TextEncoder,
    tokenizer: CaptionTokenizer,
    tokens: Sequence[Tokenized],
    batch_tokens: int = 4096,
    precision: str = 'fp32',
    sharded: bool = False,
    on_batch: Callable[[int], object] = lambda texts: None,
) -> torch.Tensor:
    """Embed tokenised texts in batches of similar length.

    Args:
        encoder: In evaluation mode, on its device.
        tokenizer: The encoder's.
        tokens: N texts.
        batch_tokens: Tokens per forward pass, padding included.
        precision: ``fp32``, or ``amp_bf16`` for autocast.
        sharded: The encoder is spread over the ranks: all run it equally often, since each takes part in gathering its
            weights; one with fewer batches repeats its last.
        on_batch: Is told how many texts each batch had.

    Returns:
        ``(N, llm_embed_dim)`` in float32 on the CPU, in the order of `tokens`.
    """
    device = next(encoder.parameters()).device
    result = torch.empty(len(tokens), encoder.llm_embed_dim, device=device)
    batches = list(token_batches([len(text.ids) for text in tokens], batch_tokens))
    if sharded:
        most = torch.tensor(len(batches), device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        batches += [batches[-1]] * (int(most) - len(batches))
    for batch in batches:
        inputs = {k: v.to(device, non_blocking=True) for k, v in tokenizer.pad([tokens[i] for i in batch]).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == 'amp_bf16'):
            result[batch] = encoder(**inputs).float()
        on_batch(len(batch))
    return result.cpu()


def encode_texts(
    encoder: TextEncoder,
    tokenizer: CaptionTokenizer,
    texts: Sequence[str],
    batch_tokens: int = 4096,
    precision: str = 'fp32',
    instruction: str = '',
) -> torch.Tensor:
    """`encode_tokens` of texts, each after an instruction that is not pooled."""
    return encode_tokens(encoder, tokenizer, tokenizer.tokenize(texts, instruction), batch_tokens, precision)
