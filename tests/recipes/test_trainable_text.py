# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2 with text encoders that learn, as a user launches it: LoRA on the LLM, CLIP's own text tower, or both."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from composer.devices import DeviceCPU
from evaluated import evaluated
from launched import SGD, losses, run, weights
from recipes_in_process import run_recipe
from safetensors.torch import load_file
from set_files import write_wds
from towers import projected, write_clip
from transformers import AutoModel, AutoTokenizer

from llm2clip.config import (
    ClipTextConfig,
    ConfigError,
    EvaluatedModelConfig,
    LoraConfig,
    Stage2Config,
    TextEncoderConfig,
    TrainableTextConfig,
)
from llm2clip.config.files import load_config
from llm2clip.evaluation.models import EvaluatedModel, load_evaluated_model
from llm2clip.models.joint import ClipBeside
from llm2clip.teacher.clip_text import load_clip_tokenizer
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord
from llm2clip.teacher.llm import load_teacher
from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.runs import load_stage2, with_trained_teacher
from llm2clip.training.text_encoders import load_trained_encoders

TEXTS = ['a red square', 'a blue circle number 7, painted on a plain wall by somebody']


@pytest.fixture(scope='module')
def siglip(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp('siglip'), llm_folder, 'siglip')


@pytest.fixture
def args(stage2_args: list[str], tmp_path: Path) -> list[str]:
    """Without embeddings datasets, and with a zero-shot set."""
    write_wds(tmp_path / 'set', [i % 6 for i in range(17)])
    return [*(arg for arg in stage2_args if '.embeddings.' not in arg), *SGD, 'model.embed_dim=32',
            'train_data.num_workers=0', f'eval_zeroshot.z.source={{name: clip_benchmark, local: {tmp_path}/set}}']


def _load(run: Path, **options: Any) -> EvaluatedModel:
    return load_evaluated_model(EvaluatedModelConfig(run=str(run), **options), run / 'cache', DeviceCPU(), 'm')


def _accuracy(run: Path) -> float:
    """What `evaluate` finds on the zero-shot set."""
    return evaluated(run, {'name': 'clip_benchmark', 'local': f'{run.parent}/set'})['mean_per_class']


@pytest.mark.dist
def test_lora_and_clip_s_text_tower(
    args: list[str], teacher_folder: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    """By method d; stopped on one rank and resumed on two, sharded, with the cache and an uneven microbatch."""
    args = [*args, f'teacher={teacher_folder}', 'trainable_text.lora={r: 4, lora_dropout: 0.0}',
            'trainable_text.method=d',
            f'trainable_text.clip.name={clip}', 'model.adapter={name: transformer, latents: 5}', 'optimizer.lr=0.5',
            'optimizer.momentum=0.9', 'callbacks.save_best={}']
    one, two = tmp_path / 'one', tmp_path / 'two'
    run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={one}')
    assert f'and the text encoder to {one}/teacher' in capsys.readouterr().out
    run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={two}', 'max_duration=3ba', 'save_interval=3ba')
    before = load_file(two / 'teacher/lora.safetensors')
    run('train_stage2', two, [*args, 'fsdp={state_dict_type: full, activation_checkpointing: true}',
                              'algorithms.grad_cache={}', 'device_train_microbatch_size=3'], 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5) and len({*losses(one).values()}) == 6
    # Of the LLM, checkpoints hold LoRA alone.
    found = weights(one)
    assert {name.partition('.')[0] for name in found} == {'model', 'text_encoder', 'beside'}
    assert all('lora_' in name for name in found if name.startswith('text_encoder.'))
    for name in ('teacher/model', 'teacher/lora', 'clip_text/model', 'clip_text/more'):
        trained, expected = (load_file(folder / f'{name}.safetensors') for folder in (two, one))
        for key, value in expected.items():
            torch.testing.assert_close(trained[key], value, rtol=1e-4, atol=1e-6, msg=f'{name}: {key}')
    assert any(not torch.allclose(value, trained, rtol=1e-3) for value, trained in zip(
        before.values(), load_file(one / 'teacher/lora.safetensors').values()))

    # The folders have what the training evaluated.
    metrics = read_metrics(one / 'metrics.jsonl')
    assert metrics['metrics/z/mean_per_class'][6] == pytest.approx(_accuracy(one), rel=1e-6)
    assert metrics['metrics/z/mean_per_class'] == pytest.approx(
        read_metrics(two / 'metrics.jsonl')['metrics/z/mean_per_class'], rel=1e-6)
    model, config, _ = load_stage2(one)
    sides = {side: _load(one, text=side).text_features(TEXTS)[0] for side in ('llm', 'clip', 'both')}
    tower, (encoder, tokenizer) = AutoModel.from_pretrained(clip).eval(), load_teacher(one / 'teacher')
    tower.load_state_dict(load_file(one / 'clip_text/model.safetensors'), strict=False)
    with torch.no_grad():
        llm = model.get_text_features(encoder(**tokenizer(TEXTS)))
        tokens = AutoTokenizer.from_pretrained(clip)(TEXTS, return_tensors='pt', padding=True, truncation=True,
                                                     max_length=12)
        own = F.normalize(projected(tower.get_text_features(tokens.input_ids, tokens.attention_mask)), dim=-1)
        weight = load_file(one / 'clip_text/more.safetensors')['concatenated.projection.weight']
        both = F.normalize(torch.cat([own, llm], 1) @ weight.T, dim=-1)
    for name, expected in (('llm', llm), ('clip', own), ('both', both)):
        torch.testing.assert_close(sides[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    for options, message in (
        ({'weights': 'best'}, '^weights: best, but the run in .* has trained its text encoder'),
        ({'text': 'both', 'truncate_dim': 8}, r'^m\.truncate_dim: 8, expected none'),
        ({'teacher': str(teacher_folder)}, 'another teacher'),
    ):
        with pytest.raises(ValueError, match=message):
            load_evaluated_model(EvaluatedModelConfig(run=str(one), **options), tmp_path, DeviceCPU(), 'm')

    # The LLM's side, as everything that loads an export has it.
    run_recipe(monkeypatch, 'export_hf', f'run={one}', f'out={tmp_path}/export')
    exported = AutoModel.from_pretrained(tmp_path / 'export/llm2clip').eval()
    with torch.no_grad():
        torch.testing.assert_close(exported.get_text_features(TEXTS), llm, rtol=1e-4, atol=1e-5)
    # What is in the place of what a run will write is said before it goes on.
    (one / 'teacher/mine.txt').touch()
    with pytest.raises(ConfigError, match='teacher is there already and is not replaced .*mine.txt'):
        run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={one}', 'max_duration=8ba')


def test_clip_is_fine_tuned_directly(
    args: list[str], siglip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins as what was pretrained, and ends as what `evaluate` finds."""
    args = [*args, f'trainable_text.clip.name={siglip}', 'model.adapter.name=identity', f'model.vision.name={siglip}',
            'model.vision.pretrained=true', 'model.visual_projection=pretrained', 'eval_first=true', 'max_duration=3ba']
    whole = AutoModel.from_pretrained(siglip)
    run_recipe(monkeypatch, 'train_stage2', *args, 'optimizer.lr=0.0', f'save_folder={tmp_path}/begun')
    begun = _load(tmp_path / 'begun')
    theirs = load_evaluated_model(EvaluatedModelConfig(pretrained=str(siglip)), tmp_path, DeviceCPU(), 'm')
    for found, expected in zip(begun.text_features(TEXTS), theirs.text_features(TEXTS)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # and as many that lost their end
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(begun.image_features(pixels), theirs.image_features(pixels), rtol=1e-4, atol=1e-5)
    run_recipe(monkeypatch, 'train_stage2', *args, 'optimizer.lr=0.5', f'save_folder={tmp_path}/run')
    accuracy = read_metrics(tmp_path / 'run/metrics.jsonl')['metrics/z/mean_per_class']
    assert list(accuracy) == [0, 3] and accuracy[3] == pytest.approx(_accuracy(tmp_path / 'run'), rel=1e-6)
    trained = load_file(tmp_path / 'run/clip_text/model.safetensors')['text_model.head.weight']
    assert not torch.allclose(trained, whole.text_model.head.weight, atol=1e-4)
    with pytest.raises(ConfigError, match="^run: .*run/clip_text is the text tower"):
        run_recipe(monkeypatch, 'export_hf', f'run={tmp_path}/run', f'out={tmp_path}/export')
    run_recipe(monkeypatch, 'export_vision', f'run={tmp_path}/run', f'out={tmp_path}/vision')


REQUIRED = ['run_name=r', 'save_folder=f', 'max_duration=1ep', 'global_train_batch_size=8', 'model.vision.name=x',
            'optimizer.lr=1e-3', 'train_data.streams.s.local=d', 'teacher=t']


@pytest.mark.parametrize(('extra', 'message'), [
    (['trainable_text.method=b'], '^trainable_text.clip: required but not set, since trainable_text.method b is about'),
    (['initial_adapter=a', 'trainable_text.clip.name=c'], '^initial_adapter: there is no LLM, since'),
])
def test_what_does_not_go_together_is_refused(extra: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Stage2Config, [*REQUIRED, *extra])
    load_config(Stage2Config, [*REQUIRED, 'trainable_text={lora: {}, clip: {name: c}, method: d}'])


def test_what_cannot_be_trained_is_named(llm_folder: Path, clip: Path, tmp_path: Path) -> None:
    def load(texts: TrainableTextConfig, embed_dim: int = 32) -> None:
        encoders = load_trained_encoders(texts, TextEncoderConfig(str(llm_folder)))
        if (tower := encoders[1]) is not None and texts.method is not None:
            ClipBeside(tower, load_clip_tokenizer(ClipTextConfig(str(clip)), 'c'), texts.method, embed_dim)

    for texts, message in (
        (TrainableTextConfig(clip=ClipTextConfig(str(llm_folder))),
         "^trainable_text.clip: .*, a 'llama' model, expected"),
        (TrainableTextConfig(lora=LoraConfig(target_modules=['x'])),
         "^trainable_text.lora.target_modules: a 'llama' mod"),
        (TrainableTextConfig(clip=ClipTextConfig(str(clip)), method='b'),
         "^model.embed_dim: 16 is not the width of the features of CLIP's text tower, 32, as trainable_text.method b"),
    ):
        with pytest.raises(ValueError, match=message):
            load(texts, 16)
    with pytest.raises(ConfigError, match='^.*/teacher: there is none yet; the run trains its text encoder'):
        with_trained_teacher(tmp_path, Stage2Config(trainable_text=TrainableTextConfig(lora=LoraConfig())),
                         TeacherRecord(Fingerprint.of('x', {}), {}))
