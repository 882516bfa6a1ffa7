# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Atomic writer of MDS datasets, each with a dataset card.

One process writes each part of a split into a folder of shards, ``<split>/part-<name>``.  When all parts are
complete, on any machine, one index over all shards in the split's folder makes the dataset readable.
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

from llm2clip.config import WriterConfig
from llm2clip.config.loading import check_values
from llm2clip.config.ranges import FolderName
from llm2clip.data.caption_files import check_text
from llm2clip.data.convert.samples import MISSING_FILE, Dropped, Part, Sample
from llm2clip.data.images import decode_image, decode_pixels, encode_image
from llm2clip.data.schema import CAPTION, IMAGE, INDEX, SAMPLE_ID, check_shard, read_index
from llm2clip.engine import Engine, LocalEngine, Work
from llm2clip.errors import ConfigError, FileError, under
from llm2clip.io.files import read_json, reading
from llm2clip.io.folders import atomic_folder, locked
from llm2clip.io.remotes import OutputFolder
from llm2clip.modeling.image_processing_llm2clip import FORMATS, MAX_PIXELS

CARD_FILE = 'dataset.json'
"""Dataset card, written last: a folder with a card is complete."""
# Ids per reason for omission in the card; the records of the parts list all ids.
_NAMED = 1000
_EXCLUDED = 'named by exclude_ids'
_PART_FILE = 'part.json'
_RECORD = {'options': dict, 'samples': int, 'dropped': dict, 'filtered': dict, 'words': dict, 'shards': list}
# Bytes; larger input files other than weights, and tars, are compared by size alone.
_COMPARED = 1 << 26


def is_written(out: OutputFolder, about: Mapping[str, Any], config: WriterConfig) -> bool:
    """Return whether a dataset is complete; the arguments are those given to `write_splits`.

    Raises:
        ConfigError: The dataset has another source or other options, or an input file has changed since.
    """
    if not out.fetch(CARD_FILE):
        return False
    path = out.local / CARD_FILE
    card = read_json(path, dict)
    options = _deciding_options(about, config, out)
    options['inputs'] = {name: _input_identity(name) for name in card.get('inputs', ()) if os.path.isfile(name)}
    _check_options(out, path, card, options)
    return True


def write_splits(
    splits: Mapping[str, list[Part]], dropped: Dropped, out: Union[str, Path, OutputFolder],
    config: Optional[WriterConfig] = None, about: Optional[Mapping[str, Any]] = None,
    engine: Optional[Engine] = None,
) -> Optional[dict[str, int]]:
    """Write one MDS dataset per split, and a dataset card.

    A sample without captions, or with an image that cannot be decoded, is left out and counted.  Complete
    parts are kept.  Each of several machines writes its share of them, and the last one writes the indices.

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
        ConfigError: The folder holds another dataset, or the configuration has changed or does not fit.
        FileError, FileNotFoundError: A part is damaged or missing, or a text cannot be written.
        ValueError: Ids occur twice, columns differ, a split is empty, or too many samples were left out.
    """
    if not isinstance(out, OutputFolder):
        out = OutputFolder(out)
    config = config or WriterConfig()
    options = _deciding_options(about or {}, config, out)
    jobs: list[_PartJob] = []
    inputs: dict[str, Any] = {}
    for split, parts in splits.items():
        with under('source.split'):
            check_values(FolderName, split)
        if out.fetch(f'{split}/{INDEX}'):
            name = read_index(out.local / split)['shards'][0]['raw_data']['basename']
            if not name.startswith('part-'):
                raise ConfigError(f'out: {out.local / split} holds another dataset (with {name}), expected '
                                  'an empty folder or one that prepare_data wrote')
        for part in parts:
            with under('the folder of a part'):
                check_values(FolderName, f'part-{part.name}')
            for path in part.files:
                if path not in inputs:
                    inputs[path] = _input_identity(path)
            part_options = options | {'inputs': {path: inputs[path] for path in part.files}}
            jobs.append(_PartJob(out, f'{split}/part-{part.name}', part, config, part_options))
    for folder, count in Counter(job.folder for job in jobs).items():
        if count > 1:
            raise ValueError(f'two input files would be written to {folder}; give them different names')
    # Refuse parts that other machines wrote with other options before any work starts.
    for job in jobs[:config.shard_index] + jobs[config.shard_index + 1:config.num_shards]:
        _read_record(job)
    mine = jobs[config.shard_index::config.num_shards]
    todo: dict[str, _PartJob] = {}
    for job in mine:
        record = _read_record(job)
        # Parts without samples, or whose missing image files exist now, are read again.
        if (record is None or not record['samples']
                or any(map(os.path.isfile, record['dropped'].get(MISSING_FILE, ())))):
            todo[job.folder] = job
    engine = engine or LocalEngine(config.num_workers)
    print(f'{out}: {len(todo)} of {len(mine)} parts are to be written, by {engine}', flush=True)
    num_done = len(mine) - len(todo)
    with tqdm(total=len(mine), initial=num_done, desc=f'write {out.local.name}', unit=' parts') as bar:
        engine.run(todo, partial(_writing, show_progress=len(todo) == 1), lambda _: bar.update())
    records: dict[str, dict[str, dict[str, Any]]] = {split: {} for split in splits}  # split -> part's folder
    for job in jobs:
        record = _read_record(job)
        if record is None:
            if config.num_shards == 1:
                raise FileNotFoundError(f'{out.local / job.folder / _PART_FILE}, which another machine has written, '
                                        'is not here: machines that do not share the folder need out_remote')
            return None
        split, folder = job.folder.rsplit('/', 1)
        records[split][folder] = record
    return _finish(records, dropped, out, config, options | {'inputs': inputs})


def _finish(
    records: Mapping[str, Mapping[str, dict[str, Any]]], dropped: Dropped, out: OutputFolder, config: WriterConfig,
    options: dict[str, Any],
) -> dict[str, int]:
    """Check all parts together, then write the indices and, last, the card."""
    left_out = Dropped()
    written = dict.fromkeys(records, 0)
    words: dict[str, dict[str, Counter[int]]] = {split: {} for split in records}
    for split, parts in records.items():
        for record in parts.values():
            written[split] += record['samples']
            left_out.update(record['dropped'], record['filtered'])
            for key, counts in record['words'].items():
                words[split].setdefault(key, Counter()).update({int(n): count for n, count in counts.items()})
    num_written = sum(written.values())
    num_unusable = sum(left_out.counts().values())
    if num_unusable > config.max_dropped * (num_written + num_unusable):
        examples = {reason: ids[:5] for reason, ids in left_out.reasons.items()}
        hint = ' Paths are relative to source.images.' if MISSING_FILE in examples else ''
        raise ValueError(f'{num_unusable} of {num_written + num_unusable} samples were left out, more than '
                         f'max_dropped={config.max_dropped} allows: {examples}.{hint}  To read repaired '
                         f'images again, remove {out}')
    left_out.update(dropped.reasons, dropped.filtered)
    for split, parts in records.items():
        if not written[split]:
            raise ValueError(f'split {split!r} has no samples (left out: {left_out.counts()}, by filters: '
                             f'{dict(left_out.filtered)})')
        _check_shards(out, split, parts)
    if config.exclude_ids is not None:
        num_ids = len(excluded_ids(config.exclude_ids))
        num_excluded = left_out.filtered[_EXCLUDED]
        summary = f'exclude_ids: {num_excluded:,} samples are left out, and {config.exclude_ids} names {num_ids:,}'
        if num_ids and not num_excluded:
            raise ConfigError(f'{summary}; expected ids of samples of this source')
        print(summary, flush=True)
    captions: dict[str, dict[str, dict[str, int]]] = {}
    for split, counters in words.items():
        captions[split] = {key: _lengths(counts) for key, counts in counters.items()}
    card = options | {
        'read': num_written + sum(left_out.counts().values()) + left_out.filtered.total(), 'samples': written,
        'dropped': left_out.counts(), 'filtered': dict(left_out.filtered),
        'dropped_ids': {reason: ids[:_NAMED] for reason, ids in left_out.reasons.items()},
        'captions': captions,
    }
    for split, parts in records.items():
        # The index names the shards inside the folders of the parts, so no file has to move.
        shards = []
        for folder, record in parts.items():
            for shard in record['shards']:
                shard['raw_data']['basename'] = f'{folder}/{shard["raw_data"]["basename"]}'
                shards.append(shard)
        out.commit(f'{split}/{INDEX}', json.dumps({'version': 2, 'shards': shards}, sort_keys=True))
    out.commit(CARD_FILE, json.dumps(card, indent=2, ensure_ascii=False, default=str) + '\n')
    return written


def _check_shards(out: OutputFolder, split: str, parts: Mapping[str, dict[str, Any]]) -> None:
    """Check that all shards have the same columns and, without a remote, exist with their recorded sizes."""
    shards: list[tuple[str, dict[str, Any]]] = []
    for part, record in parts.items():
        shards += [(part, shard) for shard in record['shards']]
    first_part, first_shard = shards[0]
    for part, shard in shards:
        info = shard['raw_data']
        path = out.local / split / part / info['basename']
        size = path.stat().st_size if path.is_file() else None
        if out.remote is None and size != info['bytes']:
            state = 'is missing' if size is None else f'has {size:,} bytes'
            raise FileError(f'{path}: {state}, expected {info["bytes"]:,} bytes; remove {path.parent} to '
                            'convert that part again')
        if shard['column_names'] != first_shard['column_names']:
            raise ValueError(f'{part} of split {split!r} has columns {shard["column_names"]}, but {first_part} has '
                             f'{first_shard["column_names"]}')


def _lengths(counts: Counter[int]) -> dict[str, int]:
    """Number of captions, number of samples without one, and quantiles of the words per caption."""
    result = {'captions': counts.total() - counts[0], 'absent': counts[0]}
    words = [n for n in counts if n]
    if words:
        weights = [counts[n] for n in words]
        for percent in (5, 50, 95):
            quantile = np.quantile(words, percent / 100, weights=weights, method='inverted_cdf')
            result[f'words_p{percent}'] = int(quantile)
    return result


# -----------------------------------------------------------------------------------------------------------
# One part
# -----------------------------------------------------------------------------------------------------------


class _PartJob(NamedTuple):
    """Part to write."""

    out: OutputFolder
    folder: str  # the part's folder, relative to `out`
    part: Part
    config: WriterConfig
    options: dict[str, Any]  # options that determine the samples, with the identities of the input files


def _deciding_options(about: Mapping[str, Any], config: WriterConfig, out: OutputFolder) -> dict[str, Any]:
    """Options that determine the samples of a part and where it is, as JSON returns recorded ones."""
    ids_hash = None
    if config.exclude_ids is not None:
        ids_hash = xxhash.xxh64_hexdigest(json.dumps(sorted(excluded_ids(config.exclude_ids))))
    options = dict(about)
    options.update(image_max_side=config.image_max_side, image_quality=config.image_quality,
                   require_any_caption=config.require_any_caption, exclude_ids=ids_hash, out_remote=out.remote)
    return json.loads(json.dumps(options, default=str))


@functools.cache
def excluded_ids(path: str) -> frozenset[str]:
    """Return the sample ids in an `exclude_ids` file; raise a ConfigError if an entry is not a text."""
    ids = read_json(path, list)
    if not all(isinstance(name, str) for name in ids):
        raise ConfigError(f'exclude_ids: {path} has entries that are no texts, expected a list of ids of samples')
    return frozenset(ids)


def _input_identity(path: str) -> list[Any]:
    """Size of an input file, and a hash of its content unless it is large or a tar.

    Weights are always hashed, since those of another training have the same size.
    """
    size = os.path.getsize(path)
    if path.endswith('.tar') or size > _COMPARED and not path.endswith('.safetensors'):
        return [size]
    with reading(path, 'a file'), open(path, 'rb') as file:
        return [size, hashlib.file_digest(file, xxhash.xxh64).hexdigest()]  # pyright: ignore[reportArgumentType]


def _check_options(out: OutputFolder, path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ConfigError if the options `now` differ from those recorded in `path`, `before`."""
    for name, value in now.items():
        if name != 'inputs' and before.get(name) != value:
            raise ConfigError(f'out: {out} was written with another {name} ({path} has it); choose another '
                              'out, or remove it to convert again')
    inputs = before.get('inputs') or {}
    for file, identity in now['inputs'].items():
        if inputs.get(file, identity) != identity:
            raise ConfigError(f'{file}: has changed since {out} was written from it; choose another out, or '
                              f'remove {out} to convert again')


def _read_record(job: _PartJob) -> Optional[dict[str, Any]]:
    """Record of a written part; None if it is incomplete, or empty and written with other options."""
    path = job.out.local / job.folder / _PART_FILE
    if not job.out.fetch(f'{job.folder}/{_PART_FILE}'):
        return None
    record = read_json(path, dict)
    is_whole = {name: type(value) for name, value in record.items()} == _RECORD
    if is_whole:
        for i, shard in enumerate(record['shards']):
            check_shard(shard, f'{path}: shard {i}')
    if not is_whole or sum(shard['samples'] for shard in record['shards']) != record['samples']:
        raise FileError(f'{path}: is damaged, expected {", ".join(_RECORD)} of a part; remove {path.parent} '
                        'to convert it again')
    try:
        _check_options(job.out, path, record['options'], job.options)
    except ConfigError:
        if record['samples']:
            raise
        return None
    return record


def _writing(show_progress: bool) -> Work[_PartJob, None]:
    """Make the function that writes parts, and may show the progress within a part."""
    def work(jobs: Iterable[_PartJob], done: Callable[[None], object]) -> None:
        for job in jobs:
            folder = job.out.local / job.folder
            lock = folder.with_name(f'.{folder.name}.lock')
            # A worker that the engine considers lost may still be writing.
            with locked(lock, folder):
                _write_part(job, show_progress)
                lock.unlink()
            done(None)

    return work


def _write_part(job: _PartJob, show_progress: bool) -> None:
    """Write one part into its folder and, last, its record."""
    folder = job.out.local / job.folder
    dropped = Dropped()
    ids: set[str] = set()
    words: dict[str, Counter[int]] = {}
    shards: list[dict[str, Any]] = []
    with atomic_folder(folder) as out:
        usable = _usable(job.part.read(dropped), dropped, job.config)
        first = next(usable, None)
        if first is not None:
            columns = {SAMPLE_ID: 'str'}
            if first.image is not None:
                columns[IMAGE] = 'bytes'
            columns.update({CAPTION + key: 'str' for key in first.captions})
            words = {key: Counter() for key in first.captions}
            samples = tqdm(itertools.chain([first], usable), desc=job.part.name, unit=' samples',
                           disable=not show_progress)
            with MDSWriter(out=str(out), columns=columns, hashes=['xxh64'], size_limit=job.config.size_limit) as writer:
                for sample in samples:
                    if sample.sample_id in ids:
                        raise ValueError(f'sample id {sample.sample_id!r} occurs twice in {folder}')
                    if sample.captions.keys() != words.keys():
                        raise ValueError(f'sample {sample.sample_id!r} has captions {sorted(sample.captions)}, '
                                         f'expected {sorted(words)}')
                    ids.add(sample.sample_id)
                    row: dict[str, Any] = {SAMPLE_ID: sample.sample_id}
                    if sample.image is not None:
                        row[IMAGE] = sample.image
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
    record = {'options': job.options, 'samples': len(ids), 'dropped': dropped.reasons, 'filtered': dropped.filtered,
              'words': words, 'shards': shards}
    job.out.commit(f'{job.folder}/{_PART_FILE}', json.dumps(record))


def _usable(samples: Iterable[Sample], dropped: Dropped, config: WriterConfig) -> Iterator[Sample]:
    """Yield the usable samples, without white space around captions, and record the others in `dropped`."""
    needed = config.require_any_caption
    excluded: frozenset[str] = frozenset()
    if config.exclude_ids is not None:
        excluded = excluded_ids(config.exclude_ids)
    for sample in samples:
        check_text(sample.sample_id, f'the id of sample {sample.sample_id!r}')
        for key, text in sample.captions.items():
            check_text(text, f'sample {sample.sample_id!r}: caption {key!r}')
        for key in needed:
            if key not in sample.captions:
                raise ConfigError(f'require_any_caption: there is no caption {key!r}; the samples have '
                                  f'{", ".join(sample.captions)}')
        captions = sample.captions = {key: text.strip() for key, text in sample.captions.items()}
        if sample.sample_id in excluded:
            dropped.filtered[_EXCLUDED] += 1
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
    max_side = config.image_max_side
    try:
        if max_side is None:
            decode_pixels(sample.image, sample.sample_id)
            return None
        picture = decode_image(sample.image, sample.sample_id)
        if max(picture.size) > max_side:
            picture.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
            sample.image = encode_image(picture, 'JPEG', quality=config.image_quality)
    except ValueError as error:
        too_large = f'more than {MAX_PIXELS:,} pixels'
        if too_large in str(error):
            return too_large
        return f'undecodable image, expected {", ".join(FORMATS)}'
    return None
