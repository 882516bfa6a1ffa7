# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Retrieval sets: the images and captions of a dataset that `prepare_data` wrote."""

import pickle
from pathlib import Path

import pytest
from parts import make_samples, picture, write_dataset
from refusals import refused_at

from llm2clip.data.convert.samples import Dropped, Part, Sample
from llm2clip.data.convert.writer import write_splits
from llm2clip.errors import FileError
from llm2clip.evaluation.retrieval_sets import open_retrieval_set


def test_captions_of_a_dataset_that_are_absent_are_no_texts(tmp_path: Path) -> None:
    samples = [Sample(f'{i}', {'de': f'de {i}' if i else '', 'fr': 'fr' if i == 2 else ' ', 'en': 'x'}, picture(i))
               for i in range(3)]
    write_dataset(samples, tmp_path / 'out')
    local = f'{tmp_path}/out/train'
    assert open_retrieval_set(local, ['fr', 'de']).captions == [[], ['de 1'], ['fr', 'de 2']]
    assert open_retrieval_set(local).captions == [['x'], ['de 1', 'x'], ['de 2', 'x', 'fr']]
    # All languages have the same images, whose features are computed once.
    one, other = (open_retrieval_set(local, [key]) for key in ('de', 'fr'))
    assert one.read_image == other.read_image and one.image_ids == other.image_ids == ['0', '1', '2']
    write_dataset([Sample('0', {'de': '', 'en': 'x'}, picture(0))], tmp_path / 'none')
    for folder, keys, key in (('none/train', ['de'], 'caption_keys'), ('out/train', ['raw'], 'caption_keys'),
                              ('nowhere', [], 'local')):
        with refused_at(key):
            open_retrieval_set(f'{tmp_path}/{folder}', keys)


def test_a_pattern_selects_captions(tmp_path: Path) -> None:
    write_dataset([Sample('0', {'de_0': 'a', 'de_1': 'b', 'en': 'c', 'de': 'd', 'x[0]': 'e'}, picture(0))], tmp_path)
    local = f'{tmp_path}/train'
    for keys, captions in ((['de_*'], ['a', 'b']), (['en', 'de*'], ['c', 'd', 'a', 'b']), (['x[0]'], ['e']),
                           (['de_1', 'de_*'], ['b', 'a'])):
        assert open_retrieval_set(local, keys).captions == [captions]


def test_an_id_that_two_files_use_names_two_images(tmp_path: Path) -> None:
    parts = [Part(name, lambda _, i=i: [Sample('0', {'x': f'{i}'}, picture(i))]) for i, name in enumerate('ab')]
    write_splits({'train': parts}, Dropped(), tmp_path / 'out')
    found = open_retrieval_set(f'{tmp_path}/out/train')
    assert found.image_ids == ['0', '0 (1)'] and found.captions == [['0'], ['1']]
    assert [found.read_image(i) for i in range(2)] == [picture(0), picture(1)]


def test_images_are_read_by_position_also_in_another_process(tmp_path: Path) -> None:
    write_dataset(make_samples(4), tmp_path, size_limit='1kb')
    local = f'{tmp_path}/train'
    shards = sorted(Path(local).glob('part-all/shard.*'))
    assert len(shards) > 1
    found = open_retrieval_set(local)
    for read_image in (found.read_image, pickle.loads(pickle.dumps(found.read_image))):
        assert [read_image(i) for i in range(4)] == [picture(i) for i in range(4)]
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(FileError, match=f'{shards[1].name} is damaged'):
        open_retrieval_set(local)
