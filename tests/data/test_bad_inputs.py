# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Whatever is wrong with the files of a source, its arguments, or a dataset that is there: one message that names it.

A case is a name, what is written, and what the message says, as a regular expression.
"""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from composer.devices import DeviceCPU
from parts import make_samples, picture, write_dataset
from streaming import MDSWriter

from llm2clip.config import DatasetConfig, WriterConfig
from llm2clip.data.convert.samples import Dropped, Part, Sample, one_part, read_image
from llm2clip.data.convert.writer import is_written, write_splits
from llm2clip.data.schema import read_index, read_samples
from llm2clip.data.streams.verified_stream import ShardError, VerifiedStream
from llm2clip.errors import ConfigError, FileError
from llm2clip.io.remotes import OutputFolder
from llm2clip.registry import build_source
from llm2clip.teacher.extraction import EmbeddingsDataset, extract_text_embeddings
from llm2clip.teacher.sources import TeacherFolder

HEADER = 'image,caption\n'


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder `photos` with an image, a link out of it and one inside, and an image beside it."""
    monkeypatch.chdir(tmp_path)
    Path('photos').mkdir()
    Path('photos/a.png').write_bytes(picture(0))
    Path('secret.png').write_bytes(picture(1))
    Path('photos/out.png').symlink_to('../secret.png')
    Path('photos/up').symlink_to('..')
    Path('photos/in.png').symlink_to('a.png')


def write(path: str, content: Union[str, bytes]) -> None:
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def convert(**source: Any) -> list[Sample]:
    """All samples of a source, without writing them."""
    splits, dropped = build_source(source)
    return [sample for parts in splits.values() for part in parts for sample in part.read(dropped)]


def refused(words: str, call: Callable[[], Any]) -> None:
    with pytest.raises((ConfigError, FileError), match=words):
        call()


def _numbered(cases: Sequence[Sequence[Any]]) -> list[str]:
    return [f'{i}-{case[0]}' for i, case in enumerate(cases)]


CAPTION_FILES: list[tuple[str, Union[str, bytes], str]] = [
    ('c.csv', f'{HEADER}../secret.png,x\n', r"c\.csv: the path '\.\./secret\.png' leads to .*secret.png, expected one"),
    ('c.csv', f'{HEADER}out.png,x\n', "the path 'out.png' leads to .*/secret.png, expected one inside photos"),
    ('c.csv', f'{HEADER}a.png,x\na.png,"one\nb.png,two\n',
     r'c\.csv:3: .*expected a row in which every quote that is op'),
    ('c.csv', HEADER.encode() + b'a.png,x\na.png,caf\xe9\n', r'c\.csv:3: has the byte 0xe9, expected a text in UTF-8'),
    ('c.csv', f'{HEADER}a.png,x\0y\n', r'c\.csv:2: has a NUL character'),
    ('c.csv', 'image;caption\na.png;x\n', r"c\.csv:2 has no 'image'; it has image;caption"),
    ('c.csv', f'{HEADER}a.png,x\nup/photos/a.png,y\n', "c.csv: 'a.png' and 'up/photos/a.png' are the same image"),
    ('c.csv', f'{HEADER}\na.png,"x\n\ny"\n\nin.png,x,y\n', r'c\.csv:7: has 3 values, expected 2'),
    ('c.json', '[{"image": "a.png", "caption": 3}]', r"c\.json, value 0: 'caption': '3', expected a text"),
    ('c.json', '[{"image": "a.png", "caption": "\\ud800"}]',
     r"'caption': has the half character U\+D800, expected a text"),
    ('c.json', json.dumps([{f'{i}.png': ['x'] for i in range(60)}]), r"has no 'image'; it has 0.png, .*7.png, .* …$"),
]


@pytest.mark.parametrize(['file', 'content', 'words'], CAPTION_FILES, ids=_numbered(CAPTION_FILES))
def test_a_file_of_captions(file: str, content: Union[str, bytes], words: str) -> None:
    write(file, content)
    refused(words, lambda: convert(name='image_folder', images='photos', captions=file))


def test_links_inside_and_a_link_that_is_the_folder_are_fine() -> None:
    Path('linked').symlink_to('photos')
    write('c.csv', f'\ufeff{HEADER}\nin.png,"x, ""y"""\nup/photos/a.png,z\n')
    samples = convert(name='image_folder', images='linked', captions='c.csv')
    assert [(sample.sample_id, sample.captions['0']) for sample in samples] == [
        ('in.png', 'x, "y"'), ('up/photos/a.png', 'z')]
    assert all(sample.image == picture(0) for sample in samples)


def test_two_tables_that_name_an_image_in_two_ways(tmp_path: Path) -> None:
    write('a.csv', 't,i\nx,a.png\nx,a.png\n')
    write('b.csv', f't,i\nx,in.png\nx,{tmp_path}/photos/a.png\n')
    source = {'name': 'table', 'files': '*.csv', 'captions': 't', **IMAGE}
    assert len(convert(**source)) == 4
    refused("source.image_column: 'i': 'a.png' and '/.*/photos/a.png'", lambda: convert(**source, holdout=0.5))


ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    *((source, {'split': '../x'}, "source.split: '../x', expected the name of a folder")
      for source in ('image_folder', 'table', 'huggingface', 'webdataset')),
    *(('image_folder', {'holdout': holdout}, 'source.holdout: .*, expected (a share|at least|a? ?finite|number)')
      for holdout in (-5, 1.5, float('nan'), '3')),
    ('plain_text', {'files': [5]}, r'source.files: \[5\], expected string'),
    *((source, {'captions': {}}, 'source.captions: .*, expected .*at least 1 item')
      for source in ('webdataset', 'table')),
    *((source, {'sample': share}, f'source.sample: {share}, expected (greater than 0|at most 1)')
      for source in ('table', 'huggingface', 'webdataset') for share in (0, 1.5)),
    *((source, {'filters': {'t': {}}}, 'source.filters.t: expected min, max')
      for source in ('table', 'huggingface', 'webdataset')),
]
REQUIRED = {
    'image_folder': {'images': 'photos', 'captions': 'c.csv'}, 'table': {'files': 't.csv', 'captions': 't'},
    'huggingface': {'path': 'x', 'captions': 't'}, 'webdataset': {'files': 't.csv', 'captions': {'a': 'b'}},
    'plain_text': {'files': 't.csv'},
}


@pytest.mark.parametrize(['name', 'arguments', 'words'], ARGUMENTS, ids=_numbered(ARGUMENTS))
def test_an_argument_of_a_source(name: str, arguments: dict[str, Any], words: str) -> None:
    write('c.csv', f'{HEADER}a.png,x\nin.png,y\n')
    write('t.csv', 't\nx\n')
    refused(words, lambda: convert(**{'name': name, **REQUIRED[name], **arguments}))


def _parquet(columns: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns), buffer,
                                **options)
    return buffer.getvalue()


def _not_utf8() -> pyarrow.Array:
    return pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(np.array([0, 3], np.int32)),
                                            pyarrow.py_buffer(b'a\xffb'))


_WHOLE = _parquet({'t': [f'text {i}' * 50 for i in range(500)]}, compression='snappy')
IMAGE = {'image_column': 'i', 'images': 'photos'}
TABLES: list[tuple[str, Union[str, bytes], dict[str, Any], str]] = [
    ('a.parquet', _WHOLE[:-50], {}, r'a\.parquet: cannot be read .*, expected a Parquet file'),
    ('a.parquet', _parquet({'t': _not_utf8()}), {},
     r'a\.parquet: cannot be read .*, expected a Parquet file with texts'),
    ('a.parquet', _parquet(pyarrow.Table.from_arrays([pyarrow.array(['a'])] * 2, names=['t', 't'])), {},
     r"a\.parquet: expected one column 't', found t, t"),
    ('a.parquet', _parquet({'t': ['a'], 'k': [None]}), {'id_column': 'k'},
     "a.parquet, row 1: 'k': None, expected a text or"),
    ('a.parquet', _parquet({'t': ['a'], 'i': [3]}), IMAGE,
     "a.parquet, row 1: 'i' is 3, expected an encoded image or a path"),
    ('a.parquet', _parquet({'t': ['x', 'a'], 'i': ['a.png', '../secret.png']}), IMAGE,
     r"a\.parquet, row 2: the path '\.\./secret\.png' leads to .*, expected one inside photos"),
    ('a.csv', 't,i\nx,/etc/hostname\n', IMAGE, r"a\.csv, row 1: the path '/etc/hostname' leads to /etc/hostname"),
]


@pytest.mark.parametrize(['file', 'content', 'options', 'words'], TABLES, ids=_numbered(TABLES))
def test_a_table(file: str, content: Union[str, bytes], options: dict[str, Any], words: str) -> None:
    write(file, content)
    refused(words, lambda: convert(name='table', files=file, captions='t', **options))


def test_without_a_folder_of_images_a_path_may_lead_anywhere(tmp_path: Path) -> None:
    for path in (f'{tmp_path}/secret.png', 'photos/out.png'):
        write('a.csv', f't,i\nx,{path}\n')
        assert convert(name='table', files='a.csv', captions='t', image_column='i')[0].image == picture(1)
    refused('expected one inside photos', lambda: read_image(['photos', 'nowhere'], '../secret.png', 'a', Dropped()))
    assert read_image(['photos', '.'], '../secret.png', 'a', Dropped()) == picture(1)


@pytest.mark.parametrize('file_name', ['../secret.png', '/etc/hostname', 'up/secret.png'])
def test_a_folder_of_the_library_names_images_inside_of_it(
    file_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip('datasets', reason='the package datasets is not installed')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    write('photos/metadata.csv', f'file_name,text\n{file_name},x\n')
    refused('the path .* leads to|cannot be read', lambda: convert(
        name='huggingface', path='photos', captions='text', image_column='image'))


def _tar(members: list[Any]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def _special(kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo('1.jpg')
    info.type, info.linkname = kind, target
    return info


def _one(record: bytes) -> bytes:
    return _tar([('0.jpg', picture(0)), ('0.json', record)])


MEMBERS = [member for i in range(3) for member in ((f'{i}.jpg', picture(i)), (f'{i}.json', b'{"c": "x"}'))]
TAR = _tar(MEMBERS)
TARS: list[tuple[str, bytes, str]] = [
    ('list', _one(b'[1]'), r"t\.tar: sample '0': holds '\[1\]', expected JSON, an object"),
    ('txt', _tar([('0.jpg', picture(0)), ('0.txt', b'\xe9')]), r"sample '0': txt: cannot be read .*UTF-8"),
    ('parent', _tar([('../0.jpg', picture(0))]), r"t\.tar: the path '\.\./0\.jpg' leads out of the tar"),
    ('symlink', _tar([*MEMBERS[:2], _special(tarfile.SYMTYPE, '/etc/hostname')]),
     r"t\.tar: '1\.jpg' is a link or a d"),
    ('cut in a header', TAR[:1200], r't\.tar: is cut off, .* at byte 1,024, expected a whole tar'),
    ('cut in a file', TAR[:2600], r't\.tar: cannot be read .unexpected end.*, expected a whole tar'),
    ('damaged header', TAR[:2048] + b'\xff\xff' + TAR[2050:], r't\.tar: .* no header of a file, at byte 2,048'),
]


@pytest.mark.parametrize(['name', 'content', 'words'], TARS, ids=_numbered(TARS))
def test_a_tar(name: str, content: bytes, words: str) -> None:
    write('t.tar', content)
    refused(words, lambda: convert(name='webdataset', files='t.tar', captions={'a': 'txt' if name == 'txt' else 'c'}))


def test_files_that_cannot_be_read() -> None:
    write('a.txt', os.urandom(99) + b'\0')
    refused(r'a\.txt:\d: has .*, expected a text in UTF-8', lambda: convert(name='plain_text', files='*.txt'))
    write('p.jsonl', '{"query": "a", "positive": "\\ud800"}\n')
    refused(r"p\.jsonl:1: 'positive': has the half character", lambda: convert(name='text_pairs', files='p.jsonl'))


def test_texts_that_cannot_be_written(tmp_path: Path) -> None:
    for sample, words in ((Sample('a\ud800', {'a': 'x'}), 'the id of sample .*: has the half character U.D800'),
                          (Sample('a', {'a': 'x', 'b': '\ud800'}), "sample 'a': caption 'b': has the half character"),
                          (Sample('a', {'a': 'x\0'}), "sample 'a': caption 'a': has a NUL character")):
        refused(words, lambda sample=sample: write_dataset([sample], tmp_path / 'out'))


def test_names_that_lead_out_of_the_dataset(tmp_path: Path) -> None:
    for splits, words in (({'../x': one_part(make_samples(2))}, r"source\.split: '\.\./x'"),
                          ({'train': [Part('../../x', lambda dropped: [])]}, r"folder of a part: 'part-\.\.")):
        refused(words, lambda splits=splits: write_splits(splits, Dropped(), tmp_path / 'out'))
        assert not (tmp_path / 'out').exists()


Change = Callable[[dict[str, Any]], Any]


def _edit(path: Path, change: Change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture(scope='module')
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('dataset')
    write_dataset(make_samples(6), folder, size_limit='1kb')
    return folder / 'train'


PARTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ('no keys', lambda part: write(f'{part}/part.json', '{}'),
     r'part\.json: cannot be read .*remove .*part-'),
    ('shard', lambda part: write(f'{part}/shard.00000.mds', b'x'),
     r'shard\.00000\.mds: is missing or damaged, expected .* bytes'),
]


@pytest.mark.parametrize(['name', 'damage', 'words'], PARTS, ids=_numbered(PARTS))
def test_a_part_that_is_there_already(
    name: str, damage: Callable[[Path], Any], words: str, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / 'out'
    shutil.copytree(dataset / 'part-all', out / 'train/part-all')
    damage(out / 'train/part-all')
    refused(words, lambda: write_dataset(make_samples(6), out, size_limit='1kb'))
    assert not (out / 'train/index.json').exists()


def test_only_a_dataset_of_the_same_source_is_complete(tmp_path: Path) -> None:
    out, about = OutputFolder(tmp_path / 'out'), {'source': {'name': 'x', 'files': ['a']}}
    config = WriterConfig()
    assert not is_written(out, about, config)
    write_splits({'train': one_part(make_samples(2))}, Dropped(), out, description=about)
    assert is_written(out, about, config)
    refused('out: .* was written with another source', lambda: is_written(out, {'source': {'name': 'y'}}, config))
    refused('out: .* was written with another require_any_caption',
            lambda: is_written(out, about, WriterConfig(require_any_caption=['short'])))
    (tmp_path / 'out/dataset.json').write_text('{')
    refused(r'dataset\.json: cannot be read .*, expected JSON, an object', lambda: is_written(out, about, config))


def test_the_dataset_of_somebody_else_is_not_overwritten(tmp_path: Path, teacher_folder: Path) -> None:
    with MDSWriter(out=str(tmp_path / 'out/train'), columns={'sample_id': 'str', 'caption.a': 'str'}) as writer:
        writer.write({'sample_id': '0', 'caption.a': 'x'})
    index = (tmp_path / 'out/train/index.json').read_bytes()
    refused('out: .*/train holds another dataset', lambda: write_dataset(make_samples(2), tmp_path / 'out'))
    folder = tmp_path / 'out/train'
    embeddings, teacher = EmbeddingsDataset(DatasetConfig(local=str(folder)),
                                            OutputFolder(folder)), TeacherFolder(teacher_folder)
    refused('out: .* holds a dataset that is no embeddings dataset', lambda: extract_text_embeddings(embeddings,
                                                                                                     teacher.load(DeviceCPU())))
    assert (tmp_path / 'out/train/index.json').read_bytes() == index


def _shard(**values: Any) -> Change:
    return lambda index: index['shards'][1].update(values)


def _file(**values: Any) -> Change:
    return _shard(raw_data={'bytes': 1, 'hashes': {}, 'basename': 'x', **values})


def _every(**values: Any) -> Change:
    return lambda index: [shard.update(values) for shard in index['shards']]


INDICES: list[tuple[str, Change, str]] = [
    ('shards', lambda index: index.pop('shards'), 'the MDS dataset is empty, expected a list of shards'),
    *((f'no {key}', lambda index, key=key: index['shards'][1].pop(key), f'shard 1: cannot be read .*{key}.*an entry of')
      for key in ('raw_data', 'column_sizes')),
    ('a version', _shard(version=3), 'shard 1: cannot be read .Unsupported .*version: 3.*an entry of an MDS'),
    ('no object', lambda index: index['shards'].append('x'), 'shard 3: cannot be read .*, expected an entry of an MDS'),
    *(('name', _file(basename=name), 'shard 1: the file .* is outside the folder')
      for name in ('../../x', 'a/../../x', '/etc/passwd')),
    ('compression', _shard(compression='zstd'), 'shard 1: is compressed'),
    ('columns', _shard(column_names=['a']), r"shard 1 has columns \['a'\], expected those of the first shard"),
    ('types', _every(column_encodings=['str', 'pkl', 'str', 'str']), 'shard 0: .* contains an unsafe type: pkl'),
]


@pytest.mark.parametrize(['name', 'change', 'words'], INDICES, ids=_numbered(INDICES))
def test_an_index(name: str, change: Change, words: str, dataset: Path) -> None:
    write('index.json', (dataset / 'index.json').read_bytes())
    _edit(Path('index.json'), change)
    refused(rf'index\.json: {words}', lambda: read_index('.'))


def test_an_index_that_is_no_json_is_not_kept(tmp_path: Path) -> None:
    write('index.json', b'{"version": 2, "sh')
    refused(r'index\.json: .*expected JSON', lambda: read_index('.'))
    with pytest.raises(ShardError, match=r'index\.json is damaged: .*expected JSON'):
        VerifiedStream(local='cache', remote=str(tmp_path), download_retry=1).open()
    assert not Path('cache/index.json').exists()
    refused('there is no MDS dataset in photos', lambda: read_index('photos'))


def test_shards_that_are_not_what_the_index_says(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, 'train')
    path = 'train/' + read_index(dataset)['shards'][1]['raw_data']['basename']
    whole = Path(path).read_bytes()
    for data, words in ((whole[:-1], rf'{len(whole) - 1} bytes, expected {len(whole)}'),
                        (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], 'xxh64 .*, expected')):
        write(path, data)
        refused(rf'the shard {path} is damaged: {words}', lambda: read_samples('train'))
