# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A step on fake tensors against the same step on real ones."""

from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from llm2clip.config import (
    FsdpConfig,
    ModelConfig,
    SelfDistillationConfig,
    Stage2Config,
    TextEncoderConfig,
    VisionConfig,
)
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.planning.dry_run import EncoderPass, Meter, StepCost, as_on_cuda, dry_run_step, fake_ranks
from llm2clip.planning.planners import image_batch, on_meta
from llm2clip.training.optim import build_optimizer


def make(recompute: bool = False, device: str = 'meta') -> ComposerLLM2CLIP:
    vision = VisionConfig(name='test_vit', image_size=64, gradient_checkpointing=recompute)
    with torch.device(device):
        return ComposerLLM2CLIP(LLM2CLIP(ModelConfig(vision=vision, embed_dim=32), 48, False))


def measure(
    device_batch: int, microbatch: Optional[int] = None, ranks: int = 1, recompute: bool = False,
    teacher: Optional[EncoderPass] = None, **keys: Any
) -> StepCost:
    algorithms = {'grad_cache': {}} if microbatch and microbatch < device_batch else {}
    config = Stage2Config(**{
        'optimizer': {'name': 'adamw', 'lr': 1e-3}, 'precision': 'fp32', 'algorithms': algorithms,
        'global_train_batch_size': device_batch * ranks, 'device_train_microbatch_size': microbatch, **keys})
    with fake_ranks(ranks):
        return dry_run_step(make(recompute), config, lambda n: image_batch(n, 64, 48), teacher)


def size(tensors: Any) -> int:
    """In the blocks of CUDA's allocator."""
    return sum(-(-tensor.numel() * tensor.element_size() // 512) * 512 for tensor in tensors)


def test_weights_and_optimizer_are_exact() -> None:
    cost = measure(4)
    model = make(device='cpu')
    optimizer = build_optimizer(Stage2Config(optimizer={'name': 'adamw', 'lr': 1e-3}), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [value for state in optimizer.state.values() for value in state.values()]
    assert cost.parameters == size([*model.parameters(), *model.buffers()])
    assert cost.gradients == size(model.parameters()) and cost.optimizer == size(state)
    values = [*model.state_dict().values(), *state]
    assert cost.checkpoint == sum(value.numel() * value.element_size() for value in values)
    shards = measure(4, ranks=3, fsdp=FsdpConfig())
    assert shards.gradients == size(parameter.chunk(3)[0] for parameter in model.parameters())
    assert shards.checkpoint == cost.checkpoint and shards.peak < cost.peak


def test_peak_grows_with_what_it_should() -> None:
    plain = measure(64)
    assert plain.peak == plain.parameters + plain.optimizer + plain.gradients + plain.activations
    cached = measure(64, 8)
    assert cached.activations < plain.activations / 4
    assert measure(256, 8).peak == pytest.approx(cached.peak, rel=0.02)
    # The second of two microbatches adds to the gradients of the first.
    one, two = (measure(n, 32) for n in (32, 64))
    assert two.peak - one.peak == pytest.approx(one.gradients, rel=0.15)
    assert measure(64, recompute=True).activations < plain.activations / 2
    assert measure(64, precision='amp_bf16').activations < 0.8 * plain.activations
    assert measure(64, ranks=8).buckets == sum(parameter.numel() * 4 for parameter in make().parameters())


def test_self_distillation_adds_a_copy_and_a_third_of_the_flops() -> None:
    plain = measure(64, ranks=4, fsdp=FsdpConfig())
    distilled = measure(64, ranks=4, fsdp=FsdpConfig(), self_distillation=SelfDistillationConfig(enabled=True))
    model = make()
    tower = [*model.model.vision_encoder.parameters(), *model.model.visual_projection.parameters()]
    assert distilled.copy == pytest.approx(size(tower) / 4, rel=0.1)
    assert (distilled.optimizer, distilled.gradients) == (plain.optimizer, plain.gradients)
    assert 1.25 < distilled.flops / plain.flops < 1.4 and distilled.peak - plain.peak > distilled.copy


def test_flops_are_those_of_the_step_itself() -> None:
    model = make(device='cpu').train()
    batch = {**image_batch(8, 64, 48), 'text_embedding': torch.randn(8, 48)}
    batch['pixel_values'].zero_()
    with FlopCounterMode(display=False) as counter, Meter() as meter:
        loss: Any = model.loss(model(batch), batch)
        loss.backward()
    plain = measure(8)
    assert plain.flops == meter.flops and meter.recomputed == 0
    # Torch 2.7 has no formula for the attention of a CPU.
    assert 1 <= meter.flops / counter.get_total_flops() < 1.2
    again = measure(8, recompute=True)
    assert again.recomputed == again.flops - plain.flops > 0.2 * plain.flops
    cached = measure(8, 2)
    assert cached.recomputed == pytest.approx(cached.flops - plain.flops, rel=0.01)
    assert measure(8, 3).flops == pytest.approx(cached.flops, rel=0.01)
    even, uneven = (measure(8, n, self_distillation=SelfDistillationConfig(True)) for n in (2, 3))
    assert uneven.flops == pytest.approx(even.flops, rel=0.01)
    sharded = measure(8, ranks=4, fsdp=FsdpConfig(activation_checkpointing=True))
    assert sharded.flops == pytest.approx(again.flops, rel=0.02)


def test_autocast_and_dropout_as_on_cuda() -> None:
    rows = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
    with as_on_cuda(), torch.autocast('cpu', torch.bfloat16):
        assert F.layer_norm(rows, (16,)).dtype == rows.softmax(-1).dtype == rows.pow(2).dtype == torch.float32
        assert F.linear(rows, rows).dtype == torch.bfloat16
        with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
            values = torch.empty(1024, 1024, requires_grad=True)
            before = meter.current
            dropped = F.dropout(values, 0.1)
            assert meter.current - before == 4 * 2**20 + 2**20  # the values, and one byte for each
            dropped.sum().backward()
    with torch.autocast('cpu', torch.bfloat16):
        assert F.layer_norm(rows, (16,)).dtype == torch.bfloat16
    assert torch.UntypedStorage(8).resize_(16).nbytes() == 16


def test_a_teacher_in_the_loop(llm_folder: Path) -> None:
    def teacher(sharded: bool = False) -> EncoderPass:
        return EncoderPass(on_meta(TextEncoderConfig(str(llm_folder), dtype='float32')), 8, 64, 'fp32', sharded)

    plain, taught, alone = measure(16, ranks=2), measure(16, ranks=2, teacher=teacher()), teacher().dry_run()
    # 16 captions are two forward passes.
    assert taught.teacher == alone.teacher and taught.flops == plain.flops + 2 * alone.flops
    assert taught.peak >= plain.peak + alone.teacher
    assert measure(16, ranks=2, teacher=teacher(sharded=True)).teacher < 0.7 * taught.teacher
