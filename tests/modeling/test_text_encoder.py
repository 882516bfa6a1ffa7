# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Captions as tokens: template, instruction, end token, truncation, padding; batches and poolings."""

import copy
import itertools
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
import torch.nn as nn
from parts import text_encoder_from_config
from tokenizers import processors
from torch._dynamo.testing import CompileCounter
from transformers import AttentionInterface, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from llm2clip.config import TextEncoderConfig
from llm2clip.modeling import text_encoder
from llm2clip.modeling.sentence_transformer import padded_batches
from llm2clip.modeling.text_encoder import (
    CaptionTokenizer,
    encode_tokens,
    last_pool,
    mean_pool,
    pack,
    token_batches,
    weighted_mean_pool,
)

# As Llama 3.1's: a system prompt with the date, unless that is given.
LLAMA = ("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
         "<s>system {{ date_string }}</s>"
         "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}</s>{% endfor %}")
# As SmolLM3's: one that cannot be given.
CLOCK = "{% for m in messages %}<s>{{ strftime_now('%d %B %Y') }} {{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
LONG = 'a purple stripe painted by somebody who likes green'


def _tokenizer(folder: Path, template: str = '', **options: object) -> CaptionTokenizer:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if template:
        tokenizer.chat_template = template
    return CaptionTokenizer(tokenizer, TextEncoderConfig(pretrained='', **options))


def _decode(tokenizer: CaptionTokenizer, ids: list[int]) -> str:
    return tokenizer.tokenizer.decode(ids)


@pytest.mark.parametrize(('template', 'header', 'footer'), [
    ("{% for m in messages %}{% if loop.first %}<s>system\nbe nice</s>\n{% endif %}<s>{{ m['role'] }}\n"
     "{{ m['content'] }}</s>\n{% endfor %}", '<s>user\n', '</s>'),  # SmolLM2's, Qwen2.5's
    (LLAMA, '<s>[user]', '</s>'),
    ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}|{% endfor %}</s>", '<s>[user]', '|</s>'),  # Phi 3.5's
    ("{% for m in messages %}[{{ m['role'] }}]{% if loop.last and m['role'] == 'assistant' %}think {% endif %}"
     "{{ m['content'] }}</s>{% endfor %}", '<s>[user]', '</s>'),  # Qwen3's
    ("<s>{% for m in messages %}{% if m['role'] == 'user' %}U {{ m['content'] }}{% else %}A {{ m['content'] }}</s>"
     "{% endif %}{% endfor %}", '<s>U ', ''),  # DeepSeek's
    ("<s>system\nbe nice</s>{{ messages[0]['content'] }}</s>", '<s>system\nbe nice</s>', '</s>'),
    ("{% for m in messages %}<s>[INST] {{ m['content'] | trim }} [/INST]\n{% endfor %}", '<s>[INST] ', ' [/INST]'),
    ("{% for m in messages %}<s>{{ m['content'] }}</s>\n<s>{% endfor %}", '<s>', '</s>'),  # up to its special token
])
def test_a_turn_of_the_user_has_no_system_prompt(template: str, header: str, footer: str, llm_folder: Path) -> None:
    """Unless the template knows no other turn."""
    tokenizer = _tokenizer(llm_folder, template)
    assert (_decode(tokenizer, tokenizer.header), _decode(tokenizer, tokenizer.footer)) == (header, footer)


@pytest.mark.parametrize(('pooling', 'expected'), [('mean', '<s>a red square'), ('last', '<s>a red square</s>')])
def test_without_template_bos_precedes_a_caption(llm_folder: Path, pooling: str, expected: str) -> None:
    tokenizer = _tokenizer(llm_folder, chat_template=False, pooling=pooling)
    silent = PreTrainedTokenizerFast.from_pretrained(llm_folder)
    silent.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # adds no BOS
    for made in (tokenizer, CaptionTokenizer(silent, TextEncoderConfig('', chat_template=False, pooling=pooling))):
        text, = made.tokenize(['a red square'])
        assert _decode(tokenizer, text.ids) == expected and text.start == 1


@pytest.mark.parametrize(('content', 'expected', 'instructed'), [
    ("m['content']", '<s>  a  </s>', '<s>Say:   a  </s>'), ("m['content'] | trim", '<s>a</s>', '<s>Say:   a</s>'),
    ("m['content'].rstrip()", '<s>  a</s>', '<s>Say:   a</s>')])
def test_white_space_at_the_ends_as_in_the_template(
    llm_folder: Path, content: str, expected: str, instructed: str
) -> None:
    tokenizer = _tokenizer(llm_folder, f'{{% for m in messages %}}<s>{{{{ {content} }}}}</s>{{% endfor %}}')
    assert _decode(tokenizer, tokenizer.tokenize(['  a  '])[0].ids) == expected
    assert _decode(tokenizer, tokenizer.tokenize(['  a  '], 'Say:')[0].ids) == instructed


@pytest.mark.parametrize('template', [LLAMA, CLOCK])
def test_a_caption_has_the_same_tokens_next_year(
    template: str, llm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    years: list[tuple[list[int], str]] = []
    for year in (2026, 2027):
        clock = SimpleNamespace(now=lambda year=year: datetime(year, 3, 1))
        monkeypatch.setattr(chat_template_utils, 'datetime', clock)
        tokenizer = _tokenizer(llm_folder, template)
        dated = tokenizer.tokenizer.apply_chat_template([{'role': 'user', 'content': 'a'}], tokenize=False)
        years.append((tokenizer.tokenize(['a'])[0].ids, dated))
    (this, text), (following, dated) = years
    assert this == following and '2026' in text and '2027' in dated
    assert template == LLAMA or '2024' in _decode(tokenizer, this)


def test_truncation_is_counted_and_keeps_the_end_token(llm_folder: Path) -> None:
    whole, = _tokenizer(llm_folder).tokenize([LONG])
    text, = _tokenizer(llm_folder, max_length=12).tokenize([LONG])
    assert len(text.ids) == 12 and text.ids[-1] == 1
    assert text.cut == len(whole.ids) - 12 and whole.cut == 0


def test_captions_without_room_text_or_template_are_errors(llm_folder: Path) -> None:
    bare = PreTrainedTokenizerFast.from_pretrained(llm_folder)
    bare.chat_template = None
    assert CaptionTokenizer(bare, TextEncoderConfig(pretrained='')).footer == []
    for refused, message in (
            (lambda: _tokenizer(llm_folder, max_length=1), 'max_length: 1 leaves no room'),
            (lambda: _tokenizer(llm_folder, max_length=10).tokenize(['a'], 10 * 'Find it. '), 'leaves no room'),
            (lambda: _tokenizer(llm_folder).tokenize(['a', ' ']), 'caption 1 .* empty'),
            (lambda: CaptionTokenizer(bare, TextEncoderConfig('', chat_template=True)), 'no chat template')):
        with pytest.raises(ValueError, match=message):
            refused()


def _varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, _: torch.Tensor, longest: int,
    __: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool
) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn` as its documentation defines it, one text at a time."""
    assert torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
    assert enable_gqa and longest == offsets.diff().max() and offsets.dtype == torch.int32
    before, after = window_size
    outputs = []
    for start, end in itertools.pairwise(offsets.tolist()):
        q, k, v = (x[start:end].transpose(0, 1).float() for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if before >= 0:
            hidden |= distance > before
        if after >= 0:
            hidden |= -distance > after
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype))
    return torch.cat(outputs)


@pytest.fixture
def own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of this package, whichever copy of it in an exported model was registered last."""
    attend = partial(text_encoder._attend, 'sdpa')
    monkeypatch.setitem(AttentionInterface._global_mapping, 'llm2clip_sdpa', attend)


@pytest.mark.usefixtures('own_attention')
@pytest.mark.parametrize(('bidirectional', 'is_causal', 'window'), [
    (True, True, None), (True, True, 3), (False, True, None), (False, True, 3), (False, True, 4), (False, False, None),
    (False, False, 3)])
def test_one_kernel_for_all_texts_attends_as_one_per_length(
    bidirectional: bool, is_causal: bool, window: Optional[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    lengths = [2, 5, 5, 9]
    batch = pack({'ids': torch.ones(4, 9, dtype=torch.long)}, lengths)
    inputs = [torch.randn(1, heads, 21, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
    arguments: dict[str, Any] = {'runs': batch['runs'], 'offsets': batch['offsets'], 'scaling': 0.4,
                                 'bidirectional': bidirectional, 'sliding_window': window}
    layer: Any = nn.Module()
    layer.is_causal = is_causal  # False in EmbeddingGemma, an LLM with `use_bidirectional_attention`
    results = []
    for has_kernel in (False, True):
        monkeypatch.setattr(text_encoder, 'varlen_attn', _varlen_attn)
        monkeypatch.setattr(text_encoder, 'has_varlen_kernel', lambda device, value=has_kernel: value)
        output, _ = AttentionInterface()['llm2clip_sdpa'](layer, *inputs, None, **arguments)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        results.append([output, *torch.autograd.grad((output.float() * weights).sum(), inputs)])
    for one, per_length in zip(*results):
        assert one.shape == per_length.shape
        torch.testing.assert_close(one, per_length, rtol=0.03, atol=0.03)


@pytest.mark.usefixtures('own_attention')
def test_an_encoder_gives_the_kernel_what_it_packs(llm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TextEncoderConfig(str(llm_folder), dtype='bfloat16', attn_implementation='sdpa')
    encoder, tokenizer = text_encoder_from_config(config)
    tokens = tokenizer.tokenize(['a', LONG, 'b'])
    expected = encode_tokens(encoder.eval(), tokens)
    called: list[list[int]] = []

    def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
        called.append(args[3].tolist())
        return _varlen_attn(*args, **kwargs)

    monkeypatch.setattr(text_encoder, 'varlen_attn', kernel)
    monkeypatch.setattr(text_encoder, 'has_varlen_kernel', lambda device: True)
    torch.testing.assert_close(encode_tokens(encoder, tokens), expected, rtol=0.05, atol=0.05)
    lengths = sorted(len(text.ids) for text in tokens)
    assert called == encoder.llm.config.num_hidden_layers * [[0, *itertools.accumulate(lengths)]]


def test_a_compiled_layer_serves_all_lengths(llm_folder: Path) -> None:
    encoder, tokenizer = text_encoder_from_config(TextEncoderConfig(str(llm_folder), attn_implementation='sdpa'))
    plain = copy.deepcopy(encoder)
    torch.compiler.reset()
    counter = CompileCounter()
    encoder.llm.layers[0].compile(backend=counter)
    compiled: list[int] = []
    for n in range(2, 8):
        tokens = tokenizer.tokenize([' '.join('abc' * k) for k in range(1, n)])
        torch.testing.assert_close(encode_tokens(encoder, tokens), encode_tokens(plain, tokens))
        compiled.append(counter.frame_count)
    assert compiled[0] > 0 and len(set(compiled[2:])) == 1


def test_poolings_see_the_captions_own_tokens() -> None:
    hidden, mask = torch.randn(2, 5, 3), torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    torch.testing.assert_close(mean_pool(hidden, mask), torch.stack([hidden[0, 1:3].mean(0), hidden[1, 2:].mean(0)]))
    torch.testing.assert_close(last_pool(hidden, mask), torch.stack([hidden[0, 2], hidden[1, 4]]))
    weighted = (hidden[1, 2] + 2 * hidden[1, 3] + 3 * hidden[1, 4]) / 6
    torch.testing.assert_close(weighted_mean_pool(hidden, mask)[1], weighted)


@pytest.mark.parametrize(('batches_of', 'expected'), [
    (token_batches, [[90], [50, 20, 20], [20, 7, 7, 4, 3, 1]]),
    (padded_batches, [[90], [50, 20], [20, 20, 7, 7, 4], [3, 1]])])
def test_batches_hold_every_text_once_within_the_budget(batches_of: Callable, expected: list[list[int]]) -> None:
    lengths = [3, 50, 7, 7, 90, 1, 20, 20, 20, 4]
    batches = list(batches_of(lengths, 100))
    assert [[lengths[i] for i in batch] for batch in batches] == expected
    assert sorted(i for batch in batches for i in batch) == list(range(10))
    assert list(batches_of([500], 100)) == [[0]] and not list(batches_of([], 100))
