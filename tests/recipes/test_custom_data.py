# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""`yamls/custom_data/`, one command per step, on pictures and captions as people have them."""

import csv
import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import timm
from launched import ROOT
from recipes_in_process import run_recipe
from refusals import refused_at
from safetensors.torch import save_file
from set_files import write_images

from llm2clip.data.schema import read_samples

LANGUAGES = ('en', 'en_2', 'de', 'fr', 'es')
TOWER = '{name: test_efficientnet, checkpoint: tower.safetensors, remap: false, image_size: 32}'
# Stand-ins for the LLM and the tower, and few steps.
SMALL = {
    'train_stage1': ['max_duration=2ba', 'global_train_batch_size=8', 'text_encoder.gguf_file=null',
                     'text_encoder.max_length=32'],
    'extract_image_embeddings': [f'vision={TOWER}'],
    'train_stage2': ['max_duration=1ep', 'global_train_batch_size=8', f'model.vision={TOWER}', 'model.embed_dim=16'],
    'evaluate': ['num_workers=0'],
}


@pytest.fixture(scope='module')
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """Sixty pictures, with one to five captions in four languages, and a table of them."""
    folder = tmp_path_factory.mktemp('own')
    write_images(folder / 'photos', [f'{i}.png' for i in range(60)])
    save_file(timm.create_model('test_efficientnet').state_dict(), folder / 'tower.safetensors')
    rng, rows = random.Random(1), []
    for i in range(60):
        there = rng.sample(LANGUAGES, 1 + i % 5)
        rows.append({'image': f'{i}.png', **{key: f'{key}: a picture, number {i}' if key in there else ''
                                              for key in LANGUAGES}})
    with open(folder / 'captions.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, ['image', *LANGUAGES])
        writer.writeheader()
        writer.writerows(rows)
    return folder, rows


def _run(monkeypatch: pytest.MonkeyPatch, llm_folder: Path, recipe: str, *files: str, more: Sequence[str] = ()) -> None:
    args = [*SMALL.get(recipe, []), *more]
    if recipe not in ('prepare_data', 'export_hf', 'report'):
        args.append('device=cpu')
    if recipe.startswith('train'):
        args += ['progress_bar=false', 'train_data.num_workers=0']
    if recipe == 'train_stage1':
        args.append(f'text_encoder.pretrained={llm_folder}')
    paths = [str(ROOT / f'yamls/custom_data/{file}.yaml') for file in ('steps', *files)]
    run_recipe(monkeypatch, recipe, *paths, *args)


def test_every_step_from_its_file(
    own: tuple[Path, list[dict[str, str]]], llm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = own
    monkeypatch.chdir(folder)
    run = partial(_run, monkeypatch, llm_folder)
    run('prepare_data', 'languages')
    for recipe, files in (('train_stage1', []), ('extract_embeddings', []), ('extract_image_embeddings', []),
                          ('train_stage2', ['align']), ('evaluate', ['languages']), ('export_hf', []), ('report', [])):
        run(recipe, *files)

    holdout = {sample['sample_id'] for sample in read_samples('data/custom/val')}
    assert 2 <= len(holdout) <= 12 and len(holdout) + len(read_samples('data/custom/train')) == 60
    results = json.loads(Path('runs/custom/evaluate/results.json').read_text())['retrieval']
    for name, keys in (('val', LANGUAGES), ('en', ('en', 'en_2')), ('de', ('de',)), ('es', ('es',))):
        texts = [[row[key] for key in keys if row[key]] for row in rows if row['image'] in holdout]
        found, = results[name]['models'].values()
        assert (found['n_images'], found['n_texts']) == (sum(map(bool, texts)), sum(map(len, texts))), name
    assert 'data:image' in Path('runs/custom/report.html').read_text()


def test_one_caption_per_image(
    own: tuple[Path, list[dict[str, str]]], llm_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows = own
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'photos').symlink_to(folder / 'photos')
    lines = [f'{row["image"]},a picture of {i}\n' for i, row in enumerate(rows)]
    Path('captions.csv').write_text('image,caption\n' + ''.join(lines))
    run = partial(_run, monkeypatch, llm_folder)
    run('prepare_data')
    with refused_at('attention_dropout'):
        run('train_stage1', more=['attention_dropout=0.0'])
    capsys.readouterr()
    run('train_stage1', more=['eval_data.streams.val.local=data/custom/val'])
    said = capsys.readouterr().out
    assert 'a caption of train_data.streams.photos is paired with itself' in said
    assert 'eval_data.streams: val has one caption per sample' in said
