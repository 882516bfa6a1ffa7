# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What `plan=true` says against what is so."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import COMMON, run
from parts import make_samples, write_dataset

from llm2clip.config import (
    LoaderConfig,
    LossConfig,
    ModelConfig,
    Stage1Config,
    Stage2Config,
    TrainConfig,
    VisionConfig,
)
from llm2clip.config_files import load_config
from llm2clip.data.caption_pairs import build_caption_pair_loader
from llm2clip.data.image_embeddings import build_image_loader
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.planning.datasets import DatasetPlan
from llm2clip.planning.memory import Memory, StepPlan, step_memory
from llm2clip.planning.plan import Plan, _check_cache, plan_stage1, plan_stage2
from llm2clip.teacher.text_encoder import load_caption_tokenizer
from llm2clip.training.trainer import build_optimizer

ADAMW = TrainConfig(optimizer={'name': 'adamw', 'lr': 1e-3})

pytestmark = pytest.mark.long


def measure(loss: LossConfig, gradient_checkpointing: bool = False, **plan: Any) -> Memory:
    vision = VisionConfig(name='vit_tiny_patch16_224', image_size=64, gradient_checkpointing=gradient_checkpointing)
    with torch.device('meta'):
        model = ComposerLLM2CLIP(LLM2CLIP(ModelConfig(vision=vision, embed_dim=32), 48, False), loss)

    def batch(n: int) -> dict[str, torch.Tensor]:
        return {'pixel_values': torch.empty(n, 3, 64, 64), 'text_embedding': torch.empty(n, 48),
                **{name: torch.zeros(n, dtype=torch.long) for name in ('index', 'text_id', 'sample_seed')}}

    return step_memory(model, lambda model: build_optimizer(ADAMW, model), batch, StepPlan(**plan))


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_parameters_and_optimizer_are_exact() -> None:
    memory = measure(LossConfig(), ranks=1, device_batch=4, microbatch=4)
    vision = VisionConfig(name='vit_tiny_patch16_224', image_size=64)
    model = ComposerLLM2CLIP(LLM2CLIP(ModelConfig(vision=vision, embed_dim=32), 48, False))
    optimizer = build_optimizer(ADAMW, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert memory.parameters == memory.gradients == size(model.parameters())
    assert memory.optimizer == size(value for state in optimizer.state.values() for value in state.values())
    shards = measure(LossConfig(), ranks=3, device_batch=4, microbatch=4, sharded=True)
    assert shards.parameters == size(parameter.chunk(3)[0] for parameter in model.parameters())
    assert shards.optimizer_whole == memory.optimizer and shards.peak < memory.peak


def test_peak_grows_with_what_it_should() -> None:
    plain = measure(LossConfig(), ranks=1, device_batch=64, microbatch=64)
    assert plain.peak > plain.parameters + plain.optimizer + plain.activations
    cached = measure(LossConfig(), ranks=1, device_batch=64, microbatch=8)
    larger = measure(LossConfig(), ranks=1, device_batch=256, microbatch=8)
    assert cached.activations < plain.activations / 4
    images = (256 - 64) * 3 * 64 * 64 * 4
    assert larger.peak - images == pytest.approx(cached.peak, rel=0.02)
    assert measure(LossConfig(), True, ranks=1, device_batch=64, microbatch=64).activations < plain.activations / 2
    half = measure(LossConfig(), ranks=1, device_batch=64, microbatch=64, bfloat16=True)
    assert half.activations < 0.8 * plain.activations
    ddp = measure(LossConfig(), ranks=8, device_batch=64, microbatch=64)
    assert ddp.buckets == ddp.gradients and ddp.logits > 4 * 512 * 512 > plain.logits
    blocks = measure(LossConfig(block_size=64), ranks=8, device_batch=64, microbatch=64)
    assert blocks.logits < ddp.logits / 2
    ema = measure(LossConfig(), ranks=1, device_batch=64, microbatch=64, ema=True)
    assert ema.peak - plain.peak == plain.parameters


@pytest.fixture
def args(image_dataset: Path, sidecar: Path, tmp_path: Path) -> list[str]:
    stream = f'{{local: {image_dataset}, embeddings: {{tiny: {{local: {sidecar}}}}}}}'
    return [*COMMON, f'train_data.streams.s={stream}', 'model.vision.name=test_efficientnet', 'optimizer.lr=0.05',
            'model.vision.image_size=32', 'model.adapter.depth=1', 'model.embed_dim=16', f'save_folder={tmp_path}/run',
            'train_data.caption_mix={short: 1, long: 3}', 'max_duration=3ep', 'train_data.num_workers=0']


def stage2(*args: str) -> Plan:
    return plan_stage2(load_config(Stage2Config, list(args)))


def test_steps_and_data_are_those_of_the_loader(args: list[str], image_dataset: Path, no_leftovers: None) -> None:
    plan = stage2(*args, 'train_data.streams.s.repeat=1.6')
    config = load_config(Stage2Config, [*args, 'train_data.streams.s.repeat=1.6'])
    loader = build_image_loader(config.train_data, config.model.vision.image_size, 8, 0, True, 'train_data')
    data, = plan.datasets
    assert plan.epoch_steps == len(loader.dataloader) == 12 and plan.steps == 36
    assert (data.samples, data.drawn, data.captions) == (64, 102, {'short': 0.25, 'long': 0.75})
    assert data.size == size_of_shards(image_dataset)
    assert (plan.checkpoints, plan.kept) == (18, 2)
    assert plan.modules['adapter'] == (sum(p.numel() for p in LLM2CLIP(config.model, 32).adapter.parameters()), 0)
    assert plan.modules['visual_projection'] == (256 * 16, 0) and not plan.problems
    text = str(plan)
    assert '102 samples and 12 steps per epoch; 36 steps, 288 samples in all' in text
    assert 's: 64 samples, 102 per epoch (short 25%, long 75%)' in text
    assert 'warning: 6 samples of an epoch fill no batch' in text


def size_of_shards(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob('*.mds'))


def test_each_batch_of_stage1_is_of_one_stream(
    image_dataset: Path, llm_folder: Path, tmp_path: Path, no_leftovers: None
) -> None:
    write_dataset(make_samples(45, images=False), tmp_path / 'texts')
    texts = tmp_path / 'texts/train'
    streams = f'{{a: {{local: {image_dataset}, proportion: 0.7}}, b: {{local: {texts}, proportion: 0.3}}}}'
    args = [*COMMON, f'text_encoder.pretrained={llm_folder}', f'train_data.streams={streams}', 'optimizer.lr=0.1',
            'train_data.pairs=[{query: [short], positive: [long]}]', f'save_folder={tmp_path}/run', 'max_duration=2ep',
            'train_data.num_workers=0', 'text_encoder.max_length=32', 'learn_scale=true']
    config = load_config(Stage1Config, args)
    plan = plan_stage1(config)
    loader = build_caption_pair_loader(config.train_data, load_caption_tokenizer(config.text_encoder), 8, 0, True, 't')
    assert [data.drawn for data in plan.datasets] == [76, 33]
    assert plan.epoch_steps == sum(1 for _ in loader.dataloader) == 76 // 8 + 33 // 8
    assert plan.texts == 2 * 8 * plan.steps == 2 * 8 * 26 and plan.tokens == 32 * plan.texts
    trainable, frozen = plan.modules['lora']
    assert trainable > 0 == frozen and plan.modules['text_encoder'][0] == 0 and plan.modules['scale'] == (1, 0)
    # Of checkpoints, only what is trained, with the state of Adam.
    assert plan.memory and plan.checkpoint == 4 * (trainable + 1) + plan.memory.optimizer
    warm = plan_stage1(load_config(Stage1Config, [*args, 'objective=mntp', 'train_data.texts={short: 1.0}']))
    assert warm.memory and warm.texts == warm.steps * 8 and not warm.problems


def test_what_will_stop_the_run_is_said(args: list[str], image_dataset: Path, sidecar: Path, tmp_path: Path) -> None:
    write_dataset(make_samples(40), tmp_path / 'other')
    cases = [
        (['train_data.streams.s.local=/nowhere'], r'streams\.s\.local: there is no MDS dataset in /nowhere'),
        ([f'train_data.streams.s.local={tmp_path}/other/train'], r'streams\.s: sidecar .* belongs to another dataset'),
        ([f'train_data.streams.s.local={tmp_path}/cache', f'train_data.streams.s.remote={tmp_path}/gone'],
         r'gone/index\.json does not exist'),
        (['train_data.caption_mix={medium: 1}'], r"column 'caption\.medium' is missing"),
        (['train_data.streams.s.embeddings.big.local=x'], r'dataset s has sidecars of 2 teachers'),
        (['train_data.teachers=[big]'], r"there is no sidecar of 'big', only of tiny"),
        (['device_train_microbatch_size=3'], r'would only see the negatives inside it'),
        (['global_train_batch_size=128'], r'an epoch has 64 samples, fewer than one global batch of 128'),
        (['train_data.cache_limit=10kb'], r'cache_limit: 10kb is less than four shards'),
        (['optimizer.name=lion'], r"optimizer: there is no 'lion'"),
        (['optimizer.lr=-1'], r'optimizer: Invalid learning rate: -1'),
        (['callbacks.save_best={}'], r'callbacks.save_best: there is no eval_data'),
        ([f'eval_data.streams.s={{local: {image_dataset}, embeddings: {{tiny: {{local: {sidecar}}}}}}}',
          'callbacks.save_best={metric: nosuch}'],
         r"callbacks.save_best.metric: 'nosuch' is never computed, expected retrieval_recall@10"),
    ]
    for extra, message in cases:
        plan = stage2(*args, *extra)
        assert any(re.search(message, problem) for problem in plan.problems), (extra, plan.problems)
    assert not stage2(*args).problems


def test_a_remote_is_asked_for_its_index_only(
    args: list[str], image_dataset: Path, sidecar: Path, tmp_path: Path
) -> None:
    cache = tmp_path / 'cache'
    remote = [f'train_data.streams.s.local={cache}/images', f'train_data.streams.s.remote={image_dataset}',
              f'train_data.streams.s.embeddings.tiny.local={cache}/sidecar',
              f'train_data.streams.s.embeddings.tiny.remote={sidecar}']
    plan = stage2(*args, *remote)
    assert not plan.problems and plan.datasets == stage2(*args).datasets and not cache.exists()
    shutil.copytree(image_dataset, cache / 'images')
    assert stage2(*args, *remote).datasets == plan.datasets


def test_a_sharded_run_with_layer_decay_and_recomputation(args: list[str]) -> None:
    plain = stage2(*args, 'layer_decay=0.85')
    sharded = stage2(*args, 'layer_decay=0.85', 'fsdp={activation_checkpointing: true, state_dict_type: sharded}')
    assert plain.memory and sharded.memory and not sharded.problems
    assert sharded.memory.activations < plain.memory.activations
    both = stage2(*args, 'fsdp={activation_checkpointing: true}', 'model.vision.gradient_checkpointing=true')
    assert any('gradient_checkpointing recomputes the same blocks already' in problem for problem in both.problems)


def test_a_cache_that_holds_half_of_the_data() -> None:
    plan = Plan(1, 8, 8, 8, datasets=[DatasetPlan('s', 64, 9_000, 1_000, {}, sidecars={'tiny': 1_000})])
    _check_cache(plan, LoaderConfig(cache_limit='5000b'))
    assert not plan.problems and re.search('holds 50% of the data; the rest is downloaded again', plan.warnings[0])


def test_as_a_user_calls_it(args: list[str], tmp_path: Path) -> None:
    said = run('train_stage2', tmp_path / 'run', [*args, 'plan=true', 'plan_ranks=2'])
    assert '2 GPUs, 8 samples per step, 4 per GPU in microbatches of 4' in said and 'buckets' in said
    said = run('train_stage2', tmp_path / 'run', [*args, 'plan=true', 'plan_ranks=3'], ok=False)
    assert 'WILL FAIL: global_train_batch_size: 8 is not divisible by the number of ranks, 3' in said
    assert not (tmp_path / 'run').exists()
