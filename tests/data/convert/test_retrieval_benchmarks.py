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
from llm2clip.evaluation.retrieval_sets import open_retrieval_set
from llm2clip.registry import build_source

pytestmark = pytest.mark.usefixtures('no_leftovers', 'here')
# Name of a source -> the images of its split, as their numbers when they were written.
EXPECTED = {
    'coco': [0, 3], 'coco_cn': [1, 0], 'docci': [1, 3], 'flickr30k': [1, 3], 'flickr8k': [1, 4],
    'flickr_cn': [0, 1], 'image_folder': [0, 1], 'sharegpt4v': [0, 1, 2], 'urban1k': [0, 1, 2], 'xm3600': [0, 1],
}
# The captions by image id; those of Flickr and COCO are in test_flickr_coco.py.
CAPTIONS = {
    'docci': {f'{name}.jpg': [f'A view of {name}.'] for name in ('test_00000', 'test_00001')},
    'sharegpt4v': {name: [f'In the photo, {i}. It is "so".'] for i, name in enumerate((
        'sam/images/sa_545504.jpg', 'coco/train2017/000000000009.jpg',
        'llava/llava_pretrain/images/00000/000000010.jpg'))},
    'urban1k': {f'{i}.jpg': [f'A street, number {i}.'] for i in (1, 2, 10)},
    'xm3600': {f'{key}.jpg': [f'Bild {key}', 'ein zweites', f'bilde {key}']
               for key in ('000411001ff7dd4f', '000ef8db2c7dd84a')},
}


def _write(name: str, arguments: dict[str, Any], out: str = 'out') -> None:
    splits, dropped = build_source({'name': name, **arguments})
    write_splits(splits, dropped, out, WriterConfig(max_dropped=0))


@pytest.mark.parametrize('name', EXPECTED)
def test_images_and_captions_are_the_published_ones_or_named(name: str) -> None:
    arguments = set_files.WRITERS[name](Path())
    images = Path(arguments.get('images') or 'Urban1k/image').absolute()
    images.rename('elsewhere')
    images.symlink_to(Path('elsewhere').absolute())
    _write(name, arguments)
    patterns = ['de_*', 'no_*'] if name == 'xm3600' else None
    found = open_retrieval_set(f'out/{"train" if name == "image_folder" else "test"}', patterns)
    assert [found.read_image(i) for i in range(len(found.image_ids))] == [picture(i) for i in EXPECTED[name]]
    captions = dict(zip(found.image_ids, found.captions))
    assert captions == CAPTIONS.get(name, captions) and all(found.captions)
    next(path for path in Path('elsewhere').rglob('*') if path.is_file()
         and path.read_bytes() == picture(EXPECTED[name][-1])).unlink()
    with pytest.raises(ValueError, match=f'1 missing image file, such as {images}.* allows a share of 0;'):
        _write(name, arguments, 'other')


@pytest.mark.parametrize(('name', 'key', 'place'), [
    ('sharegpt4v', 'conversations', ''), ('docci', 'description', ':1'), ('xm3600', 'caption', ':1')])
def test_a_file_of_another_format_is_named(name: str, key: str, place: str) -> None:
    arguments = set_files.WRITERS[name](Path())
    file = arguments['annotations']
    Path(file).write_text(Path(file).read_text().replace(f'"{key}"', '"other"'))
    with refused_at(f'{file}{place}'):
        build_source({'name': name, **arguments})


def test_what_a_benchmark_does_not_have_is_named() -> None:
    with pytest.raises(FileError, match='has 4 values, expected at least 5'):
        build_source({'name': 'sharegpt4v', **set_files.sharegpt4v(Path()), 'first': 5})
    docci = {'name': 'docci', **set_files.docci(Path())}
    assert build_source(docci)[0].keys() == {'train', 'test', 'qual_dev'}
    with refused_at('source.splits'):
        build_source({**docci, 'splits': ['qual_test']})
    with refused_at('source.folder'):
        build_source({'name': 'urban1k', 'folder': '.'})
    arguments, caption = set_files.urban1k(Path()), Path('Urban1k/caption/10.txt')
    caption.write_text('')
    with pytest.raises(ValueError, match='no caption.*10.jpg'):
        _write('urban1k', arguments)
    caption.unlink()
    with refused_at(f'./{caption}'):
        build_source({'name': 'urban1k', **arguments})
