# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Embeddings of images, and of captions by several prompts: extracted, trained on, exported."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from launched import SGD, losses, run, stage2_arguments
from parts import make_samples, picture, write_dataset, write_text_embeddings
from recipes_in_process import run_recipe
from safetensors.torch import save_file

from llm2clip.config import ExtractImagesConfig, Stage2Config, VisionConfig
from llm2clip.config.loading import load_config
from llm2clip.data.captions import caption_key, text_id
from llm2clip.data.images import decode_pixels
from llm2clip.data.schema import EMBEDDING, read_columns, read_samples
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.models.frozen_tower import FrozenTower
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.teacher.llm import load_teacher
from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.runs import Stage2Run
from llm2clip.training.stage2 import make_loaders


@pytest.fixture(scope='module')
def folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of the tower's size, so that no crop changes them; weights of a tower; text embeddings."""
    folder = tmp_path_factory.mktemp('both')
    torch.manual_seed(0)
    save_file(timm.create_model('test_vit').state_dict(), folder / 'tower.safetensors')
    samples = [replace(sample, image=picture(i, 32)) for i, sample in enumerate(make_samples(48))]
    for sample in samples[::3]:
        sample.captions['long'] = ''
    write_dataset(samples, folder / 'data', size_limit='8kb')
    write_text_embeddings(folder / 'data/train', folder / 'texts', teacher_folder)
    return folder


def tower(folder: Path) -> str:
    return f'{{name: test_vit, image_size: 32, checkpoint: {folder}/tower.safetensors}}'


def extract(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *args: str) -> list[dict[str, np.ndarray]]:
    run_recipe(monkeypatch, 'extract_image_embeddings', f'vision={tower(folder)}', f'out={out}', 'device=cpu',
               f'datasets.images.local={folder}/data/train', *args)
    return read_samples(out / 'images')


def stage2(folder: Path, *args: str, images: str = '') -> list[str]:
    vectors = [f'{data}.streams.s.image_embeddings.local={images}' for data in ('train_data', 'eval_data') if images]
    return [*stage2_arguments(folder / 'data/train', folder / 'texts'), *SGD, *vectors,
            f'model.vision={tower(folder)}', 'model.vision.freeze=true', 'train_data.crop_scale=[1.0, 1.0]', *args]


def test_vectors_equal_the_tower_and_views_are_deterministic(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = VisionEncoder(VisionConfig('test_vit', checkpoint=f'{folder}/tower.safetensors', image_size=32)).eval()
    pixels = [decode_pixels(sample['image'], '') for sample in read_samples(folder / 'data/train')]
    with torch.no_grad():
        expected = encoder(torch.stack(pixels)).numpy()
    views = ['views=2', 'horizontal_flip=0.5', 'crop_scale=[0.3, 0.6]']
    plain = extract(monkeypatch, folder, tmp_path / 'plain', 'storage=float32', 'batch_size=7')
    first, again = (extract(monkeypatch, folder, tmp_path / name, 'num_workers=3', *views) for name in ('a', 'b'))
    np.testing.assert_allclose([sample[EMBEDDING + 'image'] for sample in plain], expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(first, again, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
        assert one[EMBEDDING + 'view1'].dtype == np.float16
        assert np.abs(one[EMBEDDING + 'view1'] - one[EMBEDDING + 'view2']).max() > 0.01
    with pytest.raises(ValueError, match='begun for another dataset or teacher: .*seed'):
        extract(monkeypatch, folder, tmp_path / 'a', *views, 'seed=3')
    # A view depends on the seed, the sample and its number alone.
    image = read_samples(folder / 'data/train')[0]['image']
    items = [(image, 'a', 1), (image, 'a', 2), (image, 'b', 1)]
    configs = [ExtractImagesConfig(crop_scale=[0.3, 0.6], seed=seed) for seed in (0, 0, 1)]
    pixels, same, others = (FrozenTower(encoder.train(), config).prepare(items) for config in configs)
    assert not encoder.training
    assert torch.equal(pixels, same) and len(torch.cat([pixels, others]).unique(dim=0)) == 6


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


def test_heads_export_and_truncate(
    folder: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(monkeypatch, folder, tmp_path / 'vectors', 'views=1', 'storage=int8')
    heads = ['model.visual_projection=glu', 'model.visual_projection_expansion=2', 'model.adapter={name: mlp}',
             'loss={matryoshka_dims: [8, 16]}', 'max_duration=2ba']
    run_recipe(monkeypatch, 'train_stage2', *stage2(folder, *heads, images=str(tmp_path / 'vectors/images')),
               f'save_folder={tmp_path}/run')
    for dim in ([], ['truncate_dim=8']):  # the features of an export are compared with those of the run
        run_recipe(monkeypatch, 'export_hf', f'run={tmp_path}/run', f'teacher={teacher_folder}', *dim,
                   f'out={tmp_path}/export{len(dim)}')


@pytest.mark.parametrize(('wrong', 'message'), [
    ('model.vision={mean: [0.1, 0.1, 0.1], std: [1.0, 1.0, 1.0]}', 'comes from another tower than model.vision: mean'),
    ('train_data.streams.t={local: x, embeddings: {tiny: {local: x}}}', r'streams\.t\.image_embeddings: required'),
    ('train_data.streams.s.image_embeddings.local=gone', 'no MDS dataset in gone'),
    ('train_data.streams.s.image_embeddings.local=TEXTS', r'embedding\.image'),
])
def test_wrong_vectors_are_refused_before_training(
    wrong: str, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (folder / 'images/images').is_dir():
        extract(monkeypatch, folder, folder / 'images')
    args = stage2(folder, wrong.replace('TEXTS', f'{folder}/texts'), images=f'{folder}/images/images')
    with pytest.raises(ValueError, match=message):
        run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={tmp_path}/run')
    assert not (tmp_path / 'run/checkpoints').exists()


@pytest.mark.usefixtures('no_leftovers')
def test_stage2_draws_them_by_keys_of_their_own(
    stage2_args: list[str], teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(32)
    samples[5].captions['long'] = ''
    write_dataset(samples, tmp_path / 'images')
    extract = [f'teacher={teacher_folder}', f'datasets.s.local={tmp_path}/images/train', f'out={tmp_path}/out',
               'device=cpu', "prompts.brief='in a word, {caption} is'", "prompts.mood='the mood of {caption}'"]
    run_recipe(monkeypatch, 'extract_embeddings', *extract)
    out = tmp_path / 'out/s'
    names = [key + name for key in ('long', 'short') for name in ('', '@brief', '@mood')]
    assert {*read_columns(out)} == {'sample_id', *(f'text_embedding.{name}' for name in names)}
    rows, encoder = read_samples(out), load_teacher(teacher_folder)
    prompts = {'': '{caption}', '@brief': 'in a word, {caption} is', '@mood': 'the mood of {caption}'}
    for key, (name, prompt) in product(('short', 'long'), prompts.items()):
        captions = [sample.captions[key] for sample in samples]
        expected = encode_texts(*encoder, [prompt.replace('{caption}', text or '-') for text in captions]).numpy()
        expected[[not text for text in captions]] = 0
        found = np.stack([row[f'text_embedding.{key}{name}'] for row in rows])
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    for changed, part in (("prompts.brief='{caption}?'", 'vectors.prompts.brief'), ('prompts=null', 'caption_keys')):
        with pytest.raises(ValueError, match=f'was begun for another dataset or teacher: {part} is'):
            run_recipe(monkeypatch, 'extract_embeddings', *extract, changed)

    args = [arg for arg in stage2_args if 'eval' not in arg and 'caption_weights' not in arg] + [
        f'train_data.streams.s.local={tmp_path}/images/train', f'train_data.streams.s.embeddings.tiny.local={out}',
        'train_data.num_workers=0', 'train_data.captions_per_image=2', 'max_duration=4ba']
    weights = [f'train_data.caption_weights.{name}=1' for name in names[1:]]
    data, _ = make_loaders(load_config(Stage2Config, [*args, *weights, f'save_folder={tmp_path}/run']))
    of_sample, drawn = {sample.sample_id: (sample, row) for sample, row in zip(samples, rows)}, set()
    for batch in data.dataloader:
        for sample_id, both, text_ids in zip(batch['sample_id'], batch['text_embedding'], batch['text_id']):
            sample, row = of_sample[sample_id]
            for vector, text in zip(both.numpy(), text_ids):
                found = {name for name in names[1:] if (row[f'text_embedding.{name}'] == vector).all()
                         and text == text_id(sample.captions[caption_key(name)])}
                assert found and vector.any()
                drawn |= found
    assert drawn == {*names[1:]}
    del data
    run_recipe(monkeypatch, 'train_stage2', *args, *weights, f'save_folder={tmp_path}/run')
    assert len({*losses(tmp_path / 'run').values()}) == 4
    with pytest.raises(ValueError, match="column 'caption.long@brief' is missing"):
        run_recipe(monkeypatch, 'train_stage2', *args, *weights, f'save_folder={tmp_path}/other',
                   'text_encoder_in_loop.enabled=true', f'teacher={teacher_folder}')
