# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The parts of every source survive the way to another process, as Ray sends them, and can be read again."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from parts import picture
from set_files import flickr8k

from llm2clip.data.convert.samples import Dropped, Part
from llm2clip.registry import SOURCES, build_source

# Ray's own copy of it is no other.
cloudpickle = pytest.importorskip('cloudpickle')


def _arguments(name: str, folder: Path) -> dict[str, Any]:
    """Of a source, after its files are written."""
    csv = folder / 'captions.csv'
    csv.write_text('image,caption\n' + ''.join(f'{i}.png,caption {i}\n' for i in range(4)))
    for i in range(4):
        (folder / f'{i}.png').write_bytes(picture(i))
    if name == 'flickr8k':
        return flickr8k(folder)
    if name == 'huggingface':
        datasets = pytest.importorskip('datasets')
        rows = {'image': [{'bytes': picture(i), 'path': None} for i in range(3)], 'text': ['a', 'b', 'c']}
        datasets.Dataset.from_dict(rows).cast_column('image', datasets.Image()).save_to_disk(folder / 'saved')
        return {'path': f'{folder}/saved', 'captions': 'text', 'image_column': 'image'}
    if name == 'webdataset':
        with wds.TarWriter(f'{folder}/0.tar') as writer:
            writer.write({'__key__': 'a', 'jpg': picture(0), 'txt': 'a text', 'json': {}})
        return {'files': f'{folder}/*.tar', 'captions': {'raw': 'txt'}}
    if name == 'text_pairs':
        (folder / 'pairs.jsonl').write_text(''.join(f'{{"query": "q{i}", "positive": "p{i}"}}\n' for i in range(9)))
        return {'files': f'{folder}/pairs.jsonl', 'holdout': 0.5}
    return {'caption_csv': {'captions': str(csv)}, 'plain_text': {'files': str(csv), 'min_characters': 9},
            'image_folder': {'images': str(folder), 'captions': str(csv), 'holdout': 1},
            'table': {'files': str(csv), 'captions': {'en': 'caption'}}}[name]


# As flickr8k are coco and flickr30k; the quickstart's sources read packages, and one embeds, on one machine.
@pytest.mark.parametrize('name', sorted({*SOURCES} - {
    'coco', 'emoji', 'flickr30k', 'hard_negatives', 'wikipedia_summaries'}))
def test_a_copy_of_a_part_reads_the_same_samples(name: str, tmp_path: Path) -> None:
    splits, _ = build_source({'name': name, **_arguments(name, tmp_path)})
    assert any(splits.values())
    for part in (part for parts in splits.values() for part in parts):
        copy = pickle.loads(cloudpickle.dumps(part))
        assert copy.name == part.name
        assert _read(copy) == _read(part) == _read(copy) != ([], {})


def _read(part: Part) -> tuple[list[Any], dict[str, int]]:
    dropped = Dropped()
    return list(part.read(dropped)), dropped.counts()
