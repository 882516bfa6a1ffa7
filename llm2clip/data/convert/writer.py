# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Samples -> MDS datasets that appear only when they are complete, with a card of what went in.

Every part of a split becomes a folder of shards inside that of the split, ``part-<name>``, written by one process; when
all are there, on whichever machine, one index over all of them, in the split's folder, makes the dataset readable.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import xxhash
from tqdm import tqdm

from llm2clip.config import ConfigError, WriterConfig
from llm2clip.config.files import check_values
from llm2clip.config.ranges import FolderName
from llm2clip.data.convert.card import CaptionCounts, draw_card, drawing
from llm2clip.data.convert.parts import (
    PART_FILE,
    PartJob,
    check_inputs,
    check_options,
    covers,
    deciding_options,
    input_identity,
    left_out_ids,
    part_ids,
    read_record,
    writing,
)
from llm2clip.data.convert.samples import Dropped, Part
from llm2clip.data.schema import INDEX, read_index
from llm2clip.engine import Engine, LocalEngine
from llm2clip.files import FileError, read_json
from llm2clip.remotes import OutputFolder

__all__ = ['CARD_FILE', 'is_written', 'write_splits']

CARD_FILE = 'dataset.json'
"""Written last: a folder that has it is complete."""
# Of a reason to leave samples out, so many are named in the card; the parts' own files name all.
_NAMED = 1000

Records = dict[str, dict[str, dict[str, Any]]]
"""Split -> folder of each part -> what was written of it."""


def write_splits(
    splits: Mapping[str, list[Part]],
    dropped: Dropped,
    out: Union[str, Path, OutputFolder],
    config: Optional[WriterConfig] = None,
    about: Optional[Mapping[str, Any]] = None,
    extend: bool = False,
    engine: Optional[Engine] = None,
) -> Optional[dict[str, int]]:
    """Write one MDS dataset per split, and their card beside them.

    Every image is decoded to check it; a sample whose image does not decode, or that has no caption or lacks one that
    its source requires, is left out and counted.  Parts that are there already are kept.  With several machines each
    writes its share, and the last one to finish writes the indices.

    Args:
        splits: Name -> parts.
        dropped: What the source left out before the parts.
        out: The folder; a part that is complete is uploaded if it has a remote.
        config: How to write.
        about: Facts about the source for the card; a folder with samples of another source is refused.
        extend: It may have parts of a source with fewer ``files``, which then come first, in the order of the index.
        engine: By which the parts are written; unset, by the processes of this machine that `config` says.

    Returns:
        Samples written, a split; None if other machines are not done.

    Raises:
        ConfigError: The folder has samples that were written with another configuration, or a dataset that was not
            written here, or one with a part that is none of the source's; a split has a name that no folder can have;
            or `require_any_caption` has a key that the samples do not have.
        FileError: A part that is there already is damaged, or a text cannot be written.
        FileNotFoundError: A part was written on a machine that does not share `out`, which has no remote.
        ValueError: Two samples have the same id, the captions' keys differ, a split is empty, or more samples were
            left out than `max_dropped` allows.
    """
    out, config = out if isinstance(out, OutputFolder) else OutputFolder(out), config or WriterConfig()
    options = deciding_options(about or {}, config)
    there = {}
    for split, parts in splits.items():
        check_values(FolderName, split, 'source.split')
        before = _parts_of_index(out, split)
        there[split] = before if extend else []
        if gone := [folder for folder in there[split] if folder not in {f'part-{part.name}' for part in parts}]:
            raise ConfigError(f'extend: {out.local / split} has {gone[0]}, which comes from none of the input files; '
                              'expected those that the dataset was written from, and more')
        for folder in there[split] if config.leave_out is not None else ():
            hashes = [xxhash.xxh64_intdigest(name) for name in left_out_ids(str(config.leave_out))]
            if n := int(np.isin(part_ids(out, f'{split}/{folder}'), np.array(hashes, np.uint64)).sum()):
                raise ConfigError(f'leave_out: {config.leave_out} names {n:,} of the samples in '
                                  f'{out.local / split / folder}, which is kept as it is; remove that folder to '
                                  'convert it again')
    inputs = {path: input_identity(path)
              for path in dict.fromkeys(path for parts in splits.values() for part in parts for path in part.files)}
    jobs = [PartJob(out, f'{split}/part-{part.name}', part, config,
                    {**options, 'inputs': {path: inputs[path] for path in part.files}}, extend)
            for split, parts in splits.items() for part in parts]
    for job in jobs:
        check_values(FolderName, f'part-{job.part.name}', 'the folder of a part')
    names = Counter(job.folder for job in jobs)
    if max(names.values(), default=0) > 1:
        raise ValueError(f'two input files would be written to {names.most_common(1)[0][0]}; give them different names')
    # A part of every other machine, so that other options are refused before the work.
    for job in jobs[:config.machine] + jobs[config.machine + 1:config.machines]:
        read_record(job)
    mine = jobs[config.machine::config.machines]
    # A part that gave no sample is read again: what was missing may be there now.
    todo = {job.folder: job for job in mine if not (read_record(job) or {}).get('samples')}
    engine = engine or LocalEngine(config.num_workers)
    print(f'{out}: {len(todo)} of {len(mine)} parts are to be written, by {engine}', flush=True)
    written = 0
    with tqdm(total=len(mine), desc=f'write {out.local.name}', unit=' parts') as progress:
        progress.update(len(mine) - len(todo))

        def count(samples: int) -> None:
            nonlocal written
            written += samples
            progress.update()
            progress.set_postfix(samples=written)

        engine.run(todo, partial(writing, len(todo) == 1), count)
    records: Records = {split: {} for split in splits}
    for job in jobs:
        if (record := read_record(job)) is None:
            if config.machines == 1:
                raise FileNotFoundError(f'{out.local / job.folder / PART_FILE}, which another machine has written, is '
                                        'not here: machines that do not share the folder need out_remote')
            return None
        split, folder = job.folder.rsplit('/', 1)
        records[split][folder] = record
    # A dataset that grows keeps its shards where they were: sidecars rely on it.
    records = {split: {**{folder: parts[folder] for folder in there[split]}, **parts}
               for split, parts in records.items()}
    left = {'leave_out': options['leave_out']} if 'leave_out' in options else {}
    return _finish(records, dropped, out, config, {**(about or {}), 'inputs': inputs, **left})


def _finish(
    records: Records, dropped: Dropped, out: OutputFolder, config: WriterConfig, about: Mapping[str, Any]
) -> dict[str, int]:
    """Check all parts together, then write the indices and last the card."""
    written = {split: sum(record['samples'] for record in parts.values()) for split, parts in records.items()}
    left_out = Dropped()
    captions = {split: CaptionCounts() for split in records}
    for split, parts in records.items():
        for record in parts.values():
            left_out.update(Dropped(record['dropped'], Counter(record['filtered']), left_out=record['left_out']))
            captions[split].add_record(record['captions'])
    total = sum(written.values()) + len(left_out)
    if len(left_out) > config.max_dropped * total:
        examples = {reason: ids[:5] for reason, ids in left_out.reasons.items()}
        raise ValueError(f'{len(left_out)} of {total} samples were left out, more than max_dropped='
                         f'{config.max_dropped} allows: {examples}')
    left_out.update(dropped)
    filtered = dict(left_out.filtered)
    if config.leave_out is not None and (unknown := left_out_ids(config.leave_out).difference(left_out.left_out)):
        said = f'leave_out: {config.leave_out} names {len(unknown):,} ids that no sample has: ' + \
            ', '.join(sorted(unknown)[:5])
        if not left_out.left_out:
            raise ConfigError(f'{said}; expected ids of samples of this source')
        print(said, flush=True)
    for split, parts in records.items():
        if not written[split]:
            raise ValueError(f'split {split!r} has no samples (left out: {left_out.counts()}, by filters: {filtered})')
        _check_shards(out, split, parts)
    ids = {f'{split}/{folder}': part_ids(out, f'{split}/{folder}', record['samples'])
           for split, parts in records.items() for folder, record in parts.items()}
    values, counts = np.unique(np.concatenate([*ids.values()]), return_counts=True)
    if (twice := values[counts > 1]).size:
        where = [folder for folder, of_part in ids.items() if np.isin(twice[0], of_part)]
        raise ValueError(f'{twice.size} sample ids occur in more than one part, one of them in {" and ".join(where)}')
    card = {**about, 'read': sum(written.values()) + len(left_out) + sum(filtered.values()), 'samples': written,
            'dropped': left_out.counts(), 'filtered': filtered,
            **({'tables': dropped.tables} if dropped.tables else {}),
            'dropped_ids': {reason: ids[:_NAMED] for reason, ids in left_out.reasons.items()},
            'captions': {split: found.summary() for split, found in captions.items()},
            'captions_per_sample': {split: dict(sorted(found.per_sample.items())) for split, found in captions.items()}}
    for split, parts in records.items():
        # The shards stay where they are.
        for folder, record in parts.items():
            for info in (info for shard in record['shards'] for info in (shard['raw_data'], shard['zip_data']) if info):
                info['basename'] = f'{folder}/{info["basename"]}'
        shards = [shard for record in parts.values() for shard in record['shards']]
        out.commit(f'{split}/{INDEX}', json.dumps({'version': 2, 'shards': shards}, sort_keys=True))
    first = next(iter(records))
    with drawing(str(out.local / 'dataset.png')):
        draw_card(out, first, captions[first], 'dataset.png')
    out.commit(CARD_FILE, json.dumps(card, indent=2, ensure_ascii=False, default=str) + '\n')
    return written


def _check_shards(out: OutputFolder, split: str, parts: Mapping[str, dict[str, Any]]) -> None:
    """Raise an error unless all shards of a split have the same columns and, without a remote, are there in their
    sizes."""
    columns: dict[str, list[str]] = {}
    for part, record in parts.items():
        for shard in record['shards']:
            columns.setdefault(part, shard['column_names'])
            info = shard['zip_data'] or shard['raw_data']
            path = out.local / split / part / info['basename']
            size = path.stat().st_size if path.is_file() else None
            if out.remote is None and size != info['bytes']:
                raise FileError(f'{path}: {"is missing" if size is None else f"has {size:,} bytes"}, expected '
                                f'{info["bytes"]:,} bytes; remove {path.parent} to convert that part again')
    first = next(iter(columns))
    for folder, names in columns.items():
        if names != columns[first]:
            raise ValueError(f'{folder} of split {split!r} has columns {names}, but {first} has {columns[first]}')


def _parts_of_index(out: OutputFolder, split: str) -> list[str]:
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


def is_written(out: OutputFolder, about: Mapping[str, Any], config: WriterConfig) -> bool:
    """Whether a dataset is complete.

    Args:
        out: Its folder.
        about: Facts about its source, as `write_splits` was given them.
        config: As `write_splits` was given it.

    Raises:
        ConfigError: It is, but was written from another source, with other options, or from an input file that has
            changed since.
    """
    if not out.fetch(CARD_FILE):
        return False
    card = read_json(out.local / CARD_FILE, dict)
    options = deciding_options(about, config)
    for name, value in options.items():
        if name in card and card[name] != value:
            more = ', or extend it by extend=true' if covers(card[name], value) else ''
            raise ConfigError(f'out: {out} is complete, but was written with another {name} ({out.local / CARD_FILE} '
                              f'has it); remove it to convert again{more}')
    inputs = card.get('inputs', {})
    check_inputs(out, inputs, {path: input_identity(path) for path in inputs if os.path.isfile(path)})
    if card.get('leave_out') != options.get('leave_out'):
        raise ConfigError(f'out: {out} is complete, but was written with another leave_out; remove it to convert again')
    for split in card.get('samples', ()):
        for folder in _parts_of_index(out, split)[:1]:
            if out.fetch(name := f'{split}/{folder}/{PART_FILE}'):
                check_options(out, out.local / name, read_json(out.local / name, dict), options, True)
    return True
