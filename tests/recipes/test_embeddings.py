# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Embeddings of images: extracted, trained on, exported."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from launched import SGD, losses, run, stage2_arguments
from parts import make_samples, picture, write_dataset, write_text_embeddings
from recipes_in_process import run_recipe
from safetensors.torch import save_file

from llm2clip.config import VisionConfig
from llm2clip.data.images import decode_pixels
from llm2clip.data.schema import EMBEDDING, read_samples
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.runs import Stage2Run


@pytest.fixture(scope='module')
def folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of the tower's size, so that no crop changes them; weights of a tower; text embeddings."""
    folder = tmp_path_factory.mktemp('both')
    torch.manual_seed(0)
    save_file(timm.create_model('test_vit').state_dict(), folder / 'tower.safetensors')
    save_file(timm.create_model('test_vit2').state_dict(), folder / 'second.safetensors')
    samples = [replace(sample, image=picture(i, 32)) for i, sample in enumerate(make_samples(48))]
    for sample in samples[::3]:
        sample.captions['long'] = ''
    write_dataset(samples, folder / 'data', size_limit='8kb')
    write_text_embeddings(folder / 'data/train', folder / 'texts', teacher_folder)
    return folder


def tower(folder: Path) -> str:
    return f'{{name: test_vit, image_size: 32, checkpoint: {folder}/tower.safetensors}}'


def beside(folder: Path) -> str:
    return f'vision.beside=[{{name: test_vit2, checkpoint: {folder}/second.safetensors, feature_levels: 1}}]'


def extract(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *args: str) -> list[dict[str, np.ndarray]]:
    run_recipe(monkeypatch, 'extract_image_embeddings', f'vision={tower(folder)}', f'out={out}', 'device=cpu',
               f'datasets.images.local={folder}/data/train', *args)
    return read_samples(out / 'images')


def stage2(folder: Path, *args: str, images: str = '') -> list[str]:
    vectors = [f'{data}.streams.s.image_embeddings.local={images}' for data in ('train_data', 'eval_data') if images]
    return [*stage2_arguments(folder / 'data/train', folder / 'texts'), *SGD, *vectors,
            f'model.vision={tower(folder)}', 'model.vision.freeze=true', 'train_data.crop_scale=[1.0, 1.0]', *args]


def test_vectors_are_features_of_the_tower(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = VisionEncoder(VisionConfig('test_vit', checkpoint=f'{folder}/tower.safetensors', image_size=32)).eval()
    pixels = [decode_pixels(sample['image'], '') for sample in read_samples(folder / 'data/train')]
    with torch.no_grad():
        expected = encoder(torch.stack(pixels)).numpy()
    vectors = extract(monkeypatch, folder, tmp_path / 'vectors', 'storage=float32', 'batch_size=7')
    np.testing.assert_allclose([sample[EMBEDDING + 'image'] for sample in vectors], expected, rtol=1e-5, atol=1e-6)
    first, again = (extract(monkeypatch, folder, tmp_path / name, 'num_workers=3') for name in ('a', 'b'))
    for row, other in zip(first, again, strict=True):
        assert row[EMBEDDING + 'image'].dtype == np.float16
        assert np.array_equal(row[EMBEDDING + 'image'], other[EMBEDDING + 'image'])
    with pytest.raises(ValueError, match='begun for another dataset or teacher: .*storage'):
        extract(monkeypatch, folder, tmp_path / 'a', 'storage=int8')


@pytest.mark.dist
def test_training_on_vectors_is_training_with_the_frozen_tower(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(monkeypatch, folder, tmp_path / 'vectors', 'storage=float32')
    vectors, cached = str(tmp_path / 'vectors/images'), ['algorithms.grad_cache={}', 'device_train_microbatch_size=3']
    run('train_stage2', tmp_path / 'in_loop', stage2(folder))
    for name, ranks, extra in (('one', 1, []), ('ddp', 2, cached), ('fsdp', 2, ['fsdp={state_dict_type: full}'])):
        run('train_stage2', tmp_path / name, stage2(folder, *extra, images=vectors), ranks)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / 'in_loop'), rel=1e-5)
        found, expected = (read_metrics(tmp_path / run / 'metrics.jsonl')['metrics/eval/retrieval_recall@10']
                           for run in (name, 'in_loop'))
        assert found == pytest.approx(expected)
    models = [Stage2Run(tmp_path / name).load_model() for name in ('one', 'in_loop')]
    noise = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(*(model.get_image_features(noise) for model in models), rtol=1e-4, atol=1e-4)


def test_heads_on_two_towers_export_and_truncate(
    folder: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(monkeypatch, folder, tmp_path / 'vectors', 'storage=int8', beside(folder))
    heads = [f'model.{beside(folder)}', 'model.visual_projection=glu', 'model.visual_projection_expansion=2',
             'model.adapter={name: mlp}', 'loss={matryoshka_dims: [8, 16]}', 'max_duration=2ba']
    run_recipe(monkeypatch, 'train_stage2', *stage2(folder, *heads, images=str(tmp_path / 'vectors/images')),
               f'save_folder={tmp_path}/run')
    for dim in ([], ['truncate_dim=8']):  # the features of an export are compared with those of the run
        run_recipe(monkeypatch, 'export_hf', f'run={tmp_path}/run', f'teacher={teacher_folder}', *dim,
                   f'out={tmp_path}/export{len(dim)}')


@pytest.mark.parametrize(('wrong', 'message'), [
    ('model.vision={mean: [0.1, 0.1, 0.1], std: [1.0, 1.0, 1.0]}', 'comes from another tower than model.vision: mean'),
    ('model.vision.beside=[{name: test_vit2, pretrained: false}]', 'comes from another tower than model.vision'),
    ('train_data.streams.t={local: x, embeddings: {tiny: {local: x}}}', r'streams\.t\.image_embeddings: required'),
    ('train_data.streams.s.image_embeddings.local=gone', 'no MDS dataset in gone'),
    ('train_data.streams.s.image_embeddings.local=TEXTS', r'embedding\.image'),
    ('train_data.streams.s.local=gone', 'no MDS dataset in gone'),
    ('eval_data.streams.s.local=OTHER', 'images/images belongs to another dataset than .*other/train'),
])
def test_wrong_vectors_are_refused_before_training(
    wrong: str, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (folder / 'images/images').is_dir():
        extract(monkeypatch, folder, folder / 'images')
    samples = make_samples(48)
    samples[7].captions['short'] = 'a wolf'
    write_dataset(samples, tmp_path / 'other', size_limit='8kb')
    wrong = wrong.replace('TEXTS', f'{folder}/texts').replace('OTHER', f'{tmp_path}/other/train')
    args = stage2(folder, wrong, images=f'{folder}/images/images')
    with pytest.raises(ValueError, match=message):
        run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={tmp_path}/run')
    assert not (tmp_path / 'run/checkpoints').exists()


def test_an_index_is_enough_of_the_dataset(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here or in a remote, also for a plan."""
    extract(monkeypatch, folder, tmp_path / 'vectors')
    (tmp_path / 'kept').mkdir()
    shutil.copy(folder / 'data/train/index.json', tmp_path / 'kept')
    args = stage2(folder, f'train_data.streams.s.local={tmp_path}/kept', f'eval_data.streams.s.local={tmp_path}/cache',
                  f'eval_data.streams.s.remote={tmp_path}/kept', 'max_duration=1ba', 'train_data.num_workers=0',
                  images=f'{tmp_path}/vectors/images')
    run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={tmp_path}/run', 'plan=true')
    assert not (tmp_path / 'cache').exists()
    run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={tmp_path}/run')
    assert [path.name for path in (tmp_path / 'cache').glob('[!.]*')] == ['index.json']
