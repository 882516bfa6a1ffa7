# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""FLOPs that are counted without memory against those of real steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.utils import get_device
from parts import text_encoder_from_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm2clip.config import AdapterConfig, LoraConfig, ModelConfig, TextEncoderConfig, VisionConfig
from llm2clip.models.adapter import build_adapter
from llm2clip.models.caption_contrastive import CaptionContrastive
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.models.mntp import MaskedNextTokenPrediction
from llm2clip.remote_code.text_encoder_llm2clip import TextEncoder
from llm2clip.training.callbacks.monitors import SpeedMonitor

CLIP = {'model_type': 'clip_vision_model', 'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 3,
        'num_attention_heads': 2, 'patch_size': 8, 'image_size': 32}
TOWERS = {'clip': {'architecture': CLIP, 'mean': [0.5] * 3, 'std': [0.5] * 3}, 'eva02_tiny_patch14_224': {},
          'test_vit': {}, 'test_efficientnet': {}}


@contextmanager
def counted(result: dict[str, int]) -> Iterator[None]:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        yield
    result['flops'] = counter.get_total_flops()


def images(tower: str, **options: Any) -> ComposerLLM2CLIP:
    size = 56 if tower.startswith('eva') else 32
    vision = VisionConfig(tower, False, image_size=size, **TOWERS[tower], **options)
    return ComposerLLM2CLIP(LLM2CLIP(ModelConfig(vision, AdapterConfig(depth=2), embed_dim=16), 8))


def ids(*texts: int) -> dict[str, torch.Tensor]:
    """Of a batch of three images."""
    return {'index': torch.arange(3), 'text_id': torch.zeros(*texts or (3,))}


def image_step(model: ComposerLLM2CLIP, *texts: int) -> int:
    """FLOPs of a real step on three images."""
    size, result = model.model.vision_encoder.preprocessing.image_size, {}
    batch = {'pixel_values': torch.randn(3, 3, size, size), 'text_embedding': torch.randn(*texts or (3,), 8),
             'sample_seed': torch.arange(3)}
    with counted(result):
        outputs = model.train()(batch)
        sum(outputs[name].square().sum() for name in model.feature_names).backward()
    return result['flops']


@pytest.mark.parametrize('tower', TOWERS)
def test_images(tower: str) -> None:
    model = images(tower).eval()
    flops = model.batch_flops()
    assert not model.training and all(not p.is_meta and p.grad is None for p in model.parameters())
    assert flops(ids()) == image_step(model) > 0
    assert flops(ids(3, 5)) == image_step(model, 3, 5) > flops(ids())


def test_an_adapter_with_latents() -> None:
    """Whose keys and values are computed once, however many captions attend to them."""
    model = images('test_vit')
    model.model.adapter = build_adapter(AdapterConfig('transformer', depth=2, heads=2, latents=50), 8, 16)
    assert model.batch_flops()(ids()) == image_step(model)
    assert model.batch_flops()(ids(3, 5)) == image_step(model, 3, 5)


def test_a_step_that_is_cheaper() -> None:
    """Patches that are dropped and gradients that nobody needs do not count; what is recomputed counts once."""
    whole, dropped, locked = images('test_vit'), images('test_vit'), images('test_vit', lock=True)
    dropped.model.vision_encoder.drop_patches(0.5)
    found = [model.batch_flops()(ids()) for model in (whole, dropped, locked)]
    assert found == [image_step(model) for model in (whole, dropped, locked)]
    assert found[1] < found[0] and found[2] < found[0] / 2
    for tower in ('test_vit', 'clip'):
        again, once = images(tower, gradient_checkpointing=True), images(tower)
        expected = once.batch_flops()(ids())
        assert again.batch_flops()(ids()) == expected == image_step(once)
        assert image_step(again) > expected


def encoder(llm: Path, bidirectional: bool = True) -> TextEncoder:
    config = TextEncoderConfig(pretrained=str(llm), bidirectional=bidirectional)
    return text_encoder_from_config(config, LoraConfig(r=4))[0]


@pytest.mark.parametrize(('length', 'bidirectional'), [(7, True), (100, False), (333, True)])
def test_texts(length: int, bidirectional: bool, llm_folder: Path) -> None:
    """Of any length, by what was counted at two others."""
    model = CaptionContrastive(encoder(llm_folder, bidirectional))
    sides = ('query', 'positive')
    batch = {f'{side}_{name}': torch.ones(3, length, dtype=torch.long) for side in sides
             for name in ('input_ids', 'attention_mask', 'embed_mask')}
    flops, result = model.batch_flops(), {}
    with counted(result):
        outputs = model.train()(batch)
        sum(outputs[side].square().sum() for side in sides).backward()
    assert flops(batch) == pytest.approx(result['flops'], rel=1e-3)
    # Padding, and a side that a batch does not have, do not count.
    padded = {name: torch.nn.functional.pad(value, (0, 50)) for name, value in batch.items() if 'query' in name}
    assert flops(padded) == pytest.approx(flops(batch) / 2)


def test_masked_tokens(llm_folder: Path) -> None:
    head = torch.nn.Linear(32, 400, bias=False).requires_grad_(False)
    model = MaskedNextTokenPrediction(encoder(llm_folder), head)
    labels = torch.full((3, 20), -100)
    labels[:, 4:8] = 5
    ones = torch.ones(3, 20, dtype=torch.long)
    batch, result = {'input_ids': ones, 'attention_mask': ones, 'labels': labels}, {}
    flops = model.batch_flops()
    with counted(result):
        model.loss(model.train()(batch), batch).backward()
    assert flops(batch) == pytest.approx(result['flops'], rel=1e-3)


def test_mfu() -> None:
    """Of what Composer divides by time and by the peak of a GPU, the model counts the FLOPs."""
    monitor, model = SpeedMonitor(window_size=2, gpu_flops_available=1e12), images('test_vit')
    logged: dict[str, float] = {}
    state: Any = SimpleNamespace(model=model, device=get_device('cpu'), batch=ids())
    logger: Any = SimpleNamespace(log_metrics=logged.update)
    monitor.init(state, logger)
    for step in range(3):
        state.timestamp = SimpleNamespace(
            sample=SimpleNamespace(value=3 * step), token=SimpleNamespace(value=0),
            total_wct=SimpleNamespace(total_seconds=lambda seconds=0.75 * step: seconds))
        monitor.batch_end(state, logger)
    expected = 2 * image_step(model) / 1.5
    assert logged['throughput/device/flops_per_sec'] == pytest.approx(expected)
    assert logged['throughput/device/mfu'] == pytest.approx(expected / 1e12, rel=1e-3)
