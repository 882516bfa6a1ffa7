# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Atomic writer of MDS datasets, each with a dataset card.

One process writes each part of a split into a folder of shards, ``<split>/part-<name>``.  When all parts are
complete, on any machine, one index over all shards in the split's folder makes the dataset readable.
"""

import csv
import hashlib
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import xxhash
from tqdm import tqdm

from llm2clip.config import WriterConfig
from llm2clip.config.loading import check_values
from llm2clip.config.ranges import FolderName
from llm2clip.data.convert.part_writer import (
    EXCLUDED,
    PartJob,
    check_options,
    excluded_ids,
    fetch_records,
    read_record,
    write_parts,
)
from llm2clip.data.convert.samples import MISSING_FILE, Dropped, Part
from llm2clip.data.schema import INDEX, read_index
from llm2clip.errors import ConfigError, FileError, under
from llm2clip.io.files import atomic_write, read_json, reading
from llm2clip.io.remotes import OutputFolder

CARD_FILE = 'dataset.json'
"""Dataset card, written last: a folder with a card is complete."""
LEFT_OUT_FILE = 'left_out.csv'
# Ids per reason for omission in the card; the records of the parts list all ids.
_NAMED = 1000
# Bytes; larger input files, and tars, are compared by size alone.
_COMPARED = 1 << 26
_DEFAULTS = WriterConfig()
_UNDESCRIBED: Mapping[str, Any] = {}


def is_written(out: OutputFolder, description: Mapping[str, Any], config: WriterConfig) -> bool:
    """Return whether a dataset is complete; the arguments are those given to `write_splits`.

    Raises:
        ConfigError: The dataset has another source or other options, or an input file has changed since.
    """
    if not out.fetch(CARD_FILE):
        return False
    path = out.local / CARD_FILE
    card = read_json(path, dict)
    options = _deciding_options(description, config, out)
    inputs = card.get('inputs', ())
    options['inputs'] = {name: _input_identity(name) for name in inputs if os.path.isfile(name)}
    check_options(out, path, card, options)
    return True


def write_splits(
    splits: Mapping[str, list[Part]], dropped: Dropped, out: Union[str, Path, OutputFolder],
    config: WriterConfig = _DEFAULTS, description: Mapping[str, Any] = _UNDESCRIBED,
) -> Optional[dict[str, int]]:
    """Write one MDS dataset per split, and a dataset card.

    A sample without captions, or with an image that cannot be decoded, is left out and counted.  Complete
    parts are kept.  Each of several machines writes its share of them, and the last one writes the indices.

    Args:
        splits: Name -> parts.
        dropped: Samples that the source left out before it made parts.
        out: Output folder; complete parts are uploaded if it has a remote.
        config: Settings of the writer.
        description: Description of the source for the card; a folder with another description is refused.

    Returns:
        Split -> number of samples; None if other machines are not done.

    Raises:
        ConfigError: The folder holds another dataset, or the configuration has changed or does not fit.
        FileError: A part is damaged or missing, or a text cannot be written.
        ValueError: Ids occur twice, columns differ, a split is empty, or too many samples were left out.
    """
    if not isinstance(out, OutputFolder):
        out = OutputFolder(out)
    options = _deciding_options(description, config, out)
    for split in splits:
        with under('source.split'):
            check_values(FolderName, split)
        if out.fetch(f'{split}/{INDEX}'):
            name = read_index(out.local / split)['shards'][0]['raw_data']['basename']
            if not name.startswith('part-'):
                raise ConfigError(f'{out.local / split} holds another dataset (with {name}), expected an '
                                  'empty folder or one that prepare_data wrote', 'out')
    inputs, jobs = _part_jobs(splits, out, config, options)
    mine = jobs[config.shard_index::config.num_shards]
    is_finished = out.fetch(CARD_FILE)
    fetch_records(out, mine)
    todo = [job for job in mine if _is_to_be_written(job, is_finished)]
    print(f'{out}: {len(todo)} of {len(mine)} parts are to be written, num_workers={config.num_workers}',
          flush=True)
    num_done = len(mine) - len(todo)
    with tqdm(total=len(mine), initial=num_done, desc=f'write {out.local.name}', unit=' parts') as bar:
        write_parts(todo, config.num_workers, bar)
    # Other machines that are not done lack their last part.
    if not fetch_records(out, jobs[-config.num_shards:]) or not fetch_records(out, jobs):
        return None
    written = {split: _Split() for split in splits}
    left_out = Dropped()
    for job in jobs:
        record = read_record(job)
        if record is None:
            return None
        split, folder = job.folder.rsplit('/', 1)
        written[split].add(folder, record)
        left_out.update(record['dropped'], record['filtered'])
    _check_dropped(left_out, sum(split.samples for split in written.values()), config, out)
    left_out.update(dropped.reasons, dropped.filtered)
    return _finish(written, left_out, out, options | {'inputs': inputs})


class _Split:
    """What is kept of the records of a split's parts, of which there may be a hundred thousand."""

    def __init__(self) -> None:
        self.samples = 0
        self.words: dict[str, Counter[int]] = {}
        """Caption key -> number of words -> number of captions."""
        self.shards: list[str] = []
        """Entries of the index as JSON, which takes less memory."""
        self.columns: dict[str, str] = {}
        """Columns of a shard -> folder of the first part with them."""

    def add(self, folder: str, record: Mapping[str, Any]) -> None:
        """Add the record of a part."""
        self.samples += record['samples']
        for key, counts in record['words'].items():
            self.words.setdefault(key, Counter()).update({int(n): count for n, count in counts.items()})
        for shard in record['shards']:
            # The index names the shards inside the folders of the parts, so no file has to move.
            shard['raw_data']['basename'] = f'{folder}/{shard["raw_data"]["basename"]}'
            self.columns.setdefault(str(shard['column_names']), folder)
            self.shards.append(json.dumps(shard, sort_keys=True))


def _part_jobs(
    splits: Mapping[str, list[Part]], out: OutputFolder, config: WriterConfig, options: Mapping[str, Any]
) -> tuple[dict[str, Any], list[PartJob]]:
    """Identities of all input files, and one job per part."""
    inputs: dict[str, Any] = {}
    jobs: dict[str, PartJob] = {}
    for split, parts in splits.items():
        for part in parts:
            folder = f'{split}/part-{part.name}'
            if folder in jobs:
                raise ValueError(f'two input files would be written to {folder}; give them different names')
            for path in part.files:
                if path not in inputs:
                    inputs[path] = _input_identity(path)
            part_options = dict(options) | {'inputs': {path: inputs[path] for path in part.files}}
            jobs[folder] = PartJob(out, folder, part, config, part_options)
    return inputs, list(jobs.values())


def _is_to_be_written(job: PartJob, is_finished: bool) -> bool:
    """Whether a part is incomplete, has only unusable samples, lacked image files that exist now or, in an
    unfinished dataset, was written from input files that have changed."""
    record = read_record(job, any_inputs=not is_finished)
    if record is None or record['options']['inputs'] != job.options['inputs']:
        return True
    if not record['samples'] and (record['dropped'] or record['options'] != job.options):
        return True
    return any(map(os.path.isfile, record['dropped'].get(MISSING_FILE, ())))


def _finish(
    splits: Mapping[str, _Split], left_out: Dropped, out: OutputFolder, options: dict[str, Any]
) -> dict[str, int]:
    """Check all parts together, then write the indices and, last, the card."""
    for name, split in splits.items():
        if not split.samples:
            raise ValueError(f'split {name!r} has no samples (left out: {left_out.counts()}, by filters: '
                             f'{dict(left_out.filtered)})')
        if len(split.columns) > 1:
            (first, _), (columns, folder), *_ = split.columns.items()
            raise ValueError(f'{folder} of split {name!r} has columns {columns}, but the first part has '
                             f'{first}')
    written = {name: split.samples for name, split in splits.items()}
    num_read = sum(written.values()) + sum(left_out.counts().values()) + left_out.filtered.total()
    card = options | {
        'read': num_read, 'samples': written,
        'dropped': left_out.counts(), 'filtered': dict(left_out.filtered),
        'dropped_ids': {reason: ids[:_NAMED] for reason, ids in left_out.reasons.items()},
        'captions': {name: _caption_lengths(split.words) for name, split in splits.items()},
    }
    for name, split in splits.items():
        out.commit(f'{name}/{INDEX}', f'{{"shards": [{", ".join(split.shards)}], "version": 2}}')
    out.commit(CARD_FILE, json.dumps(card, indent=2, ensure_ascii=False, default=str) + '\n')
    return written


def _check_dropped(left_out: Dropped, num_written: int, config: WriterConfig, out: OutputFolder) -> None:
    """Raise an error if too many samples of the parts are unusable, or `exclude_ids` names none of them."""
    num_unusable = sum(left_out.counts().values())
    num_read = num_written + num_unusable
    path = out.local / LEFT_OUT_FILE
    path.unlink(missing_ok=True)
    if num_unusable > config.max_dropped * num_read:
        _write_left_out(path, left_out.reasons)
        counts = [f'{len(ids)} {reason}, such as {ids[0]}' for reason, ids in left_out.reasons.items() if ids]
        needed = math.ceil(100 * num_unusable / num_read) / 100
        raise FileError(f'lists {num_unusable} of {num_read} samples, which cannot be used '
                        f'({"; ".join(counts)}), and files with similar names; max_dropped allows a share of '
                        f'{config.max_dropped}; mend the input and repeat the command, or set '
                        f'max_dropped={needed}; to read repaired images again, remove {out}', path)
    num_ids = len(excluded_ids(config.exclude_ids))
    if num_ids:
        num_excluded = left_out.filtered[EXCLUDED]
        summary = f'{num_excluded:,} samples are left out, and {config.exclude_ids} names {num_ids:,}'
        if not num_excluded:
            raise ConfigError(f'{summary}; expected ids of samples of this source', 'exclude_ids')
        print(f'exclude_ids: {summary}', flush=True)


def _write_left_out(path: Path, reasons: Mapping[str, Sequence[str]]) -> None:
    """Write a CSV file of unusable samples, given as reason -> ids or paths of missing files.

    Beside a missing file is the name of one in its folder that differs only in case, white space, punctuation
    or suffix.
    """
    similar: dict[tuple[str, str], str] = {}  # folder and letters of a name -> name
    for folder in {*map(os.path.dirname, reasons.get(MISSING_FILE, ()))}:
        if os.path.isdir(folder):
            names = sorted(os.listdir(folder), reverse=True)  # so that a.jpg replaces a.txt
            similar.update({_letters(f'{folder}/{name}'): name for name in names})
    with atomic_write(path) as partial, open(
            partial, 'w', encoding='utf-8-sig', errors='replace', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(['reason', 'sample', 'similar file'])
        for reason, ids in reasons.items():
            rows.writerows([reason, sample_id, similar.get(_letters(sample_id))] for sample_id in ids)


def _letters(path: str) -> tuple[str, str]:
    """Folder of a path, and letters and digits of its name in lower case, without its suffix."""
    stem = unicodedata.normalize('NFKC', Path(path).stem).casefold()
    return os.path.dirname(path), re.sub(r'[\W_]+', '', stem)


def _caption_lengths(words: Mapping[str, Counter[int]]) -> dict[str, dict[str, int]]:
    """Caption key -> number of captions, number of absent ones, and quantiles of the words per caption."""
    lengths: dict[str, dict[str, int]] = {}
    for key, counts in words.items():
        num_absent = counts.pop(0, 0)
        lengths[key] = {'captions': counts.total(), 'absent': num_absent}
        if counts:
            for percent in (5, 50, 95):
                quantile = np.quantile([*counts], percent / 100, weights=[*counts.values()],
                                       method='inverted_cdf')
                lengths[key][f'words_p{percent}'] = int(quantile)
    return lengths


def _deciding_options(
    description: Mapping[str, Any], config: WriterConfig, out: OutputFolder
) -> dict[str, Any]:
    """Options that determine the samples of a part and where it is, as JSON returns recorded ones."""
    ids_hash = None
    if config.exclude_ids is not None:
        ids_hash = xxhash.xxh64_hexdigest(json.dumps(sorted(excluded_ids(config.exclude_ids))))
    options = dict(description)
    options.update(image_max_side=config.image_max_side, image_quality=config.image_quality,
                   require_any_caption=config.require_any_caption, exclude_ids=ids_hash,
                   out_remote=out.remote)
    return json.loads(json.dumps(options, default=str))


def _input_identity(path: str) -> list[Any]:
    """Size of an input file, and a hash of its content unless it is large or a tar."""
    size = os.path.getsize(path)
    if path.endswith('.tar') or size > _COMPARED:
        return [size]
    with reading(path, 'a file'), open(path, 'rb') as file:
        digest = hashlib.file_digest(file, xxhash.xxh64)  # pyright: ignore[reportArgumentType]
        return [size, digest.hexdigest()]
