# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""ShareGPT4V-1k, Urban1k and DOCCI."""

import json
from pathlib import Path

import pytest
from set_files import conversation
from set_files import docci as write_docci
from set_files import sharegpt4v as write_sharegpt4v
from set_files import urban1k as write_urban1k

from llm2clip.config import ConfigError
from llm2clip.evaluation.sets.long_captions import docci, sharegpt4v, urban1k


def test_sharegpt4v_is_the_first_answers(tmp_path: Path) -> None:
    arguments = write_sharegpt4v(tmp_path)
    found = sharegpt4v(**arguments)
    assert found.image_ids == ['sam/images/sa_545504.jpg', 'coco/train2017/000000000009.jpg',
                               'llava/llava_pretrain/images/00000/000000010.jpg']
    assert found.captions == [[f'In the photo, {i}.\nIt is "so".'] for i in range(3)]
    with pytest.raises(ConfigError, match=r'1 of 4 images are missing, the first of them is .*/sam/images/sa_7.jpg; '
                                          r'.*/sam/images has sa_545504.jpg'):
        sharegpt4v(**{**arguments, 'first': 4})
    with pytest.raises(ValueError, match='has 4 values, expected at least 1,000'):
        sharegpt4v(arguments['images'], arguments['annotations'])


def test_a_conversation_without_an_answer(tmp_path: Path) -> None:
    arguments = write_sharegpt4v(tmp_path)
    path = Path(arguments['annotations'])
    record = conversation('sam/images/sa_545504.jpg', 'x')
    record['conversations'].pop()
    path.write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=r'1107.json, value 0: no turn of the conversation is from .gpt.'):
        sharegpt4v(**{**arguments, 'first': 1})


def test_urban1k_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    arguments = write_urban1k(tmp_path)
    (tmp_path / 'Urban1k/caption/2.txt').write_text('A street.\nA second line.')
    (tmp_path / 'Urban1k/image/.DS_Store').write_text('')
    found = urban1k(**arguments)
    assert found.image_ids == ['1.jpg', '2.jpg', '10.jpg']
    assert found.captions == [['A street, number 1.'], ['A street.'], ['A street, number 10.']]


def test_urban1k_laid_out_wrongly(tmp_path: Path) -> None:
    folder = Path(write_urban1k(tmp_path)['folder'])
    with pytest.raises(ConfigError, match=f'urban1k: source.folder: expected the folders image and caption in '
                                          f'{tmp_path}; {tmp_path} has Urban1k$'):
        urban1k(str(tmp_path))
    (folder / 'caption/10.txt').rename(folder / 'caption/7.txt')
    with pytest.raises(ConfigError, match=r'1 of 3 files in .*/image have none of the same name in .*/caption, the '
                                          'first of them is 10'):
        urban1k(str(folder))
    (folder / 'caption/7.txt').rename(folder / 'caption/10.json')
    with pytest.raises(ConfigError, match=r'expected only .txt files in .*/caption, found 10.json'):
        urban1k(str(folder))
    (folder / 'caption/10.json').unlink()
    (folder / 'caption/10.txt').write_text('')
    with pytest.raises(ValueError, match='urban1k: image 10.jpg has no caption'):
        urban1k(str(folder))


def test_docci_by_split(tmp_path: Path) -> None:
    arguments = write_docci(tmp_path)
    found = docci(**arguments)
    assert found.image_ids == ['test_00000.jpg', 'test_00001.jpg']
    assert found.captions == [['A view of test_00000.'], ['A view of test_00001.']]
    assert docci(**arguments, split='qual_dev').image_ids == ['qual_dev_00000.jpg']
    with pytest.raises(ConfigError, match="there is no 'qual_test' in .*; it has qual_dev, test, train"):
        docci(**arguments, split='qual_test')
