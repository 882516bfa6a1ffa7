# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Towers, LLMs and losses on a GPU."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llms import CONFIGS, TEXTS, save_llm
from parts import text_encoder_from_config
from towers import TOWERS
from whole_matrix import CASES, own_rows, sample, whole_matrix

from llm2clip.config import AdapterConfig, ModelConfig, TextEncoderConfig
from llm2clip.modeling.text_encoder import encode_tokens
from llm2clip.models.llm2clip import LLM2CLIP


@pytest.mark.parametrize('precision', ['fp32', 'amp_bf16'])
@pytest.mark.parametrize('name', TOWERS)
def test_features_and_gradients_of_a_tower_equal_a_cpu(name: str, precision: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model = LLM2CLIP(ModelConfig(TOWERS[name], AdapterConfig(depth=1), embed_dim=16), 8).train()
    size = TOWERS[name].image_size
    pixels = torch.randint(256, (4, 3, size, size), dtype=torch.uint8)
    found: list[list[torch.Tensor]] = []
    for place in (torch.device('cpu'), device):
        model.to(place).zero_grad()
        exact = place.type == 'cpu' or precision == 'fp32'
        torch.set_float32_matmul_precision('highest' if exact else 'high')
        torch.backends.cudnn.allow_tf32 = not exact
        with torch.autocast(device.type, torch.bfloat16, enabled=place == device and precision == 'amp_bf16'):
            features = model.get_image_features(pixels.to(place))
        (features.float() * torch.linspace(-1, 1, 16, device=place)).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.vision_encoder.parameters()
                              if parameter.grad is not None])
        found.append([features.detach().cpu().float(), gradient.detach().cpu()])
    (expected, direction), (features, gradient) = found
    rtol, atol = (1e-4, 1e-4) if precision == 'fp32' else (0.1, 0.05)
    torch.testing.assert_close(features, expected, rtol=rtol, atol=atol)
    assert F.cosine_similarity(gradient, direction, dim=0) > (0.99999 if precision == 'fp32' else 0.95)


@pytest.mark.parametrize('bidirectional', [True, False])
@pytest.mark.parametrize('name', CONFIGS)
def test_an_llm_has_the_vectors_that_it_has_on_a_cpu(
    name: str, bidirectional: bool, llm_folder: Path, tmp_path: Path, device: torch.device
) -> None:
    """Packed, padded and alone; and each text alone, whatever kernel its length calls for."""
    save_llm(name, 2, llm_folder, tmp_path)
    encoder, tokenizer = text_encoder_from_config(
        TextEncoderConfig(str(tmp_path), bidirectional=bidirectional, chat_template=False))
    tokens = tokenizer.tokenize([*TEXTS, *TEXTS[::-1], 'b'])
    encoder.eval()
    with torch.no_grad():
        expected = encoder(**tokenizer.pad(tokens))
    encoder.to(device)
    batch = {key: value.to(device) for key, value in tokenizer.pad(tokens).items()}
    torch.set_float32_matmul_precision('highest')
    with torch.no_grad():
        ways = {'padded': encoder(**batch).cpu(), 'packed': encode_tokens(encoder, tokens).cpu(),
                'alone': encode_tokens(encoder, tokens, 1).cpu()}
        half = encode_tokens(encoder, tokens, precision='amp_bf16').cpu()
    for way, vectors in ways.items():
        error = (vectors - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < 1e-4, way
    assert F.cosine_similarity(half, expected).min() > 0.98


@pytest.mark.parametrize('block_size', [None, 4])
@pytest.mark.parametrize('case', CASES)
def test_a_loss_is_float32_whatever_surrounds_it(case: str, block_size: int, device: torch.device) -> None:
    leaves, ids = sample(case)
    expected = whole_matrix(case, leaves, ids)
    expected.backward()
    ours = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
    torch.set_float32_matmul_precision('high')
    with torch.autocast(device.type, torch.bfloat16):
        loss = own_rows(case, ours, ids.to(device), block_size)
    loss.backward()
    torch.set_float32_matmul_precision('highest')
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for leaf, other in zip(ours, leaves):
        if other.grad is not None:
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad.cpu(), other.grad, rtol=1e-4, atol=1e-6)
