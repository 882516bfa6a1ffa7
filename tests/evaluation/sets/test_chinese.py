# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Flickr30k-CN and COCO-CN."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from parts import picture
from set_files import chinese_clip, write_json_lines
from set_files import coco_cn as write_coco_cn
from set_files import flickr_cn as write_flickr_cn

from llm2clip.config import ConfigError
from llm2clip.evaluation.sets.files import RetrievalSet
from llm2clip.evaluation.sets.languages import coco_cn, flickr_cn


def test_flickr_cn(tmp_path: Path) -> None:
    found = flickr_cn(**write_flickr_cn(tmp_path))
    assert found.image_ids == ['1009692167.jpg', '1021439420.jpg']
    assert found.captions == [[f'第{k}条狗坐在{number}。' for k in range(5)] for number in (1009692167, 1021439420)]


@pytest.mark.parametrize(['file', 'lines'], [
    # The original package marks each word's part of speech.
    ('seg.flickr30kzhmbosontest.caption.txt',
     ['1009692167#zhm#1 一:m 条:q 狗:n 站:vi 在:p John:nx A:nx .:wj Noble:nx 前:f 。:wj',
      '1021439420#zhm#1 两:m 条:q 狗:n']),
    ('flickr30k_test_zh.txt', ['image,caption', '1009692167.jpg,一条狗站在JohnA.Noble前。', '1021439420.jpg,两条狗']),
    ('plain.txt', ['1009692167 一条狗站在JohnA.Noble前。', '1021439420\t两条狗']),
    ('headless.txt', ['1009692167.jpg,一条狗站在JohnA.Noble前。', '1021439420.jpg,两条狗']),
])
def test_other_files_of_flickr_cn(file: str, lines: list[str], tmp_path: Path) -> None:
    arguments = write_flickr_cn(tmp_path)
    (tmp_path / file).write_text('\n'.join(lines) + '\n')
    found = flickr_cn(arguments['images'], f'{tmp_path}/{file}')
    assert found.image_ids == ['1009692167.jpg', '1021439420.jpg']
    assert found.captions == [['一条狗站在JohnA.Noble前。'], ['两条狗']]


def test_coco_cn_in_the_order_of_its_split(tmp_path: Path) -> None:
    arguments = write_coco_cn(tmp_path)
    found = coco_cn(**arguments)
    assert found.image_ids == ['val2014/COCO_val2014_000000461245.jpg', 'train2014/COCO_train2014_000000503310.jpg']
    assert found.captions == [['一群长颈鹿。', '一群长颈鹿站在树边'], ['座位空空的。']]
    assert coco_cn(**arguments, split='train').captions == [['飞机正准备起飞。']]
    with pytest.raises(ConfigError, match=r'there is no .*coco-cn_dev.txt; the splits there are train, test'):
        coco_cn(**arguments, split='dev')


def test_coco_cn_laid_out_wrongly(tmp_path: Path) -> None:
    arguments = write_coco_cn(tmp_path)
    with pytest.raises(ConfigError, match=f'expected imageid.human-written-caption.txt and coco-cn_<split>.txt in '
                                          f'{tmp_path}; {tmp_path} has coco, coco-cn-version1805v1.1'):
        coco_cn(arguments['images'], str(tmp_path))
    split = Path(arguments['annotations'], 'coco-cn_test.txt')
    for ids, message in (('000000461245\n', 'image ids such as COCO_val2014_000000043734, found .000000461245'),
                         ('COCO_val2014_000000000001\n', 'image val2014/COCO_val2014_000000000001.jpg has no caption'),
                         (split.read_text() * 2, 'occurs twice')):
        split.write_text(ids)
        with pytest.raises(ValueError, match=message):
            coco_cn(**arguments)


@pytest.mark.parametrize('load', [flickr_cn, coco_cn])
def test_the_files_of_chinese_clip(load: Callable[..., RetrievalSet], tmp_path: Path) -> None:
    found = load(**chinese_clip(tmp_path))
    assert found.image_ids == ['1000002', '1000003']
    assert found.captions == [['高级1', '高级3'], ['高级0', '高级2']]
    for read_image in (found.read_image, pickle.loads(pickle.dumps(found.read_image))):
        assert [read_image(i) for i in range(2)] == [picture(0), picture(1)]


def test_chinese_clips_files_that_do_not_fit(tmp_path: Path) -> None:
    arguments = chinese_clip(tmp_path)
    texts, images = Path(arguments['annotations']), Path(arguments['images'])
    write_json_lines(texts, [{'text_id': 1, 'text': 'a', 'image_ids': [1000002, 1000003]}])
    with pytest.raises(ValueError, match="expected one image in 'image_ids', found"):
        flickr_cn(**arguments)
    write_json_lines(texts, [{'text_id': 1, 'text': 'a', 'image_ids': [1000002]}])
    with pytest.raises(ValueError, match='image 1000003 has no caption'):
        flickr_cn(**arguments)
    images.write_text('1000002\tabcde\n')
    with pytest.raises(ValueError, match='test_imgs.tsv: image 0 is not base64'):
        flickr_cn(**arguments).read_image(0)
    images.write_text('1000002\tabcd\n1000002\tabcd\n')
    with pytest.raises(ValueError, match='image 1000002 occurs twice in .*test_imgs.tsv'):
        flickr_cn(**arguments)
    images.write_text('1000002 abcd\n')
    with pytest.raises(ValueError, match='test_imgs.tsv:1: expected `<id><tab><image in base64>`'):
        flickr_cn(**arguments)
