# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""LLM as a text encoder: caption -> tokens -> bidirectional attention -> pooled vector.

Exported models contain a copy of this file.  It imports only torch and transformers.
"""

import copy
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import accumulate, chain, cycle, groupby
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerBase

varlen_attn: Any = None
try:
    from torch.nn.attention import varlen
    if 'enable_gqa' in inspect.signature(varlen.varlen_attn).parameters:
        varlen_attn = varlen.varlen_attn
except ImportError:
    pass  # an older torch

Tokens = dict[str, torch.Tensor]
_SENTINEL, _ANSWER = '\u2063caption\u2063', '\u2063answer\u2063'
_SPACE = '\u2003'
# Fixed date for all chat templates: Llama 3.1 and others write the current date into the prompt.
_DAY = datetime(2024, 7, 26)
# `strftime_now` of that date, as a macro before the template, since transformers 5 accepts no functions for
# templates. Jinja drops its final newline after the block, and would otherwise drop one at the start of the
# template.
_CODES = {code: _DAY.strftime(f'%{code}') for code in 'aAbBcdfGHIjmMpSuUVwWxXyYzZ'}
_CODES.update({f'-{code}': str(int(text)) for code, text in _CODES.items() if text.isdigit()})
_CLOCK = ('{% macro strftime_now(format) %}{{ format'
          + ''.join(f'|replace({"%" + code!r},{text!r})' for code, text in _CODES.items()) +
          ' }}{% endmacro %}\n')


class Tokenized(NamedTuple):
    """Tokens of one text."""

    ids: list[int]
    start: int
    """Number of leading tokens that do not belong to the caption."""
    cut: int
    """Number of caption tokens that were truncated to keep `max_length`."""


class CaptionTokenizer:
    """Tokenizer from captions to `input_ids`, `attention_mask` and `embed_mask`, padded on the right.

    The layout of a text is ``[header][instruction][caption][footer]``; `embed_mask` marks the caption and the
    footer, which are pooled.  White space around a caption is stripped where the chat template strips it.

    Header and footer are those of a user turn in the chat template, without the system prompt that some
    templates put before the first turn.  Instruction and caption are tokenised as one text, joined by a
    space; its last n tokens are pooled if the caption alone has n.  The official code does the same
    (`tokenize`, `prepare_for_tokenization` and `_convert_to_str` in llm2clip/llm2vec/llm2vec.py).

    Without a template the header is the BOS token, if one exists, even where the tokenizer omits it: LLMs
    give the first token an outlier hidden state, unfit for pooling.
    The footer is EOS for pooling ``last``, else empty.

    Args:
        tokenizer: Tokenizer of the LLM.  Without a pad token, it pads with the end token,
            which the mask hides.
        config: Configuration of the text encoder; uses `chat_template`, `pooling`,
            `max_length` and `instruction`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
        self.tokenizer = tokenizer
        self.max_length = config.max_length
        self.instruction = config.instruction
        self.trims = (False, False)
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad_id = next((i for i in candidates if isinstance(i, int)), 0)
        self.header, self.footer = self._frame(config)
        self._check_room('')

    def _frame(self, config: Any) -> tuple[list[int], list[int]]:
        if config.chat_template and not self.tokenizer.chat_template:
            raise ValueError('text_encoder.chat_template is on, but the tokenizer has no chat template')
        if config.chat_template is False or not self.tokenizer.chat_template:
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            header = [bos] if isinstance(bos, int) else []
            if config.pooling != 'last':
                return header, []
            if not isinstance(eos, int):
                raise ValueError('text_encoder.pooling: last needs an end token, and the tokenizer has none')
            return header, [eos]
        caption = f'{_SPACE}{_SENTINEL}{_SPACE}'
        try:
            before, after = self._render(caption).split(_SENTINEL)
            _, _, ended = self._render(_SENTINEL, _ANSWER).partition(_ANSWER)
            _, _, continued = self._render(_SENTINEL, _ANSWER, caption).partition(_ANSWER)
        except Exception as error:
            raise ValueError(f'{self.tokenizer.name_or_path}: its chat template cannot be used ({error}), '
                             'expected one that shows a message once') from error
        self.trims = (not before.endswith(_SPACE), not after.startswith(_SPACE))
        before = before.removesuffix(_SPACE)
        footer = self.plain(after.removeprefix(_SPACE).rstrip())
        # The footer ends with its first special token.
        special_ids = self.tokenizer.all_special_ids
        end = next((i + 1 for i, token in enumerate(footer) if token in special_ids), len(footer))
        # Start of a user turn, without the end of the answer before it;
        # empty if the template shows no second turn.
        header = self.plain(continued.partition(_SENTINEL)[0].removesuffix(_SPACE))
        header = header[len(commonprefix([header, self.plain(ended)])):]
        if header and header[:1] != self._bos():
            header = self._bos() + header
        return header or self.plain(before), footer[:end]

    def _render(self, *contents: str) -> str:
        """Apply the chat template to alternating messages of user and assistant."""
        messages = [
            {'role': role, 'content': content}
            for role, content in zip(cycle(('user', 'assistant')), contents)]
        template = _CLOCK + self.tokenizer.get_chat_template()
        return str(self.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, date_string=f'{_DAY:%d %b %Y}'))

    def _bos(self) -> list[int]:
        """BOS token as a list; empty if the tokenizer does not add one."""
        bos: list[Any] = [self.tokenizer.bos_token_id]
        if self.tokenizer('').input_ids[:1] == bos:
            return bos
        return []

    def _check_room(self, instruction: str) -> None:
        others = len(self.header) + len(self.plain(instruction)) + len(self.footer)
        if others >= self.max_length:
            raise ValueError(f'text_encoder.max_length: {self.max_length} leaves no room for a caption '
                             f'beside {others} tokens of template and instruction')

    def plain(self, text: str) -> list[int]:
        """Tokenise a text without BOS, EOS or template."""
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def tokenize(self, texts: Sequence[str], instruction: str = '') -> list[Tokenized]:
        """Tokenise each text.

        Args:
            texts: Captions.
            instruction: Text before each caption that is read but not pooled.

        Raises:
            ValueError: A text is empty, or the instruction leaves no room for it.
        """
        texts = list(texts)
        instruction = instruction.strip()
        self._check_room(instruction)
        for i, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f'caption {i} of the batch is empty')
        trims_start, trims_end = self.trims
        if trims_end:
            texts = [text.rstrip() for text in texts]
        if trims_start and not instruction:
            texts = [text.lstrip() for text in texts]
        # verbose=False: no warning about the texts that are truncated below.
        whole = captions = self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        if instruction:
            whole = self.tokenizer([f'{instruction} {text}' for text in texts],
                                   add_special_tokens=False, verbose=False).input_ids
        room = self.max_length - len(self.header) - len(self.footer)
        tokens = []
        for ids, caption in zip(whole, captions):
            start = min(max(len(ids) - len(caption), 0), room - 1)
            framed = self.header + ids[:room] + self.footer
            tokens.append(Tokenized(framed, len(self.header) + start, max(0, len(ids) - room)))
        return tokens

    def placeholder(self) -> Tokenized:
        """Return a single pad token, for a sample without a text."""
        return Tokenized([self.pad_id], 0, 0)

    def pad(self, tokens: Sequence[Tokenized]) -> Tokens:
        """Pad B texts to three tensors ``(B, T)``."""
        return pad(tokens, self.pad_id)

    def __call__(self, texts: Sequence[str], instruction: str = '') -> Tokens:
        """Tokenise and pad B captions."""
        return self.pad(self.tokenize(texts, instruction))

    def packed(self, texts: Sequence[str]) -> dict[str, Any]:
        """Tokenise B captions and `pack` them."""
        return pack_tokens(self.tokenize(texts))

    def save(self, folder: Union[str, Path]) -> None:
        """Save a tokenizer that adds header and footer by itself, so that any program gets these tokens.

        It also truncates to `max_length` and pads on the right where it is told to.  It gives the same tokens
        as this one for texts without white space at their ends.  A tokenizer without a ``tokenizer.json``
        is saved as it is.
        """
        saved: Any = copy.deepcopy(self.tokenizer)
        if not saved.is_fast:
            saved.save_pretrained(folder)
            return
        names = {i: f'token {i}' for i in self.header + self.footer}
        for i in names.keys() & {saved.bos_token_id, saved.eos_token_id}:
            names[i] = saved.convert_ids_to_tokens(i)  # llama.cpp recognises BOS and EOS by their names
        template = [*(names[i] for i in self.header), '$A', *(names[i] for i in self.footer)]
        tokens = [{'id': name, 'ids': [i], 'tokens': [saved.convert_ids_to_tokens(i)]}
                  for i, name in names.items()]
        saved.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
        saved.model_max_length = self.max_length
        saved.padding_side = saved.truncation_side = 'right'
        if saved.pad_token is None:
            saved.pad_token = saved.eos_token
        saved.save_pretrained(folder)
        # transformers would otherwise replace the template by what these fields and the class say.
        path = Path(folder, 'tokenizer_config.json')
        fields = json.loads(path.read_text(encoding='utf-8'))
        fields.pop('add_bos_token', None)
        fields.pop('add_eos_token', None)
        fields['tokenizer_class'] = 'PreTrainedTokenizerFast'
        fields['model_input_names'] = ['input_ids', 'attention_mask']
        path.write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')


def pad(tokens: Sequence[Tokenized], pad_id: int = 0, min_length: int = 0) -> Tokens:
    """Pad B texts on the right to `input_ids`, `attention_mask` and `embed_mask`, each ``(B, T)``, with T of
    `min_length` at least."""
    length = max(min_length, max(len(text.ids) for text in tokens))
    input_ids = torch.full((len(tokens), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    embed_mask = torch.zeros_like(input_ids)
    for row, text in enumerate(tokens):
        input_ids[row, :len(text.ids)] = torch.tensor(text.ids)
        attention_mask[row, :len(text.ids)] = 1
        embed_mask[row, text.start:len(text.ids)] = 1
    return {'input_ids': input_ids, 'attention_mask': attention_mask, 'embed_mask': embed_mask}


class Runs:
    """The (count, length) of consecutive texts of one length in a row.

    It is no list, because `torch.compile` would compile layers anew for every length of a list.
    """

    def __init__(self, runs: Iterable[tuple[int, int]]) -> None:
        self._runs = list(runs)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._runs)


def pack(texts: Mapping[str, torch.Tensor], lengths: Sequence[int]) -> dict[str, Any]:
    """Pack B texts, padded on the right as ``(B, T)``, into one row of S tokens without padding,
    shortest text first.

    Returns:
        Each tensor of `texts` as ``(1, S)``; `position_ids` ``(1, S)``, which restart at 0 for every text;
        `runs`, the `Runs` of the row; `offsets` ``(B + 1,)``, where each text of the row begins, and the end;
        and `places` ``(B,)``, the position of each text in the row.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    in_order = [lengths[i] for i in order]
    rows = {name: [value[i, :lengths[i]] for i in order] for name, value in texts.items()}
    rows['position_ids'] = [torch.arange(length) for length in in_order]
    packed: dict[str, Any] = {name: torch.cat(parts).unsqueeze(0) for name, parts in rows.items()}
    packed['runs'] = Runs((len(list(run)), length) for length, run in groupby(in_order))
    packed['offsets'] = torch.tensor([0, *accumulate(in_order)], dtype=torch.int32)
    packed['places'] = torch.tensor(order).argsort()
    return packed


def pack_tokens(tokens: Sequence[Tokenized]) -> dict[str, Any]:
    """Pack B tokenised texts for `TextEncoder`."""
    padded = pad(tokens)
    lengths = [len(text.ids) for text in tokens]
    return pack({'input_ids': padded['input_ids'], 'embed_mask': padded['embed_mask']}, lengths)


def mean_pool(hidden: torch.Tensor, embed_mask: torch.Tensor) -> torch.Tensor:
    """Average ``(B, T, D)`` to ``(B, D)`` in float32, with the weights or mask `embed_mask` ``(B, T)``."""
    weights = embed_mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def weighted_mean_pool(hidden: torch.Tensor, embed_mask: torch.Tensor) -> torch.Tensor:
    """Average with weight i for a caption's i-th token (SGPT, Muennighoff 2022, eq. 2);
    shapes as in `mean_pool`."""
    return mean_pool(hidden, embed_mask.cumsum(1) * embed_mask)


def last_pool(hidden: torch.Tensor, embed_mask: torch.Tensor) -> torch.Tensor:
    """Return the last token that `embed_mask` marks; shapes and dtype as in `mean_pool`."""
    positions = torch.arange(embed_mask.shape[1], device=embed_mask.device)
    last = (embed_mask * positions).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last].float()


POOLINGS = {'mean': mean_pool, 'weighted_mean': weighted_mean_pool, 'last': last_pool}


class TextEncoder(nn.Module):
    """LLM with bidirectional attention, or causal if `config.bidirectional` is False, and pooling.

    Args:
        llm: Decoder without its language-model head, optionally wrapped by peft.
        config: Configuration of the text encoder; uses `bidirectional` and `pooling`.
    """

    def __init__(self, llm: Any, config: Any) -> None:
        super().__init__()
        self.llm = llm
        self.config = config
        self.llm_embed_dim: int = llm.config.hidden_size
        self.pool = POOLINGS[config.pooling]
        attention = llm.config._attn_implementation
        llm.config._attn_implementation = _PACKED.get(attention, attention)
        self._layer_names = set(llm._no_split_modules)

    @staticmethod
    def arguments(batch: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
        """Return the arguments of `forward` that a batch holds, whose names there begin with `prefix`."""
        names = ('input_ids', 'attention_mask', 'embed_mask', 'position_ids', 'runs', 'offsets', 'places')
        return {name: batch[prefix + name] for name in names if prefix + name in batch}

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Whether a module is a decoder layer, which FSDP shards and activation checkpointing recomputes
        alone."""
        return type(module).__name__ in self._layer_names

    activation_checkpointing_fn = fsdp_wrap_fn

    def forward(
        self, input_ids: torch.Tensor, attention_mask: Optional[torch.Tensor] = None,
        embed_mask: Optional[torch.Tensor] = None, position_ids: Optional[torch.Tensor] = None,
        runs: Optional[Runs] = None, offsets: Optional[torch.Tensor] = None,
        places: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Embed tokens ``(B, T)`` as vectors ``(B, llm_embed_dim)`` in float32, not normalised.

        Without `embed_mask`, return hidden states ``(B, T, llm_embed_dim)``.  A causal encoder needs no
        `attention_mask` for texts of equal length.  With the output of `pack` instead of `attention_mask`,
        tokens and hidden states form one row ``(1, S)``, and vectors keep the order of the texts.  LLMs with
        length-dependent rotary frequencies (``longrope``, ``dynamic``) use the longest text of the row, as
        they use that of a padded batch.
        """
        if runs is not None:
            # This 4-D mask is not read; without one, transformers would allocate a mask of S x S.
            states = self.llm(
                input_ids=input_ids, attention_mask=torch.zeros(1, 1, 1, 1, device=input_ids.device),
                position_ids=position_ids, use_cache=False, runs=runs, offsets=offsets,
                bidirectional=self.config.bidirectional).last_hidden_state
            if embed_mask is None:
                return states
            sizes = [n * length for n, length in runs]
            vectors = []
            for part, mask, (n, length) in zip(states[0].split(sizes), embed_mask[0].split(sizes), runs):
                vectors.append(self.pool(part.view(n, length, -1), mask.view(n, length)))
            return torch.cat(vectors)[places]
        mask: Any = attention_mask
        if self.config.bidirectional:
            # Additive mask ``(B, 1, T, T)`` that hides only padding.  transformers passes it unchanged to all
            # layers, including those with a sliding window.
            dtype = self.llm.dtype
            if torch.is_autocast_enabled(mask.device.type):
                dtype = torch.get_autocast_dtype(mask.device.type)
            hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            hidden.masked_fill_(mask == 0, torch.finfo(dtype).min)
            mask = hidden[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        states = self.llm(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        if embed_mask is None:
            return states
        return self.pool(states, embed_mask)


def save_llm(llm: Any, bidirectional: bool, folder: Union[str, Path]) -> None:
    """Save an LLM so that other programs know whether it is bidirectional.

    transformers from 5.2 on, vLLM and llama.cpp read `is_causal`; `TextEncoder` passes its own mask.
    """
    if bidirectional:
        llm.config.is_causal = False
    llm.save_pretrained(folder, safe_serialization=True)


class Visible(NamedTuple):
    """Number of tokens of a text, before and after each token, that it attends to; -1: all."""

    before: int = -1
    after: int = -1

    def mask(self, length: int, device: torch.device) -> torch.Tensor:
        """Return a mask ``(length, length)``; entry i, j: whether token i attends to token j."""
        positions = torch.arange(length, device=device)
        distance = positions[:, None] - positions
        before, after = (length if number < 0 else number for number in self)
        return (distance <= before) & (-distance <= after)


def _attend(
    implementation: str, module: nn.Module, *args: Any, runs: Optional[Runs] = None, **kwargs: Any
) -> Any:
    """Attention function for transformers; `runs`, `offsets` and `bidirectional` come with packed texts."""
    if runs is not None:
        attend: Any = _attend_packed
        return attend(implementation, module, *args, runs=runs, **kwargs)
    if implementation == 'eager':
        return _eager(module)(module, *args, **kwargs)
    return AttentionInterface()[implementation](module, *args, **kwargs)


@torch.compiler.disable  # it would recompile for every new set of lengths
def _attend_packed(
    implementation: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: Optional[torch.Tensor], *, runs: Runs, offsets: torch.Tensor, bidirectional: bool,
    scaling: float, dropout: float = 0.0, sliding_window: Optional[int] = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention ``(1, S, H, head_dim)`` within each of the texts that are packed in one row.

    With SDPA, one kernel computes all texts where torch has one.  Elsewhere, texts of one length form a batch
    without padding.  Bidirectional attention ignores the sliding window.
    """
    visible = Visible()
    if not bidirectional:
        before = -1 if sliding_window is None else sliding_window - 1
        visible = Visible(before, 0 if getattr(module, 'is_causal', True) else before)
    if implementation == 'eager':
        attend = partial(_attend_eagerly, visible, module, scaling=scaling, dropout=dropout, **kwargs)
    else:
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if _fits_varlen_kernel(query, dropout):
            longest = max(length for _, length in runs)
            return _attend_in_one_kernel(visible, (query, key, value), offsets, longest, scaling), None
        # Few kernels support grouped-query attention, and torch cannot count the FLOPs of those that do.
        groups = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(groups, 1)
        value = value.repeat_interleave(groups, 1)
        attend = partial(_attend_by_sdpa, visible, scale=scaling, dropout_p=dropout)
    sizes = [n * length for n, length in runs]
    outputs = []
    split_states = [states[0].split(sizes, 1) for states in (query, key, value)]
    for (n, length), *parts in zip(runs, *split_states):
        output = attend(*(part.unflatten(1, (n, length)).transpose(0, 1) for part in parts))
        outputs.append(output.reshape(1, n * length, *output.shape[2:]))
    return torch.cat(outputs, 1), None


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Return the attention function in the LLM's own module."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _attend_eagerly(visible: Visible, module: nn.Module, *states: torch.Tensor, **kwargs: Any) -> Any:
    """Compute attention by the LLM's own function, such as Gemma 2's with its soft cap on attention scores:
    queries, keys and values ``(n, H, length, head_dim)`` -> ``(n, length, H, head_dim)``."""
    mask = None
    if visible != Visible():
        query = states[0]
        hidden = ~visible.mask(query.shape[2], query.device)[None, None]
        mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)
    return _eager(module)(module, *states, mask, **kwargs)[0]


def _attend_by_sdpa(visible: Visible, *states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Compute attention by torch, with shapes as above.  Only a sliding window needs a mask, so that every
    device can use its fastest kernel."""
    length = states[0].shape[2]
    mask = None
    if 0 <= visible.before < length - 1:
        mask = visible.mask(length, states[0].device)
    is_causal = mask is None and visible.after == 0
    attend: Any = F.scaled_dot_product_attention
    return attend(*states, mask, is_causal=is_causal, **kwargs).transpose(1, 2)


def has_varlen_kernel(device: torch.device) -> bool:
    """Whether `varlen_attn` has a kernel for a device, FlashAttention: on NVIDIA GPUs from Ampere on."""
    if device.type != 'cuda' or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _fits_varlen_kernel(query: torch.Tensor, dropout: float) -> bool:
    """Whether `varlen_attn` computes attention of these queries: in 16 bits, without dropout."""
    if varlen_attn is None or dropout or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    head_dim = query.shape[-1]
    return head_dim <= 256 and head_dim % 8 == 0 and has_varlen_kernel(query.device)


def _attend_in_one_kernel(
    visible: Visible, states: Sequence[torch.Tensor], offsets: torch.Tensor, longest: int, scaling: float
) -> torch.Tensor:
    """Compute attention within each text of a row: queries ``(1, H, S, head_dim)``, and keys and values in as
    many heads or fewer."""
    tokens = [row.transpose(0, 1) for row, in states]
    # On Hopper and Blackwell, cuDNN would go first, and build a plan for every new number of texts.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = varlen_attn(*tokens, offsets, offsets, longest, longest, scale=scaling, enable_gqa=True,
                             window_size=visible)
    return output.unsqueeze(0)


# Attention implementation -> wrapper that also takes packed texts.  An LLM keeps the wrapper permanently,
# since activation checkpointing may run layers again in the backward pass.
_PACKED = {name: f'llm2clip_{name}' for name in ('sdpa', 'eager')}
for _name, _packed in _PACKED.items():
    AttentionInterface.register(_packed, partial(_attend, _name))
    AttentionMaskInterface.register(_packed, AttentionMaskInterface()[_name])


def token_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, longest text first, each with at most `batch_tokens` tokens or a single text.

    Texts of equal length are adjacent, which suits `pack`.  The first batch needs the most memory, so that
    running out of memory shows at once.
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
    encoder: TextEncoder, tokens: Sequence[Tokenized], batch_tokens: int = 4096, precision: str = 'fp32',
    sharded: bool = False, on_batch: Callable[[int], object] = lambda texts: None,
) -> torch.Tensor:
    """Embed N tokenised texts, packed without padding: ``(N, llm_embed_dim)`` in float32 on the encoder's
    device.

    Args:
        encoder: Encoder in evaluation mode, on its device.
        tokens: N texts.
        batch_tokens: Tokens per forward pass.
        precision: ``fp32``, or ``amp_bf16`` for autocast.
        sharded: Whether the encoder is sharded.  Each forward pass gathers weights from all ranks, so all
            must run equally many; a rank with fewer batches repeats its last one.
        on_batch: Called after each batch with its number of texts.
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
        texts = to_device(pack_tokens([tokens[i] for i in batch]), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == 'amp_bf16'):
            vectors.append(encoder(**texts).float())
        on_batch(len(batch))
    order = torch.tensor(list(chain.from_iterable(batches)), dtype=torch.long)
    return torch.cat(vectors)[:len(tokens)][order.argsort().to(device, non_blocking=True)]


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy tensors from pinned memory; a copy from pageable memory would wait for the previous batch."""
    copies = dict(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            pinned = torch.empty_like(value, pin_memory=device.type == 'cuda').copy_(value)
            copies[name] = pinned.to(device, non_blocking=True)
    return copies


def encode_texts(
    encoder: TextEncoder, tokenizer: CaptionTokenizer, texts: Sequence[str], batch_tokens: int = 4096,
    precision: str = 'fp32', instruction: str = '',
) -> torch.Tensor:
    """Tokenise and embed texts, each after an instruction that is not pooled;
    return the vectors on the CPU."""
    return encode_tokens(encoder, tokenizer.tokenize(texts, instruction), batch_tokens, precision).cpu()
