# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Zero-shot sets that are evaluated while stage 2 trains."""

import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.utils import dist
from evaluated import evaluated
from launched import stage2_arguments
from recipes_in_process import run_recipe
from refusals import refused_at
from set_files import SEVERAL_CLASSES, write_custom_sets, write_wds

from llm2clip.config import ZeroshotConfig
from llm2clip.data.classification_sets import zeroshot_set
from llm2clip.errors import FileError
from llm2clip.teacher.sources import TeacherFolder
from llm2clip.training import trainer, zeroshot
from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.zeroshot import names_of_rank, zeroshot_evaluator

pytestmark = pytest.mark.usefixtures('no_leftovers')


@pytest.fixture(scope='module')
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with `classes` and `templates.txt`, and with tars: `tars`, whose images have a class each, two of which
    have the same name, and `several`."""
    folder = tmp_path_factory.mktemp('sets')
    write_custom_sets(folder)
    write_wds(folder / 'tars', [i % 6 for i in range(17)])
    write_wds(folder / 'several', SEVERAL_CLASSES)
    return folder


@pytest.fixture
def args(image_dataset: Path, embeddings: Path, teacher_folder: Path, tmp_path: Path) -> list[str]:
    return [*stage2_arguments(image_dataset, embeddings), f'teacher={teacher_folder}', 'train_data.num_workers=0',
            f'save_folder={tmp_path}/run']


def _source(folder: Path, name: str) -> str:
    return f'eval_zeroshot.{name}.source={{name: clip_benchmark, local: {folder}/{name}}}'


def _folders(folder: Path) -> list[str]:
    return [f'eval_zeroshot.pets.source={{name: imagenet_folder, images: {folder}/classes}}',
            f'eval_zeroshot.pets.templates={folder}/templates.txt']


class _Watched:
    """Teachers that stage 2 loads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: list[weakref.ref[torch.nn.Module]] = []
        self.alive: list[bool] = []
        load, fit = TeacherFolder.load, trainer.fit

        def watched_load(*args: Any, **options: Any) -> Any:
            teacher: Any = load(*args, **options)
            self.loaded.append(weakref.ref(teacher.module))
            return teacher

        def watched_fit(*args: Any) -> None:
            self.alive.extend(ref() is not None for ref in self.loaded)
            fit(*args)

        monkeypatch.setattr(TeacherFolder, 'load', watched_load)
        monkeypatch.setattr(trainer, 'fit', watched_fit)


@pytest.mark.long
def test_a_training_finds_what_evaluate_finds(
    args: list[str], sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Names in several blocks, the last of which is smaller.
    monkeypatch.setattr(zeroshot, '_ROWS', 5)
    watched, run = _Watched(monkeypatch), tmp_path / 'run'
    args = [*args, *_folders(sets), _source(sets, 'tars'), _source(sets, 'several'), 'eval_data=null',
            'eval_first=true', 'callbacks.save_best={metric: mean_per_class, dataloader_label: tars}',
            'optimizer.name=sgd']
    tars, several = ({'name': 'clip_benchmark', 'local': f'{sets}/{name}'} for name in ('tars', 'several'))
    for steps in (3, 6):
        watched.loaded.clear()
        run_recipe(monkeypatch, 'train_stage2', *args, f'max_duration={steps}ba')
        # The teacher was let go, and what is resumed reads the prompts from disk.
        assert watched.alive == [False] and len(watched.loaded) == (steps == 3)
        metrics = read_metrics(run / 'metrics.jsonl')
        assert {name.split('/')[1] for name in metrics if name.startswith('metrics/')} == {'pets', 'tars', 'several'}
        pets = evaluated(run, {'name': 'imagenet_folder', 'images': f'{sets}/classes'}, f'{sets}/templates.txt')
        expected = {'pets': pets, 'tars': evaluated(run, tars), 'several': evaluated(run, several)}
        for name, values in expected.items():
            for metric, value in values.items():
                found = metrics[f'metrics/{name}/{metric}']
                assert list(found) == [0, 3, 6][:1 + steps // 3]
                assert found[steps] == pytest.approx(value, rel=1e-6), (name, metric, steps)
    # More than a model finds that takes all images for one class.
    assert expected['tars']['zeroshot_top1'] > 100 * 3 / 17
    found, best = metrics['metrics/tars/mean_per_class'], metrics['best/mean_per_class']
    assert list(best.values())[-1] == max(found.values()) and best[0] == found[0]
    assert set(best.items()) <= {*found.items()}
    # Both sets of tars have one file of prompts.
    assert len(list((run / 'text_embeddings').rglob('*.safetensors'))) == 2


@pytest.mark.long
def test_the_teacher_in_the_loop_embeds_the_prompts(
    args: list[str], sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = _Watched(monkeypatch)
    run_recipe(monkeypatch, 'train_stage2', *(arg for arg in args if '.embeddings.' not in arg),
               'text_encoder_in_loop.enabled=true', _source(sets, 'tars'), 'eval_interval=1ba', 'save_interval=4ba',
               'max_duration=4ba')
    found = read_metrics(tmp_path / 'run/metrics.jsonl')
    assert watched.alive == [True]
    assert len(found['loss/train/total']) == 4 == len(found['metrics/eval/retrieval_recall@10'])
    for metric, value in evaluated(tmp_path / 'run', {'name': 'clip_benchmark', 'local': f'{sets}/tars'}).items():
        assert list(found[f'metrics/tars/{metric}']) == [1, 2, 3, 4]
        assert found[f'metrics/tars/{metric}'][4] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize('ranks', [1, 2, 5, 11])
def test_each_rank_has_its_share_of_images_and_names(sets: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nine images in batches of two, also where there are more ranks than images."""
    one = zeroshot_set(ZeroshotConfig({'name': 'clip_benchmark', 'local': f'{sets}/several'}), 'z')
    monkeypatch.setattr(dist, 'get_world_size', lambda: ranks)
    images, names = [], []
    for rank in range(ranks):
        monkeypatch.setattr(dist, 'get_global_rank', lambda: rank)  # noqa: B023
        loader: Any = zeroshot_evaluator(one, 'z', 32, 2, 0).dataloader.dataloader
        images.append([batch['index'].tolist() for batch in loader])
        names.append(names_of_rank(5))
    assert len({tuple(map(len, batches)) for batches in images}) == len({*map(len, names)}) == 1  # as many steps
    assert {index for batches in images for batch in batches for index in batch} == {*range(9)}
    assert [name for turn in zip(*names) for name in turn][:5] == [*range(5)]


@pytest.mark.parametrize(('extra', 'key'), [
    ('eval_zeroshot.pets.templates=null', 'eval_zeroshot.pets.templates'),
    ('callbacks.save_best={metric: mean_average_precision, dataloader_label: pets}', 'callbacks.save_best.metric')])
def test_what_cannot_be_evaluated_is_refused_before_loading(
    args: list[str], sets: Path, extra: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = _Watched(monkeypatch)
    with refused_at(key):
        run_recipe(monkeypatch, 'train_stage2', *args, *_folders(sets), extra)
    assert not watched.loaded


def test_a_broken_image_is_named_before_the_first_step(
    args: list[str], sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sets / 'classes', tmp_path / 'classes')
    (tmp_path / 'classes/dog/11.png').write_bytes(b'no image')
    with pytest.raises(FileError, match=f"eval_zeroshot.pets: {tmp_path}/classes: the image of sample 'dog/11.png' "):
        run_recipe(monkeypatch, 'train_stage2', *args, *_folders(sets), 'eval_first=true', 'train_data.num_workers=1',
                   f'eval_zeroshot.pets.source.images={tmp_path}/classes')
    assert 'loss/train/total' not in read_metrics(tmp_path / 'run/metrics.jsonl')
