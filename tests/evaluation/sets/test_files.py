# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What holds for every retrieval set, and what is said when its files are not as they should be."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from parts import picture
from set_files import WRITERS, write_images, write_json_lines

from llm2clip.config import ConfigError
from llm2clip.evaluation.sets import files as module
from llm2clip.evaluation.sets.files import read_first
from llm2clip.registry import RETRIEVAL_SETS, find

# Each set's images, as their numbers when they were written.
EXPECTED = {
    'coco': [0, 3], 'coco_cn': [1, 0], 'docci': [1, 3], 'flickr30k': [1, 3], 'flickr8k': [1, 4],
    'flickr_cn': [0, 1], 'image_folder': [0, 1], 'mds': [0, 1, 2, 3], 'sharegpt4v': [0, 1, 2], 'urban1k': [0, 1, 2],
    'xm3600': [0, 1],
}
IN_FILES = sorted(EXPECTED.keys() - {'mds'})


@pytest.mark.parametrize('name', sorted(RETRIEVAL_SETS))
def test_images_are_read_by_position_also_in_another_process(name: str, tmp_path: Path) -> None:
    found = find(RETRIEVAL_SETS[name])(**WRITERS[name](tmp_path))
    assert len(found.image_ids) == len(set(found.image_ids)) == len(found.captions) == len(EXPECTED[name])
    assert all(captions and all(captions) for captions in found.captions)
    for read_image in (found.read_image, pickle.loads(pickle.dumps(found.read_image))):
        assert [read_image(i) for i in range(len(found.image_ids))] == [picture(i) for i in EXPECTED[name]]


@pytest.mark.parametrize('name', IN_FILES)
def test_missing_images_are_found_when_the_set_is_opened(name: str, tmp_path: Path) -> None:
    arguments = WRITERS[name](tmp_path)
    found = find(RETRIEVAL_SETS[name])(**arguments)
    folder = Path(arguments.get('images') or f'{tmp_path}/Urban1k/image')
    path = folder / found.image_ids[-1]
    path.unlink()
    total = len(found.image_ids)
    message = fr'1 of {total} images are missing, the first of them is {path}; .* (has |is empty)'
    if name == 'urban1k':
        message = r'1 of 3 files in .*/caption have none of the same name in .*/image, the first of them is 10'
    with pytest.raises(ConfigError, match=f'({name}|photos).*: {message}'):
        find(RETRIEVAL_SETS[name])(**arguments)


@pytest.mark.parametrize('name', IN_FILES)
def test_a_path_that_is_not_there_is_named_with_what_is(name: str, tmp_path: Path) -> None:
    arguments = WRITERS[name](tmp_path)
    for key in arguments.keys() & {'images', 'annotations', 'folder'}:
        with pytest.raises(ConfigError, match=f'source.{key}: .*{tmp_path}/nowhere/at/all.*; {tmp_path} has '):
            find(RETRIEVAL_SETS[name])(**{**arguments, key: f'{tmp_path}/nowhere/at/all'})


def _docci(tmp_path: Path, *records: Any) -> None:
    write_images(tmp_path / 'images', ['a.jpg', 'b.jpg'])
    write_json_lines(tmp_path / 'd.jsonlines', records)
    find(RETRIEVAL_SETS['docci'])(images=f'{tmp_path}/images', annotations=f'{tmp_path}/d.jsonlines')


def _record(image: str, text: str, split: str = 'test') -> dict[str, str]:
    return {'image_file': image, 'description': text, 'split': split}


def test_what_is_wrong_with_a_record_is_said(tmp_path: Path) -> None:
    _docci(tmp_path, _record('a.jpg', 'A.'), _record('b.jpg', 'B.'))
    with pytest.raises(ValueError, match=r'docci: image a.jpg occurs twice in .*d.jsonlines'):
        _docci(tmp_path, _record('a.jpg', 'A.'), _record('a.jpg', 'B.'))
    with pytest.raises(ValueError, match=r'docci: image b.jpg has an empty caption in .*d.jsonlines'):
        _docci(tmp_path, _record('a.jpg', 'A.'), _record('b.jpg', ' \n'))
    with pytest.raises(ConfigError, match=r"source.split: there is no 'test' in .*d.jsonlines; it has train, val"):
        _docci(tmp_path, _record('a.jpg', 'A.', 'val'), _record('b.jpg', 'B.', 'train'))


@pytest.mark.parametrize('name', sorted(RETRIEVAL_SETS.keys() - {'mds', 'urban1k', 'sharegpt4v'}))
def test_an_empty_file_is_not_a_set(name: str, tmp_path: Path) -> None:
    arguments = WRITERS[name](tmp_path)
    path = Path(arguments.get('annotations') or arguments['captions'])
    path = path / 'coco-cn_test.txt' if path.is_dir() else path
    path.write_text('{"images": []}' if path.suffix == '.json' else '')
    with pytest.raises(ConfigError, match=f'(no images|no rows).*{path.name}|{path.name}.*(no images|no rows)'):
        find(RETRIEVAL_SETS[name])(**arguments)


@pytest.mark.parametrize('chunk', [3, 7, 64, 1 << 20])
def test_the_first_values_of_a_list_are_those_that_json_reads(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, '_CHUNK', chunk)
    values = [{'a': 'x],{"', 'b': [1, {'c': 'é\n'}]}, {'a': ''}, {}, {'d': 12345}]
    path = tmp_path / 'list.json'
    for indent in (None, 2):
        path.write_text('\n ' + json.dumps(values, indent=indent) + '\n')
        for count in range(1, 5):
            assert read_first(str(path), count) == values[:count]
    with pytest.raises(ValueError, match=r'list.json has 4 values, expected at least 1,000'):
        read_first(str(path), 1000)
    path.write_text(json.dumps(values)[:-9])
    assert read_first(str(path), 3) == values[:3]
    with pytest.raises(ValueError, match=r'list.json is damaged after 3 values'):
        read_first(str(path), 4)
    path.write_text(json.dumps({'images': values}))
    with pytest.raises(ValueError, match='expected a JSON list'):
        read_first(str(path), 1)
