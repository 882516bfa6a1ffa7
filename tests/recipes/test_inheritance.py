# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""From CLIP's text features to a stage 2 that begins in CLIP's own space."""

from pathlib import Path

import pytest
import torch
from launched import COMMON, SGD, assert_same_weights, losses, run
from recipes_in_process import run_recipe
from refusals import refused_at
from safetensors.torch import load_file
from towers import projected
from transformers import CLIPModel

from llm2clip.config import InheritanceConfig
from llm2clip.config.loading import load_config
from llm2clip.errors import ConfigError
from llm2clip.models.adapter_folder import load_adapter
from llm2clip.planning.planners import make_plan
from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.runs import Stage2Run


@pytest.fixture(scope='module')
def targets(clip: Path, image_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('targets')
    with pytest.MonkeyPatch.context() as patch:
        run_recipe(patch, 'extract_embeddings', 'teacher.type=clip_text', f'teacher.name={clip}',
                   f'datasets.train.local={image_dataset}', f'out={out}', 'device=cpu')
    return out / 'train'


@pytest.fixture
def args(targets: Path, embeddings: Path, teacher_folder: Path) -> list[str]:
    streams = [f'{data}.streams.s={{local: /no/images/are/read, embeddings: {{tiny: {{local: {embeddings}}}, '
               f'clip_text: {{local: {targets}}}}}}}' for data in ('train_data', 'eval_data')]
    return [*COMMON, *streams, 'adapter.depth=2', 'optimizer={name: adamw, lr: 0.003}', f'teacher={teacher_folder}',
            'eval_data.num_workers=0', 'eval_interval=6ba', 'global_eval_batch_size=16', 'structure=2']


@pytest.mark.dist
def test_two_ranks_learn_what_one_learns_that_is_stopped(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sgd = [*args, *SGD, 'optimizer.lr=0.5']
    with pytest.raises(ConfigError, match='lr_scale'):
        run_recipe(monkeypatch, 'train_inheritance', *sgd, f'save_folder={tmp_path}/one', 'lr_scale={vision: 1.0}')
    assert not (tmp_path / 'one').exists()
    for steps in (4, 6):
        run_recipe(monkeypatch, 'train_inheritance', *sgd, f'save_folder={tmp_path}/one', f'max_duration={steps}ba',
                   f'adapter_folder={tmp_path}/after{steps}')
    output = capfd.readouterr().out
    assert 'resumes from batch 4 (max_duration: 6ba)' in output and f'wrote the adapter to {tmp_path}/after6' in output
    two = [*sgd, 'fsdp={activation_checkpointing: true}', 'algorithms.grad_cache={}', 'device_train_microbatch_size=3',
           'block_size=3']
    run('train_inheritance', tmp_path / 'two', two, 2)
    assert losses(tmp_path / 'two') == pytest.approx(losses(tmp_path / 'one'), rel=1e-5)
    assert_same_weights(*(load_file(tmp_path / name / 'adapter.safetensors') for name in ('two/adapter', 'after6')))
    recalls = {read_metrics(tmp_path / name / 'metrics.jsonl')['metrics/eval/retrieval_recall@10'][6]
               for name in ('two', 'one')}
    assert len(recalls) == 1
    run_recipe(monkeypatch, 'train_inheritance', *two, f'save_folder={tmp_path}/two')
    assert 'is complete' in capfd.readouterr().out
    with pytest.raises(ConfigError, match='structure is 2.0, expected 1.0'):
        run_recipe(monkeypatch, 'train_inheritance', *two, f'save_folder={tmp_path}/two', 'structure=1')


def test_stage2_begins_in_the_space_of_clip(
    args: list[str], clip: Path, stage2_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(monkeypatch, 'train_inheritance', *args, f'save_folder={tmp_path}/inheritance', 'max_duration=30ba',
               'eval_interval=15ba', 'save_interval=30ba')
    metrics = read_metrics(tmp_path / 'inheritance/metrics.jsonl')
    loss = metrics['loss/train/total']
    assert loss[29] < 0.15 * loss[0] and metrics['metrics/eval/retrieval_recall@10'].keys() == {15, 30}

    stage2 = [*stage2_args, 'eval_data=null', f'model.vision.name={clip}', 'model.vision.pretrained=true',
              'model.adapter.depth=2', 'model.embed_dim=32', f'initial_adapter={tmp_path}/inheritance/adapter',
              'self_distillation.enabled=true', 'max_duration=2ba', 'optimizer.lr=0.0',
              'model.visual_projection=pretrained']
    run_recipe(monkeypatch, 'train_stage2', *stage2, f'save_folder={tmp_path}/stage2')
    run = Stage2Run(tmp_path / 'stage2')
    model = run.load_model()
    pixels = torch.randn(2, 3, 32, 32)
    theirs = torch.nn.functional.normalize(projected(CLIPModel.from_pretrained(clip).get_image_features(pixels)))
    torch.testing.assert_close(model.get_image_features(pixels), theirs, rtol=1e-4, atol=1e-5)
    inherited = load_file(tmp_path / 'inheritance/adapter/adapter.safetensors')
    assert all(torch.equal(value, inherited[name]) for name, value in model.adapter.state_dict().items())
    # What interpolation counts as known before.
    initial = run.initial_state()
    assert {name.split('.')[0] for name in initial} == {'vision_encoder', 'visual_projection', 'adapter'}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in initial.items())

    for changed in ('model.adapter.depth=1', 'initial_adapter=/nowhere'):
        with refused_at(changed.partition('=')[0]):
            run_recipe(monkeypatch, 'train_stage2', *stage2, changed, f'save_folder={tmp_path}/other')
    with pytest.raises(ConfigError, match='the adapter in .* comes from another teacher than train'):
        about = tmp_path / 'inheritance/adapter/adapter.json'
        about.write_text(about.read_text().replace('"weights": "', '"weights": "0'))
        load_adapter(model.adapter, run.config.model.adapter, 32, run.record.teacher, about.parent)


def test_a_plan_says_what_it_will_take(args: list[str], tmp_path: Path) -> None:
    def plan(*more: str) -> str:
        return str(make_plan(load_config(InheritanceConfig, [*args, f'save_folder={tmp_path}/run', *more])))

    text = plan('max_duration=3ep')
    assert '64 samples and 8 steps per epoch; 24 steps' in text and 'WILL FAIL' not in text
    assert 'WILL FAIL: train_data.streams.s.embeddings' in plan('train_data.target=x')
    assert 'the width of the targets is not known, 768 is assumed' in plan('plan_samples=1000')
