# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""SugarCrepe, Winoground and ARO in their published layouts, and what is said when their files are not so."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parts import picture
from PIL import Image
from set_files import COMPOSITION_WRITERS, SUGARCREPE

from llm2clip.config import ConfigError
from llm2clip.data.images import decode_image
from llm2clip.evaluation.sets.composition import aro_attribution, aro_relation, sugarcrepe, winoground
from llm2clip.registry import COMPOSITION_SETS, open_set


def test_sugarcrepe_by_file_and_by_what_was_done(tmp_path: Path) -> None:
    arguments = COMPOSITION_WRITERS['sugarcrepe'](tmp_path)
    found = sugarcrepe(**arguments)
    # Each image once, though several files and examples are about it.
    assert sorted(found.image_ids) == [f'{number:012}.jpg' for number in (139, 285, 632, 724)]
    assert len(found.examples) == 16 and not any(text != text.strip() for text in found.texts)
    for name, keys in SUGARCREPE.items():
        records = json.loads(Path(arguments['annotations'], f'{name}.json').read_text())
        group, = found.numbers[name].groups
        assert list(records) == list(keys) and len(group) == len(keys)
        for position, record in zip(group, records.values()):
            (image,), (right, wrong) = found.examples[position]
            assert found.image_ids[image] == record['filename'] and found.units[position] == image
            assert found.texts[right] == record['caption'].strip() and found.texts[wrong] == record['negative_caption']
    assert list(found.numbers) == ['replace_obj', 'replace_att', 'replace_rel', 'swap_obj', 'swap_att', 'add_obj',
                                   'add_att', 'replace', 'swap', 'add']
    for kind in ('replace', 'swap', 'add'):
        group, = found.numbers[kind].groups
        assert group == [i for name, number in found.numbers.items() if name.startswith(f'{kind}_')
                         for i in number.groups[0]]


def test_winoground_by_score_and_by_tag(tmp_path: Path) -> None:
    found = winoground(**COMPOSITION_WRITERS['winoground'](tmp_path))
    assert found.image_ids == [f'ex_{i}_img_{k}.png' for i in range(4) for k in range(2)]
    assert [example.images for example in found.examples] == [(2 * i, 2 * i + 1) for i in range(4)]
    assert [tuple(found.texts[t] for t in example.texts) for example in found.examples] == [
        (f'{i} mugs in some grass', f'some grass in {i} mugs') for i in range(4)]
    assert found.numbers == {f'{score}_score': ([[0, 1, 2, 3]], score) for score in ('text', 'image', 'group')}
    assert found.parts == {
        'collapsed_tag: Object': [0, 2], 'tag: Noun': [0, 2], 'collapsed_tag: Relation': [1],
        'secondary_tag: Series': [1], 'tag: Verb-Transitive': [1], 'secondary_tag: Symbolic': [2],
        'collapsed_tag: Both': [3], 'tag: Scope': [3]}


def test_relations_that_count_and_parts_of_images(tmp_path: Path) -> None:
    found = aro_relation(**COMPOSITION_WRITERS['aro_relation'](tmp_path))
    # Two examples are about the same part of an image; all of an image are one unit.
    boxes = [('2370799.jpg', (2, 3, 22, 33)), ('1592325.jpg', (0, 0, 48, 48)), ('1592325.jpg', (10, 4, 18, 13)),
             ('2370799.jpg', (5, 5, 45, 45))]
    assert found.image_ids == [f'{file} {box}' for file, box in boxes]
    assert [example.images for example in found.examples] == [(0,), (1,), (0,), (2,), (3,)]
    assert found.units == [0, 1, 0, 1, 0]
    assert found.parts == {'on': [0, 1, 2], 'eating': [3], 'near': [4]}
    number, = found.numbers.values()
    assert list(found.numbers) == ['macro_accuracy'] and number.groups == [[0, 1, 2], [3]]
    assert [found.texts[t] for t in found.examples[3].texts] == ['the horse is eating the hay',
                                                                 'the hay is eating the horse']
    for read_image in (found.read_image, pickle.loads(pickle.dumps(found.read_image))):
        for position, (file, box) in enumerate(boxes):
            data = picture(['2370799.jpg', '1592325.jpg'].index(file))
            expected = Image.open(io.BytesIO(data)).convert('RGB').crop(box)
            np.testing.assert_array_equal(np.asarray(decode_image(read_image(position), 's')), np.asarray(expected))


def test_pairs_of_attributes_that_are_not_rare_count(tmp_path: Path) -> None:
    found = aro_attribution(**COMPOSITION_WRITERS['aro_attribution'](tmp_path))
    number, = found.numbers.values()
    assert number.groups == [list(range(25)), list(range(25, 51))]
    assert {name: len(part) for name, part in found.parts.items()} == {
        'white, open': 25, 'open, white': 26, 'red, round': 2}


Change = Callable[[dict[str, Any]], Any]


def in_example(**fields: Any) -> Change:
    """Replace fields of an example; `...` takes one away."""
    def change(record: dict[str, Any]) -> None:
        record.update(fields)
        for key in [key for key, value in record.items() if value is ...]:
            del record[key]
    return change


BAD: list[tuple[str, Change, str]] = [
    ('sugarcrepe', in_example(caption=...), r"replace_obj\.json, example '3' has no 'caption'; it has filename, "),
    ('sugarcrepe', in_example(filename='../x.jpg'), r"the path '\.\./x\.jpg' leads to .*, expected one inside"),
    ('winoground', in_example(image_1='ex_2_img_1.png'), r'winoground: 1 of 8 images are missing, .*_1\.png\.png'),
    ('winoground', in_example(caption_1=''), r"examples\.jsonl:3: 'caption_1' is empty, expected a text"),
]


@pytest.mark.parametrize(('name', 'change', 'words'), BAD, ids=[f'{i}-{case[0]}' for i, case in enumerate(BAD)])
def test_what_is_wrong_with_an_example_is_said(name: str, change: Change, words: str, tmp_path: Path) -> None:
    arguments = COMPOSITION_WRITERS[name](tmp_path)
    path = Path(arguments['annotations'])
    if name == 'winoground':
        records = [json.loads(line) for line in path.read_text().splitlines()]
        change(records[2])
        path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    else:
        path = path / 'replace_obj.json'
        records = json.loads(path.read_text())
        change(records['3'])
        path.write_text(json.dumps(records))
    with pytest.raises(ConfigError, match=rf'^composition\.x\.source: .*{words}'):
        open_set('composition', {'name': name, **arguments}, 'composition.x.source')


@pytest.mark.parametrize('name', sorted(COMPOSITION_WRITERS))
def test_what_is_wrong_with_a_file_is_said(name: str, tmp_path: Path) -> None:
    assert sorted(COMPOSITION_WRITERS) == sorted(COMPOSITION_SETS)
    arguments = COMPOSITION_WRITERS[name](tmp_path)

    def refused(words: str, **other: str) -> None:
        with pytest.raises(ConfigError, match=rf'^composition\.x\.source[:.]? ?.*{words}'):
            open_set('composition', {'name': name, **arguments, **other}, 'composition.x.source')

    for key in ('images', 'annotations'):
        refused(rf'{name}: source\.{key}: there is no (file|folder) {tmp_path}/nowhere; {tmp_path} has ',
                **{key: f'{tmp_path}/nowhere'})
    refused(f'annotation: {name} takes no such argument; did you mean .annotations.', annotation='x')
    path = Path(arguments['annotations'])
    if name == 'sugarcrepe':
        path = path / 'swap_att.json'
    path.write_bytes(path.read_bytes()[:-40])
    refused(rf'{path}(:4)?: cannot be read .*, expected JSON')
    path.write_text({'sugarcrepe': '{}', 'winoground': ''}.get(name, '[]'))
    refused(f'{name}: there are no examples in {path}')
    path.unlink()
    refused(rf'source\.annotations: there is no file {path}; {path.parent} has ')
