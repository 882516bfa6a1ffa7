# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""From captions to a search on a GPU, each step against the same on a CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composer import Callback, State
from composer.loggers import Logger
from launched import DEVICE, Train, losses
from PIL import Image
from safetensors.torch import load_file
from set_files import custom_sets, write_custom_sets
from transformers import AutoImageProcessor, AutoModel

from llm2clip.data.schema import read_samples
from llm2clip.training.callbacks.jsonl_logger import read_metrics

Recipe = Callable[..., None]
KEYS = ('text_embedding.short', 'text_embedding.long')


def _vectors(embeddings: Path) -> torch.Tensor:
    return torch.tensor(np.stack([np.concatenate([row[key] for key in KEYS])
                                  for row in read_samples(embeddings)])).float()


@pytest.mark.parametrize('precision', ['fp32', 'amp_bf16'])
def test_extraction_and_the_stage_2_that_reads_it(
    precision: str, recipe: Recipe, train: Train, image_dataset: Path, embeddings: Path, teacher_folder: Path,
    tmp_path: Path
) -> None:
    recipe('extract_embeddings', f'teacher={teacher_folder}', f'out={tmp_path}/out', f'precision={precision}',
           f'datasets.train.local={image_dataset}', f'device={DEVICE}', 'batch_tokens=200')
    found, expected = _vectors(tmp_path / 'out/train'), _vectors(embeddings)
    if precision == 'fp32':
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)  # float16, in which they are stored
    else:
        assert F.cosine_similarity(found, expected).min() > 0.99
    runs = [train(2, name, 'precision=fp32', f'train_data.streams.s.embeddings.tiny.local={vectors}')
            for name, vectors in (('from_gpu', tmp_path / 'out/train'), ('from_cpu', embeddings))]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=2e-3 if precision == 'fp32' else 0.05)


@pytest.mark.parametrize('sharded', ['false', 'true'])
def test_the_teacher_in_the_loop_gives_its_embeddings(sharded: str, train: Train, teacher_folder: Path) -> None:
    args = ['precision=fp32', f'teacher={teacher_folder}', 'eval_interval=4ba']
    in_loop = ['train_data.streams.s.embeddings={}', 'eval_data.streams.s.embeddings={}',
              f'text_encoder_in_loop={{enabled: true, sharded: {sharded}, batch_tokens: 100}}']
    cached = ['algorithms.grad_cache={}', 'device_train_microbatch_size=3']
    found, expected = train(2, 'text_encoder_in_loop', *args, *in_loop, *cached), train(2, 'embeddings', *args)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-3)
    recalls = [read_metrics(run / 'metrics.jsonl')['metrics/eval/retrieval_recall@10'] for run in (found, expected)]
    assert recalls[0] == pytest.approx(recalls[1], abs=4)


class _Temperature(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def after_forward(self, state: State, logger: Logger) -> None:
        scale: torch.Tensor = state.outputs['logit_scale']  # pyright: ignore
        assert scale.dtype == torch.float32
        self.found.append(scale.exp().item())


@pytest.mark.parametrize('fsdp', ['', 'fsdp={activation_checkpointing: true}'])
@pytest.mark.parametrize('stage', [1, 2])
def test_the_temperature_is_float32_where_the_rest_is_bfloat16(
    stage: int, fsdp: str, train: Train, watch: Callable
) -> None:
    """100 is no number of bfloat16: sharded, it would be 98.9."""
    watch(temperature := _Temperature())
    scale = ['logit_scale=100', 'learn_logit_scale=true'] if stage == 1 else ['model.logit_scale=100']
    args = [*scale, f'precision={"fp32" if fsdp and DEVICE == "cpu" else "amp_bf16"}', 'algorithms={}',
            *([fsdp] if fsdp else [])]
    train(stage, 'still', *args, 'optimizer.lr=0')
    assert temperature.found == pytest.approx([100] * 8, rel=1e-6)
    train(stage, 'learns', *args)
    assert len({*temperature.found[8:]}) == 8


def test_evaluation_search_and_export(
    recipe: Recipe, train: Train, teacher_folder: Path, image_dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / 'sets').mkdir()
    write_custom_sets(tmp_path / 'sets')
    run = train(2, 'run', f'precision={"amp_bf16" if DEVICE == "gpu" else "fp32"}', f'teacher={teacher_folder}',
                'max_duration=4ep', *(f'eval_{arg}' for arg in custom_sets(tmp_path / 'sets')
                                      if arg.startswith('zero')))
    recipe('export_hf', f'run={run}', f'out={tmp_path}/export')
    folder = tmp_path / 'export/llm2clip'
    results: dict[str, Any] = {}
    for device, precision in (('cpu', 'fp32'), (DEVICE, 'fp32'), (DEVICE, 'amp_bf16')):
        out = tmp_path / f'{device}_{precision}_{len(results)}'
        recipe('evaluate', f'out={out}', f'device={device}', 'num_workers=1', 'bootstrap=0', 'gallery=1',
               f'models.m={{export: {folder}, precision: {precision}}}', *custom_sets(tmp_path / 'sets'),
               f'cra.captions={image_dataset}', f'cra.teachers.t={teacher_folder}', f'cra.precision={precision}')
        results[f'{device} {precision} {len(results)}'] = json.loads((out / 'results.json').read_text())
    expected, found, half = results.values()
    numbers = _numbers(expected)
    assert numbers.keys() == _numbers(found).keys() == _numbers(half).keys() and len(numbers) > 10
    # All but those of which an image or a text has two neighbours that are equally near but for rounding.
    assert sum(_numbers(found)[name] == pytest.approx(value, abs=1e-3) for name, value in numbers.items()
               ) > 0.9 * len(numbers)
    watched = [*read_metrics(run / 'metrics.jsonl')['metrics/pets/zeroshot_top1'].values()]
    same = half if DEVICE == 'gpu' else found
    one_image = 100 / 12
    assert watched[-1] == pytest.approx(same['zeroshot']['pets']['models']['m']['zeroshot_top1'], abs=one_image + 0.01)

    features = []
    for device in ('cpu', DEVICE):
        index = tmp_path / f'index_{device}_{len(features)}'
        recipe('search', f'model={folder}', f'images={tmp_path}/sets', f'index={index}', f'device={device}',
               'num_workers=1', 'query=[a red square]')
        features.append(load_file(next(index.glob('*.safetensors'))))
    for name, value in features[0].items():
        torch.testing.assert_close(features[1][name].float(), value.float(), rtol=2e-3, atol=2e-3)

    # What a user does with it, there.
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    pixels = processor(Image.new('RGB', (50, 40), 'red'), return_tensors='pt')['pixel_values']
    with torch.no_grad():
        expected = model.get_image_features(pixels) @ model.get_text_features(['a red square', 'a dog']).T
        model.to('cuda' if DEVICE == 'gpu' else 'cpu')
        found = model.get_image_features(pixels.to(model.device)) @ model.get_text_features(['a red square', 'a dog']).T
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-3, atol=2e-3)


def _numbers(result: Any, name: str = '') -> dict[str, float]:
    if isinstance(result, dict):
        return {key: value for part in result for key, value in _numbers(result[part], f'{name}/{part}').items()}
    return {name: float(result)} if isinstance(result, (int, float)) and 'seconds' not in name else {}
