# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Writer of one part of an MDS dataset: a folder of shards with a record of its samples."""

import functools
import itertools
import json
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, Optional

from PIL import Image
from streaming import MDSWriter
from tqdm import tqdm

from llm2clip.config import WriterConfig
from llm2clip.data.caption_files import check_text
from llm2clip.data.convert.samples import Dropped, Part, Sample
from llm2clip.data.images import decode_image, encode_image
from llm2clip.data.schema import CAPTION, IMAGE, INDEX, SAMPLE_ID
from llm2clip.errors import ConfigError, FileError
from llm2clip.io.files import read_json, reading
from llm2clip.io.folders import atomic_folder
from llm2clip.io.processes import end_with_parent
from llm2clip.io.remotes import OutputFolder
from llm2clip.modeling.image_processing_llm2clip import FORMATS, MAX_PIXELS, TooManyPixels

PART_FILE = 'part.json'
"""Record of a part, written last: a folder with a record is complete."""
EXCLUDED = 'named by exclude_ids'
"""Reason for samples that `exclude_ids` leaves out."""


class PartJob(NamedTuple):
    """Part to write."""

    out: OutputFolder
    folder: str  # the part's folder, relative to `out`
    part: Part
    config: WriterConfig
    options: dict[str, Any]  # options that determine the samples, with the identities of the input files


@functools.cache
def excluded_ids(path: Optional[str]) -> frozenset[str]:
    """Return the sample ids in an `exclude_ids` file; whole numbers become texts, as in every source."""
    if path is None:
        return frozenset()
    return frozenset(map(str, read_json(path, list)))


def check_options(
    out: OutputFolder, path: Path, recorded: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Raise a ConfigError if the options differ from those `recorded` in the file `path`."""
    deciding = dict(options)
    inputs = deciding.pop('inputs')
    for name, value in deciding.items():
        if recorded.get(name) != value:
            raise ConfigError(f'{out} was written with another {name} ({path} has it); choose another out, '
                              'or remove it to convert again', 'out')
    for file, identity in inputs.items():
        if recorded['inputs'].get(file, identity) != identity:
            raise ConfigError(f'{file}: has changed since {out} was written from it; choose another out, or '
                              f'remove {out} to convert again')


def fetch_records(out: OutputFolder, jobs: Sequence[PartJob]) -> bool:
    """Download the records of parts that only the remote has, and return whether all parts are complete."""
    return all(out.fetch_all(f'{job.folder}/{PART_FILE}' for job in jobs))


def read_record(job: PartJob, any_inputs: bool = False) -> Optional[dict[str, Any]]:
    """Return the record of a written part; None if it is not here, and so incomplete.

    Raises:
        ConfigError: The options or, unless `any_inputs`, an input file have changed, and the part has
            samples.
        FileError: The record is damaged.
    """
    path = job.out.local / job.folder / PART_FILE
    if not path.is_file():
        return None
    record = read_json(path, dict)
    with reading(path, f'the record of a part; remove {path.parent} to convert it again'):
        options = dict(job.options)
        if any_inputs:
            options['inputs'] = {}
        if record['samples']:
            check_options(job.out, path, record['options'], options)
    return record


# Jobs of this process, set before workers fork, because the functions that read parts cannot be pickled.
_jobs: list[PartJob] = []


def write_parts(jobs: Sequence[PartJob], num_workers: int, progress: tqdm) -> None:
    """Write parts in `num_workers` forked processes, or one after another in this process if that is 1.

    `progress` counts the parts.  After an error, no further part begins.
    """
    num_workers = min(num_workers, len(jobs))
    _jobs[:] = jobs
    if num_workers <= 1:
        for i in range(len(jobs)):
            _write_part(i)
            progress.update()
        return
    pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context('fork'),
                               initializer=end_with_parent, initargs=(os.getpid(),))
    try:
        for future in as_completed([pool.submit(_write_part, i) for i in range(len(jobs))]):
            future.result()
            progress.update()
    finally:
        # After an error, parts that have begun are finished, before the folder's lock is released.
        pool.shutdown(cancel_futures=True)


def _write_part(i: int) -> None:
    """Write the part of a job, given by its index, into its folder and, last, its record."""
    job = _jobs[i]
    folder = job.out.local / job.folder
    dropped = Dropped()
    ids: set[str] = set()
    words: dict[str, Counter[int]] = {}
    shards: list[dict[str, Any]] = []
    with atomic_folder(folder) as out:
        usable = _usable(job.part, dropped, job.config)
        first = next(usable, None)
        if first is not None:
            columns = {SAMPLE_ID: 'str'}
            if first.image is not None:
                columns[IMAGE] = 'bytes'
            columns.update({CAPTION + key: 'str' for key in first.captions})
            words = {key: Counter() for key in first.captions}
            samples = tqdm(itertools.chain([first], usable), desc=job.part.name, unit=' samples',
                           disable=len(_jobs) > 1)
            with MDSWriter(out=str(out), columns=columns, hashes=['xxh64'],
                           size_limit=job.config.size_limit) as writer:
                for sample in samples:
                    if sample.sample_id in ids:
                        raise FileError(f'sample id {sample.sample_id!r} occurs twice, expected unique ids',
                                        folder)
                    if sample.captions.keys() != words.keys():
                        raise FileError(f'sample {sample.sample_id!r} has captions '
                                        f'{sorted(sample.captions)}, expected {sorted(words)}', folder)
                    ids.add(sample.sample_id)
                    row: dict[str, Any] = {SAMPLE_ID: sample.sample_id, IMAGE: sample.image}
                    for key, text in sample.captions.items():
                        words[key][len(text.split())] += 1
                        row[CAPTION + key] = text
                    writer.write(row)
            # A part is not a dataset: the index of the split lists its shards.
            index = out / INDEX
            shards = read_json(index, dict)['shards']
            index.unlink()
    files = [f'{job.folder}/{path.name}' for path in sorted(folder.glob('shard.*'))]
    job.out.publish(*files, keep=job.config.keep_local)
    record = {'options': job.options, 'samples': len(ids), 'dropped': dropped.reasons,
              'filtered': dropped.filtered, 'words': words, 'shards': shards}
    job.out.commit(f'{job.folder}/{PART_FILE}', json.dumps(record))


def _usable(part: Part, dropped: Dropped, config: WriterConfig) -> Iterator[Sample]:
    """Yield the usable samples, without white space around captions, and record the others in `dropped`."""
    needed = config.require_any_caption
    excluded = excluded_ids(config.exclude_ids)
    for sample in part.read(dropped):
        if not isinstance(sample, Sample):
            raise ConfigError(f'part {part.name} yields {sample!r:.60}, expected samples', 'source')
        check_text(sample.sample_id, f'the id of sample {sample.sample_id!r}')
        if not {*needed} <= sample.captions.keys():
            raise ConfigError(f'{needed}, but the samples have {", ".join(sample.captions)}',
                              'require_any_caption')
        captions = sample.captions = {
            key: check_text(text, f'sample {sample.sample_id!r}: caption {key!r}').strip()
            for key, text in sample.captions.items()}
        if sample.sample_id in excluded:
            dropped.filtered[EXCLUDED] += 1
        elif not any(captions.values()):
            dropped.add('no caption', sample.sample_id)
        elif needed and not any(captions[key] for key in needed):
            dropped.filtered[f'no caption {" or ".join(needed)}'] += 1
        else:
            problem = _image_problem(sample, config)
            if problem is None:
                yield sample
            else:
                dropped.add(problem, sample.sample_id)


def _image_problem(sample: Sample, config: WriterConfig) -> Optional[str]:
    """Reason why a sample's image cannot be used, if any; shrink an image that exceeds `image_max_side`."""
    if sample.image is None:
        return None
    max_side = config.image_max_side or math.inf
    try:
        picture = decode_image(sample.image, sample.sample_id)
        if max(picture.size) > max_side:
            picture.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
            sample.image = encode_image(picture, 'JPEG', quality=config.image_quality)
    except ValueError as error:
        if isinstance(error.__cause__, TooManyPixels):
            return f'more than {MAX_PIXELS:,} pixels'
        return f'undecodable image, expected {", ".join(FORMATS)}'
    return None
