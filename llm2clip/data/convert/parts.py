# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A part of a split: what decides its samples, its folder of shards, and the file that says that it is complete."""

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import xxhash
from PIL import Image
from streaming import MDSWriter
from tqdm import tqdm

from llm2clip.config import ConfigError, WriterConfig
from llm2clip.data.caption_files import check_text
from llm2clip.data.convert.card import CaptionCounts
from llm2clip.data.convert.samples import Dropped, Part, Sample
from llm2clip.data.images import decode_image, decode_pixels, encode_image, unsupported_format
from llm2clip.data.schema import IMAGE, INDEX, SAMPLE_ID, caption_column, check_shard
from llm2clip.engine import Work
from llm2clip.files import FileError, read_json, reading
from llm2clip.folders import complete_folder, locked
from llm2clip.remotes import OutputFolder

__all__ = ['PART_FILE', 'PartJob', 'check_inputs', 'check_options', 'covers',
           'deciding_options', 'input_identity', 'left_out_ids', 'part_ids', 'read_record', 'writing']

PART_FILE = 'part.json'
_IDS = 'ids.npy'
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


# ---------------------------------------------------------------------------------------------------------------------
# What decides the samples
# ---------------------------------------------------------------------------------------------------------------------


def deciding_options(about: Mapping[str, Any], config: WriterConfig) -> dict[str, Any]:
    """What decides the samples of a part, as it comes back from its file."""
    options = {**about, 'image_max_side': config.image_max_side, 'image_quality': config.image_quality,
               'require_any_caption': config.require_any_caption}
    if config.leave_out is not None:
        options['leave_out'] = xxhash.xxh64(json.dumps(sorted(left_out_ids(config.leave_out)))).hexdigest()
    return json.loads(json.dumps(options, default=str))


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


def check_options(
    out: OutputFolder, path: Path, record: Mapping[str, Any], options: Mapping[str, Any], extend: bool
) -> None:
    """Raise a ConfigError if a part was written with other options.

    Where a dataset is extended, that may have been for fewer files and with another `leave_out`.
    """
    found, options = {**record.get('options', {})}, {**options}
    check_inputs(out, found.pop('inputs', {}), options.pop('inputs', {}))
    if extend:
        found.pop('leave_out', None)
        options.pop('leave_out', None)
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


@functools.cache
def left_out_ids(path: str) -> frozenset[str]:
    """The ids in a file of `leave_out`."""
    ids = read_json(path, list)
    if not all(isinstance(name, str) for name in ids):
        raise ConfigError(f'leave_out: {path} has entries that are no texts, expected a list of ids of samples')
    return frozenset(ids)


# ---------------------------------------------------------------------------------------------------------------------
# What was written
# ---------------------------------------------------------------------------------------------------------------------


def read_record(job: PartJob) -> Optional[dict[str, Any]]:
    """What was written of a part; None if it is not complete, or has no sample and was written with other options.

    Raises:
        ConfigError: It has samples, and was written with other options.
        FileError: It is damaged.
    """
    path = job.out.local / job.folder / PART_FILE
    if not job.out.fetch(f'{job.folder}/{PART_FILE}'):
        return None
    record = read_json(path, dict)
    whole = {name: type(value) for name, value in record.items()} == _RECORD and \
        record['captions'].keys() == vars(CaptionCounts()).keys()
    for i, shard in enumerate(record['shards'] if whole else ()):
        check_shard(shard, f'{path}: shard {i}')
    if not whole or sum(shard['samples'] for shard in record['shards']) != record['samples']:
        raise FileError(f'{path}: is damaged, expected {", ".join(_RECORD)} of a part; remove {path.parent} to convert '
                        'it again')
    try:
        check_options(job.out, path, record, job.options, job.extend)
        return record
    except ConfigError:
        if record['samples']:
            raise
    path.unlink()
    return None


def part_ids(out: OutputFolder, folder: str, count: Optional[int] = None) -> np.ndarray:
    """Hashes of the ids of a part's samples, of which there are so many if that is known, or a FileError."""
    out.fetch(f'{folder}/{_IDS}')
    path = out.local / folder / _IDS
    expected = f'the ids of {"all" if count is None else count} samples; remove {path.parent} to convert it again'
    with reading(path, expected):
        ids = np.load(path, allow_pickle=False)
    if ids.ndim != 1 or ids.dtype != np.uint64 or count not in (None, len(ids)):
        raise FileError(f'{path}: holds {ids.dtype} values of shape {ids.shape}, expected {expected}')
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def writing(alone: bool) -> Work[PartJob, int]:
    """Write parts, and tell how many samples each has; a part that is alone has a bar of its own."""
    def work(jobs: Iterable[PartJob], done: Callable[[int], object]) -> None:
        for job in jobs:
            folder = job.out.local / job.folder
            lock = folder.with_name(f'.{folder.name}.lock')
            # A worker that the engine takes for lost may still be writing.
            with locked(lock, folder):
                written = _write_part(job, alone)
                lock.unlink()
            done(written)

    return work


def _write_part(job: PartJob, alone: bool) -> int:
    """Write one part into its folder; returns how many samples."""
    config, folder = job.config, job.out.local / job.folder
    dropped, ids, seen = Dropped(), [], set()
    counts, shards = CaptionCounts(), []
    with complete_folder(folder) as out:
        checked = _checked(job.part.read(dropped), dropped, config)
        first = next(checked, None)
        if first is not None:
            columns = {SAMPLE_ID: 'str', **({IMAGE: 'bytes'} if first.image is not None else {}),
                       **{caption_column(key): 'str' for key in first.captions}}
            with MDSWriter(out=str(out), columns=columns, hashes=['xxh64'], size_limit=config.size_limit,
                           compression=config.compression) as writer:
                for sample in tqdm(itertools.chain([first], checked), desc=job.part.name, unit=' samples',
                                   disable=not alone):
                    if sample.sample_id in seen:
                        raise ValueError(f'sample id {sample.sample_id!r} occurs twice in {folder}')
                    if sample.captions.keys() != first.captions.keys():
                        raise ValueError(f'sample {sample.sample_id!r} has captions {sorted(sample.captions)}, '
                                         f'expected {sorted(first.captions)}')
                    seen.add(sample.sample_id)
                    ids.append(xxhash.xxh64_intdigest(sample.sample_id))
                    counts.add(sample.captions)
                    captions = {caption_column(k): text for k, text in sample.captions.items()}
                    image = {IMAGE: sample.image} if sample.image is not None else {}
                    writer.write({SAMPLE_ID: sample.sample_id, **captions, **image})
            # The part is no dataset of its own: what its index says goes into that of the split.
            index = out / INDEX
            shards = read_json(index, dict)['shards']
            index.unlink()
        np.save(out / _IDS, np.array(ids, dtype=np.uint64))
    job.out.publish(*(f'{job.folder}/{path.name}' for path in sorted(folder.glob('shard.*'))), keep=config.keep_local)
    job.out.publish(f'{job.folder}/{_IDS}')
    record = {'options': job.options, 'samples': len(ids), 'dropped': dropped.reasons, 'filtered': dropped.filtered,
              'left_out': dropped.left_out, 'captions': vars(counts), 'shards': shards}
    job.out.commit(f'{job.folder}/{PART_FILE}', json.dumps(record))
    return len(ids)


def _checked(samples: Iterable[Sample], dropped: Dropped, config: WriterConfig) -> Iterator[Sample]:
    """Leave out what cannot be used; an absent caption becomes an empty text."""
    needed = config.require_any_caption
    for sample in samples:
        check_text(sample.sample_id, f'the id of sample {sample.sample_id!r}')
        for key, text in sample.captions.items():
            check_text(text, f'sample {sample.sample_id!r}: caption {key!r}')
        if unknown := [key for key in needed if key not in sample.captions]:
            raise ConfigError(f'require_any_caption: there is no caption {unknown[0]!r}; the samples have '
                              f'{", ".join(sample.captions)}')
        captions = sample.captions = {key: text if text.strip() else '' for key, text in sample.captions.items()}
        missing = [key for key in sample.required if not captions[key]]
        if config.leave_out is not None and sample.sample_id in left_out_ids(config.leave_out):
            dropped.filtered['named by leave_out'] += 1
            dropped.left_out.append(sample.sample_id)
        elif not any(captions.values()):
            dropped.add('no caption', sample.sample_id)
        elif missing:
            dropped.add(f'no caption {" and ".join(missing)}', sample.sample_id)
        elif needed and not any(captions[key] for key in needed):
            dropped.filtered[f'no caption {" or ".join(needed)}'] += 1
        elif sample.image is not None and (problem := _image_problem(sample, sample.image, config)) is not None:
            dropped.add(problem, sample.sample_id)
        else:
            yield sample


def _image_problem(sample: Sample, image: bytes, config: WriterConfig) -> Optional[str]:
    """Why a sample's image cannot be used; one that is too large is made smaller."""
    try:
        if config.image_max_side is None:
            decode_pixels(image, sample.sample_id)
            return None
        picture = decode_image(image, sample.sample_id)
        if max(picture.size) > config.image_max_side:
            picture.thumbnail((config.image_max_side, config.image_max_side), Image.Resampling.BICUBIC)
            sample.image = encode_image(picture, 'JPEG', quality=config.image_quality)
    except ValueError:
        name = unsupported_format(image)
        return f'{name} is not supported; convert it to PNG or JPEG' if name else 'undecodable image'
    return None
