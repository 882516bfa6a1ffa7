# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Atomic writer of MDS datasets, each with a dataset card.

One process writes each part of a split into a folder of shards, ``<split>/part-<name>``.  When all parts are complete,
on any machine, one index over all shards in the split's folder makes the dataset readable.
"""

import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import xxhash
from PIL import Image
from streaming import MDSWriter
from tqdm import tqdm

from llm2clip.config import ConfigError, WriterConfig
from llm2clip.config.files import check_values
from llm2clip.config.ranges import FolderName
from llm2clip.data.caption_files import check_text
from llm2clip.data.convert.samples import MISSING_FILE, Dropped, Part, Sample
from llm2clip.data.image_processing_llm2clip import FORMATS, MAX_PIXELS
from llm2clip.data.images import decode_image, decode_pixels, encode_image
from llm2clip.data.schema import CAPTION, IMAGE, INDEX, SAMPLE_ID, check_shard, read_index
from llm2clip.engine import Engine, LocalEngine, Work
from llm2clip.files import FileError, read_json, reading
from llm2clip.folders import atomic_folder, locked
from llm2clip.remotes import OutputFolder

CARD_FILE = 'dataset.json'
"""Dataset card, written last: a folder with a card is complete."""
# Ids per reason for omission in the card; the records of the parts list all ids.
_NAMED = 1000
_PART_FILE = 'part.json'
_RECORD = {'options': dict, 'samples': int, 'dropped': dict, 'filtered': dict, 'words': dict, 'shards': list}
# Bytes; larger input files other than weights, and tars, are compared by size alone.
_COMPARED = 1 << 26


def is_written(out: OutputFolder, about: Mapping[str, Any], config: WriterConfig) -> bool:
    """Return whether a dataset is complete; the arguments are those given to `write_splits`.

    Raises:
        ConfigError: The complete dataset has another source or other options, or an input file has changed since.
    """
    if not out.fetch(CARD_FILE):
        return False
    path = out.local / CARD_FILE
    card = read_json(path, dict)
    inputs = {name: _input_identity(name) for name in card.get('inputs', ()) if os.path.isfile(name)}
    _check_options(out, path, card, {**_deciding_options(about, config, out), 'inputs': inputs})
    return True


def write_splits(
    splits: Mapping[str, list[Part]], dropped: Dropped, out: Union[str, Path, OutputFolder],
    config: Optional[WriterConfig] = None, about: Optional[Mapping[str, Any]] = None,
    engine: Optional[Engine] = None,
) -> Optional[dict[str, int]]:
    """Write one MDS dataset per split, and a dataset card.

    Every image is decoded as a check.  A sample without captions, or with an image that cannot be decoded, is left out
    and counted.  Complete parts are kept.  Each of several machines writes its share of the parts, and the last one to
    finish writes the indices.

    Args:
        splits: Name -> parts.
        dropped: Samples that the source left out before it made parts.
        out: Output folder; complete parts are uploaded if it has a remote.
        config: Settings of the writer.
        about: Description of the source for the card; a folder with another description is refused.
        engine: Engine that runs the parts; by default `config.num_workers` processes of this machine.

    Returns:
        Split -> number of samples; None if other machines are not done.

    Raises:
        ConfigError: The folder holds another dataset, or the configuration has changed or does not fit the samples.
        FileError, FileNotFoundError: A part is damaged or missing, or a text cannot be written.
        ValueError: Two samples of a part have the same id, caption keys or columns differ, a split is empty, or too
            many samples were left out.
    """
    out, config = out if isinstance(out, OutputFolder) else OutputFolder(out), config or WriterConfig()
    options = _deciding_options(about or {}, config, out)
    jobs, names = list[_PartJob](), Counter[str]()
    inputs: dict[str, Any] = {}
    records: dict[str, dict[str, dict[str, Any]]] = {split: {} for split in splits}  # split -> part's folder -> record
    for split, parts in splits.items():
        check_values(FolderName, split, 'source.split')
        if out.fetch(f'{split}/{INDEX}'):
            name = read_index(out.local / split)['shards'][0]['raw_data']['basename']
            if not name.startswith('part-'):
                raise ConfigError(f'out: {out.local / split} holds another dataset (with {name}), expected an empty '
                                  'folder or one that prepare_data wrote')
        for part in parts:
            check_values(FolderName, f'part-{part.name}', 'the folder of a part')
            inputs |= {path: _input_identity(path) for path in part.files if path not in inputs}
            jobs.append(_PartJob(out, f'{split}/part-{part.name}', part, config,
                                {**options, 'inputs': {path: inputs[path] for path in part.files}}))
            names[jobs[-1].folder] += 1
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f'two input files would be written to {twice[0]}; give them different names')
    # Refuse parts that other machines wrote with other options before any work starts.
    for job in jobs[:config.shard_index] + jobs[config.shard_index + 1:config.num_shards]:
        _read_record(job)
    mine = jobs[config.shard_index::config.num_shards]
    # Parts without samples, or whose missing image files exist now, are read again.
    todo = {job.folder: job for job in mine if (record := _read_record(job)) is None or not record['samples']
            or any(map(os.path.isfile, record['dropped'].get(MISSING_FILE, ())))}
    engine = engine or LocalEngine(config.num_workers)
    print(f'{out}: {len(todo)} of {len(mine)} parts are to be written, by {engine}', flush=True)
    with tqdm(total=len(mine), initial=len(mine) - len(todo), desc=f'write {out.local.name}', unit=' parts') as bar:
        engine.run(todo, partial(_writing, len(todo) == 1), lambda _: bar.update())
    for job in jobs:
        if (record := _read_record(job)) is None:
            if config.num_shards == 1:
                raise FileNotFoundError(f'{out.local / job.folder / _PART_FILE}, which another machine has written, is '
                                        'not here: machines that do not share the folder need out_remote')
            return None
        split, folder = job.folder.rsplit('/', 1)
        records[split][folder] = record
    return _finish(records, dropped, out, config, {**options, 'inputs': inputs})


def _finish(
    records: Mapping[str, Mapping[str, dict[str, Any]]], dropped: Dropped, out: OutputFolder, config: WriterConfig,
    options: Mapping[str, Any],
) -> dict[str, int]:
    """Check all parts together, then write the indices and, last, the card."""
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
        hint = ' Paths are relative to source.images.' if MISSING_FILE in examples else ''
        raise ValueError(f'{unusable} of {total + unusable} samples were left out, more than max_dropped='
                         f'{config.max_dropped} allows: {examples}.{hint}  To read repaired images again, remove {out}')
    left_out.filtered.update(dropped.filtered)
    for reason, ids in dropped.reasons.items():
        left_out.add(reason, *ids)
    for split, parts in records.items():
        if not written[split]:
            raise ValueError(f'split {split!r} has no samples (left out: {left_out.counts()}, by filters: '
                             f'{dict(left_out.filtered)})')
        _check_shards(out, split, parts)
    if config.exclude_ids is not None:
        excluded = excluded_ids(config.exclude_ids)
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
        # The index names the shards inside the folders of the parts, so no file has to move.
        for folder, record in parts.items():
            for shard in record['shards']:
                shard['raw_data']['basename'] = f'{folder}/{shard["raw_data"]["basename"]}'
        shards = [shard for record in parts.values() for shard in record['shards']]
        out.commit(f'{split}/{INDEX}', json.dumps({'version': 2, 'shards': shards}, sort_keys=True))
    out.commit(CARD_FILE, json.dumps(card, indent=2, ensure_ascii=False, default=str) + '\n')
    return written


def _check_shards(out: OutputFolder, split: str, parts: Mapping[str, dict[str, Any]]) -> None:
    """Raise an error unless all shards have the same columns and, without a remote, exist with their recorded sizes."""
    shards = [(part, shard) for part, record in parts.items() for shard in record['shards']]
    first, like = shards[0]
    for part, shard in shards:
        info = shard['raw_data']
        path = out.local / split / part / info['basename']
        size = path.stat().st_size if path.is_file() else None
        if out.remote is None and size != info['bytes']:
            raise FileError(f'{path}: {"is missing" if size is None else f"has {size:,} bytes"}, expected '
                            f'{info["bytes"]:,} bytes; remove {path.parent} to convert that part again')
        if shard['column_names'] != like['column_names']:
            raise ValueError(f'{part} of split {split!r} has columns {shard["column_names"]}, but {first} has '
                             f'{like["column_names"]}')


def _lengths(counts: Counter[int]) -> dict[str, int]:
    """Number of captions, number of samples without one, and quantiles of the words per caption."""
    words = [n for n in counts if n]
    result = {'captions': counts.total() - counts[0], 'absent': counts[0]}
    for percent in (5, 50, 95) if words else ():
        result[f'words_p{percent}'] = int(np.quantile(
            words, percent / 100, weights=[counts[n] for n in words], method='inverted_cdf'))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# One part
# ---------------------------------------------------------------------------------------------------------------------


class _PartJob(NamedTuple):
    """Part to write."""

    out: OutputFolder
    folder: str  # the part's folder, relative to `out`
    part: Part
    config: WriterConfig
    options: dict[str, Any]  # options that determine the samples, with the identities of the input files


def _deciding_options(about: Mapping[str, Any], config: WriterConfig, out: OutputFolder) -> dict[str, Any]:
    """Options that determine the samples of a part and where it is, passed through JSON so that recorded ones compare
    equal."""
    ids = json.dumps(sorted(excluded_ids(config.exclude_ids))) if config.exclude_ids is not None else None
    options = {**about, 'image_max_side': config.image_max_side, 'image_quality': config.image_quality,
               'require_any_caption': config.require_any_caption, 'exclude_ids': ids and xxhash.xxh64_hexdigest(ids),
               'out_remote': out.remote}
    return json.loads(json.dumps(options, default=str))


@functools.cache
def excluded_ids(path: str) -> frozenset[str]:
    """Return the sample ids in an `exclude_ids` file; raise a ConfigError if an entry is not a text."""
    ids = read_json(path, list)
    if not all(isinstance(name, str) for name in ids):
        raise ConfigError(f'exclude_ids: {path} has entries that are no texts, expected a list of ids of samples')
    return frozenset(ids)


def _input_identity(path: str) -> list[Any]:
    """Identity of an input file on any machine: its size, and a hash of its content unless it is large or a tar.
    Weights are always hashed, since those of another training have the same size."""
    size = os.path.getsize(path)
    if path.endswith('.tar') or size > _COMPARED and not path.endswith('.safetensors'):
        return [size]
    with reading(path, 'a file'), open(path, 'rb') as file:
        return [size, hashlib.file_digest(file, xxhash.xxh64).hexdigest()]  # pyright: ignore[reportArgumentType]


def _check_options(out: OutputFolder, path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ConfigError if the options `now` differ from those recorded in `path`, `before`."""
    for name, value in now.items():
        found = before.get(name)
        if name == 'inputs':
            if changed := [file for file, identity in value.items() if (found or {}).get(file, identity) != identity]:
                raise ConfigError(f'{changed[0]}: has changed since {out} was written from it; choose another out, or '
                                  f'remove {out} to convert again')
            continue
        if found != value:
            raise ConfigError(f'out: {out} was written with another {name} ({path} has it); choose another out, or '
                              'remove it to convert again')


def _read_record(job: _PartJob) -> Optional[dict[str, Any]]:
    """Record of a written part; None if it is incomplete, or has no samples and was written with other options."""
    path = job.out.local / job.folder / _PART_FILE
    if not job.out.fetch(f'{job.folder}/{_PART_FILE}'):
        return None
    record = read_json(path, dict)
    whole = {name: type(value) for name, value in record.items()} == _RECORD
    for i, shard in enumerate(record['shards'] if whole else ()):
        check_shard(shard, f'{path}: shard {i}')
    if not whole or sum(shard['samples'] for shard in record['shards']) != record['samples']:
        raise FileError(f'{path}: is damaged, expected {", ".join(_RECORD)} of a part; remove {path.parent} to convert '
                        'it again')
    try:
        _check_options(job.out, path, record['options'], job.options)
    except ConfigError:
        if record['samples']:
            raise
        return None
    return record


def _writing(alone: bool) -> Work[_PartJob, None]:
    """Make the function that writes parts; with `alone`, it shows the progress within a part."""
    def work(jobs: Iterable[_PartJob], done: Callable[[None], object]) -> None:
        for job in jobs:
            folder = job.out.local / job.folder
            lock = folder.with_name(f'.{folder.name}.lock')
            # A worker that the engine considers lost may still be writing.
            with locked(lock, folder):
                _write_part(job, alone)
                lock.unlink()
            done(None)

    return work


def _write_part(job: _PartJob, alone: bool) -> None:
    """Write one part into its folder and, last, its record."""
    config, folder = job.config, job.out.local / job.folder
    dropped, ids, words, shards = Dropped(), set[str](), dict[str, Counter[int]](), []
    with atomic_folder(folder) as out:
        usable = _usable(job.part.read(dropped), dropped, config)
        first = next(usable, None)
        if first is not None:
            columns = {SAMPLE_ID: 'str', **({IMAGE: 'bytes'} if first.image is not None else {}),
                       **{CAPTION + key: 'str' for key in first.captions}}
            words = {key: Counter() for key in first.captions}
            with MDSWriter(out=str(out), columns=columns, hashes=['xxh64'], size_limit=config.size_limit) as writer:
                for sample in tqdm(itertools.chain([first], usable), desc=job.part.name, unit=' samples',
                                   disable=not alone):
                    if sample.sample_id in ids:
                        raise ValueError(f'sample id {sample.sample_id!r} occurs twice in {folder}')
                    if sample.captions.keys() != words.keys():
                        raise ValueError(f'sample {sample.sample_id!r} has captions {sorted(sample.captions)}, '
                                         f'expected {sorted(words)}')
                    ids.add(sample.sample_id)
                    for key, text in sample.captions.items():
                        words[key][len(text.split())] += 1
                    captions = {CAPTION + key: text for key, text in sample.captions.items()}
                    image = {IMAGE: sample.image} if sample.image is not None else {}
                    writer.write({SAMPLE_ID: sample.sample_id, **captions, **image})
            # A part is not a dataset: the index of the split lists its shards.
            index = out / INDEX
            shards = read_json(index, dict)['shards']
            index.unlink()
    job.out.publish(*(f'{job.folder}/{path.name}' for path in sorted(folder.glob('shard.*'))), keep=config.keep_local)
    record = {'options': job.options, 'samples': len(ids), 'dropped': dropped.reasons, 'filtered': dropped.filtered,
              'words': words, 'shards': shards}
    job.out.commit(f'{job.folder}/{_PART_FILE}', json.dumps(record))


def _usable(samples: Iterable[Sample], dropped: Dropped, config: WriterConfig) -> Iterator[Sample]:
    """Yield the usable samples, without white space around captions, and record the others in `dropped`."""
    needed = config.require_any_caption
    excluded = excluded_ids(config.exclude_ids) if config.exclude_ids is not None else ()
    for sample in samples:
        check_text(sample.sample_id, f'the id of sample {sample.sample_id!r}')
        for key, text in sample.captions.items():
            check_text(text, f'sample {sample.sample_id!r}: caption {key!r}')
        if unknown := [key for key in needed if key not in sample.captions]:
            raise ConfigError(f'require_any_caption: there is no caption {unknown[0]!r}; the samples have '
                              f'{", ".join(sample.captions)}')
        captions = sample.captions = {key: text.strip() for key, text in sample.captions.items()}
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
    """Reason why a sample's image cannot be used, if any; shrink an image that exceeds `image_max_side`."""
    try:
        if config.image_max_side is None:
            decode_pixels(image, sample.sample_id)
            return None
        picture = decode_image(image, sample.sample_id)
        if max(picture.size) > config.image_max_side:
            picture.thumbnail((config.image_max_side, config.image_max_side), Image.Resampling.BICUBIC)
            sample.image = encode_image(picture, 'JPEG', quality=config.image_quality)
    except ValueError as error:
        if (limit := f'more than {MAX_PIXELS:,} pixels') in str(error):
            return limit
        return f'undecodable image, expected {", ".join(FORMATS)}'
    return None
