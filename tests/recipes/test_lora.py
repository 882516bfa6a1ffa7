# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2 that trains LoRA on the LLM or on the vision tower, or CLIP's own text tower, as a user launches it."""

from pathlib import Path

import pytest
import timm
import torch
from evaluated import evaluated, load
from launched import SGD, assert_same_weights, losses, run, weights
from recipes_in_process import REQUIRED, run_recipe
from refusals import refused_at
from safetensors.torch import load_file
from set_files import write_wds
from towers import write_clip
from transformers import AutoModel

from llm2clip.config import ClipTextConfig, LoraConfig, Stage2Config, TextEncoderConfig, TrainableTextConfig
from llm2clip.config.loading import load_config, save_config
from llm2clip.errors import ConfigError
from llm2clip.export.hf import LLM2CLIPModel
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord
from llm2clip.teacher.llm import load_teacher
from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.runs import Stage2Run
from llm2clip.training.text_encoders import load_trained_encoder

TEXTS = ['a red square', 'a blue circle number 7, painted on a plain wall by somebody']


@pytest.fixture
def args(stage2_args: list[str], tmp_path: Path) -> list[str]:
    """Without embeddings datasets, and with a zero-shot set."""
    write_wds(tmp_path / 'set', [i % 6 for i in range(17)])
    return [*(arg for arg in stage2_args if '.embeddings.' not in arg), *SGD, 'model.embed_dim=32',
            'train_data.num_workers=0', f'eval_zeroshot.z.source={{name: clip_benchmark, local: {tmp_path}/set}}']


def _accuracy(run: Path) -> float:
    return evaluated(run, {'name': 'clip_benchmark', 'local': f'{run.parent}/set'})['mean_per_class']


@pytest.mark.dist
def test_lora_on_the_llm(
    args: list[str], teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped on one rank and resumed on two, sharded, with the cache and an uneven microbatch."""
    args = [*args, f'teacher={teacher_folder}', 'trainable_text.lora={r: 4, lora_dropout: 0.0}',
            'optimizer.lr=0.5', 'optimizer.momentum=0.9', 'callbacks.save_best={}']
    one, two = tmp_path / 'one', tmp_path / 'two'
    run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={one}')
    assert f'and the text encoder to {one}/teacher' in capsys.readouterr().out
    run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={two}', 'max_duration=3ba')
    before = load_file(two / 'teacher/lora.safetensors')
    run('train_stage2', two, [*args, 'fsdp={state_dict_type: full, activation_checkpointing: true}',
                              'algorithms.grad_cache={}', 'device_train_microbatch_size=3'], 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5) and len({*losses(one).values()}) == 6
    # Of the LLM, checkpoints hold LoRA alone.
    found = weights(one)
    assert {name.partition('.')[0] for name in found} == {'model', 'text_encoder'}
    assert all('lora_' in name for name in found if name.startswith('text_encoder.'))
    for name in ('model', 'lora'):
        assert_same_weights(*(load_file(folder / f'teacher/{name}.safetensors') for folder in (two, one)))
    assert any(not torch.allclose(value, trained, rtol=1e-3) for value, trained in zip(
        before.values(), load_file(one / 'teacher/lora.safetensors').values()))

    # The folder has what the training evaluated.
    metrics = read_metrics(one / 'metrics.jsonl')
    assert metrics['metrics/z/mean_per_class'][6] == pytest.approx(_accuracy(one), rel=1e-6)
    assert metrics['metrics/z/mean_per_class'] == pytest.approx(
        read_metrics(two / 'metrics.jsonl')['metrics/z/mean_per_class'], rel=1e-6)
    model, (encoder, tokenizer) = Stage2Run(one).load_model(), load_teacher(one / 'teacher')
    with torch.no_grad():
        expected = model.get_text_features(encoder(**tokenizer(TEXTS)))
    torch.testing.assert_close(load(tmp_path, run=str(one)).text_features(TEXTS)[0], expected, rtol=1e-4, atol=1e-5)
    for options, message in (({'weights': 'best'}, '^weights'), ({'teacher': str(teacher_folder)}, 'another teacher')):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **{'run': str(one), **options})

    run_recipe(monkeypatch, 'export_hf', f'run={one}', f'out={tmp_path}/export')
    exported = AutoModel.from_pretrained(tmp_path / 'export/llm2clip').eval()
    with torch.no_grad():
        torch.testing.assert_close(exported.get_text_features(TEXTS), expected, rtol=1e-4, atol=1e-5)
    # What is in the place of what a run will write is said before it resumes.
    (one / 'teacher/mine.txt').touch()
    with pytest.raises(ConfigError, match='teacher is there already and is not replaced .*mine.txt'):
        run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={one}', 'max_duration=8ba')


@pytest.mark.dist
def test_clip_is_fine_tuned_directly(
    args: list[str], llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins as what was pretrained, and ends, sharded over two ranks, as what `evaluate` finds."""
    siglip = write_clip(tmp_path / 'siglip', llm_folder, 'siglip')
    args = [*args, f'trainable_text.clip.name={siglip}', 'model.adapter.name=identity', f'model.vision.name={siglip}',
            'model.vision.pretrained=true', 'model.visual_projection=pretrained', 'eval_first=true', 'max_duration=3ba']
    whole = AutoModel.from_pretrained(siglip)
    run_recipe(monkeypatch, 'train_stage2', *args, 'optimizer.lr=0.0', f'save_folder={tmp_path}/begun')
    begun = load(tmp_path, run=f'{tmp_path}/begun')
    theirs = load(tmp_path, pretrained=str(siglip))
    for found, expected in zip(begun.text_features(TEXTS), theirs.text_features(TEXTS)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # and as many that lost their end
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(begun.image_features(pixels), theirs.image_features(pixels), rtol=1e-4, atol=1e-5)
    run('train_stage2', tmp_path / 'run', [*args, 'optimizer.lr=0.5', 'fsdp={}'], 2)
    accuracy = read_metrics(tmp_path / 'run/metrics.jsonl')['metrics/z/mean_per_class']
    assert list(accuracy) == [0, 3] and accuracy[3] == pytest.approx(_accuracy(tmp_path / 'run'), rel=1e-6)
    trained = load_file(tmp_path / 'run/clip_text/model.safetensors')['text_model.head.weight']
    assert not torch.allclose(trained, whole.text_model.head.weight, atol=1e-4)
    with pytest.raises(ConfigError, match="^run: .*run/clip_text is the text tower"):
        run_recipe(monkeypatch, 'export_hf', f'run={tmp_path}/run', f'out={tmp_path}/export')
    run_recipe(monkeypatch, 'export_vision', f'run={tmp_path}/run', f'out={tmp_path}/vision')


def test_what_cannot_be_trained_is_named(llm_folder: Path, tmp_path: Path) -> None:
    for texts, key in ((TrainableTextConfig(clip=ClipTextConfig(str(llm_folder))), 'clip'),
                       (TrainableTextConfig(lora=LoraConfig(target_modules=['x'])), 'lora.target_modules')):
        with refused_at(f'trainable_text.{key}'):
            load_trained_encoder(texts, TextEncoderConfig(str(llm_folder)))
    args = [*REQUIRED['train_stage2'], 'teacher=t', 'trainable_text.lora={}']
    save_config(load_config(Stage2Config, args), tmp_path)
    TeacherRecord(Fingerprint.of('x', {}), {'llm_embed_dim': 32}).write(tmp_path)
    with pytest.raises(ConfigError, match='/teacher: there is none yet'):
        Stage2Run(tmp_path).teachers()


@pytest.mark.dist
def test_lora_trains_sharded_resumes_and_is_merged(
    stage2_args: list[str], teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    pretrained = timm.create_model('test_vit', img_size=32).state_dict()
    torch.save(pretrained, tmp_path / 'vit.pth')
    args = [*stage2_args, *SGD, f'teacher={teacher_folder}', 'layer_decay=0.9', 'optimizer.weight_decay=0.01',
            f'model.vision={{name: test_vit, image_size: 32, checkpoint: {tmp_path}/vit.pth, lora: {{r: 4}}}}',
            'model.vision.lora.lora_dropout=0.0']
    one, two, export = tmp_path / 'one', tmp_path / 'two', tmp_path / 'export/llm2clip'
    run('train_stage2', one, args)
    cached = ['algorithms.grad_cache={}', 'device_train_microbatch_size=3']
    for steps, more in ((3, ['fsdp={state_dict_type: full, activation_checkpointing: true}']), (6, [])):  # then DDP
        run('train_stage2', two, [*args, *cached, *more, f'max_duration={steps}ba'], 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5) and len({*losses(one).values()}) == 6
    assert_same_weights(weights(two), weights(one))
    state = {name.removeprefix('model.'): value for name, value in weights(one).items()}
    assert all(value.any() for name, value in state.items() if 'lora_B' in name)
    own = {name: value for name, value in pretrained.items() if not name.startswith('head.')}
    for name, value in state.items():
        if name.startswith('vision_encoder.trunk.') and 'lora_' not in name:
            assert value.equal(own[name.removeprefix('vision_encoder.trunk.').replace('.base_layer', '')])

    trained = Stage2Run(one)
    unmerged = LLM2CLIP(trained.config.model, 32, False).eval()
    unmerged.load_state_dict(state)
    model = trained.load_model()
    assert not any('lora' in name for name in model.state_dict())
    run_recipe(monkeypatch, 'export_hf', f'run={one}', f'out={tmp_path}/export')
    run_recipe(monkeypatch, 'export_vision', f'run={one}', f'out={tmp_path}/vision', 'projection=false')
    evaluated = load(tmp_path, run=str(one))
    pixels = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected, tower = unmerged.get_image_features(pixels), unmerged.vision_encoder(pixels)
        for found in (model.get_image_features(pixels), LLM2CLIPModel.from_pretrained(export).get_image_features(
                pixel_values=pixels), evaluated.image_features(pixels)[0]):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        of_timm = timm.create_model(f'local-dir:{tmp_path}/vision', pretrained=True).eval()
        torch.testing.assert_close(of_timm(pixels), tower, rtol=1e-5, atol=1e-5)

    # WiSE-FT goes back to the weights of the file, and another run with LoRA begins with the merged ones.
    back = Stage2Run(one, wise_ft_alpha=0.0).load_model().vision_encoder.trunk.state_dict()
    assert all(value.equal(own[name]) for name, value in back.items()) and back.keys() == own.keys()
    run_recipe(monkeypatch, 'train_stage2', *args, f'initial_weights={export}', f'save_folder={tmp_path}/again',
               'max_duration=1ba', 'optimizer.lr=0.0', 'train_data.num_workers=0')
    assert_same_weights(Stage2Run(tmp_path / 'again').load_model().state_dict(), model.state_dict())
