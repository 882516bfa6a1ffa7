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
from llm2clip.data.convert.parts import (
    PART_FILE,
    PartJob,
    check_options,
    deciding_options,
    excluded_ids,
    input_identity,
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


def is_written(out: OutputFolder, about: Mapping[str, Any], config: WriterConfig) -> bool:
    """Whether a dataset is complete; the arguments are as `write_splits` was given them.

    Raises:
        ConfigError: It is, but was written from another source, with other options, or from a file that has changed.
    """
    if not out.fetch(CARD_FILE):
        return False
    path = out.local / CARD_FILE
    card = read_json(path, dict)
    inputs = {name: input_identity(name) for name in card.get('inputs', ()) if os.path.isfile(name)}
    check_options(out, path, card, {**deciding_options(about, config), 'inputs': inputs}, extend=False)
    return True


def write_splits(
    splits: Mapping[str, list[Part]], dropped: Dropped, out: Union[str, Path, OutputFolder],
    config: Optional[WriterConfig] = None, about: Optional[Mapping[str, Any]] = None, extend: bool = False,
    engine: Optional[Engine] = None,
) -> Optional[dict[str, int]]:
    """Write one MDS dataset per split, and their card beside them.

    Every image is decoded to check it; a sample whose image does not decode, or that has no caption, is left out and
    counted.  Parts that are there already are kept.  With several machines each writes its share, and the last one to
    finish writes the indices.

    Args:
        splits: Name -> parts.
        dropped: What the source left out before the parts.
        out: The folder; a part that is complete is uploaded if it has a remote.
        config: How to write.
        about: Facts about the source for the card; a folder with samples of another source is refused.
        extend: It may have parts of a source with fewer ``files``, which then come first, in the order of the index.
        engine: By which the parts are written; unset, by the processes of this machine that `config` says.

    Returns:
        Split -> samples written; None if other machines are not done.

    Raises:
        ConfigError: The folder holds something else, or was written with another configuration; or the configuration
            does not fit the samples.
        FileError: A part that is there already is damaged, or a text cannot be written.
        FileNotFoundError: A part was written on a machine that does not share `out`, which has no remote.
        ValueError: Two samples have the same id, the captions' keys differ, a split is empty, or more samples were
            left out than `max_dropped` allows.
    """
    out, config = out if isinstance(out, OutputFolder) else OutputFolder(out), config or WriterConfig()
    options = deciding_options(about or {}, config)
    jobs, names = list[PartJob](), Counter[str]()
    inputs: dict[str, Any] = {}
    records: dict[str, dict[str, dict[str, Any]]] = {split: {} for split in splits}  # by the folders of parts
    for split, parts in splits.items():
        check_values(FolderName, split, 'source.split')
        if out.fetch(f'{split}/{INDEX}'):
            # A dataset that grows keeps its shards where they were: text embeddings rely on it.
            files = [shard['raw_data']['basename'] for shard in read_index(out.local / split)['shards']]
            if not files[0].startswith('part-'):
                raise ConfigError(f'out: {out.local / split} holds another dataset (with {files[0]}), expected an '
                                  'empty folder or one that prepare_data wrote')
            records[split] = {name.rsplit('/', 1)[0]: {} for name in files} if extend else {}
        if gone := records[split].keys() - {f'part-{part.name}' for part in parts}:
            raise ConfigError(f'extend: {out.local / split} has {min(gone)}, which comes from none of the input files; '
                              'expected those that the dataset was written from, and more')
        for part in parts:
            check_values(FolderName, f'part-{part.name}', 'the folder of a part')
            inputs |= {path: input_identity(path) for path in part.files if path not in inputs}
            jobs.append(PartJob(out, f'{split}/part-{part.name}', part, config,
                                {**options, 'inputs': {path: inputs[path] for path in part.files}}, extend))
            names[jobs[-1].folder] += 1
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f'two input files would be written to {twice[0]}; give them different names')
    # A part of every other machine, so that other options are refused before the work.
    for job in jobs[:config.shard_index] + jobs[config.shard_index + 1:config.num_shards]:
        read_record(job)
    mine = jobs[config.shard_index::config.num_shards]
    # A part that gave no sample is read again: what was missing may be there now.
    todo = {job.folder: job for job in mine if not (read_record(job) or {}).get('samples')}
    engine = engine or LocalEngine(config.num_workers)
    print(f'{out}: {len(todo)} of {len(mine)} parts are to be written, by {engine}', flush=True)
    with tqdm(total=len(mine), initial=len(mine) - len(todo), desc=f'write {out.local.name}', unit=' parts') as bar:
        engine.run(todo, partial(writing, len(todo) == 1), lambda _: bar.update())
    for job in jobs:
        if (record := read_record(job)) is None:
            if config.num_shards == 1:
                raise FileNotFoundError(f'{out.local / job.folder / PART_FILE}, which another machine has written, is '
                                        'not here: machines that do not share the folder need out_remote')
            return None
        split, folder = job.folder.rsplit('/', 1)
        records[split][folder] = record
    return _finish(records, dropped, out, config, {**options, 'inputs': inputs})


def _finish(
    records: Mapping[str, Mapping[str, dict[str, Any]]], dropped: Dropped, out: OutputFolder, config: WriterConfig,
    options: Mapping[str, Any],
) -> dict[str, int]:
    """Check all parts together, then write the indices and last the card."""
    written = {split: sum(record['samples'] for record in parts.values()) for split, parts in records.items()}
    left_out = Dropped()
    words: dict[str, dict[str, Counter[int]]] = {split: {} for split in records}
    for split, parts in records.items():
        for record in parts.values():
            left_out.filtered.update(record['filtered'])
            for reason, ids in record['dropped'].items():
                left_out.add(reason, *ids)
            for key, counts in record['words'].items():
                words[split].setdefault(key, Counter()).update({int(n): count for n, count in counts.items()})
    unusable, total = sum(left_out.counts().values()), sum(written.values())
    if unusable > config.max_dropped * (total + unusable):
        examples = {reason: ids[:5] for reason, ids in left_out.reasons.items()}
        raise ValueError(f'{unusable} of {total + unusable} samples were left out, more than max_dropped='
                         f'{config.max_dropped} allows: {examples}')
    left_out.filtered.update(dropped.filtered)
    for reason, ids in dropped.reasons.items():
        left_out.add(reason, *ids)
    for split, parts in records.items():
        if not written[split]:
            raise ValueError(f'split {split!r} has no samples (left out: {left_out.counts()}, by filters: '
                             f'{dict(left_out.filtered)})')
        _check_shards(out, split, parts)
    ids = {f'{split}/{folder}': part_ids(out, f'{split}/{folder}', record['samples'])
           for split, parts in records.items() for folder, record in parts.items()}
    values, counts = np.unique(np.concatenate([*ids.values()]), return_counts=True)
    if (twice := values[counts > 1]).size:
        where = [folder for folder, of_part in ids.items() if np.isin(twice[0], of_part)]
        raise ValueError(f'{twice.size} sample ids occur in more than one part, one of them in {" and ".join(where)}')
    if config.exclude_ids is not None:
        excluded = excluded_ids(config.exclude_ids)
        hashes = np.array([xxhash.xxh64_intdigest(name) for name in excluded], dtype=np.uint64)
        for folder, of_part in ids.items():
            if n := int(np.isin(of_part, hashes).sum()):
                raise ConfigError(f'exclude_ids: {config.exclude_ids} names {n:,} of the samples in '
                                  f'{out.local / folder}, which is kept as it is; remove that folder to convert it '
                                  'again')
        said = (f'exclude_ids: {left_out.filtered["named by exclude_ids"]:,} samples are left out, and '
                f'{config.exclude_ids} names {len(excluded):,}')
        if excluded and not left_out.filtered['named by exclude_ids']:
            raise ConfigError(f'{said}; expected ids of samples of this source')
        print(said, flush=True)
    card = {**options, 'read': total + sum(left_out.counts().values()) + left_out.filtered.total(), 'samples': written,
            'dropped': left_out.counts(), 'filtered': dict(left_out.filtered),
            'dropped_ids': {reason: ids[:_NAMED] for reason, ids in left_out.reasons.items()},
            'captions': {split: {key: _lengths(counts) for key, counts in of_split.items()}
                         for split, of_split in words.items()}}
    for split, parts in records.items():
        # The shards stay where they are.
        for folder, record in parts.items():
            for info in (info for shard in record['shards'] for info in (shard['raw_data'], shard['zip_data']) if info):
                info['basename'] = f'{folder}/{info["basename"]}'
        shards = [shard for record in parts.values() for shard in record['shards']]
        out.commit(f'{split}/{INDEX}', json.dumps({'version': 2, 'shards': shards}, sort_keys=True))
    out.commit(CARD_FILE, json.dumps(card, indent=2, ensure_ascii=False, default=str) + '\n')
    return written


def _check_shards(out: OutputFolder, split: str, parts: Mapping[str, dict[str, Any]]) -> None:
    """Raise an error unless all shards have the same columns and, without a remote, are there in their sizes."""
    shards = [(part, shard) for part, record in parts.items() for shard in record['shards']]
    first, like = shards[0]
    for part, shard in shards:
        info = shard['zip_data'] or shard['raw_data']
        path = out.local / split / part / info['basename']
        size = path.stat().st_size if path.is_file() else None
        if out.remote is None and size != info['bytes']:
            raise FileError(f'{path}: {"is missing" if size is None else f"has {size:,} bytes"}, expected '
                            f'{info["bytes"]:,} bytes; remove {path.parent} to convert that part again')
        if shard['column_names'] != like['column_names']:
            raise ValueError(f'{part} of split {split!r} has columns {shard["column_names"]}, but {first} has '
                             f'{like["column_names"]}')


def _lengths(counts: Counter[int]) -> dict[str, int]:
    """How many captions there are, how many samples lack one, and quantiles of their words."""
    words = [n for n in counts if n]
    result = {'captions': counts.total() - counts[0], 'absent': counts[0]}
    for percent in (5, 50, 95) if words else ():
        result[f'words_p{percent}'] = int(np.quantile(
            words, percent / 100, weights=[counts[n] for n in words], method='inverted_cdf'))
    return result
