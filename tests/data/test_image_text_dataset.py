# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The joined stream and both loaders: right pairs, right order, clear errors, and the shared memory of workers."""

import json
import mmap
import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composer import DataSpec
from composer.utils import dist
from parts import check_resumed, make_samples, write_dataset, write_text_embeddings
from refusals import refused_at
from streaming import MDSWriter
from streaming.base.util import clean_stale_shared_memory

from llm2clip.config import DatasetConfig, ImageDataConfig, ImageStreamConfig
from llm2clip.data.captions import text_id
from llm2clip.data.convert.samples import Sample
from llm2clip.data.image_text_dataset import build_image_loader
from llm2clip.data.loader import shared_memory
from llm2clip.data.schema import dataset_fingerprint, read_index, read_samples, vector_columns, vector_rows
from llm2clip.data.vectors import dequantize
from llm2clip.errors import ConfigError, FileError
from llm2clip.teacher.fingerprint import teacher_of_embeddings

IMAGE_SIZE = 32

pytestmark = pytest.mark.usefixtures('no_leftovers')


@pytest.fixture
def config(image_dataset: Path, embeddings: Path) -> ImageDataConfig:
    return _config(image_dataset, embeddings)


def _config(images: Path, embeddings: Path) -> ImageDataConfig:
    streams = {'s': ImageStreamConfig(local=str(images), embeddings={'tiny': DatasetConfig(local=str(embeddings))})}
    return ImageDataConfig(streams=streams, num_workers=0, num_canonical_nodes=4,
                           caption_weights={'short': 0.5, 'long': 0.5})


def _spec(
    config: ImageDataConfig, train: bool = True, batch: int = 8, captions: bool = False, **options: Any
) -> DataSpec:
    clean_stale_shared_memory()
    return build_image_loader(replace(config, **options), IMAGE_SIZE, batch, 5, train=train, captions=captions)


def _loader(*args: Any, **options: Any) -> Any:
    return _spec(*args, **options).dataloader


def test_workers_change_nothing_and_epochs_differ(config: ImageDataConfig) -> None:
    epochs: dict[int, list[dict[int, tuple[torch.Tensor, torch.Tensor]]]] = {0: [], 2: []}
    for workers, seen in epochs.items():
        loader = _loader(config, num_workers=workers, crop_scale=[0.3, 1.0])
        for _ in range(2):
            rows = {}
            for batch in loader:
                rows.update(zip(batch['index'].tolist(), zip(batch['pixel_values'], batch['text_embedding'])))
            seen.append(rows)
    for one, two in zip(*epochs.values()):
        assert len(one) == 64
        torch.testing.assert_close(one, {index: two[index] for index in one}, rtol=0, atol=0)
    first, second = epochs[0]
    assert list(first) != list(second)


@pytest.mark.parametrize('train', [True, False])
def test_a_loader_knows_how_many_batches_an_epoch_has(
    train: bool, config: ImageDataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming repeats 32 of the 64 samples, so that each of 48 canonical nodes has as many."""
    config.num_canonical_nodes = 48
    config.epoch_size = None if train else 48  # which is that of training
    loader = _loader(config, train, 10)
    batches = [batch['index'].tolist() for batch in loader]
    assert len(batches) == len(loader) == (9 if train else 10)
    assert train or {at for batch in batches for at in batch} == {*range(64)}
    if train:
        check_resumed(lambda: _loader(config, train, 10))
    monkeypatch.setattr(dist, 'get_world_size', lambda: 5)
    monkeypatch.setattr(dist, 'get_local_world_size', lambda: 5)
    assert len(loader.dataset) == 20  # of 96, the same number on each rank


def test_missing_dataset_embeddings_and_columns_are_named(
    config: ImageDataConfig, image_dataset: Path, embeddings: Path, tmp_path: Path
) -> None:
    for folders in ((tmp_path / 'nowhere', embeddings), (image_dataset, tmp_path / 'nowhere')):
        with pytest.raises(FileError, match='no MDS dataset in .*nowhere'):
            _loader(_config(*folders))
    with pytest.raises(ValueError, match="column 'caption.medium' is missing; .*caption.long"):
        _loader(config, caption_weights={'medium': 1.0})
    with pytest.raises(ConfigError, match='^global_train_batch_size: 25, .* 24 samples'):
        _loader(config, batch=25, epoch_size=24)
    columns = {'sample_id': 'str', 'image': 'str', 'caption.short': 'str', 'caption.long': 'str'}
    with MDSWriter(out=str(tmp_path / 'typed'), columns=columns, hashes=['xxh64']) as writer:
        writer.write({name: 'x' for name in columns})
    with pytest.raises(ValueError, match="column 'image' has type 'str', expected 'bytes'"):
        _loader(_config(tmp_path / 'typed', embeddings))


def test_embeddings_of_several_teachers_are_concatenated(
    config: ImageDataConfig, image_dataset: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    write_text_embeddings(image_dataset, tmp_path / 'int8', teacher_folder, storage='int8')
    config.streams['s'].embeddings['other'] = DatasetConfig(local=str(tmp_path / 'int8'))
    with refused_at('streams.s.embeddings', 'choice by `teachers`; there are 2 .tiny, other'):
        _loader(config)
    vectors = {}
    for names in (['tiny'], ['other'], ['other', 'tiny']):
        spec = _spec(config, teachers=names)
        batch = next(iter(spec.dataloader))
        assert ('text_embedding_scale' in batch) is (names == ['other'])
        vectors[len(names), names[0]] = dequantize(batch).float()
        record = teacher_of_embeddings(spec)
        assert record.llm_embed_dim == 32 * len(names) and len(record.teacher) == len(names)
    tiny, other, both = vectors[1, 'tiny'], vectors[1, 'other'], vectors[2, 'other']
    assert not torch.equal(tiny, other)
    torch.testing.assert_close(tiny, other, rtol=0, atol=0.05)
    torch.testing.assert_close(both, torch.cat([F.normalize(other, dim=-1), F.normalize(tiny, dim=-1)], dim=-1))
    with pytest.raises(ConfigError, match="there is no embeddings dataset of 'third', only of tiny, other"):
        _loader(config, teachers=['third'])


@pytest.mark.parametrize('train', [True, False])
def test_embeddings_of_several_storage_types(train: bool, tmp_path: Path) -> None:
    """Vectors of images and texts stay as stored where all datasets store them alike.

    The datasets have the same sample ids, and no captions are equal because of that."""
    vectors = np.random.default_rng(0).standard_normal((8, 1, 4)).astype(np.float32)
    write_dataset([Sample(f'{i}', {'x': 'a'}) for i in range(8)], tmp_path / 'd')
    dataset = dataset_fingerprint(read_index(tmp_path / 'd/train'))
    for name, storage in (('a', 'float16'), ('b', 'int8')):
        for out, key in ((tmp_path / name, 'image'), (tmp_path / f't{name}', 'x')):
            columns = vector_columns([key], 4, storage)
            with MDSWriter(out=str(out), columns=columns, hashes=['xxh64']) as writer:
                for row in vector_rows([f'{i}' for i in range(8)], [key], vectors, storage):
                    writer.write(row)
            (out / 'teacher.json').write_text(json.dumps({'dataset': dataset}))

    def stream(name: str) -> ImageStreamConfig:
        return ImageStreamConfig(str(tmp_path / 'd/train'), embeddings={'t': DatasetConfig(f'{tmp_path}/t{name}')},
                                 image_embeddings=DatasetConfig(str(tmp_path / name)))

    for names, dtype in (('a', torch.float16), ('b', torch.int8), ('ab', torch.float32)):
        config = ImageDataConfig(streams={name: stream(name) for name in names}, caption_weights={'x': 1.0},
                                 num_workers=0, num_canonical_nodes=1)
        batch, = _loader(config, train, 8 * len(names))
        for kind in ('image', 'text'):
            assert batch[f'{kind}_embedding'].dtype == dtype and (f'{kind}_embedding_scale' in batch) is (names == 'b')
        assert len(batch['text_id'].unique()) == 8 * len(names)
        expected = torch.from_numpy(vectors[batch['index'] % 8, 0])
        torch.testing.assert_close(dequantize(batch, 'image_embedding').float(), expected, rtol=0, atol=0.02)


def test_unreadable_shared_memory_is_no_error(config: ImageDataConfig) -> None:
    of_another_user = Path('/dev/shm/999999_locals')
    of_another_user.mkdir()  # root, too, cannot read a folder
    try:
        assert len(list(_loader(config))) == 8
    finally:
        of_another_user.rmdir()


def test_several_captions_of_an_image_in_one_batch(config: ImageDataConfig, embeddings: Path) -> None:
    one = list(_loader(config))
    config.captions_per_image = 2
    for batch, single in zip(list(_loader(config)), one, strict=True):
        assert batch['sample_id'] == single['sample_id']
        for name in ('text_embedding', 'text_id'):  # the first is the one that is drawn alone
            assert batch[name].shape == (8, 2, *single[name].shape[1:]) and torch.equal(batch[name][:, 0], single[name])
        assert torch.equal(batch['pixel_values'], single['pixel_values'])
        rows = {row['sample_id']: row for row in read_samples(embeddings)}
        for sample_id, vectors in zip(batch['sample_id'], batch['text_embedding']):
            both = {tuple(rows[sample_id][f'text_embedding.{key}'].tolist()) for key in ('short', 'long')}
            assert {tuple(vector.tolist()) for vector in vectors} == both
    for train in (True, False):
        spec = _spec(config, train, captions=True)
        whole = next(iter(spec.dataloader))
        parts: Any = spec.split_batch(whole, 3)
        assert [len(part['index']) for part in parts] == [3, 3, 2]
        for part in (whole, *parts):  # one list per caption
            assert len(part['caption']) == 2 and {len(column) for column in part['caption']} == {len(part['index'])}
            if train:
                assert part['text_id'].T.tolist() == [list(map(text_id, column)) for column in part['caption']]


def test_a_dataset_may_have_its_own_captions(
    config: ImageDataConfig, teacher_folder: Path, tmp_path: Path
) -> None:
    samples = make_samples(32, prefix='t')
    for sample in samples:
        sample.captions = {'re': sample.captions['long']}
    write_dataset(samples, tmp_path / 'other')
    write_text_embeddings(tmp_path / 'other' / 'train', tmp_path / 'embeddings', teacher_folder)
    config.streams['other'] = ImageStreamConfig(f'{tmp_path}/other/train', caption_weights={'re': 1.0},
                                                embeddings={'tiny': DatasetConfig(f'{tmp_path}/embeddings')})
    batches = list(_loader(config, caption_weights={'short': 1.0}))
    ids = [(sample, int(text)) for batch in batches for sample, text in zip(batch['sample_id'], batch['text_id'])]
    expected = {**{s.sample_id: text_id(s.captions['short']) for s in make_samples(64)},
                **{s.sample_id: text_id(s.captions['re']) for s in samples}}
    assert len(ids) == 96 and dict(ids) == expected


def test_embeddings_of_another_dataset_is_refused(
    image_dataset: Path, embeddings: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    """One whose fingerprint was forged is still found out by its samples."""
    write_dataset(make_samples(64, prefix='t'), tmp_path / 'other', size_limit='8kb')
    write_text_embeddings(tmp_path / 'other' / 'train', tmp_path / 'embeddings', teacher_folder)
    with pytest.raises(ValueError, match='belongs to another dataset'):
        _loader(_config(image_dataset, tmp_path / 'embeddings'))
    with pytest.raises(ValueError, match='begun for another dataset or teacher: dataset is'):
        write_text_embeddings(image_dataset, tmp_path / 'embeddings', teacher_folder)
    shutil.copy(embeddings / 'teacher.json', tmp_path / 'embeddings' / 'teacher.json')
    with pytest.raises(ValueError, match="is 's00.*' in .* but 't00.*' in the embeddings dataset"):
        next(iter(_loader(_config(image_dataset, tmp_path / 'embeddings'), train=False)))


def test_a_run_does_not_resume_on_other_embeddings(
    image_dataset: Path, embeddings: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    """Of the same captions by the same teacher; checkpoints of earlier versions do not describe them."""
    write_text_embeddings(image_dataset, tmp_path / 'again', teacher_folder)
    write_text_embeddings(image_dataset, tmp_path / 'int8', teacher_folder, storage='int8')
    loader = _loader(_config(image_dataset, embeddings))
    next(iter(loader))
    state = loader.state_dict()
    del loader
    data = json.loads(state['data'])
    mapping = state | {'data': data.copy()}
    del data['embeddings']
    older = state | {'data': data}
    for folder, saved in (('again', state), ('again', mapping), ('again', older), ('int8', older)):
        _loader(_config(image_dataset, tmp_path / folder)).load_state_dict(saved)
    resumed = _loader(_config(image_dataset, tmp_path / 'int8'))
    with refused_at('train_data', 'the data have changed .*embeddings'):
        resumed.load_state_dict(state)


def test_each_tensor_takes_whole_pages_of_shared_memory() -> None:
    batch = {'sample_id': ['0'] * 512, 'text_id': torch.empty(512, dtype=torch.long, device='meta'),
             'pixel_values': torch.empty(512, 3, 336, 336, dtype=torch.uint8, device='meta')}
    # 8 ranks of 8 workers with 2 batches each.
    assert shared_memory(batch, 8, 8, 3_000_000) == 128 * (512 * 3 * 336 ** 2 + mmap.PAGESIZE) + 24_000_000


def _shared() -> int:
    """Bytes of the memory that torch shares between this process and its workers."""
    files = {}
    for pid in [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]:
        for name in os.listdir(f'/proc/{pid}/fd'):
            try:
                if os.readlink(f'/proc/{pid}/fd/{name}').startswith('/dev/shm/torch_'):
                    status = os.stat(f'/proc/{pid}/fd/{name}')
                    files[status.st_ino] = status.st_blocks * 512
            except FileNotFoundError:  # closed since
                continue
    return sum(files.values())


def test_the_bound_of_shared_memory_is_what_workers_fill(config: ImageDataConfig) -> None:
    batches = iter(_loader(config, num_workers=2))
    held = next(batches)
    # Two for each worker, and the one that is held here, which is not pinned.
    expected = shared_memory(held, 2) + shared_memory(held, 1) // 2
    assert expected > 5 * 8 * 3 * IMAGE_SIZE ** 2
    for _ in range(5000):  # 100 s at most
        if _shared() >= expected:
            break
        time.sleep(0.02)
    time.sleep(0.1)
    assert _shared() == expected
