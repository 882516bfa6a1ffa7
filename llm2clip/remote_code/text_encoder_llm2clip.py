# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""An LLM as a text encoder: caption -> tokens -> bidirectional attention -> pooled vector.

Exports with remote code hold a copy of this file.  So it imports nothing of this package, and no more than torch and
transformers.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import cycle, groupby, takewhile
from typing import Any, NamedTuple, Optional

import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerBase

__all__ = [
    'POOLINGS', 'CaptionTokenizer', 'TextEncoder', 'Tokenized', 'encode_texts', 'encode_tokens', 'pack',
]

Tokens = dict[str, torch.Tensor]
Runs = Sequence[tuple[int, int]]
_SENTINEL, _ANSWER = '\u2063caption\u2063', '\u2063answer\u2063'
_SPACE = '\u2003'
# The day on which every chat template is applied: Llama 3.1's and others' write it into what they make of a caption.
_DAY = datetime(2024, 7, 26)
# Its `strftime_now`, as a macro at the head of a template: transformers 5 takes no functions for one.  It ends in the
# newline that a block swallows, so that white space at the beginning of the template stays as it is.
_CODES = {code: _DAY.strftime(f'%{code}') for code in 'aAbBcdfGHIjmMpSuUVwWxXyYzZ'}
_CODES.update({f'-{code}': str(int(text)) for code, text in _CODES.items() if text.isdigit()})
_CLOCK = ('{% macro strftime_now(format) %}{{ format'
          + ''.join(f'|replace({"%" + code!r},{text!r})' for code, text in _CODES.items()) + ' }}{% endmacro %}\n')


class Tokenized(NamedTuple):
    """One text's tokens."""

    ids: list[int]
    start: int
    """How many at the start are not the caption's own."""
    cut: int
    """How many of the caption's tokens were cut off to keep `max_length`."""


class CaptionTokenizer:
    """Captions -> `input_ids`, `attention_mask` and `embed_mask`, padded on the right.

    A text is laid out as ``[header][instruction][caption][footer]``; `embed_mask` marks the caption and the footer,
    which are what pooling sees.  A caption loses white space at its ends where the chat template takes it away.

    Header and footer are those of a turn of the user in the chat template, without the system prompt that some
    templates put before the first turn.  Instruction and caption are one text with one space between; pooled are as
    many of its last tokens as the caption has by itself.  This is how the official code does it (`tokenize`,
    `prepare_for_tokenization` and `_convert_to_str` in llm2clip/llm2vec/llm2vec.py).

    Without a template the header is the BOS token, if there is one, also where the tokenizer does not add it: LLMs give
    the first token an outlying state, which belongs to no caption.  Texts whose end token is pooled end with EOS,
    others with their last word.

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
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            if config.pooling == 'last' and not isinstance(eos, int):
                raise ValueError('text_encoder.pooling: last needs an end token, and the tokenizer has none')
            return ([bos] if isinstance(bos, int) else [],
                    [eos] if config.pooling == 'last' and isinstance(eos, int) else [])
        caption = f'{_SPACE}{_SENTINEL}{_SPACE}'
        try:
            before, after = self._render(caption).split(_SENTINEL)
            ended, continued = (self._render(_SENTINEL, _ANSWER, *more).partition(_ANSWER)[2]
                                for more in ([], [caption]))
        except Exception as error:
            raise ValueError(f'{self.tokenizer.name_or_path}: its chat template cannot be used ({error}), expected one '
                             'that shows a message once') from error
        self.trims = not before.endswith(_SPACE), not after.startswith(_SPACE)
        before, after = before.removesuffix(_SPACE), after.removeprefix(_SPACE)
        footer = self.plain(after.rstrip())
        special = next((i for i, token in enumerate(footer) if token in self.tokenizer.all_special_ids), len(footer))
        # What begins a turn of the user, after what ends an answer; nothing where the template shows no second turn.
        header = self.plain(continued.partition(_SENTINEL)[0].removesuffix(_SPACE))
        closing = takewhile(lambda pair: pair[0] == pair[1], zip(header, self.plain(ended)))
        header = header[sum(1 for _ in closing):]
        if header[:1] != self._bos():
            header = header and self._bos() + header
        return header or self.plain(before), footer[:special + 1]

    def _render(self, *contents: str) -> str:
        """The chat template of messages, those of the user and of the assistant by turns."""
        messages = [{'role': role, 'content': content}
                    for role, content in zip(cycle(('user', 'assistant')), contents)]
        return str(self.tokenizer.apply_chat_template(
            messages, chat_template=_CLOCK + self.tokenizer.get_chat_template(), tokenize=False,
            date_string=f'{_DAY:%d %b %Y}'))

    def _bos(self) -> list[int]:
        """The BOS token, if the tokenizer adds one."""
        bos = self.tokenizer.bos_token_id
        return [bos] if isinstance(bos, int) and bos in self.tokenizer('').input_ids else []

    def _room(self, instruction: str) -> int:
        return self.max_length - len(self.header) - len(self.plain(instruction)) - len(self.footer)

    def plain(self, text: str) -> list[int]:
        """Token ids without BOS, EOS or template."""
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def tokenize(self, texts: Sequence[str], instruction: str = '') -> list[Tokenized]:
        """Token ids of each text.

        Args:
            texts: Captions; a string is one.
            instruction: Text before each of them that is read but not pooled.

        Raises:
            ValueError: A text is empty, or the instruction leaves it no room.
        """
        texts = [texts] if isinstance(texts, str) else texts
        instruction = instruction.strip()
        if self._room(instruction) < 1:
            prefix = len(self.header) + len(self.plain(instruction))
            raise ValueError(f'max_length {self.max_length} leaves no room for a caption after {prefix} tokens of '
                             'template and instruction')
        empty = [i for i, text in enumerate(texts) if not text.strip()]
        if empty:
            raise ValueError(f'caption {empty[0]} of the batch is empty')
        at_start, at_end = self.trims
        texts = [text.rstrip() if at_end else text for text in texts]
        texts = [text.lstrip() for text in texts] if at_start and not instruction else texts
        whole = captions = self.tokenizer(texts, add_special_tokens=False).input_ids
        if instruction:
            whole = self.tokenizer([f'{instruction} {text}' for text in texts], add_special_tokens=False).input_ids
        room, tokens = self._room(''), []
        for ids, caption in zip(whole, captions):
            start = min(max(len(ids) - len(caption), 0), room - 1)
            tokens.append(Tokenized(self.header + ids[:room] + self.footer, len(self.header) + start,
                                    max(0, len(ids) - room)))
        return tokens

    def placeholder(self) -> Tokenized:
        """One token that stands where a sample has no text."""
        return Tokenized([self.pad_id], 0, 0)

    def pad(self, tokens: Sequence[Tokenized]) -> Tokens:
        """Tokens -> three ``(B, T)`` tensors."""
        return pad(tokens, self.pad_id)

    def __call__(self, texts: Sequence[str], instruction: str = '') -> Tokens:
        """Tokenise and pad B captions."""
        return self.pad(self.tokenize(texts, instruction))

    def packed(self, texts: Sequence[str]) -> dict[str, Any]:
        """Tokenise B captions and `pack` them."""
        return pack_tokens(self.tokenize(texts))


def pad(tokens: Sequence[Tokenized], pad_id: int = 0) -> Tokens:
    """`input_ids`, `attention_mask` and `embed_mask`, each ``(B, T)``, of B texts, padded on the right."""
    length = max(len(text.ids) for text in tokens)
    input_ids = torch.full((len(tokens), length), pad_id, dtype=torch.long)
    attention_mask, embed_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, text in enumerate(tokens):
        input_ids[row, :len(text.ids)] = torch.tensor(text.ids)
        attention_mask[row, :len(text.ids)] = 1
        embed_mask[row, text.start:len(text.ids)] = 1
    return {'input_ids': input_ids, 'attention_mask': attention_mask, 'embed_mask': embed_mask}


def pack(texts: Mapping[str, torch.Tensor], lengths: Sequence[int]) -> dict[str, Any]:
    """B texts of these `lengths`, padded ``(B, T)`` on the right -> a row of S tokens without padding, shortest first.

    Returns:
        What there is of each token, ``(1, S)`` each; `position_ids` ``(1, S)``, which begin anew with every text;
        `runs`, how many texts of which length follow one another; and `places` ``(B,)``, where in the row each stands.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    in_order = [lengths[i] for i in order]
    rows = {name: [value[i, :lengths[i]] for i in order] for name, value in texts.items()}
    rows['position_ids'] = [torch.arange(length) for length in in_order]
    return {**{name: torch.cat(parts).unsqueeze(0) for name, parts in rows.items()},
            'runs': [(len(list(run)), length) for length, run in groupby(in_order)],
            'places': torch.tensor(order).argsort()}


def pack_tokens(tokens: Sequence[Tokenized]) -> dict[str, Any]:
    """`pack` of B texts, as `TextEncoder` takes them."""
    texts = pad(tokens)
    return pack({name: texts[name] for name in ('input_ids', 'embed_mask')}, [len(text.ids) for text in tokens])


def mean_pool(hidden: torch.Tensor, embed_mask: torch.Tensor) -> torch.Tensor:
    """``(B, T, D)`` -> ``(B, D)`` in float32: the mean over the tokens that `embed_mask` ``(B, T)`` marks or weighs."""
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

    arguments = ('input_ids', 'attention_mask', 'embed_mask', 'position_ids', 'runs', 'places')
    """Of `forward`."""

    def __init__(self, llm: Any, config: Any) -> None:
        super().__init__()
        if config.pooling not in POOLINGS:
            raise ValueError(f'text_encoder.pooling: {config.pooling!r} is not one of {", ".join(POOLINGS)}')
        self.llm = llm
        self.config = config
        self.pool = POOLINGS[config.pooling]
        llm.config._attn_implementation = _PACKED.get(llm.config._attn_implementation, llm.config._attn_implementation)
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
        self,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        embed_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        runs: Optional[Runs] = None,
        places: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """``(B, T)`` tokens -> ``(B, llm_embed_dim)`` vectors in float32, not normalised.

        Without `embed_mask`, the tokens' states ``(B, T, llm_embed_dim)``.  A causal encoder needs no `attention_mask`
        for texts of one length.  With what `pack` gives in place of `attention_mask`, tokens and states are those of
        one row ``(1, S)``, and vectors are again in the order of the texts.  An LLM whose rotary frequencies follow the
        longest text (``longrope``, ``dynamic``) takes that of the row, as it takes that of a padded batch.
        """
        if runs is not None:
            # A mask of four axes, which nothing reads: transformers would make one as large as the square of the row.
            states = self.llm(
                input_ids=input_ids, attention_mask=torch.zeros(1, 1, 1, 1, device=input_ids.device),
                position_ids=position_ids, use_cache=False, runs=runs,
                bidirectional=self.config.bidirectional).last_hidden_state
            if embed_mask is None:
                return states
            sizes = [n * length for n, length in runs]
            return torch.cat([
                self.pool(part.view(n, length, -1), mask.view(n, length))
                for part, mask, (n, length) in zip(states[0].split(sizes), embed_mask[0].split(sizes), runs)])[places]
        mask = attention_mask
        if self.config.bidirectional:
            # Additive, ``(B, 1, T, T)``, and hides padding only; transformers passes it on as it is, also to layers
            # with a sliding window.
            assert attention_mask is not None
            device = attention_mask.device
            dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.llm.dtype
            hidden = torch.zeros(attention_mask.shape, dtype=dtype, device=device)
            hidden.masked_fill_(attention_mask == 0, torch.finfo(dtype).min)
            mask = hidden[:, None, None, :].expand(-1, 1, attention_mask.shape[1], -1)
        states = self.llm(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return states if embed_mask is None else self.pool(states, embed_mask)


def _attend(implementation: str, module: nn.Module, *args: Any, runs: Optional[Runs] = None, **kwargs: Any) -> Any:
    """Attention as transformers calls it, with `runs` among the arguments if texts are packed."""
    if runs is not None:
        return _attend_by_runs(
            module, *args, runs=runs, implementation=implementation, **kwargs)  # pyright: ignore[reportCallIssue]
    attend = _eager(module) if implementation == 'eager' else AttentionInterface()[implementation]
    return attend(module, *args, **kwargs)


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The attention of the LLM's own code."""
    return sys.modules[type(module).__module__].eager_attention_forward


@torch.compiler.disable  # which would compile it anew whenever the lengths differ
def _attend_by_runs(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    *,
    runs: Runs,
    bidirectional: bool,
    implementation: str,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: Optional[int] = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention ``(1, T, H, head_dim)`` within each of the texts that lie in one row.

    Texts of one length become a batch of their own, which needs neither padding nor, but for a causal sliding window,
    a mask: every device has its fastest kernel for that.  An LLM with ``eager`` attention, such as Gemma 2 with its
    soft cap on attention scores, computes the batch as it does elsewhere.  Where a token sees those after it, no window
    is left either.
    """
    causal = not bidirectional and getattr(module, 'is_causal', True)
    window = None if bidirectional else sliding_window
    eager = _eager(module) if implementation == 'eager' else None
    if eager is None:
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        # Few kernels let heads share keys and values, and torch cannot count the FLOPs of those.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    sizes = [n * length for n, length in runs]
    outputs = []
    for (n, length), *parts in zip(runs, *(x[0].split(sizes, 1) for x in (query, key, value))):
        q, k, v = (part.unflatten(1, (n, length)).transpose(0, 1) for part in parts)
        mask = None
        if (eager is not None and causal) or (window is not None and window < length):
            # Whether a token (row) sees another (column).
            positions = torch.arange(length, device=query.device)
            distance = positions[:, None] - positions
            mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
            if window is not None:
                mask = mask & (distance.abs() < window)
        if eager is not None:
            if mask is not None:
                mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(
                    ~mask, torch.finfo(q.dtype).min)[None, None]
            output, _ = eager(module, q, k, v, mask, scaling=scaling, dropout=dropout, **kwargs)
        else:
            output = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, scale=scaling, is_causal=causal and mask is None).transpose(1, 2)
        outputs.append(output.reshape(1, n * length, *output.shape[2:]))
    return torch.cat(outputs, 1), None


# Implementation of an LLM's attention -> the same, which also takes packed texts.  It stays that of the LLM, since
# layers may run again in the backward pass.
_PACKED = {name: f'llm2clip_{name}' for name in ('sdpa', 'eager')}
for _name, _packed in _PACKED.items():
    AttentionInterface.register(_packed, partial(_attend, _name))
    AttentionMaskInterface.register(_packed, AttentionMaskInterface()[_name])


def token_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices, longest text first, grouped so that a batch holds at most `batch_tokens` tokens, or a single text.

    Texts of one length stand together, which is what `pack` wants.  The batch that needs most memory is the first, so
    that one that does not fit fails at once.
    """
    batch: list[int] = []
    size = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batch and size + lengths[index] > batch_tokens:
            yield batch
            batch, size = [], 0
        batch.append(index)
        size += lengths[index]
    if batch:
        yield batch


@torch.no_grad()
def encode_tokens(
    encoder: TextEncoder,
    tokens: Sequence[Tokenized],
    batch_tokens: int = 4096,
    precision: str = 'fp32',
    sharded: bool = False,
    on_batch: Callable[[int], object] = lambda texts: None,
) -> torch.Tensor:
    """N tokenised texts -> ``(N, llm_embed_dim)`` in float32 on the encoder's device, packed without padding.

    Args:
        encoder: In evaluation mode, on its device.
        tokens: N texts.
        batch_tokens: Tokens per forward pass.
        precision: ``fp32``, or ``amp_bf16`` for autocast.
        sharded: The encoder is spread over the ranks: all run it equally often, since each takes part in gathering its
            weights; one with fewer batches repeats its last.
        on_batch: Is told how many texts each batch had.
    """
    device = next(encoder.parameters()).device
    batches = list(token_batches([len(text.ids) for text in tokens], batch_tokens))
    repeats = 0
    if sharded:
        most = torch.tensor(len(batches), device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        repeats = int(most) - len(batches)
    vectors = [torch.empty(0, encoder.llm_embed_dim, device=device)]
    for batch in batches + batches[-1:] * repeats:
        # From pageable memory the copy would wait for the batch before.
        texts = {name: torch.empty_like(value, pin_memory=device.type == 'cuda').copy_(value).to(
                     device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                 for name, value in pack_tokens([tokens[i] for i in batch]).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == 'amp_bf16'):
            vectors.append(encoder(**texts).float())
        on_batch(len(batch))
    order = torch.tensor([i for batch in batches for i in batch], dtype=torch.long)
    return torch.cat(vectors)[:len(tokens)][order.argsort().to(device, non_blocking=True)]


def encode_texts(
    encoder: TextEncoder,
    tokenizer: CaptionTokenizer,
    texts: Sequence[str],
    batch_tokens: int = 4096,
    precision: str = 'fp32',
    instruction: str = '',
) -> torch.Tensor:
    """`encode_tokens` of texts, each after an instruction that is not pooled; on the CPU."""
    return encode_tokens(encoder, tokenizer.tokenize(texts, instruction), batch_tokens, precision).cpu()
