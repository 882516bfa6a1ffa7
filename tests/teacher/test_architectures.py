# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Every supported architecture, random and small, as a bidirectional encoder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from llms import CONFIGS, TEXTS, WINDOW, save_llm
from parts import text_encoder_from_config
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig

from llm2clip.config import LoraConfig, TextEncoderConfig
from llm2clip.errors import ConfigError
from llm2clip.modeling.text_encoder import POOLINGS, TextEncoder, Tokenized, encode_tokens, pack_tokens
from llm2clip.teacher.llm import ARCHITECTURES, add_lora, load_llm


@pytest.fixture(scope='module', params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest, llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """(number of layers, further options) -> (encoder, tokenizer) of one architecture."""
    root = tmp_path_factory.mktemp(request.param)

    def load(layers: int = 2, **options: object) -> Any:
        folder = root / str(layers)
        if not folder.is_dir():
            save_llm(request.param, layers, llm_folder, folder)
        encoder, tokenizer = text_encoder_from_config(TextEncoderConfig(pretrained=str(folder), **options))
        assert encoder.llm.config.model_type in ARCHITECTURES
        return encoder.eval(), tokenizer

    return load


def _changed(encoder: TextEncoder, batch: dict[str, torch.Tensor], written: int, read: int) -> bool:
    """Whether another token at one position changes the state of another."""
    other = {**batch, 'input_ids': batch['input_ids'].clone()}
    other['input_ids'][0, written] = (other['input_ids'][0, written] + 7) % 300
    states = [encoder(x['input_ids'], x['attention_mask'])[0, read] for x in (batch, other)]
    return not torch.allclose(*states, atol=1e-6)


@pytest.mark.parametrize('bidirectional', [True, False])
def test_the_first_token_sees_the_last_only_without_causal_mask(family: Callable, bidirectional: bool) -> None:
    """No sliding window hides the rest of the text either."""
    encoder, tokenizer = family(layers=1 if bidirectional else 2, bidirectional=bidirectional)
    batch = tokenizer(TEXTS[3:])
    assert batch['input_ids'].shape[1] > 2 * WINDOW
    assert _changed(encoder, batch, -1, 0) is bidirectional
    assert not bidirectional or _changed(encoder, batch, 0, -1)


@pytest.mark.parametrize('bidirectional', [True, False])
def test_company_padding_and_its_side_do_not_matter(family: Callable, bidirectional: bool) -> None:
    """Padding on the left moves a text to later positions.  All these LLMs have rotary position embeddings, which see
    the distance between two tokens alone: so the encoder passes no `position_ids`, and none are missed here."""
    encoder, tokenizer = family(bidirectional=bidirectional)
    alone = torch.cat([encoder(**tokenizer([text])) for text in TEXTS])
    batch = tokenizer(TEXTS)
    longer = {key: torch.nn.functional.pad(value, (0, 9)) for key, value in batch.items()}
    left = {key: torch.stack([row.roll(int((m == 0).sum())) for row, m in zip(value, batch['attention_mask'])])
            for key, value in batch.items()}
    for padded in (batch, longer, left):
        torch.testing.assert_close(encoder(**padded), alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('attention', [None, 'eager'])
@pytest.mark.parametrize('bidirectional', [True, False])
def test_packed_texts_have_the_vectors_and_gradients_of_padded_ones(
    family: Callable, bidirectional: bool, attention: Optional[str]
) -> None:
    encoder, tokenizer = family(bidirectional=bidirectional, attn_implementation=attention)
    # Two of one length, one of a single token, some that begin with tokens which are not pooled.
    tokens = [*tokenizer.tokenize(TEXTS), *tokenizer.tokenize([*TEXTS[::-1], 'b'], 'Find it: '), Tokenized([7], 0, 0)]
    assert min(len(text.ids) for text in tokens) < WINDOW < max(len(text.ids) for text in tokens) // 2
    batch = tokenizer.pad(tokens)
    for encoder.pool, batch_tokens in zip(POOLINGS.values(), (1, 40, 1000)):
        with torch.no_grad():
            expected = encoder(**batch)
        distances = (encode_tokens(encoder, tokens, batch_tokens) - expected).norm(dim=1)
        assert (distances / expected.norm(dim=1)).max() < 1e-5
    where = torch.randn(len(tokens), encoder.llm_embed_dim, generator=torch.Generator().manual_seed(0))
    packed, parameters = pack_tokens(tokens), list(encoder.parameters())
    gradients = [torch.autograd.grad((encoder(**texts) * where).sum(), parameters) for texts in (batch, packed)]
    for layer in filter(encoder.activation_checkpointing_fn, encoder.modules()):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    gradients.append(torch.autograd.grad((encoder(**packed) * where).sum(), parameters))
    expected, *others = (torch.cat([g.flatten() for g in of]) for of in gradients)
    for found in others:
        assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_sdpa_and_eager_agree(family: Callable) -> None:
    encoder, tokenizer = family(attn_implementation='eager')
    if encoder.llm.config.model_type == 'gemma2':  # whose soft cap on attention scores only eager has
        with pytest.raises(ConfigError, match='attn_implementation'):
            family(attn_implementation='sdpa')
    other, _ = family()
    torch.testing.assert_close(encoder(**tokenizer(TEXTS)), other(**tokenizer(TEXTS)), rtol=1e-3, atol=1e-4)


def test_lora_reaches_every_projection_and_fsdp_every_layer(family: Callable) -> None:
    encoder, _ = family()
    assert sum(map(encoder.fsdp_wrap_fn, encoder.modules())) == 2
    linear = [name for name, module in encoder.llm.named_modules() if isinstance(module, torch.nn.Linear)]
    adapted = [name for name, module in add_lora(encoder.llm, LoraConfig(r=2)).named_modules()
               if hasattr(module, 'lora_A')]
    assert len(adapted) == len(linear) >= 2 * 4


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match='bert.*llama'):
        load_llm(TextEncoderConfig(pretrained=str(tmp_path)))
