# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Retrieval benchmarks as published: what the sources write is what `evaluate` measures."""

from pathlib import Path
from typing import Any

import pytest
import set_files
from parts import picture
from refusals import refused_at

from llm2clip.config import WriterConfig
from llm2clip.data.convert.writer import write_splits
from llm2clip.errors import FileError
from llm2clip.evaluation.retrieval_sets import RetrievalSet, open_retrieval_set
from llm2clip.registry import build_source

pytestmark = pytest.mark.usefixtures('no_leftovers')
# Name of a source -> the images of its split, as their numbers when they were written.
EXPECTED = {
    'coco': [0, 3], 'coco_cn': [1, 0], 'docci': [1, 3], 'flickr30k': [1, 3], 'flickr8k': [1, 4],
    'flickr_cn': [0, 1], 'image_folder': [0, 1], 'sharegpt4v': [0, 1, 2], 'urban1k': [0, 1, 2], 'xm3600': [0, 1],
}


def _written(name: str, arguments: dict[str, Any], out: Path, split: str = 'test', **options: Any) -> RetrievalSet:
    """The retrieval set of a source, after all of its images are written."""
    splits, dropped = build_source({'name': name, **arguments})
    write_splits(splits, dropped, out, WriterConfig(max_dropped=0))
    return open_retrieval_set(f'{out}/{split}', **options)


@pytest.mark.parametrize('name', EXPECTED)
def test_images_are_the_published_ones_or_named(name: str, tmp_path: Path) -> None:
    arguments = set_files.WRITERS[name](tmp_path)
    images = Path(arguments.get('images') or f'{tmp_path}/Urban1k/image')
    images.rename(tmp_path / 'elsewhere')
    images.symlink_to(tmp_path / 'elsewhere')
    found = _written(name, arguments, tmp_path / 'out', 'train' if name == 'image_folder' else 'test')
    assert [found.read_image(i) for i in range(len(found.image_ids))] == [picture(i) for i in EXPECTED[name]]
    assert all(found.captions)
    next(path for path in (tmp_path / 'elsewhere').rglob('*') if path.is_file()
         and path.read_bytes() == picture(EXPECTED[name][-1])).unlink()
    with pytest.raises(ValueError, match=f'1 missing image file, such as {images}.* allows a share of 0;'):
        _written(name, arguments, tmp_path / 'other')


def test_sharegpt4v_is_the_first_answers(tmp_path: Path) -> None:
    found = _written('sharegpt4v', set_files.sharegpt4v(tmp_path), tmp_path / 'out')
    assert found.image_ids == ['sam/images/sa_545504.jpg', 'coco/train2017/000000000009.jpg',
                               'llava/llava_pretrain/images/00000/000000010.jpg']
    assert found.captions == [[f'In the photo, {i}. It is "so".'] for i in range(3)]


def test_urban1k_is_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    arguments = set_files.urban1k(tmp_path)
    (tmp_path / 'Urban1k/caption/2.txt').write_text('A street.\nA second line.')
    (tmp_path / 'Urban1k/image/.DS_Store').write_text('')
    found = _written('urban1k', arguments, tmp_path / 'out')
    assert found.image_ids == ['1.jpg', '2.jpg', '10.jpg']
    assert found.captions == [['A street, number 1.'], ['A street.'], ['A street, number 10.']]
    with refused_at('source.folder'):
        build_source({'name': 'urban1k', 'folder': str(tmp_path)})


def test_docci_has_its_splits(tmp_path: Path) -> None:
    arguments = set_files.docci(tmp_path)
    found = _written('docci', arguments, tmp_path / 'out')
    assert found.image_ids == ['test_00000.jpg', 'test_00001.jpg']
    assert found.captions == [['A view of test_00000.'], ['A view of test_00001.']]
    assert open_retrieval_set(f'{tmp_path}/out/qual_dev').image_ids == ['qual_dev_00000.jpg']
    with refused_at('source.splits'):
        build_source({'name': 'docci', **arguments, 'splits': ['qual_test']})


@pytest.mark.parametrize(('name', 'key', 'place'), [
    ('sharegpt4v', 'conversations', ''), ('docci', 'description', ':1'), ('xm3600', 'caption', ':1')])
def test_a_file_of_another_format_is_named(name: str, key: str, place: str, tmp_path: Path) -> None:
    arguments = set_files.WRITERS[name](tmp_path)
    file = Path(arguments['annotations'])
    file.write_text(file.read_text().replace(f'"{key}"', '"other"'))
    with refused_at(f'{file}{place}'):
        build_source({'name': name, **arguments})


def test_fewer_captions_than_a_benchmark_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match='has 4 values, expected at least 5'):
        build_source({'name': 'sharegpt4v', **set_files.sharegpt4v(tmp_path), 'first': 5})
    arguments, caption = set_files.urban1k(tmp_path), tmp_path / 'Urban1k/caption/10.txt'
    caption.write_text('')
    with pytest.raises(ValueError, match='no caption.*10.jpg'):
        _written('urban1k', arguments, tmp_path / 'empty')
    caption.unlink()
    with refused_at(caption):
        build_source({'name': 'urban1k', **arguments})


def test_xm3600_has_its_languages(tmp_path: Path) -> None:
    found = _written('xm3600', set_files.xm3600(tmp_path), tmp_path / 'out', captions=['de_*'])
    assert found.image_ids == ['000411001ff7dd4f.jpg', '000ef8db2c7dd84a.jpg']
    assert found.captions == [['Bild 000411001ff7dd4f', 'ein zweites'], ['Bild 000ef8db2c7dd84a', 'ein zweites']]
    norwegian = open_retrieval_set(f'{tmp_path}/out/test', ['no_*'])
    assert norwegian.captions == [['bilde 000411001ff7dd4f'], ['bilde 000ef8db2c7dd84a']]
