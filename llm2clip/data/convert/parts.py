# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A part of a split: what decides its samples, its folder of shards, and the file that says that it is complete."""

import functools
import itertools
import json
import os
from collections import Counter
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
from llm2clip.data.convert.samples import Dropped, Part, Sample
from llm2clip.data.images import decode_image, decode_pixels, encode_image, unsupported_format
from llm2clip.data.schema import IMAGE, INDEX, SAMPLE_ID, caption_column, check_shard
from llm2clip.engine import Work
from llm2clip.files import FileError, read_json, reading
from llm2clip.folders import atomic_folder, locked
from llm2clip.remotes import OutputFolder

__all__ = ['PART_FILE', 'PartJob', 'check_options', 'deciding_options', 'excluded_ids', 'input_identity',
           'part_ids', 'read_record', 'writing']

PART_FILE = 'part.json'
_IDS = 'ids.npy'
_RECORD = {'options': dict, 'samples': int, 'dropped': dict, 'filtered': dict, 'words': dict, 'shards': list}
# Bytes; the content of larger input files, and of tars, is not compared.
_COMPARED = 1 << 26


class PartJob(NamedTuple):
    """A part to write."""

    out: OutputFolder
    folder: str  # name of the part's folder inside `out`
    part: Part
    config: WriterConfig
    options: dict[str, Any]  # what decides the samples, with the identities of the input files
    extend: bool  # it may have been written for a source with fewer files


def deciding_options(about: Mapping[str, Any], config: WriterConfig) -> dict[str, Any]:
    """What decides the samples of a part, as it comes back from its file."""
    ids = json.dumps(sorted(excluded_ids(config.exclude_ids))) if config.exclude_ids is not None else None
    options = {**about, 'image_max_side': config.image_max_side, 'image_quality': config.image_quality,
               'require_any_caption': config.require_any_caption, 'exclude_ids': ids and xxhash.xxh64_hexdigest(ids)}
    return json.loads(json.dumps(options, default=str))


@functools.cache
def excluded_ids(path: str) -> frozenset[str]:
    """The ids in a file of `exclude_ids`."""
    ids = read_json(path, list)
    if not all(isinstance(name, str) for name in ids):
        raise ConfigError(f'exclude_ids: {path} has entries that are no texts, expected a list of ids of samples')
    return frozenset(ids)


def input_identity(path: str) -> list[Any]:
    """What changes with the content of an input file on any machine: size, and a hash unless it is large or a tar."""
    size = os.path.getsize(path)
    if size > _COMPARED or path.endswith('.tar'):
        return [size]
    with reading(path, 'a file'):
        return [size, xxhash.xxh64_hexdigest(Path(path).read_bytes())]


def check_options(
    out: OutputFolder, path: Path, before: Mapping[str, Any], now: Mapping[str, Any], extend: bool
) -> None:
    """Raise a ConfigError if what decides the samples is not what it was.

    Args:
        out: Folder of the dataset.
        path: The file that has the options `before`.
        before, now: The `deciding_options`, and ``inputs``, path -> `input_identity`.
        extend: The source may have more ``files`` than it had, and `exclude_ids` other ids.
    """
    for name, value in now.items():
        found = before.get(name)
        if name == 'inputs':
            if changed := [file for file, identity in value.items() if (found or {}).get(file, identity) != identity]:
                raise ConfigError(f'{changed[0]}: has changed since {out} was written from it; choose another out, or '
                                  f'remove {out} to convert again (extend=true adds new files, and nothing of a file '
                                  'that it has)')
            continue
        grown = False  # whether `files` alone differs, by more entries
        if isinstance(found, dict) and isinstance(value, dict) and 'files' in found and 'files' in value:
            files, more = ([x] if isinstance(x, str) else x for x in (found['files'], value['files']))
            grown = {**found, 'files': more} == {**value, 'files': more} and {*files} <= {*more}
        if found != value and not (extend and (grown or name == 'exclude_ids')):
            raise ConfigError(f'out: {out} was written with another {name} ({path} has it); remove it to convert again'
                              + (', or add the new files by extend=true' if grown else ''))


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
    whole = {name: type(value) for name, value in record.items()} == _RECORD
    for i, shard in enumerate(record['shards'] if whole else ()):
        check_shard(shard, f'{path}: shard {i}')
    if not whole or sum(shard['samples'] for shard in record['shards']) != record['samples']:
        raise FileError(f'{path}: is damaged, expected {", ".join(_RECORD)} of a part; remove {path.parent} to convert '
                        'it again')
    try:
        check_options(job.out, path, record['options'], job.options, job.extend)
    except ConfigError:
        if record['samples']:
            raise
        return None
    return record


def part_ids(out: OutputFolder, folder: str, count: int) -> np.ndarray:
    """Hashes of the ids of a part's samples, of which there are `count`, or a FileError."""
    out.fetch(f'{folder}/{_IDS}')
    path = out.local / folder / _IDS
    expected = f'the ids of {count} samples; remove {path.parent} to convert it again'
    with reading(path, expected):
        ids = np.load(path, allow_pickle=False)
    if ids.dtype != np.uint64 or ids.shape != (count,):
        raise FileError(f'{path}: holds {ids.dtype} values of shape {ids.shape}, expected {expected}')
    return ids


def writing(alone: bool) -> Work[PartJob, None]:
    """Write parts; one that is alone has a bar of its own."""
    def work(jobs: Iterable[PartJob], done: Callable[[None], object]) -> None:
        for job in jobs:
            folder = job.out.local / job.folder
            lock = folder.with_name(f'.{folder.name}.lock')
            # A worker that the engine takes for lost may still be writing.
            with locked(lock, folder):
                _write_part(job, alone)
                lock.unlink()
            done(None)

    return work


def _write_part(job: PartJob, alone: bool) -> None:
    """Write one part into its folder, and last its record."""
    config, folder = job.config, job.out.local / job.folder
    dropped, hashes, words, shards = Dropped(), dict[str, int](), dict[str, Counter[int]](), []
    with atomic_folder(folder) as out:
        usable = _usable(job.part.read(dropped), dropped, config)
        first = next(usable, None)
        if first is not None:
            columns = {SAMPLE_ID: 'str', **({IMAGE: 'bytes'} if first.image is not None else {}),
                       **{caption_column(key): 'str' for key in first.captions}}
            words = {key: Counter() for key in first.captions}
            with MDSWriter(out=str(out), columns=columns, hashes=['xxh64'], size_limit=config.size_limit) as writer:
                for sample in tqdm(itertools.chain([first], usable), desc=job.part.name, unit=' samples',
                                   disable=not alone):
                    if sample.sample_id in hashes:
                        raise ValueError(f'sample id {sample.sample_id!r} occurs twice in {folder}')
                    if sample.captions.keys() != words.keys():
                        raise ValueError(f'sample {sample.sample_id!r} has captions {sorted(sample.captions)}, '
                                         f'expected {sorted(words)}')
                    hashes[sample.sample_id] = xxhash.xxh64_intdigest(sample.sample_id)
                    for key, text in sample.captions.items():
                        words[key][len(text.split())] += 1
                    captions = {caption_column(key): text for key, text in sample.captions.items()}
                    image = {IMAGE: sample.image} if sample.image is not None else {}
                    writer.write({SAMPLE_ID: sample.sample_id, **captions, **image})
            # The part is no dataset of its own: what its index says goes into that of the split.
            index = out / INDEX
            shards = read_json(index, dict)['shards']
            index.unlink()
        np.save(out / _IDS, np.array(list(hashes.values()), dtype=np.uint64))
    job.out.publish(*(f'{job.folder}/{path.name}' for path in sorted(folder.glob('shard.*'))), keep=config.keep_local)
    job.out.publish(f'{job.folder}/{_IDS}')
    record = {'options': job.options, 'samples': len(hashes), 'dropped': dropped.reasons, 'filtered': dropped.filtered,
              'words': words, 'shards': shards}
    job.out.commit(f'{job.folder}/{PART_FILE}', json.dumps(record))


def _usable(samples: Iterable[Sample], dropped: Dropped, config: WriterConfig) -> Iterator[Sample]:
    """Leave out what cannot be used; an absent caption becomes an empty text."""
    needed = config.require_any_caption
    excluded = excluded_ids(config.exclude_ids) if config.exclude_ids is not None else ()
    for sample in samples:
        check_text(sample.sample_id, f'the id of sample {sample.sample_id!r}')
        for key, text in sample.captions.items():
            check_text(text, f'sample {sample.sample_id!r}: caption {key!r}')
        if unknown := [key for key in needed if key not in sample.captions]:
            raise ConfigError(f'require_any_caption: there is no caption {unknown[0]!r}; the samples have '
                              f'{", ".join(sample.captions)}')
        captions = sample.captions = {key: text if text.strip() else '' for key, text in sample.captions.items()}
        if sample.sample_id in excluded:
            dropped.filtered['named by exclude_ids'] += 1
        elif not any(captions.values()):
            dropped.add('no caption', sample.sample_id)
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
