# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""All parts of a dataset together: they are checked, and get an index for each split and a card."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.config import ConfigError, WriterConfig
from llm2clip.data.convert.card import CaptionCounts, write_card
from llm2clip.data.convert.parts import JOINED_FILE, left_out_ids, part_array, part_ids
from llm2clip.data.convert.samples import Dropped
from llm2clip.data.schema import INDEX
from llm2clip.files import FileError
from llm2clip.folders import OutputFolder

__all__ = ['CARD_FILE', 'finish']

# Written last: a folder that has it is complete.
CARD_FILE = 'dataset.json'
# Of a reason to leave samples out, so many are named in the card; the parts' own files name all.
_NAMED = 1000


def finish(
    records: Mapping[str, Mapping[str, dict[str, Any]]], dropped: Dropped, out: OutputFolder, config: WriterConfig,
    about: Mapping[str, Any], options: Mapping[str, Any],
) -> dict[str, int]:
    """Check all parts together, then write the indices and last the card; `records` has, for each split, the folders
    of its parts with what was written of each."""
    written = {split: sum(record['samples'] for record in parts.values()) for split, parts in records.items()}
    left_out = Dropped()
    for parts in records.values():
        for record in parts.values():
            left_out.update(Dropped(record['dropped'], Counter(record['filtered']), left_out=record['left_out']))
    total = sum(written.values()) + len(left_out)
    if len(left_out) > config.max_dropped * total:
        examples = {reason: ids[:5] for reason, ids in left_out.reasons.items()}
        raise ValueError(f'{len(left_out)} of {total} samples were left out, more than max_dropped='
                         f'{config.max_dropped} allows: {examples}')
    left_out.update(dropped)
    filtered = dict(left_out.filtered)
    if config.leave_out is not None:
        _check_named(config.leave_out, left_out.left_out)
    for split, parts in records.items():
        if not written[split]:
            raise ValueError(f'split {split!r} has no samples (left out: {left_out.counts()}, by filters: {filtered})')
        _check_same_columns(split, parts)
        if out.remote is None:
            _check_files(out.local / split, parts)
    _check_unique(out, {(split, folder): record['samples'] for split, parts in records.items()
                        for folder, record in parts.items()})
    for split, parts in records.items():
        out.commit(f'{split}/{INDEX}', _merged_index(parts))
    captions = {split: CaptionCounts() for split in records}
    for split, parts in records.items():
        for record in parts.values():
            captions[split].add_record(record['captions'])
    left = {'leave_out': options['leave_out']} if 'leave_out' in options else {}
    card = {**about, **left, 'read': sum(written.values()) + len(left_out) + sum(filtered.values()), 'samples': written,
            'dropped': left_out.counts(), 'filtered': filtered,
            **({'tables': _joined_counts(out, records, dropped.tables)} if dropped.tables else {}),
            'dropped_ids': {reason: ids[:_NAMED] for reason, ids in left_out.reasons.items()}}
    write_card(out, card, captions, CARD_FILE)
    return written


def _check_named(path: str, found: Sequence[str]) -> None:
    """Print which ids of `leave_out` no sample has; a ConfigError if that is so of all of them."""
    unknown = sorted(left_out_ids(path).difference(found))
    if unknown:
        said = f'leave_out: {path} names {len(unknown):,} ids that no sample has: {", ".join(unknown[:5])}'
        if not found:
            raise ConfigError(f'{said}; expected ids of samples of this source')
        print(said, flush=True)


def _check_unique(out: OutputFolder, samples: Mapping[tuple[str, str], int]) -> None:
    """Raise an error if two samples have one id; `samples` has the split and folder of each part with how many are in
    it."""
    ids = [part_ids(out, split, folder, count) for (split, folder), count in samples.items()]
    values, counts = np.unique(np.concatenate(ids), return_counts=True)
    if (twice := values[counts > 1]).size:
        where = [f'{split}/{folder}' for (split, folder), part in zip(samples, ids) if np.isin(twice[0], part)]
        raise ValueError(f'{twice.size} sample ids occur in more than one part, one of them in {" and ".join(where)}')


def _joined_counts(
    out: OutputFolder, records: Mapping[str, Mapping[str, dict[str, Any]]], tables: Mapping[str, int]
) -> dict[str, int]:
    """Where the rows of the tables went whose captions the images have, and how many images have none of them."""
    used = np.zeros(tables['rows'] - tables['without_key'], dtype=bool)
    without = 0
    for split, parts in records.items():
        for folder in parts:
            rows = part_array(out, f'{split}/{folder}', JOINED_FILE, np.int64, "the numbers of its images' rows")
            if rows.size and rows.max() >= used.size:
                raise FileError(f'{out.local / split / folder}: was written with other tables, expected those of the '
                                'other parts; remove it to convert that part again')
            without += int((rows < 0).sum())
            used[rows[rows >= 0]] = True
    with_image = int(used.sum())
    return {**tables, 'with_image': with_image, 'without_image': len(used) - tables['repeated'] - with_image,
            'images_without_row': without}


def _check_same_columns(split: str, parts: Mapping[str, dict[str, Any]]) -> None:
    columns = {folder: record['shards'][0]['column_names'] for folder, record in parts.items() if record['shards']}
    first = next(iter(columns))
    for folder, names in columns.items():
        if names != columns[first]:
            raise ValueError(f'{folder} of split {split!r} has columns {names}, but {first} has {columns[first]}')


def _check_files(folder: Path, parts: Mapping[str, dict[str, Any]]) -> None:
    """Raise a FileError unless the shards of a split are there, in their sizes."""
    for part, record in parts.items():
        for shard in record['shards']:
            info = shard['zip_data'] or shard['raw_data']
            path = folder / part / info['basename']
            size = path.stat().st_size if path.is_file() else None
            if size != info['bytes']:
                raise FileError(f'{path}: {"is missing" if size is None else f"has {size:,} bytes"}, expected '
                                f'{info["bytes"]:,} bytes; remove {path.parent} to convert that part again')


def _merged_index(parts: Mapping[str, dict[str, Any]]) -> str:
    """One index over the parts' shards, which stay where they are."""
    shards = []
    for folder, record in parts.items():
        for shard in record['shards']:
            for kind in ('raw_data', 'zip_data'):
                if shard[kind]:
                    shard[kind]['basename'] = f'{folder}/{shard[kind]["basename"]}'
            shards.append(shard)
    return json.dumps({'version': 2, 'shards': shards}, sort_keys=True)
