# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A dataset that grows: what is there stays, vectors are added for what is new, and no run goes on with other data."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import xxhash
from parts import make_samples, write_text_embeddings
from recipes_in_process import run_recipe

from llm2clip.config import ConfigError, DatasetConfig, ImageDataConfig, ImageStreamConfig, WriterConfig
from llm2clip.data.convert.samples import Dropped, Part, Sample
from llm2clip.data.convert.writer import excluded_ids, write_splits
from llm2clip.data.image_embeddings import build_image_loader
from llm2clip.data.loader import streaming_dataset
from llm2clip.data.schema import dataset_fingerprint, first_shards, read_index, read_samples


def _write(out: Path, names: Iterable[str], prefix: str = '', **options: object) -> None:
    """A dataset with a part of eight samples for each name."""
    def samples(name: str) -> list[Sample]:
        return make_samples(8, prefix=prefix + name)

    parts = [Part(name, lambda dropped, name=name: samples(name)) for name in sorted(names)]
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
    with pytest.raises(ConfigError, match='written with another source .*, or add the new files by extend=true'):
        _write(out, 'bcd')
    with pytest.raises(ConfigError, match='extend: .*train has part-d, which comes from none of the input files'):
        _write(out, 'bc', extend=True)
    parts = {'train': [Part(name, lambda dropped: []) for name in 'bd']}
    about = {'source': {'files': ['b', 'd', 'x'], 'split': 'other'}}
    with pytest.raises(ConfigError, match='written with another source .* to convert again$'):
        write_splits(parts, Dropped(), out, WriterConfig(), about, extend=True)
    # A failure, here of an id that is there already, leaves the dataset as it was.
    index = (out / 'train/index.json').read_bytes()
    twice = Part('x', lambda dropped: make_samples(3, prefix='b'))
    with pytest.raises(ValueError, match='occur in more than one part'):
        write_splits({'train': [*parts['train'], twice]}, Dropped(), out, WriterConfig(),
                     {'source': {'files': ['b', 'd', 'x']}}, extend=True)
    assert (out / 'train/index.json').read_bytes() == index


def test_the_recipe_adds_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def prepare(*more: str) -> str:
        run_recipe(monkeypatch, 'prepare_data', 'source.name=table', f'source.files={tmp_path}/*.csv',
                   'source.captions=caption', f'out={tmp_path}/out', *more)
        return capsys.readouterr().out

    (tmp_path / 'b.csv').write_text('caption\none\ntwo\n')
    assert "wrote {'train': 2}" in prepare()
    (tmp_path / 'a.csv').write_text('caption\nthree\n')
    assert 'is complete; extend=true adds' in prepare()
    said = prepare('extend=true')
    assert 'out: 1 of 2 parts are to be written, by 1 process\n' in said and "wrote {'train': 3}" in said
    for option in ('image_max_side=9', 'image_quality=9', 'require_any_caption=[caption]', 'source.sample=0.5'):
        with pytest.raises(ConfigError, match=f'written with another {option.split("=")[0].split(".")[0]}'):
            prepare(option)
    (tmp_path / 'b.csv').write_text('caption\none\nTWO\n')
    for more in ([], ['extend=true']):
        with pytest.raises(ConfigError, match='b.csv: has changed since'):
            prepare(*more)


def test_ids_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def prepare(out: str, ids: list[object], *more: str) -> str:
        (tmp_path / f'{out}.json').write_text(json.dumps(ids))
        excluded_ids.cache_clear()
        run_recipe(monkeypatch, 'prepare_data', 'source.name=table', f'source.files={tmp_path}/*.csv',
                   'source.captions=caption', f'out={tmp_path}/{out}', f'exclude_ids={tmp_path}/{out}.json', *more)
        return capsys.readouterr().out

    (tmp_path / 'b.csv').write_text('caption\none\ntwo\n')
    said = prepare('out', ['b.csv:2', 'x'])
    assert 'exclude_ids: 1 samples are left out' in said and 'names 2' in said and "wrote {'train': 1}" in said
    with pytest.raises(ConfigError, match='written with another exclude_ids'):
        prepare('out', ['b.csv:1'])
    (tmp_path / 'c.csv').write_text('caption\nfour\nfive\n')
    with pytest.raises(ConfigError, match='out.json names 1 of the samples in .*part-b, which is kept'):
        prepare('out', ['b.csv:1', 'b.csv:2'], 'extend=true')
    shutil.rmtree(tmp_path / 'out/train/part-c')
    assert "wrote {'train': 2}" in prepare('out', ['b.csv:2', 'c.csv:1'], 'extend=true')
    assert json.loads((tmp_path / 'out/dataset.json').read_text())['filtered'] == {'named by exclude_ids': 2}
    with pytest.raises(ConfigError, match='0 samples are left out, and .*none.json names 2; expected ids of samples'):
        prepare('none', ['y', 'x'])


def test_a_fingerprint_is_found_among_the_beginnings_of_a_dataset(before: Path, grown: Path) -> None:
    old, new = read_index(before / 'train'), read_index(grown / 'train')
    plain = xxhash.xxh64(json.dumps([(s['samples'], s['raw_data']) for s in old['shards']], sort_keys=True)).hexdigest()
    assert dataset_fingerprint(old) == plain
    assert first_shards(new, plain) == len(old['shards']) == first_shards(old, plain)
    assert first_shards(old, dataset_fingerprint(new)) is None and first_shards(new, None) is None
    other = {'shards': [*new['shards'][1:], new['shards'][0]]}
    assert first_shards(other, plain) is None


@pytest.mark.usefixtures('no_leftovers')
def test_an_embeddings_dataset_is_extended_by_the_new_shards(
    before: Path, grown: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    out, n = tmp_path / 'embeddings', len(read_index(before / 'train')['shards'])
    write_text_embeddings(before / 'train', out, teacher_folder)
    kept = {path: path.stat().st_mtime_ns for path in out.glob('shard.*')}
    with pytest.raises(ValueError, match=rf'has vectors for {n} of the \d+ shards of .* called again with the same'):
        _loader(grown, out)
    done = write_text_embeddings(grown / 'train', out, teacher_folder)
    assert done['shards'] == len(read_index(grown / 'train')['shards']) - n and done['captions'] == 2 * 24
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    write_text_embeddings(grown / 'train', tmp_path / 'anew', teacher_folder)
    assert read_index(out) == read_index(tmp_path / 'anew')
    assert (out / 'teacher.json').read_bytes() == (tmp_path / 'anew/teacher.json').read_bytes()
    # Neither the smaller dataset nor one that begins otherwise is the one that it is of now.
    _write(tmp_path / 'other', 'bde', prefix='x')
    for dataset in (before, tmp_path / 'other'):
        with pytest.raises(ValueError, match='begun for another dataset or teacher: dataset is'):
            write_text_embeddings(dataset / 'train', out, teacher_folder)
    _loader(grown, out)


def _loader(out: Path, embeddings: Path) -> object:
    streams = {'s': ImageStreamConfig(local=f'{out}/train', embeddings={'t': DatasetConfig(local=str(embeddings))})}
    config = ImageDataConfig(streams=streams, num_workers=0, num_canonical_nodes=4, caption_weights={'short': 1.0})
    return build_image_loader(config, 32, 8, 5, True, 'train_data')


@pytest.mark.usefixtures('no_leftovers')
def test_a_state_of_other_data_is_refused(before: Path, grown: Path, tmp_path: Path) -> None:
    _write(tmp_path / 'other', 'bd', prefix='x')
    datasets = {}
    for out in (before, grown, tmp_path / 'other'):
        streams = {'s': ImageStreamConfig(local=f'{out}/train')}
        config = ImageDataConfig(streams=streams, num_workers=0, num_canonical_nodes=4, caption_weights={'short': 1.0})
        datasets[out] = streaming_dataset(build_image_loader(config, 32, 8, 5, True, 'train_data', captions=True))
    state = json.loads(json.dumps(datasets[before].state_dict(8, True)))
    datasets[before].load_state_dict(state)
    with pytest.raises(ConfigError, match='16 samples in . shards then, 40 in .* now.*choose another save_folder'):
        datasets[grown].load_state_dict(state)
    with pytest.raises(ConfigError, match='as many samples, but not the same'):
        datasets[tmp_path / 'other'].load_state_dict(state)
