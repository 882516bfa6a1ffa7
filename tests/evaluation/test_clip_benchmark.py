# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Zero-shot classification on tars that CLIP_benchmark wrote: the recipe finds what CLIP_benchmark itself finds."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_benchmark.datasets.builder import build_wds_dataset
from clip_benchmark.metrics import zeroshot_classification
from clip_benchmark.webdataset_builder import convert_dataset
from evaluated import load
from parts import picture
from PIL import Image
from recipes_in_process import run_recipe
from refusals import refused_at
from set_files import WDS_CLASSES, write_wds

from llm2clip.models.llm2clip import LLM2CLIP

N = 32
CLASSES = ['missile', 'cat', '', 'dog', 'a missile', 'owl']


class _Samples(list):
    """Encoded images with labels, as `convert_dataset` takes them."""

    templates = ['a photo of {c}.', 'some {c}', 'the {c} in a field']

    def __init__(self, labels: torch.Tensor, classes: list[str]) -> None:
        super().__init__((picture(i), label) for i, label in enumerate(labels))
        self.classes = classes


def _theirs(export: Path, data: Path, cache: Path) -> dict[str, float]:
    """What CLIP_benchmark finds, with our model, in percent."""
    model = load(cache, export=str(export))

    def transform(image: Image.Image) -> torch.Tensor:
        buffer = io.BytesIO()
        image.save(buffer, 'PNG')
        return model.preprocess(buffer.getvalue(), '')

    clip: Any = torch.nn.Module()
    clip.encode_image, clip.encode_text = (lambda x: model.image_features(x)[0]), (lambda x: model.text_features(x)[0])
    texts = type('Texts', (list,), {'to': lambda self, device: self})  # in place of tokens
    dataset: Any = build_wds_dataset('x', transform, data_dir=str(data))
    loader = torch.utils.data.DataLoader(dataset.batched(16), batch_size=None)
    found = zeroshot_classification.evaluate(clip, loader, texts, dataset.classes, dataset.templates, 'cpu', amp=False)
    return {name: round(100 * value, 3) for name, value in found.items()}


def test_the_recipe_finds_what_clip_benchmark_finds(
    exported: tuple[LLM2CLIP, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(0, len(CLASSES) - 1, (N,), generator=generator)  # no image has the last class
    several = torch.rand(N, len(CLASSES), generator=generator).lt(0.3).float()
    several[:, 3] = 0
    sets = {'one': _Samples(one, CLASSES), 'same_names': _Samples(one, WDS_CLASSES),
            'several': _Samples(several, CLASSES)}
    # Which starts 8 processes.
    with monkeypatch.context() as patch:
        loader = torch.utils.data.DataLoader
        patch.setattr(torch.utils.data, 'DataLoader', lambda dataset, num_workers, **how: loader(dataset, **how))
        for name, samples in sets.items():
            convert_dataset(samples, 'test', str(tmp_path / name), image_format='png', max_count=12,
                            multilabel=name == 'several', verbose=False)
    run_recipe(monkeypatch, 'evaluate', f'out={tmp_path}/out', 'num_workers=0', 'device=cpu', 'batch_size=12',
               'bootstrap=20', f'models.m.export={exported[1]}',
               *(f'zeroshot.{name}.source={{name: clip_benchmark, local: {tmp_path}/{name}}}' for name in sets))
    results = json.loads((tmp_path / 'out/results.json').read_text())['zeroshot']
    found = {name: results[name]['models']['m'] for name in sets}
    theirs = {name: _theirs(exported[1], tmp_path / name, tmp_path / 'cache') for name in sets}
    assert {'acc1': found['one']['zeroshot_top1'], 'acc5': found['one']['zeroshot_top5'],
            'mean_per_class_recall': found['one']['mean_per_class']} == theirs['one']
    assert {'mean_average_precision': found['several']['mean_average_precision']} == theirs['several']
    low, high = found['one']['intervals']['zeroshot_top1']
    assert low < found['one']['zeroshot_top1'] < high and list(found['one']['per_class']) == CLASSES[:-1]
    # Of classes with one name, CLIP_benchmark's accuracies take any, and its recall the first, as all of ours do.
    assert found['same_names']['mean_per_class'] == theirs['same_names']['mean_per_class_recall']
    assert all(0 < value < 100 for values in theirs.values() for value in values.values())
    for file in ('results.md', 'report.html'):
        assert 'mAP' in (tmp_path / 'out' / file).read_text()


def test_what_a_set_lacks_is_named_before_anything_is_encoded(
    exported: tuple[LLM2CLIP, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wds(tmp_path / 'one', [0, 1, 0, 1])
    write_wds(tmp_path / 'several', [[1] * 6] * 4)
    (tmp_path / 'one/zeroshot_classification_templates.txt').unlink()

    one, several = (f'{{name: clip_benchmark, local: {tmp_path}/{name}}}' for name in ('one', 'several'))
    for key, source in (('zeroshot.x.templates', f'zeroshot.x.source={one}'),
                        ('linear_probe.x.test', f'linear_probe.x={{train: {one}, test: {several}}}')):
        with refused_at(key):
            run_recipe(monkeypatch, 'evaluate', f'out={tmp_path}/out', 'num_workers=0', 'device=cpu',
                       f'models.m.export={exported[1]}', source)
