# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What `plan=true` says against what is so."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import COMMON
from parts import make_samples, write_dataset
from recipes_in_process import run_recipe
from refusals import refused_at
from torch.utils.flop_counter import FlopCounterMode

import llm2clip.planning.planners
from llm2clip.config import (
    ClipTextConfig,
    ExtractConfig,
    ExtractImagesConfig,
    LoraConfig,
    Stage1Config,
    Stage2Config,
    TextEncoderConfig,
    VisionConfig,
)
from llm2clip.config.loading import load_config
from llm2clip.data.caption_pair_dataset import build_caption_pair_loader
from llm2clip.data.image_text_dataset import build_image_loader
from llm2clip.data.schema import read_samples
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.planning.dry_run import Meter, StepCost, fake_ranks
from llm2clip.planning.plan import Plan, sum_of
from llm2clip.planning.planners import make_plan, on_meta
from llm2clip.planning.roofline import GPUS, Kernel
from llm2clip.teacher.clip_text import load_clip_text
from llm2clip.teacher.llm import build_text_encoder, load_caption_tokenizer

pytestmark = pytest.mark.long


@pytest.fixture
def args(image_dataset: Path, embeddings: Path, tmp_path: Path) -> list[str]:
    stream = f'{{local: {image_dataset}, embeddings: {{tiny: {{local: {embeddings}}}}}}}'
    return [*COMMON, f'train_data.streams.s={stream}',
            'model.vision={name: test_efficientnet, pretrained: false}', 'optimizer.lr=0.05',
            'model.vision.image_size=32', 'model.adapter.depth=1', 'model.embed_dim=16', f'save_folder={tmp_path}/run',
            'train_data.caption_weights={short: 1, long: 3}', 'max_duration=3ep', 'train_data.num_workers=0']


def stage2(*args: str) -> Plan:
    return make_plan(load_config(Stage2Config, list(args)))


def products_in_16_bits(plan: Plan) -> set[bool]:
    return {kernel.in_16_bits for kernel in plan.cost.kernels if kernel.flops}


def test_steps_and_data_are_those_of_the_loader(args: list[str], image_dataset: Path, no_leftovers: None) -> None:
    plan = stage2(*args, 'train_data.streams.s.repeat=1.6')
    config = load_config(Stage2Config, [*args, 'train_data.streams.s.repeat=1.6'])
    loader = build_image_loader(config.train_data, config.model.vision.image_size, 8, 0, train=True)
    data, = plan.datasets
    assert plan.epoch_steps == len(loader.dataloader) == 13 and plan.steps == 39
    assert (data.samples, data.epoch_samples) == (64, 102)
    assert data.size == sum(path.stat().st_size for path in image_dataset.rglob('*.mds'))
    assert (plan.checkpoints, plan.kept) == (7, 2)
    assert plan.modules['adapter'] == (sum(p.numel() for p in LLM2CLIP(config.model, 32).adapter.parameters()), 0)
    assert plan.modules['visual_projection'] == (256 * 16, 0) and not plan.errors
    assert '102 samples and 13 steps per epoch; 39 steps, 312 samples in all' in str(plan)
    assert '102 per epoch, 4.78 epochs of it in all;' in str(plan)


def test_batches_are_of_one_stream(image_dataset: Path, llm_folder: Path, tmp_path: Path, no_leftovers: None) -> None:
    write_dataset(make_samples(45, images=False), tmp_path / 'texts')
    texts = tmp_path / 'texts/train'
    streams = f'{{a: {{local: {image_dataset}, proportion: 0.72}}, b: {{local: {texts}, proportion: 0.28}}}}'
    args = [*COMMON, f'text_encoder.pretrained={llm_folder}', f'train_data.streams={streams}', 'optimizer.lr=0.1',
            'train_data.pairs=[{query: [short], positive: [long]}]', f'save_folder={tmp_path}/run', 'max_duration=2ep',
            'train_data.num_workers=0', 'text_encoder.max_length=32', 'learn_logit_scale=true']
    config = load_config(Stage1Config, args)
    plan = make_plan(config)
    loader = build_caption_pair_loader(config.train_data, load_caption_tokenizer(config.text_encoder), 8, 0, train=True)
    assert [data.epoch_samples for data in plan.datasets] == [78, 31]
    assert plan.epoch_steps == sum(1 for _ in loader.dataloader) == 80 // 8 + 32 // 8
    assert plan.texts == 2 * 8 * plan.steps == 2 * 8 * 28 and 0 < plan.tokens < 32 * plan.texts
    assert '78 per epoch, 2.44 epochs' in str(plan) and '31 per epoch, 1.38 epochs' in str(plan)
    trainable, frozen = plan.modules['lora']
    assert trainable > 0 == frozen and plan.modules['text_encoder'][0] == 0 and plan.modules['scale'] == (1, 0)
    # Of checkpoints, only what is trained, with the state of Adam.
    assert plan.cost and plan.cost.checkpoint == 12 * (trainable + 1) + 4 * (2 * 2 * 7 + 1)  # and Adam's steps
    warm = make_plan(load_config(Stage1Config, [*args, 'objective=mntp', 'train_data.texts={short: 1.0}']))
    assert warm.cost and warm.texts == warm.steps * 8 and not warm.errors


@pytest.fixture
def without_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans whose step is not measured, but costs the more the larger its batch is."""
    def measured(model: torch.nn.Module, config: Any, *_: Any) -> StepCost:
        flops = 10**12 * config.global_train_batch_size
        return StepCost(flops=flops, peak=2**30 * config.global_train_batch_size,
                        kernels={Kernel(flops, size=10**9, in_16_bits=True): 1})

    monkeypatch.setattr(llm2clip.planning.planners, 'dry_run_step', measured)


@pytest.mark.usefixtures('without_step')
def test_a_plan_names_what_will_stop_the_run(args: list[str], tmp_path: Path) -> None:
    for message, extra in {
        'streams.s: there is no MDS dataset': ['train_data.streams.s.local=/nowhere'],
        'gone/index.json does not exist': [f'train_data.streams.s.local={tmp_path}/cache',
                                           f'train_data.streams.s.remote={tmp_path}/gone'],
        'device_train_microbatch_size: ': ['device_train_microbatch_size=3'],
        'global_train_batch_size: 128': ['global_train_batch_size=128'],
        'global_train_batch_size: 64': ['global_train_batch_size=64', 'train_data.streams.s.repeat=0.97'],
        'train_data.streams.s: ': ['train_data.streams.s.repeat=0.01'],
        'train_data.cache_limit: ': ['train_data.cache_limit=10kb'],
        'callbacks.save_best.dataloader_label: ': ['callbacks.save_best={}'],
        'precision: amp_bf16': ['precision=amp_bf16'],
    }.items():
        plan = stage2(*args, *extra)
        assert any(message in problem for problem in plan.errors), (extra, plan.errors)
    assert not stage2(*args).errors
    with fake_ranks(2):
        assert stage2(*args).steps == 3 * 64 // 8  # each rank takes part in every step


@pytest.mark.usefixtures('without_step')
def test_only_the_index_is_downloaded(args: list[str], image_dataset: Path, embeddings: Path, tmp_path: Path) -> None:
    cache = tmp_path / 'cache'
    remote = [f'train_data.streams.s.local={cache}/images', f'train_data.streams.s.remote={image_dataset}',
              f'train_data.streams.s.embeddings.tiny.local={cache}/embeddings',
              f'train_data.streams.s.embeddings.tiny.remote={embeddings}']
    plan = stage2(*args, *remote)
    assert not plan.errors and plan.datasets == stage2(*args).datasets and not cache.exists()
    shutil.copytree(image_dataset, cache / 'images')
    assert stage2(*args, *remote).datasets == plan.datasets


def test_the_recipe_prints_the_plan(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(monkeypatch, 'train_stage2', *args, 'plan=true', 'plan_ranks=2')
    said = capsys.readouterr().out
    assert '2 GPUs, 8 samples per step, 4 per GPU in microbatches of 4' in said and 'buckets' in said
    with pytest.raises(SystemExit, match='1'):
        run_recipe(monkeypatch, 'train_stage2', *args, 'plan=true', 'plan_ranks=3')
    assert capsys.readouterr().out.startswith('WILL FAIL: global_train_batch_size: 8')
    monkeypatch.setenv('RANK', '1')  # the first rank plans for all
    run_recipe(monkeypatch, 'train_stage2', *args, 'plan=true', 'plan_ranks=3')
    assert not capsys.readouterr().out
    assert not (tmp_path / 'run').exists()


def test_a_plan_needs_no_data(args: list[str]) -> None:
    missing = str(stage2(*args, 'train_data.streams.s.local=/nowhere'))
    assert 'no data is there: plan_samples=' in missing and '0 samples' not in missing
    plan = stage2(*args, 'train_data.streams.s.local=/nowhere', 'plan_samples=15e6', 'plan_price=2.5',
                  'plan_mfu=0.4')
    assert (plan.epoch_samples, plan.epoch_steps, plan.steps) == (15_000_000, 1_875_000, 5_625_000) and not plan.errors
    assert plan.cost
    seconds = plan.cost.flops / (67e12 * 0.4)  # the run computes in float32
    assert plan.seconds(GPUS['H100']) == pytest.approx(seconds)
    row = next(line.split() for line in str(plan).splitlines() if line.startswith('  H100'))
    hours = seconds * 5_625_000 / 3600
    assert [float(value) for value in row[-2:]] == [round(hours), round(2.5 * hours)]


def test_extraction(image_dataset: Path, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / 'out'
    args = [f'teacher={{type: llm, pretrained: {llm_folder}, max_length: 32}}', f'datasets.s.local={image_dataset}',
            f'out={out}', 'device=cpu', 'batch_tokens=64', 'storage=int8']
    plan = make_plan(load_config(ExtractConfig, args))
    texts = sum(1 for sample in read_samples(image_dataset) for key in sample if key.startswith('caption.'))
    llm = on_meta(TextEncoderConfig(str(llm_folder)))
    assert plan.texts == texts and plan.cost and plan.cost.teacher == Meter().add_module(llm) and not plan.errors
    # Without autocast, products have the dtype of the weights.
    assert products_in_16_bits(plan) == {False}
    assert products_in_16_bits(make_plan(load_config(ExtractConfig, [*args, 'teacher.dtype=bfloat16']))) == {True}
    run_recipe(monkeypatch, 'extract_embeddings', *args)
    written = sum(path.stat().st_size for path in out.rglob('*.mds'))
    assert plan.vectors['s'] == texts * (llm.llm_embed_dim + 4)  # a byte per number and a float32 scale per vector
    with fake_ranks(2):
        assert plan.steps and make_plan(load_config(ExtractConfig, args)).steps == plan.steps / 2
    assert plan.vectors['s'] < written < 1.5 * plan.vectors['s'] + 64 * texts
    # A million images, with the captions of those on disk and their length.
    captions = texts // plan.datasets[0].samples
    more = make_plan(load_config(ExtractConfig, [*args, 'plan_samples=1e6', 'plan_captions=9']))
    assert more.texts == captions * 1_000_000 and more.tokens / more.texts == plan.tokens / plan.texts
    there = make_plan(load_config(ExtractConfig, [*args, 'plan_samples=1e6', 'plan_tokens=16']))
    assert there.tokens == 16 * there.texts and there.steps == there.texts / 4
    # Without data, the number and the length of the captions are assumed.
    missing = [*args[1:], 'teacher=/nowhere', f'plan_llm={llm_folder}', 'plan_samples=1e6', 'plan_captions=7',
               'datasets.s.local=/nowhere', 'batch_tokens=1024']
    absent = make_plan(load_config(ExtractConfig, missing))
    assert absent.cost and absent.texts == 7_000_000 and absent.tokens == 80 * absent.texts
    assert absent.vectors == {'all': absent.texts * (llm.llm_embed_dim + 4)}
    assert '1,000,000 images with 7 captions each' in str(absent) and 'mean of 80 tokens is assumed' in str(absent)
    assert len(make_plan(load_config(ExtractConfig, [*args[1:], 'teacher=/nowhere'])).errors) == 1
    other = make_plan(load_config(ExtractConfig, [*args[1:], 'teacher={type: sentence_transformers, name: x}']))
    assert not other.errors and other.warnings and other.steps is None


def test_image_extraction(
    args: list[str], image_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'out'
    extract = [f'datasets.s.local={image_dataset}', f'out={out}', 'device=cpu', 'batch_size=16',
               'vision={name: test_vit, image_size: 64, pretrained: false}']
    plan = make_plan(load_config(ExtractImagesConfig, extract))
    with torch.device('meta'):
        tower = VisionEncoder(VisionConfig('test_vit', image_size=64), load_weights=False)
    images = plan.datasets[0].samples
    assert plan.cost and plan.steps == images / 16 and not plan.errors and products_in_16_bits(plan) == {False}
    assert plan.cost.parameters == Meter().add_module(tower) < plan.cost.peak
    with FlopCounterMode(display=False) as counter:
        tower.eval()(torch.empty(16, 3, 64, 64, device='meta'))
    assert plan.cost.flops == pytest.approx(counter.get_total_flops(), rel=0.2)  # attention has no formula on meta
    run_recipe(monkeypatch, 'extract_image_embeddings', *extract, 'plan=true')
    assert not out.exists()
    run_recipe(monkeypatch, 'extract_image_embeddings', *extract)
    written = sum(path.stat().st_size for path in out.rglob('*.mds'))
    assert plan.vectors == {'s': images * 2 * tower.width} and plan.vectors['s'] < written
    more = make_plan(load_config(ExtractImagesConfig, [*extract, 'plan_samples=3e6', 'storage=int8']))
    assert more.vectors == {'all': 3_000_000 * (tower.width + 4)} and more.steps == 3_000_000 / 16
    cache = tmp_path / 'cache'
    stream = f'train_data.streams.s.image_embeddings={{local: {cache}, remote: {out}/s}}'
    vision = 'model.vision={name: test_vit, image_size: 64, pretrained: false, freeze: true}'
    assert not stage2(*args, stream, vision, 'model.vision.image_size=64').errors and not cache.exists()


@pytest.mark.usefixtures('without_step')
def test_lengths_of_captions(
    args: list[str], image_dataset: Path, llm_folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    """They come from data on disk, whatever `plan_samples` says; otherwise they are assumed."""
    stage1 = [*COMMON, f'text_encoder.pretrained={llm_folder}', f'train_data.streams.s.local={image_dataset}',
              'train_data.pairs=[{query: [short], positive: [long]}]', f'save_folder={tmp_path}/run',
              'optimizer.lr=0.1', 'text_encoder.max_length=256', 'max_duration=1ep']
    here, more, absent = (make_plan(load_config(Stage1Config, [*stage1, *extra])) for extra in (
        [], ['plan_samples=6400'], ['plan_samples=6400', 'train_data.streams.s.local=/nowhere']))
    assert more.texts == 100 * here.texts and more.tokens == 100 * here.tokens and 'assumed' not in str(more)
    assert absent.tokens == 80 * absent.texts and 'mean of 80 tokens is assumed' in str(absent)
    assert absent.teacher == 4 * sum(p.numel() for p in on_meta(TextEncoderConfig(str(llm_folder))).parameters())
    # Stage 2 draws a caption by the weights.
    lora = [*args, f'teacher={teacher_folder}', 'model.embed_dim=32', 'trainable_text.lora={r: 4}']
    lengths = {key: [len(sample[f'caption.{key}'].strip()) for sample in read_samples(image_dataset)]
               for key in ('short', 'long')}
    drawn = [(1, n) for n in lengths['short'] if n] + [(3, n) for n in lengths['long'] if n]
    for extra in ([], ['plan_samples=6400']):
        mean = stage2(*lora, *extra).characters
        # Of the first shard alone.
        assert mean == pytest.approx(sum(w * n for w, n in drawn) / sum(w for w, _ in drawn), rel=0.01)


def test_a_pipeline(
    args: list[str], image_dataset: Path, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    extract = [f'teacher={{type: llm, pretrained: {llm_folder}, max_length: 32}}', f'datasets.s.local={image_dataset}',
               f'out={tmp_path}/out']
    file = tmp_path / 'plan.yaml'
    file.write_text(json.dumps({'steps': {'embed': ['extract_embeddings', *extract], 'train': ['train_stage2', *args],
                                          'other': ['prepare_data', 'source.name=emoji', 'out=o']}}))
    run_recipe(monkeypatch, 'run', str(file), 'plan=true', 'ranks=2', 'plan_samples=1e9', 'plan_price=3')
    table = capsys.readouterr().out.split('\n\n')[-1].splitlines()
    with fake_ranks(2):
        plans = [make_plan(load_config(ExtractConfig, [*extract, 'plan_samples=1e9'])),
                 stage2(*args, 'plan_samples=1e9')]
    hours = sum(plan.hours(GPUS['H100']) for plan in plans)
    assert [line.split()[0] for line in table[1:4]] == ['embed', 'train', 'all']
    assert table[3].split()[1] == f'{max(plan.cost.peak for plan in plans) / 2**30:.0f}'
    assert table[3].split()[4] == f'{hours:,.1f}' and table[5].split()[1] == f'{hours * 2 * 3:,.0f}'
    assert plans[0].cost and plans[1].cost and plans[1].disk == 2 * plans[1].cost.checkpoint
    hours = 2 * plans[1].hours(GPUS['H100'])
    assert sum_of({'a': plans[1], 'b': plans[1]}).splitlines()[3].split()[4] == f'{hours:,.1f}'
    plans[0].cost.peak = 100 * 2**30
    assert sum_of({'big': plans[0]}).splitlines()[1].split()[3:5] == ['-', '-']
    with pytest.raises(SystemExit, match='1'):
        run_recipe(monkeypatch, 'run', str(file), 'plan=true', 'plan_ranks=3')


def test_trainable_text_encoders(args: list[str], llm_folder: Path, teacher_folder: Path, clip: Path) -> None:
    args = [*args, f'teacher={teacher_folder}', 'model.embed_dim=32', 'plan_samples=64']
    plain = stage2(*args).cost
    lora = stage2(*args, 'trainable_text.lora={r: 4}', 'plan_tokens=16')
    encoder = build_text_encoder(TextEncoderConfig(str(teacher_folder)), LoraConfig(r=4), on_meta=True)
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in encoder.parameters()) - trained
    assert lora.modules['lora'] == (trained, 0) and lora.modules['text_encoder'] == (0, frozen)
    assert plain and lora.cost and not lora.errors and (lora.texts, lora.tokens) == (8 * 24, 16 * 8 * 24)
    assert lora.cost.parameters - plain.parameters == pytest.approx(Meter().add_module(encoder), rel=0.01)
    assert lora.cost.checkpoint - plain.checkpoint == pytest.approx(3 * 4 * trained, rel=0.01)
    # The layers' weights are multiplied in the forward pass, and in the backward pass for the states alone.
    weights = frozen - sum(p.numel() for p in encoder.llm.get_input_embeddings().parameters())
    flops = 2 * 2 * weights * 8 * 16
    assert flops < lora.cost.flops - plain.flops < 2 * flops
    # Of three captions, in parts, by a teacher that is not there yet.
    several = stage2(*args, 'trainable_text.lora={r: 4}', 'train_data.captions_per_image=3', 'plan_tokens=512',
                     'algorithms.grad_cache={}', 'device_train_microbatch_size=4', 'teacher=/nowhere',
                     f'plan_llm={llm_folder}')
    assert several.cost and several.cost.flops > 3 * 512 / 16 * flops and several.texts == 3 * 8 * 24
    assert several.errors == ['teacher: trainable_text.lora needs one, and there is none in /nowhere']
    with refused_at('teacher'):
        stage2(*args, 'trainable_text.lora={r: 4}', 'teacher=/nowhere')
    # CLIP's text tower in place of the LLM.
    clip_text = load_clip_text(ClipTextConfig(str(clip)))
    tower = sum(p.numel() for p in clip_text.parameters())
    direct = stage2(*args, f'trainable_text.clip.name={clip}', 'model.adapter.name=identity')
    assert direct.modules['text_encoder'] == (tower, 0) and not direct.errors
    trained = sum(of_module for of_module, _ in direct.modules.values())
    assert direct.cost and direct.cost.gradients == pytest.approx(4 * trained, rel=0.05)
