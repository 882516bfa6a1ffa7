# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A dataset that grows: what is there stays, vectors are added for what is new, and no run goes on with other data."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import pytest
import xxhash
from parts import make_samples, write_sidecar
from recipes_in_process import run_recipe

from llm2clip.config import ConfigError, DatasetConfig, ImageDataConfig, ImageStreamConfig, WriterConfig
from llm2clip.data.convert.samples import Dropped, Part, Sample
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.image_embeddings import build_image_loader
from llm2clip.data.loader import streaming_dataset
from llm2clip.data.schema import dataset_fingerprint, first_shards, read_index, read_samples


def _write(out: Path, names: Iterable[str], prefix: str = '', **options: object) -> None:
    """A dataset with a part of eight samples for each name."""
    def samples(name: str) -> list[Sample]:
        return make_samples(8, prefix=prefix + name)

    parts = [Part(name, lambda dropped, name=name: samples(name)) for name in sorted(names)]
    with mock.patch('llm2clip.data.convert.writer.draw_card'):  # which takes longer than all the rest
        write_splits({'train': parts}, Dropped(), out, WriterConfig(size_limit='2kb'),
                     {'source': {'files': sorted(names)}}, **options)


@pytest.fixture(scope='module')
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('before') / 'out'
    _write(out, 'bd')
    return out


@pytest.fixture(scope='module')
def grown(before: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With parts whose names come before, between and after those that were there."""
    out = tmp_path_factory.mktemp('grown') / 'out'
    shutil.copytree(before, out)
    _write(out, 'abcde', extend=True)
    return out


def test_only_new_parts_are_written_and_their_shards_come_last(before: Path, grown: Path) -> None:
    old, new = (read_index(out / 'train')['shards'] for out in (before, grown))
    assert new[:len(old)] == old and len(new) > len(old) > 2
    for shard in old:
        name = shard['raw_data']['basename']
        assert (grown / 'train' / name).stat().st_mtime_ns == (before / 'train' / name).stat().st_mtime_ns
    ids = [sample['sample_id'] for sample in read_samples(grown / 'train')]
    assert ids == [sample.sample_id for name in 'bdace' for sample in make_samples(8, prefix=name)]
    card = json.loads((grown / 'dataset.json').read_text())
    assert card['samples'] == {'train': 40} and card['source']['files'] == [*'abcde']
    assert card['captions']['train']['short']['captions'] == 40


def test_a_dataset_is_extended_only_if_that_is_asked_for_and_nothing_is_lost(before: Path, tmp_path: Path) -> None:
    out = tmp_path / 'out'
    shutil.copytree(before, out)
    with pytest.raises(ConfigError, match='begun with another source or other options'):
        _write(out, 'bcd')
    with pytest.raises(ConfigError, match='extend: .*train has part-d, which comes from none of the input files'):
        _write(out, 'bc', extend=True)
    parts = {'train': [Part(name, lambda dropped: []) for name in 'bd']}
    about = {'source': {'files': ['b', 'd', 'x'], 'split': 'other'}}
    with pytest.raises(ConfigError, match='begun with another source'):
        write_splits(parts, Dropped(), out, WriterConfig(), about, extend=True)
    # A failure, here of an id that is there already, leaves the dataset as it was.
    index = (out / 'train/index.json').read_bytes()
    twice = Part('x', lambda dropped: make_samples(3, prefix='b'))
    with pytest.raises(ValueError, match='occur in more than one part'):
        write_splits({'train': [*parts['train'], twice]}, Dropped(), out, WriterConfig(),
                     {'source': {'files': ['b', 'd', 'x']}}, extend=True)
    assert (out / 'train/index.json').read_bytes() == index


def test_the_recipe_adds_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr('llm2clip.data.convert.writer.draw_card', lambda *_: None)

    def prepare(*more: str) -> str:
        run_recipe(monkeypatch, 'prepare_data', 'source.name=table', f'source.files={tmp_path}/*.csv',
                   'source.captions=caption', f'out={tmp_path}/out', *more)
        return capsys.readouterr().out

    (tmp_path / 'b.csv').write_text('caption\none\ntwo\n')
    assert "wrote {'train': 2}" in prepare()
    (tmp_path / 'a.csv').write_text('caption\nthree\n')
    assert 'is complete; extend=true adds' in prepare()
    assert "wrote {'train': 3}" in prepare('extend=true')
    (tmp_path / 'ids.json').write_text('["b.csv:2", "c.csv:1"]')
    with pytest.raises(ConfigError, match='is complete, but was written with another leave_out'):
        prepare(f'leave_out={tmp_path}/ids.json')
    with pytest.raises(ConfigError, match='begun with another source or other options'):
        prepare('image_max_side=9')
    with pytest.raises(ConfigError, match='ids.json names 1 of the samples in .*part-b, which is kept'):
        prepare(f'leave_out={tmp_path}/ids.json', 'extend=true')
    with pytest.raises(ConfigError, match='complete, but was written with another source .*extend=true'):
        prepare(f"source.files=['{tmp_path}/*.csv', '{tmp_path}/a.csv']")
    (tmp_path / 'b.csv').write_text('caption\none\nTWO\n')
    for more in ([], ['extend=true']):
        with pytest.raises(ConfigError, match='b.csv: has changed since'):
            prepare(*more)
    shutil.rmtree(tmp_path / 'out')
    (tmp_path / 'more.json').write_text('["x", "b.csv:2"]')
    (tmp_path / 'none.json').write_text('["y", "x"]')
    (tmp_path / 'c.csv').write_text('caption\nfour\nfive\n')
    assert "wrote {'train': 3}" in prepare(f'leave_out={tmp_path}/ids.json')
    card = json.loads((tmp_path / 'out/dataset.json').read_text())
    assert card['filtered'] == {'named by leave_out': 2}
    assert 'names 1 ids that no sample has: x\n' in prepare(f'leave_out={tmp_path}/more.json', f'out={tmp_path}/more')
    with pytest.raises(ConfigError, match='none.json names 2 ids that no sample has: x, y; expected'):
        prepare(f'leave_out={tmp_path}/none.json', f'out={tmp_path}/none')
    (tmp_path / 'numbers.json').write_text('[1]')
    with pytest.raises(ConfigError, match='leave_out: .*numbers.json has entries that are no texts'):
        prepare(f'leave_out={tmp_path}/numbers.json', f'out={tmp_path}/other')


def test_a_fingerprint_is_found_among_the_beginnings_of_a_dataset(before: Path, grown: Path) -> None:
    old, new = read_index(before / 'train'), read_index(grown / 'train')
    plain = xxhash.xxh64(json.dumps([(s['samples'], s['raw_data']) for s in old['shards']], sort_keys=True)).hexdigest()
    assert dataset_fingerprint(old) == plain
    assert first_shards(new, plain) == len(old['shards']) == first_shards(old, plain)
    assert first_shards(old, dataset_fingerprint(new)) is None and first_shards(new, None) is None
    other = {'shards': [*new['shards'][1:], new['shards'][0]]}
    assert first_shards(other, plain) is None


@pytest.mark.usefixtures('no_leftovers')
def test_a_sidecar_is_extended_by_the_new_shards(
    before: Path, grown: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    out, n = tmp_path / 'sidecar', len(read_index(before / 'train')['shards'])
    write_sidecar(before / 'train', out, teacher_folder)
    kept = {path: path.stat().st_mtime_ns for path in out.glob('shard.*')}
    with pytest.raises(ValueError, match=rf'has vectors for {n} of the \d+ shards of .* called again with the same'):
        _loader(grown, out)
    done = write_sidecar(grown / 'train', out, teacher_folder)
    assert done['shards'] == len(read_index(grown / 'train')['shards']) - n and done['captions'] == 2 * 24
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    write_sidecar(grown / 'train', tmp_path / 'anew', teacher_folder)
    assert read_index(out) == read_index(tmp_path / 'anew')
    assert (out / 'teacher.json').read_bytes() == (tmp_path / 'anew/teacher.json').read_bytes()
    # Neither the smaller dataset nor one that begins otherwise is the one that it is of now.
    _write(tmp_path / 'other', 'bde', prefix='x')
    for dataset in (before, tmp_path / 'other'):
        with pytest.raises(ValueError, match='begun for another dataset or teacher: dataset is'):
            write_sidecar(dataset / 'train', out, teacher_folder)
    _loader(grown, out)


def _loader(out: Path, sidecar: Path) -> object:
    streams = {'s': ImageStreamConfig(local=f'{out}/train', embeddings={'t': DatasetConfig(local=str(sidecar))})}
    config = ImageDataConfig(streams=streams, num_workers=0, num_canonical_nodes=4, caption_mix={'short': 1.0})
    return build_image_loader(config, 32, 8, 5, True, 'train_data')


@pytest.mark.usefixtures('no_leftovers')
def test_a_state_of_other_data_is_refused(before: Path, grown: Path, tmp_path: Path) -> None:
    _write(tmp_path / 'other', 'bd', prefix='x')
    datasets = {}
    for out in (before, grown, tmp_path / 'other'):
        streams = {'s': ImageStreamConfig(local=f'{out}/train')}
        config = ImageDataConfig(streams=streams, num_workers=0, num_canonical_nodes=4, caption_mix={'short': 1.0})
        datasets[out] = streaming_dataset(build_image_loader(config, 32, 8, 5, True, 'train_data', online=True))
    state = json.loads(json.dumps(datasets[before].state_dict(8, True)))
    datasets[before].load_state_dict(state)
    with pytest.raises(ConfigError, match='16 samples in . shards then, 40 in .* now.*choose another save_folder'):
        datasets[grown].load_state_dict(state)
    with pytest.raises(ConfigError, match='as many samples, but not the same'):
        datasets[tmp_path / 'other'].load_state_dict(state)
