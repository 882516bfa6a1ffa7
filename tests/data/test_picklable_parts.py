# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The parts of the sources of images survive the way to another process, as Ray sends them, and can be read again."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from parts import picture
from set_files import flickr8k, image_folder

from llm2clip.data.convert.samples import Dropped, Part
from llm2clip.registry import build_source

# Ray's own copy of it is no other.
cloudpickle = pytest.importorskip('cloudpickle')


def _table(folder: Path) -> dict[str, Any]:
    (folder / 'captions.csv').write_text('caption\none\ntwo\n')
    return {'files': f'{folder}/captions.csv', 'captions': {'en': 'caption'}}


def _webdataset(folder: Path) -> dict[str, Any]:
    with wds.TarWriter(f'{folder}/0.tar') as writer:
        writer.write({'__key__': 'a', 'jpg': picture(0), 'txt': 'a text', 'json': {}})
    return {'files': f'{folder}/*.tar', 'captions': {'raw': 'txt'}}


SOURCES = {'flickr8k': flickr8k, 'image_folder': image_folder, 'table': _table, 'webdataset': _webdataset}


@pytest.mark.parametrize('name', SOURCES)
def test_a_copy_of_a_part_reads_the_same_samples(name: str, tmp_path: Path) -> None:
    splits, _ = build_source({'name': name, **SOURCES[name](tmp_path)})
    assert any(splits.values())
    for part in (part for parts in splits.values() for part in parts):
        copy = pickle.loads(cloudpickle.dumps(part))
        assert copy.name == part.name
        assert _read(copy) == _read(part) == _read(copy) != ([], {})


def _read(part: Part) -> tuple[list[Any], dict[str, int]]:
    dropped = Dropped()
    return list(part.read(dropped)), dropped.counts()
