# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The parts of the sources of images survive the way to another process, as Ray sends them, and can be read again."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from parts import picture
from set_files import flickr8k

from llm2clip.data.convert.samples import Dropped, Part
from llm2clip.registry import build_source

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
    if name == 'webdataset':
        with wds.TarWriter(f'{folder}/0.tar') as writer:
            writer.write({'__key__': 'a', 'jpg': picture(0), 'txt': 'a text', 'json': {}})
        return {'files': f'{folder}/*.tar', 'captions': {'raw': 'txt'}}
    if name == 'table':
        return {'files': str(csv), 'captions': {'en': 'caption'}}
    return {'images': str(folder), 'captions': str(csv), 'holdout': 1}


@pytest.mark.parametrize('name', ['flickr8k', 'image_folder', 'table', 'webdataset'])
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
