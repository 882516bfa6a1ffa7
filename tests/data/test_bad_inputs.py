# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Whatever is wrong with the files of a source, its arguments, or a dataset that is there: an error names its place."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from composer.devices import DeviceCPU
from disks import flip
from parts import make_samples, picture, write_dataset
from refusals import refused_at
from set_files import tar
from streaming import MDSWriter

from llm2clip.config import DatasetConfig
from llm2clip.data.convert.samples import Dropped, Sample, one_part, read_image
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.schema import read_index, read_samples
from llm2clip.data.streams.verified_stream import ShardError, VerifiedStream
from llm2clip.errors import ConfigError, FileError
from llm2clip.io.remotes import OutputFolder
from llm2clip.registry import build_source
from llm2clip.teacher.extraction import ExtractionTask, write_embeddings
from llm2clip.teacher.sources import TeacherFolder

Content = Union[str, bytes]
Arguments = dict[str, Any]


@pytest.fixture(autouse=True)
def _photos(here: None) -> None:
    """A folder `photos` with an image, a link out of it and one inside, and an image beside it."""
    Path('photos').mkdir()
    Path('photos/a.png').write_bytes(picture(0))
    Path('secret.png').write_bytes(picture(1))
    Path('photos/out.png').symlink_to('../secret.png')
    Path('photos/up').symlink_to('..')
    Path('photos/in.png').symlink_to('a.png')


def write(path: str, content: Content) -> None:
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def convert(**source: Any) -> list[Sample]:
    """All samples of a source, without writing them."""
    splits, dropped = build_source(source)
    return [sample for parts in splits.values() for part in parts for sample in part.read(dropped)]


def refused(words: str, call: Callable[[], Any]) -> None:
    with pytest.raises((ConfigError, FileError), match=words):
        call()


REQUIRED: dict[str, Arguments] = {
    'image_folder': {'images': 'photos', 'captions': 'c.csv'}, 'table': {'files': 't.csv', 'captions': 't'},
    'huggingface': {'path': 'x', 'captions': 't'}, 'webdataset': {'files': 't.csv', 'captions': {'a': 'c'}},
    'plain_text': {'files': 't.csv'}, 'flickr8k': {'images': 'photos', 'annotations': 'k.json'},
}


@pytest.mark.parametrize(('name', 'arguments', 'key'), [
    *((source, {'split': '../x'}, 'split') for source in ('image_folder', 'table', 'huggingface', 'webdataset')),
    *(('image_folder', {'holdout': holdout}, 'holdout') for holdout in (-5, 1.5, float('nan'), '3')),
    ('plain_text', {'files': [5]}, 'files'),
    *((source, {'captions': {}}, 'captions') for source in ('webdataset', 'table')),
    *((source, {'sample': share}, 'sample') for source in ('table', 'huggingface', 'webdataset') for share in (0, 1.5)),
    *((source, {'filters': {'t': {}}}, 'filters.t') for source in ('table', 'huggingface', 'webdataset')),
    ('flickr8k', {'splits': ['dev']}, 'splits'), ('flickr8k', {'split': 'all'}, 'split'),
    ('flickr8k', {'holdout': 1}, 'holdout'), ('image_folder', {'images': 'nowhere'}, 'images'),
])
def test_an_argument_is_named(name: str, arguments: Arguments, key: str) -> None:
    write('c.csv', 'image,caption\na.png,x\nin.png,y\n')
    write('t.csv', 't\nx\n')
    write('k.json', _karpathy('train'))
    with refused_at(f'source.{key}'):
        convert(**{'name': name, **REQUIRED[name], **arguments})


def _karpathy(*splits: str) -> str:
    """An image that is in these splits."""
    image = {'filename': 'a.png', 'sentences': [{'raw': 'x'}]}
    return json.dumps({'images': [{'split': split, **image} for split in splits]})


def _parquet(columns: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns), buffer,
                                **options)
    return buffer.getvalue()


HEADER, PAIR, TOKEN = 'image,caption\n', '{"query": "a", "positive": "b"}\n', 'a.png#0\tx\nb.png#0\ty\n'
IMAGE = {'image_column': 'i', 'images': 'photos'}
JPG, MEMBERS = ('0.jpg', picture(0)), [(f'{i}.jpg', picture(i)) for i in range(3)]
LINK, TAR = tarfile.TarInfo('1.jpg'), tar(*MEMBERS)
LINK.type, LINK.linkname = tarfile.SYMTYPE, '/etc/hostname'
NOT_UTF8 = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(np.array([0, 3], np.int32)),
                                            pyarrow.py_buffer(b'a\xffb'))
FILES: list[tuple[str, str, Content, Arguments, str]] = [
    ('image_folder', 'c.csv', f'{HEADER}../secret.png,x\n', {}, r"c\.csv: the path '\.\./secret\.png' leads to"),
    ('image_folder', 'c.csv', f'{HEADER}out.png,x\n', {}, r"c\.csv: the path 'out\.png' leads to"),
    ('image_folder', 'c.csv', f'{HEADER}a.png,x\na.png,"one\nb.png,two\n', {}, r'c\.csv:3: .*quote'),
    ('image_folder', 'c.csv', HEADER.encode() + b'a.png,x\na.png,caf\xe9\n', {}, r'c\.csv:3: has .\\udce9'),
    ('image_folder', 'c.csv', f'{HEADER}a.png,x\0y\n', {}, r'c\.csv:2: has a NUL'),
    ('image_folder', 'c.csv', 'image|caption\na.png;x\n', {}, r"c\.csv:2 has no 'image'; it has image\|caption"),
    ('image_folder', 'c.csv', f'{HEADER}\na.png,"x\n\ny"\n\nin.png,x,y\n', {}, r'c\.csv:7: has 3 values'),
    ('image_folder', 'c.json', '[{"image": "a.png", "caption": 3}]', {}, r"c\.json, value 0: 'caption': '3'"),
    ('image_folder', 'c.json', '[{"image": "a.png", "caption": "\\ud800"}]', {}, r'.* has .\\ud800'),
    ('image_folder', 'c.json', json.dumps([{f'{i}.png': ['x'] for i in range(60)}]), {}, r'.* it has 0.png, .* …$'),
    *(('image_folder', 'c.csv', content, {'holdout': 1}, r'c\.csv: ') for content in ('', HEADER, f'{HEADER},red\n')),
    *(('image_folder', 'c.csv', content, {'holdout': 1}, rf'c\.csv:{line}: .*CSV UTF-8') for content, line in (
        (f'{HEADER}a.png,grün\n'.encode('cp1252'), 2), ('image\tcaption\n'.encode('utf-16'), 1), (b'PK\3\4\0!\0', 1))),
    ('table', 'a.parquet', _parquet({'t': ['text' * i for i in range(500)]})[:-50], {}, r'a\.parquet: cannot be read'),
    ('table', 'a.parquet', _parquet({'t': NOT_UTF8}), {}, r'a\.parquet: cannot be read .*with texts'),
    ('table', 'a.parquet', _parquet(pyarrow.Table.from_arrays([pyarrow.array(['a'])] * 2, names=['t', 't'])), {},
     r"a\.parquet: expected one column 't', found t, t"),
    ('table', 'a.parquet', _parquet({'t': ['a'], 'k': [None]}), {'id_column': 'k'}, r"a\.parquet, row 1: 'k': None"),
    ('table', 'a.parquet', _parquet({'t': ['a'], 'i': [3]}), IMAGE, r"a\.parquet, row 1: 'i' is 3"),
    ('table', 'a.parquet', _parquet({'a': ['x'], 'd': ['x']}), {}, r"a\.parquet: expected one column 't', found a, d"),
    ('table', 'a.parquet', _parquet({'d': ['x'], 'd_0': ['y'], 'e': [['x', 'y']]}),
     {'captions': {'d': 'e', 'd_0': 'd'}}, r'source\.captions: .*two captions one key'),
    ('table', 'a.parquet', _parquet({'t': [b'x']}), {}, r"a\.parquet, row 1: 't': .*, expected a text"),
    ('table', 'a.csv', 't,i\ny,a.png\nx,../secret.png\n', IMAGE, r"a\.csv, row 2: the path '../secret.png' leads to"),
    ('webdataset', 't.tar', tar(JPG, ('0.json', b'[1]')), {}, r"t\.tar: sample '0': holds '\[1\]'"),
    ('webdataset', 't.tar', tar(JPG, ('0.txt', b'\xe9')), {'captions': {'a': 'txt'}}, r"t\.tar: sample '0': txt"),
    ('webdataset', 't.tar', tar(LINK), {}, r"t\.tar: cannot be read .*linkname '/etc/hostname' not found"),
    ('webdataset', 't.tar', TAR[:1200], {}, r't\.tar: is cut off, .* at byte 1,024, expected a whole tar'),
    ('webdataset', 't.tar', TAR[:1600], {}, r't\.tar: cannot be read .unexpected end'),
    ('webdataset', 't.tar', TAR[:1024] + b'\xff\xff' + TAR[1026:], {}, r't\.tar: .* no header .* at byte 1,024'),
    ('plain_text', 'a.txt', b'\x89PNG\r\n\x1a\n\0', {}, r'a\.txt:1: has .\\udc89'),
    ('text_pairs', 'p.jsonl', '{"query": "a", "positive": "\\ud800"}\n', {}, r"p\.jsonl:1: 'positive': has .\\ud800"),
    ('text_pairs', 'p.jsonl', f'{PAIR}{{"query": "a"}}', {}, r"p\.jsonl:2 has no 'positive'; it has query"),
    ('text_pairs', 'p.jsonl', f'{PAIR}["a", "b"]', {}, r"p\.jsonl:2: expected an object with 'query'"),
    ('text_pairs', 'p.jsonl', '{"query": "a", "positive": null}', {}, r"p\.jsonl:1: 'positive' is null"),
    ('flickr8k', 'a.token', TOKEN, {'splits': ['train']}, r'source\.splits: '),
    ('flickr8k', 't.token.txt', TOKEN, {}, r'source\.split_files: '),
    ('flickr8k', 't.token.txt', TOKEN, {'split_files': {'test': 't.token.txt'}}, r't\.token\.txt:1: '),
    ('flickr8k', 't.token.txt', 'a.png#0\tx\nb.png\n', {'split': 'train'}, r't\.token\.txt:2: '),
    ('flickr8k', 'k.json', _karpathy('train', 'test'), {}, r'k\.json: '),
    ('flickr8k', 'k.json', _karpathy('train'), {'split_files': {'test': 'k.json'}}, r'k\.json:1: '),
    ('flickr8k', 'k.json', '{"images": [{"filename": "a.png", "split": "train"}]}', {}, r'k\.json: '),
    ('flickr8k', 'list.json', '[{"image": "a.png", "caption": [3]}]', {}, r'list\.json: '),
    ('flickr8k', 'k.csv', 'filename,split\na.png,train\n', {}, r'k\.csv: '),
    ('flickr8k', 'c.txt', f'{HEADER}a.jpg,x\na.jpg,"x" and ""y\n', {}, r'c\.txt:3: '),
]


@pytest.mark.parametrize(('name', 'file', 'content', 'options', 'words'), FILES)
def test_a_file_is_named(name: str, file: str, content: Content, options: Arguments, words: str) -> None:
    write(file, content)
    of_file = {{'image_folder': 'captions', 'flickr8k': 'annotations'}.get(name, 'files'): file}
    refused(f'^{words}', lambda: convert(**{'name': name, **REQUIRED.get(name, {}), **of_file, **options}))


def test_without_a_folder_of_images_a_path_may_lead_anywhere(tmp_path: Path) -> None:
    for path in (f'{tmp_path}/secret.png', 'photos/out.png'):
        write('a.csv', f't,i\nx,{path}\n')
        assert convert(name='table', files='a.csv', captions='t', image_column='i')[0].image == picture(1)
    refused('expected one inside photos', lambda: read_image(['photos', 'nowhere'], '../secret.png', 'a', Dropped()))
    assert read_image(['photos', '.'], '../secret.png', 'a', Dropped()) == picture(1)


@pytest.mark.parametrize('file_name', ['../secret.png', '/etc/hostname', 'up/secret.png'])
def test_a_folder_of_the_library_names_images_inside_of_it(file_name: str, datasets: Any) -> None:
    write('photos/metadata.csv', f'file_name,text\n{file_name},x\n')
    refused('the path .* leads to|cannot be read', lambda: convert(
        name='huggingface', path='photos', captions='text', image_column='image'))


@pytest.mark.parametrize(('sample', 'words'), [
    (Sample('a\ud800', {'a': 'x'}), r'the id of sample .*: has .\\ud800'),
    (Sample('a', {'a': 'x', 'b': 'x\0'}), "sample 'a': caption 'b': has a NUL character")])
def test_a_text_that_cannot_be_written_is_refused(sample: Sample, words: str, tmp_path: Path) -> None:
    refused(words, lambda: write_dataset([sample], tmp_path / 'out'))


def test_names_that_lead_out_of_the_dataset_are_refused(tmp_path: Path) -> None:
    splits = {'../x': one_part(make_samples(2))}
    refused(r"source\.split: '\.\./x'", lambda: write_splits(splits, Dropped(), tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope='module')
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('dataset')
    write_dataset(make_samples(6), folder, size_limit='1kb')
    return folder / 'train'


def test_a_damaged_part_is_not_continued(dataset: Path) -> None:
    shutil.copytree(dataset / 'part-all', 'out/train/part-all')
    write('out/train/part-all/part.json', '{}')
    refused('^out/train/part-all/part.json: ', lambda: write_dataset(make_samples(6), Path('out'), size_limit='1kb'))
    assert not Path('out/train/index.json').exists()


def test_the_dataset_of_somebody_else_is_not_overwritten(teacher_folder: Path) -> None:
    out, folder = Path('out'), Path('out/train')
    with MDSWriter(out=str(folder), columns={'sample_id': 'str', 'caption.a': 'str'}) as writer:
        writer.write({'sample_id': '0', 'caption.a': 'x'})
    index = (folder / 'index.json').read_bytes()
    refused('out: .*/train holds another dataset', lambda: write_dataset(make_samples(2), out))
    embeddings = ExtractionTask(DatasetConfig(local=str(folder)), OutputFolder(folder))
    teacher = TeacherFolder(teacher_folder).load(DeviceCPU())
    refused('out: .* that is no embeddings dataset', lambda: write_embeddings(embeddings, teacher))
    assert (folder / 'index.json').read_bytes() == index


def _shard(**values: Any) -> Change:
    return lambda index: index['shards'][1].update(values)


def _file(name: str) -> Change:
    return _shard(raw_data={'bytes': 1, 'hashes': {}, 'basename': name})


@pytest.mark.parametrize(('change', 'words'), [
    (lambda index: index.pop('shards'), 'the MDS dataset is empty'),
    (lambda index: index['shards'][1].pop('raw_data'), 'shard 1: cannot be read .*raw_data'),
    (lambda index: index['shards'][1].pop('column_sizes'), 'shard 1: cannot be read .*column_sizes'),
    (_shard(version=3), 'shard 1: cannot be read .*version: 3'),
    (lambda index: index['shards'].append('x'), 'shard 3: cannot be read'),
    *((_file(name), 'shard 1: the file .* is outside the folder') for name in ('a/../../x', '/etc/passwd')),
    (_shard(compression='zstd'), 'shard 1: is compressed'),
    (_shard(column_names=['a']), r"shard 1 has columns \['a'\]"),
    (lambda index: index['shards'][0].update(column_encodings=['str', 'pkl', 'str', 'str']), 'shard 0: .*unsafe.* pkl'),
])
def test_what_is_wrong_with_an_index_is_named(change: Change, words: str, dataset: Path) -> None:
    index = json.loads((dataset / 'index.json').read_text())
    change(index)
    write('index.json', json.dumps(index))
    refused(rf'^index\.json: {words}', lambda: read_index('.'))


def test_an_index_that_is_no_json_is_not_kept(tmp_path: Path) -> None:
    write('index.json', b'{"version": 2, "sh')
    refused(r'index\.json: .*expected JSON', lambda: read_index('.'))
    with pytest.raises(ShardError, match=r'index\.json is damaged: .*expected JSON'):
        VerifiedStream(local='cache', remote=str(tmp_path), download_retry=1).open()
    assert not Path('cache/index.json').exists()
    refused('there is no MDS dataset in photos', lambda: read_index('photos'))


def test_shards_that_are_not_what_the_index_says_are_refused(dataset: Path) -> None:
    shutil.copytree(dataset, 'train')
    path = 'train/' + read_index(dataset)['shards'][1]['raw_data']['basename']
    flip(Path(path))
    refused(f'the shard {path} is damaged: xxh64 .*, expected', lambda: read_samples('train'))
    whole = Path(path).read_bytes()
    write(path, whole[:-1])
    refused(f'the shard {path} is damaged: {len(whole) - 1} bytes, expected', lambda: read_samples('train'))
