# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A part of a split: what decides its samples, and the files that say what was written of it."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import xxhash

from llm2clip.config import ConfigError, WriterConfig
from llm2clip.data.convert.card import CaptionCounts
from llm2clip.data.convert.samples import Part
from llm2clip.data.schema import INDEX, check_shard, read_index
from llm2clip.files import FileError, read_json, reading
from llm2clip.folders import OutputFolder

__all__ = ['IDS_FILE', 'JOINED_FILE', 'PART_FILE', 'PartJob', 'as_json', 'check_inputs', 'check_left_out',
           'check_options', 'covers', 'deciding_options', 'input_identity', 'left_out_ids', 'part_array', 'part_ids',
           'parts_of_index', 'read_record']

PART_FILE = 'part.json'
IDS_FILE = 'ids.npy'
JOINED_FILE = 'joined.npy'
_RECORD = {'options': dict, 'samples': int, 'dropped': dict, 'filtered': dict, 'left_out': list, 'captions': dict,
           'shards': list}
# Bytes; the content of larger input files, and of tars, is not compared.
_COMPARED = 1 << 26


class PartJob(NamedTuple):
    """A part to write."""

    out: OutputFolder
    folder: str
    """Name of the part's folder inside `out`."""
    part: Part
    config: WriterConfig
    options: dict[str, Any]
    """What decides the samples: a part that was written with others is another part."""
    extend: bool
    """It may have been written for a source with fewer files."""


def deciding_options(about: Mapping[str, Any], config: WriterConfig) -> dict[str, Any]:
    """What decides the samples of a part, as it comes back from its file."""
    options = {**about, 'image_max_side': config.image_max_side, 'image_quality': config.image_quality,
               'require_any_caption': config.require_any_caption}
    if config.leave_out is not None:
        options['leave_out'] = xxhash.xxh64(json.dumps(sorted(left_out_ids(config.leave_out)))).hexdigest()
    return as_json(options)


def input_identity(path: str) -> list[Any]:
    """What changes with the content of an input file on any machine: size, and a hash unless it is large or a tar."""
    size = os.path.getsize(path)
    if size > _COMPARED or path.endswith('.tar'):
        return [size]
    with reading(path, 'a file'):
        return [size, xxhash.xxh64_hexdigest(Path(path).read_bytes())]


def check_inputs(out: OutputFolder, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ConfigError if an input file, path -> `input_identity`, is not what it was when it was converted."""
    for path, identity in now.items():
        if before.get(path, identity) != identity:
            raise ConfigError(f'{path}: has changed since {out} was written from it; choose another out, or remove '
                              f'{out} to convert again (extend=true adds new files, and nothing of a file that it has)')


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as they come back from a JSON file."""
    return json.loads(json.dumps(value, default=str))


def check_options(
    out: OutputFolder, path: Path, record: Mapping[str, Any], options: Mapping[str, Any], extend: bool
) -> None:
    """Raise a ConfigError if a part was written with other options.

    Where a dataset is extended, that may have been for fewer files and with another `leave_out`.
    """
    found = record.get('options')
    if isinstance(found, dict):
        found, options = {**found}, {**options}
        check_inputs(out, found.pop('inputs', {}), options.pop('inputs', {}))
    if extend and isinstance(found, dict):
        found, options = ({name: value for name, value in one.items() if name != 'leave_out'}
                          for one in (found, options))
        if covers(found.get('source'), options.get('source')):
            found['source'] = options['source']
    if found != options:
        raise ConfigError(f'out: {out} was begun with another source or other options ({path} has them); remove it '
                          'to convert again')


def covers(before: Any, now: Any) -> bool:
    """Whether a source differs from an earlier one by more entries in its ``files`` alone."""
    if not isinstance(before, dict) or not isinstance(now, dict) or 'files' not in before or 'files' not in now:
        return False
    files, more = ([files] if isinstance(files, str) else files for files in (before['files'], now['files']))
    return {**before, 'files': None} == {**now, 'files': None} and {*files} <= {*more}


def parts_of_index(out: OutputFolder, split: str) -> list[str]:
    """Folders of the parts that a split's index has, in order; none if there is no index.

    Raises:
        ConfigError: It is of a dataset whose shards are not in parts, and would be lost.
    """
    if not out.fetch(f'{split}/{INDEX}'):
        return []
    names = [shard['raw_data']['basename'] for shard in read_index(out.local / split)['shards']]
    if not names[0].startswith('part-'):
        raise ConfigError(f'out: {out.local / split} holds another dataset (with {names[0]}), expected an empty folder '
                          'or one that prepare_data wrote')
    return list(dict.fromkeys(name.rsplit('/', 1)[0] for name in names))


def read_record(job: PartJob) -> Optional[dict[str, Any]]:
    """What was written of a part; None if it is not complete, or has no sample and was written with other options.

    Raises:
        ConfigError: It has samples, and was written with other options.
        FileError: It is damaged.
    """
    path = job.out.local / job.folder / PART_FILE
    if not job.out.fetch(f'{job.folder}/{PART_FILE}'):
        return None
    record = {'left_out': [], **read_json(path, dict)}  # of which earlier versions do not know
    _check_record(record, path)
    try:
        check_options(job.out, path, record, job.options, job.extend)
        return record
    except ConfigError:
        if record['samples']:
            raise
    path.unlink()
    return None


def _check_record(record: Mapping[str, Any], path: Path) -> None:
    """Raise a FileError unless this is what was written of a part."""
    whole = {name: type(value) for name, value in record.items()} == _RECORD and \
        record['captions'].keys() == vars(CaptionCounts()).keys()
    for i, shard in enumerate(record['shards'] if whole else ()):
        check_shard(shard, f'{path}: shard {i}')
    if not whole or sum(shard['samples'] for shard in record['shards']) != record['samples']:
        raise FileError(f'{path}: is damaged, expected {", ".join(_RECORD)} of a part; remove {path.parent} to convert '
                        'it again')


def part_ids(out: OutputFolder, split: str, folder: str, count: Optional[int] = None) -> np.ndarray:
    """Hashes of the ids of a part's samples, of which there are so many if that is known."""
    expected = f'the ids of {"all" if count is None else count} samples'
    ids = part_array(out, f'{split}/{folder}', IDS_FILE, np.uint64, expected)
    if count not in (None, len(ids)):
        raise FileError(f'{out.local / split / folder / IDS_FILE}: holds {len(ids)} values, expected {expected}')
    return ids


def part_array(out: OutputFolder, folder: str, name: str, kind: type, expected: str) -> np.ndarray:
    """One of the arrays that were written beside a part's shards, or a FileError."""
    out.fetch(f'{folder}/{name}')
    path = out.local / folder / name
    expected = f'{expected}; remove {path.parent} to convert that part again'
    with reading(path, expected):
        array = np.load(path, allow_pickle=False)
    if array.ndim != 1 or array.dtype != kind:
        raise FileError(f'{path}: holds {array.dtype} values of shape {array.shape}, expected {expected}')
    return array


@functools.cache
def left_out_ids(path: str) -> frozenset[str]:
    """The ids in a file of `leave_out`."""
    ids = read_json(path, list)
    if not all(isinstance(name, str) for name in ids):
        raise ConfigError(f'leave_out: {path} has entries that are no texts, expected a list of ids of samples')
    return frozenset(ids)


def check_left_out(out: OutputFolder, split: str, folders: Sequence[str], path: str) -> None:
    """Raise a ConfigError if a part that is kept has a sample that is to be left out."""
    hashes = np.array([xxhash.xxh64_intdigest(name) for name in left_out_ids(path)], np.uint64)
    for folder in folders:
        if n := int(np.isin(part_ids(out, split, folder), hashes).sum()):
            raise ConfigError(f'leave_out: {path} names {n:,} of the samples in {out.local / split / folder}, which is '
                              'kept as it is; remove that folder to convert it again')
