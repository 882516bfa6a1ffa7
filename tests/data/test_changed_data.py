# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A dataset is never written over by another one, and no run continues with other data."""

import json
from pathlib import Path

import pytest
from parts import make_samples, write_text_embeddings
from recipes_in_process import run_recipe

from llm2clip.config import ImageDataConfig, ImageStreamConfig, WriterConfig
from llm2clip.data.convert.part_writer import excluded_ids
from llm2clip.data.convert.samples import Dropped, Part
from llm2clip.data.convert.writer import is_written, write_splits
from llm2clip.data.image_text_dataset import build_image_loader
from llm2clip.data.loader import streaming_dataset
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.errors import ConfigError
from llm2clip.io.remotes import OutputFolder


def _write(out: Path, names: str, prefix: str = '') -> Path:
    """A dataset with a part of eight samples for each name."""
    parts = [Part(name, lambda dropped, name=name: make_samples(8, prefix=prefix + name)) for name in names]
    write_splits({'train': parts}, Dropped(), out, WriterConfig(size_limit='2kb'))
    return out / 'train'


def test_a_complete_dataset_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def prepare(*more: str) -> str:
        run_recipe(monkeypatch, 'prepare_data', 'source.name=table', f'source.files={tmp_path}/*.csv',
                   'source.captions=caption', f'out={tmp_path}/out', *more)
        return capsys.readouterr().out

    (tmp_path / 'b.csv').write_text('caption\none\ntwo\n')
    assert "wrote {'train': 2}" in prepare()
    (tmp_path / 'a.csv').write_text('caption\nthree\n')
    assert 'is complete; convert new input files into another `out`' in prepare()
    for option in ('image_max_side=9', 'image_quality=9', 'require_any_caption=[caption]', 'source.sample=0.5'):
        with pytest.raises(ConfigError, match=f'written with another {option.split("=")[0].split(".")[0]}'):
            prepare(option)
    (tmp_path / 'b.csv').write_text('caption\none\nTWO\n')
    with pytest.raises(ConfigError, match='b.csv: has changed since'):
        prepare()


def test_weights_are_compared_by_content_at_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('llm2clip.data.convert.writer._COMPARED', 4)
    files, out = [tmp_path / name for name in ('table.parquet', 'model.safetensors')], OutputFolder(tmp_path / 'out')

    def write(content: str) -> None:
        for file in files:
            file.write_text(content)

    write('before')
    write_splits({'train': [Part('all', lambda dropped: make_samples(2), [*map(str, files)])]}, Dropped(), out)
    assert is_written(out, {}, WriterConfig())
    write('after!')
    with pytest.raises(ConfigError, match='model.safetensors: has changed since'):
        is_written(out, {}, WriterConfig())


def test_ids_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def prepare(out: str, ids: list[object]) -> str:
        (tmp_path / f'{out}.json').write_text(json.dumps(ids))
        excluded_ids.cache_clear()
        run_recipe(monkeypatch, 'prepare_data', 'source.name=table', f'source.files={tmp_path}/*.csv',
                   'source.captions=caption', f'out={tmp_path}/{out}', f'exclude_ids={tmp_path}/{out}.json')
        return capsys.readouterr().out

    (tmp_path / 'b.csv').write_text('caption\none\ntwo\n')
    said = prepare('out', ['b.csv:2', 'x'])
    assert 'exclude_ids: 1 samples are left out' in said and 'names 2' in said and "wrote {'train': 1}" in said
    with pytest.raises(ConfigError, match='written with another exclude_ids'):
        prepare('out', ['b.csv:1'])
    with pytest.raises(ConfigError, match='0 samples are left out, and .*none.json names 2; expected ids of samples'):
        prepare('none', ['y', 'x'])


def test_vectors_of_another_dataset_are_refused(teacher_folder: Path, tmp_path: Path) -> None:
    """Also if it begins with the one that was embedded, or has as many samples."""
    write_text_embeddings(_write(tmp_path / 'before', 'bd'), tmp_path / 'embeddings', teacher_folder)
    for out, names, prefix in (('more', 'bde', ''), ('fewer', 'b', ''), ('other', 'bd', 'x')):
        with pytest.raises(ValueError, match='begun for another dataset or teacher: dataset is'):
            write_text_embeddings(_write(tmp_path / out, names, prefix), tmp_path / 'embeddings', teacher_folder)


@pytest.mark.usefixtures('no_leftovers')
def test_a_state_of_other_data_is_refused(tmp_path: Path) -> None:
    def dataset(name: str, parts: str, prefix: str = '') -> SafeDataset:
        local = _write(tmp_path / name, parts, prefix)
        config = ImageDataConfig(streams={'s': ImageStreamConfig(local=str(local))}, num_workers=0,
                                 num_canonical_nodes=4, caption_weights={'short': 1.0})
        return streaming_dataset(build_image_loader(config, 32, 8, 5, train=True, captions=True))

    before, more, other = dataset('before', 'bd'), dataset('more', 'abcde'), dataset('other', 'bd', 'x')
    state = json.loads(json.dumps(before.state_dict(8, True)))
    before.load_state_dict(state)
    for changed in (more, other):
        with pytest.raises(ConfigError, match="then {'samples': 16, .*, now {'samples': .*choose another save_folder"):
            changed.load_state_dict(state)
