# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Compare the time that plans give to a step with its measured time: python -m recipes.benchmarks.roofline

Writes results/roofline.json.  Peak and bandwidth of this CPU are those of a product of large matrices and of
a copy of a large tensor.  The record has the operations of each step whose times differ the most."""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from llm2clip.config import (
    LoraConfig,
    ModelConfig,
    Stage1Config,
    Stage2Config,
    TextEncoderConfig,
    TrainConfig,
    VisionConfig,
)
from llm2clip.data.text_batches import split_packed, text_sides
from llm2clip.data.vectors import float_vectors
from llm2clip.device import get_device, set_up_process
from llm2clip.io.files import write_json
from llm2clip.planning.dry_run import EncoderPass, Meter, StepCost, dry_run_step, fake_ranks
from llm2clip.planning.planners import image_batch, on_meta
from llm2clip.planning.roofline import GPU
from llm2clip.training import stage1, stage2
from llm2clip.training.optim import build_optimizer
from recipes.benchmarks.measuring import describe, seconds_in_turns

LLM, TOKENS, PAIRS, CAPTIONS, IMAGES, VECTORS = 'yamls/llms/smollm2_135m', 64, 16, 64, 16, 2048
SIZE, ROUNDS = 4096, 5
TRAINING: Any = {'optimizer': {'name': 'adamw', 'lr': 1e-4}, 'device': 'cpu'}
COLUMNS = {'measured, s': ['measured'], 'planned, s': ['planned'], 'planned / measured': ['ratio'],
           'bound by memory, %': ['memory_percent']}
Step = tuple[StepCost, Callable[[], None]]  # as planned, and to be measured


def kernels() -> dict[str, Callable[[], object]]:
    """Return products of large matrices, and a copy of a large tensor."""
    square = torch.randn(SIZE, SIZE)
    values = torch.ones(2**28)
    return {'float32': partial(torch.mm, square, square),
            'bfloat16': partial(torch.mm, square.bfloat16(), square.bfloat16()),
            'copy': partial(torch.empty_like(values).copy_, values)}


@torch.no_grad()
def fill(tensors: Any) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.normal_(std=0.02)


def training(make_model: Callable[[], Any], config: TrainConfig, make_batch: Callable[[int], Any]) -> Step:
    with torch.device('meta'):
        planned, model = make_model(), make_model()
    with fake_ranks(1):
        cost = dry_run_step(planned, config, make_batch)
    model.to_empty(device='cpu').train()
    batch = make_batch(config.global_train_batch_size)
    fill([*model.parameters(), *model.buffers(), *batch.values()])
    optimizer = build_optimizer(config, model)

    def run() -> None:
        part = float_vectors(batch)
        if text_sides(part):
            part, = split_packed(part, PAIRS)
        optimizer.zero_grad()
        model.loss(model(part), part).backward()
        optimizer.step()

    return cost, run


def pairs_of_captions(n: int) -> dict[str, torch.Tensor]:
    batch = {'index': torch.arange(n)}
    for side in ('query_', 'positive_'):
        batch[f'{side}text_id'] = torch.arange(n)
        for name in ('input_ids', 'attention_mask', 'embed_mask'):
            batch[side + name] = torch.ones(n, TOKENS, dtype=torch.long)
    return batch


def tune_llm() -> Step:
    config = Stage1Config(text_encoder=TextEncoderConfig(LLM, dtype='float32'),
                          lora=LoraConfig(lora_dropout=0.0), global_train_batch_size=PAIRS, **TRAINING)
    return training(partial(stage1.make_model, config, on_meta=True), config, pairs_of_captions)


def train_stage2(tower: str, n: int, image_width: int = 0) -> Step:
    """With `image_width`, the tower is frozen, and its features are read in place of images."""
    model = ModelConfig(vision=VisionConfig(name=tower, freeze=image_width > 0), embed_dim=768)
    config = Stage2Config(model=model, global_train_batch_size=n, **TRAINING)
    return training(partial(stage2.make_model, config, 896, load_weights=False), config,
                    partial(image_batch, image_size=224, llm_embed_dim=896, width=image_width))


def extract(dtype: Literal['float32', 'bfloat16']) -> Step:
    config = TextEncoderConfig(LLM, dtype=dtype)
    cost = EncoderPass(on_meta(config), TOKENS, CAPTIONS * TOKENS, 'fp32').dry_run()
    encoder = on_meta(config).to_empty(device='cpu').eval()
    fill([*encoder.parameters(), *encoder.buffers()])
    return cost, EncoderPass(encoder, TOKENS, CAPTIONS * TOKENS, 'fp32').run


STEPS: dict[str, Callable[[], Step]] = {
    f'stage 1, SmolLM2-135M, {PAIRS} pairs': tune_llm,
    f'stage 2, ViT-S/16, {IMAGES} images': partial(train_stage2, 'vit_small_patch16_224', IMAGES),
    f'alignment of {VECTORS:,} vectors': partial(train_stage2, 'vit_base_patch16_224', VECTORS, 768),
    f'extraction, SmolLM2-135M, {CAPTIONS} captions': partial(extract, 'float32'),
    'the same in bfloat16': partial(extract, 'bfloat16'),
}


class Clock(Meter):
    """Measure the seconds of each operation beside those that a plan gives it."""

    def __init__(self, cpu: GPU) -> None:
        super().__init__()
        self.cpu = cpu
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def __torch_dispatch__(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        self.kernels.clear()
        start = time.perf_counter()
        result = super().__torch_dispatch__(func, *args, **kwargs)
        measured = time.perf_counter() - start
        total = self.seconds[func.overloadpacket.__name__]
        total[0] += measured
        total[1] += self.cpu.busy(self.kernels)[0]
        return result


def main() -> None:
    set_up_process(get_device('cpu'))
    runs: dict[str, Any] = {}
    for name, make in STEPS.items():
        cost, run = make()
        # In turns, so that a slow minute of the machine affects all alike.
        seconds = seconds_in_turns({**kernels(), name: run}, ROUNDS)
        flops = 2 * SIZE**3 / 1e12
        bandwidth = 2**31 / 1e12 / seconds['copy']  # 2 GiB are read and written
        cpu = GPU(0, flops / seconds['bfloat16'], flops / seconds['float32'], bandwidth, link=1,
                  reached_flops=1, reached_bandwidth=1)
        planned, memory_bound = cpu.busy(cost.kernels)
        clock = Clock(cpu)
        with clock:
            run()
        operations = sorted(clock.seconds.items(), key=lambda item: -abs(item[1][0] - item[1][1]))
        runs[name] = {'-': {'measured': seconds[name], 'planned': planned, 'ratio': planned / seconds[name],
                            'memory_percent': 100 * memory_bound / planned,
                            'tflops_float32': cpu.fp32, 'tflops_bfloat16': cpu.bf16,
                            'gb_per_second': 1000 * cpu.bandwidth,
                            'operations_measured_and_planned': dict(operations[:6])}}
        print(name, runs[name], flush=True)
    table = {'of': 'step', 'digits': 2, 'columns': COLUMNS, 'rows': {name: name for name in runs}}
    settings = 'peaks of the CPU measured in turns with each step; medians of five'
    write_json(Path('results/roofline.json'), {
        'about': describe() | {'settings': settings}, 'tables': {'steps': table}, 'runs': runs})


if __name__ == '__main__':
    main()
