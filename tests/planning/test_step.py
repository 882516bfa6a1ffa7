# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A step on tensors without content against the same step with content."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from composer.core import Precision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from llm2clip.config import FsdpConfig, ModelConfig, TextEncoderConfig, TrainConfig, VisionConfig
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.planning.loading import image_batch
from llm2clip.planning.pretended import Flops, Memory, as_on_cuda
from llm2clip.planning.step import OnlinePlan, StepCost, StepPlan, rehearse_encoder, rehearse_step
from llm2clip.remote_code.text_encoder_llm2clip import TextEncoder
from llm2clip.teacher.llm import load_llm
from llm2clip.training.trainer import build_optimizer

ADAMW = TrainConfig(optimizer={'name': 'adamw', 'lr': 1e-3})
VISION = VisionConfig(name='test_vit', image_size=64)
VECTOR = {'text_embedding': torch.empty(1, 48)}


def make(checkpointing: bool = False, device: str = 'meta') -> ComposerLLM2CLIP:
    vision = dataclasses.replace(VISION, gradient_checkpointing=checkpointing)
    with torch.device(device):
        return ComposerLLM2CLIP(LLM2CLIP(ModelConfig(vision=vision, embed_dim=32), 48, False))


def measure(checkpointing: bool = False, **plan: Any) -> StepCost:
    cached = plan['microbatch'] < plan['device_batch']
    return rehearse_step(make(checkpointing), partial(build_optimizer, ADAMW),
                         lambda n: image_batch(n, 64, VECTOR), StepPlan(cached=cached, **plan))


def size(tensors: Any) -> int:
    """In the blocks of CUDA's allocator."""
    return sum(-(-tensor.numel() * tensor.element_size() // 512) * 512 for tensor in tensors)


def test_weights_and_optimizer_are_exact() -> None:
    cost = measure(ranks=1, device_batch=4, microbatch=4)
    model = make(device='cpu')
    optimizer = build_optimizer(ADAMW, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [value for state in optimizer.state.values() for value in state.values()]
    assert cost.parameters == size([*model.parameters(), *model.buffers()])
    assert cost.gradients == size(model.parameters()) and cost.optimizer == size(state)
    values = [*model.state_dict().values(), *state]
    assert cost.checkpoint == sum(value.numel() * value.element_size() for value in values)
    shards = measure(ranks=3, device_batch=4, microbatch=4, fsdp=FsdpConfig())
    assert shards.gradients == size(parameter.chunk(3)[0] for parameter in model.parameters())
    assert shards.checkpoint == cost.checkpoint and shards.peak < cost.peak


def test_peak_grows_with_what_it_should() -> None:
    plain = measure(ranks=1, device_batch=64, microbatch=64)
    assert plain.peak == plain.parameters + plain.optimizer + plain.gradients + plain.activations
    cached = measure(ranks=1, device_batch=64, microbatch=8)
    assert cached.activations < plain.activations / 4
    assert measure(ranks=1, device_batch=256, microbatch=8).peak == pytest.approx(cached.peak, rel=0.02)
    # The second of two microbatches adds to the gradients of the first.
    one, two = (measure(ranks=1, device_batch=n, microbatch=32) for n in (32, 64))
    assert two.peak - one.peak == pytest.approx(one.gradients, rel=0.15)
    assert measure(checkpointing=True, ranks=1, device_batch=64, microbatch=64).activations < plain.activations / 2
    half = measure(ranks=1, device_batch=64, microbatch=64, precision=Precision.AMP_BF16)
    assert half.activations < 0.8 * plain.activations
    ddp = measure(ranks=8, device_batch=64, microbatch=64)
    assert ddp.buckets == sum(parameter.numel() * 4 for parameter in make().parameters())
    ema = measure(ranks=1, device_batch=64, microbatch=64, ema=True)
    assert ema.peak - plain.peak == plain.parameters


@pytest.mark.parametrize('fsdp', [None, FsdpConfig()])
def test_self_distillation_takes_a_copy_of_the_tower_and_a_third_more_operations(fsdp: Optional[FsdpConfig]) -> None:
    plan: Any = {'ranks': 4, 'device_batch': 64, 'microbatch': 64, 'fsdp': fsdp}
    plain, held = measure(**plan), measure(**plan, distilled=True)
    model = make()
    tower = [*model.model.vision_encoder.parameters(), *model.model.visual_projection.parameters()]
    assert held.copy == pytest.approx(size(tower) / (4 if fsdp else 1), rel=0.1)
    assert (held.optimizer, held.checkpoint, held.gradients) == (plain.optimizer, plain.checkpoint, plain.gradients)
    assert 1.25 < held.flops / plain.flops < 1.4 and held.peak - plain.peak > held.copy


def test_flops_are_those_of_the_step_itself() -> None:
    model = make(device='cpu').train()
    batch = {**image_batch(8, 64, VECTOR), 'text_embedding': torch.randn(8, 48)}
    batch['pixel_values'].zero_()
    with FlopCounterMode(display=False) as counter, Flops() as ours:
        loss: Any = model.loss(model(batch), batch)
        loss.backward()
    plain = measure(ranks=1, device_batch=8, microbatch=8)
    assert plain.flops == ours.total and ours.again == 0
    # Torch has no formula for the attention of a CPU.
    assert ours.total - ours.attention == counter.get_total_flops() and ours.attention > 0
    again = measure(checkpointing=True, ranks=1, device_batch=8, microbatch=8)
    assert again.recomputed == again.flops - plain.flops > 0.2 * plain.flops
    cached = measure(ranks=1, device_batch=8, microbatch=2)
    assert cached.recomputed == pytest.approx(cached.flops - plain.flops, rel=0.01)
    sharded = measure(ranks=4, device_batch=8, microbatch=8, fsdp=FsdpConfig(activation_checkpointing=True))
    assert sharded.flops == pytest.approx(again.flops, rel=0.02)


def test_half_as_many_tokens_have_a_quarter_of_the_attention() -> None:
    cost = StepCost(flops=1200, attention=200, recomputed=600)
    cost.shorten(0.5)
    assert (cost.flops, cost.attention, cost.recomputed) == (550, 50, 275)


def test_autocast_and_dropout_as_on_cuda() -> None:
    rows = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
    with as_on_cuda(), torch.autocast('cpu', torch.bfloat16):
        assert F.layer_norm(rows, (16,)).dtype == rows.softmax(-1).dtype == rows.pow(2).dtype == torch.float32
        assert F.linear(rows, rows).dtype == torch.bfloat16
        with FakeTensorMode(allow_non_fake_inputs=True), Memory() as memory:
            values = torch.empty(1024, 1024, requires_grad=True)
            before = memory.current
            dropped = F.dropout(values, 0.1)
            assert memory.current - before == 4 * 2**20 + 2**20  # the values, and one byte for each
            dropped.sum().backward()
    with torch.autocast('cpu', torch.bfloat16):
        assert F.layer_norm(rows, (16,)).dtype == torch.bfloat16


def test_a_teacher_in_the_loop(llm_folder: Any) -> None:
    def online(sharded: bool = False) -> OnlinePlan:
        config = TextEncoderConfig(str(llm_folder), dtype='float32')
        return OnlinePlan(TextEncoder(load_llm(config, on_meta=True), config), 8, 64, 'fp32', sharded)

    plain = measure(ranks=2, device_batch=16, microbatch=16)
    taught = measure(ranks=2, device_batch=16, microbatch=16, teacher=online())
    alone = rehearse_encoder(online())
    # 16 captions are two forward passes.
    assert taught.teacher == alone.teacher and taught.flops == plain.flops + 2 * alone.flops
    assert taught.peak >= plain.peak + alone.teacher
    spread = measure(ranks=2, device_batch=16, microbatch=16, teacher=online(sharded=True))
    assert spread.teacher < 0.7 * taught.teacher


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    there = torch.distributed.is_initialized()
    if not there:
        torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/ranks', rank=0, world_size=1)
    try:
        measure(ranks=2, device_batch=4, microbatch=4, fsdp=FsdpConfig())
        assert torch.distributed.get_world_size() == 1 and torch.distributed.get_backend() == 'gloo'
        torch.distributed.all_reduce(value := torch.ones(1))
        assert value.item() == 1
    finally:
        if not there:
            torch.distributed.destroy_process_group()
    assert torch.distributed.is_initialized() is there
    assert nn.LayerNorm(4)(torch.randn(2, 4)).dtype == torch.float32
    assert torch.UntypedStorage(8).resize_(16).nbytes() == 16
