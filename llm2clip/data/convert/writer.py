# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Samples -> MDS datasets that appear only when they are complete, with a card of what went in.

Every part of a split becomes a folder of shards inside that of the split, ``part-<name>``, written by one process; when
all are there, on whichever machine, one index over all of them, in the split's folder, makes the dataset readable.
"""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from llm2clip.data.convert.card import CaptionCounts, write_card
from llm2clip.data.convert.samples import Dropped, Part, Sample, size_of_input
from llm2clip.data.images import decode_image, decode_pixels, encode_image, unsupported_format
from llm2clip.data.schema import IMAGE, INDEX, SAMPLE_ID, caption_column, check_shard, read_index
from llm2clip.engine import Engine, LocalEngine, Work
from llm2clip.files import FileError, read_json, reading
from llm2clip.folders import OutputFolder, complete_folder, locked

__all__ = ['CARD_FILE', 'is_written', 'write_splits']

# Written last: a folder that has it is complete.
CARD_FILE = 'dataset.json'
_PART_FILE = 'part.json'
_IDS_FILE = 'ids.npy'
_JOINED_FILE = 'joined.npy'
# Of a reason to leave samples out, so many are named in the card; the parts' own files name all.
_NAMED = 1000
_RECORD = {'options': dict, 'samples': int, 'dropped': dict, 'filtered': dict, 'captions': dict, 'shards': list}


class _Job(NamedTuple):
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
    options = _options(about or {}, config)
    there = {}
    for split, parts in splits.items():
        check_values(FolderName, split, 'source.split')
        before = _parts_of_index(out, split)
        there[split] = before if extend else []
        if gone := [folder for folder in there[split] if folder not in {f'part-{part.name}' for part in parts}]:
            raise ConfigError(f'extend: {out.local / split} has {gone[0]}, which comes from none of the input files; '
                              'expected those that the dataset was written from, and more')
        if extend and config.leave_out is not None:
            _check_left_out(out, split, before, config.leave_out)
    jobs = [_Job(out, f'{split}/part-{part.name}', part, config, options, extend)
            for split, parts in splits.items() for part in parts]
    for job in jobs:
        check_values(FolderName, f'part-{job.part.name}', 'the folder of a part')
    names = Counter(job.folder for job in jobs)
    if max(names.values(), default=0) > 1:
        raise ValueError(f'two input files would be written to {names.most_common(1)[0][0]}; give them different names')
    # A part of every other machine, so that other options are refused before the work.
    for job in jobs[:config.machine] + jobs[config.machine + 1:config.machines]:
        _read_record(job)
    mine = jobs[config.machine::config.machines]
    # A part that gave no sample is read again: what was missing may be there now.
    todo = {job.folder: job for job in mine if not (_read_record(job) or {}).get('samples')}
    engine = engine or LocalEngine(config.num_workers)
    size = size_of_input(job.part for job in todo.values())
    more = '' if size is None else f'; their input files have {tqdm.format_sizeof(size, "B")}'
    print(f'{out}: {len(todo)} of {len(mine)} parts are to be written, by {engine}{more}', flush=True)
    written = 0
    with tqdm(total=len(mine), desc=f'write {out.local.name}', unit=' parts') as progress:
        progress.update(len(mine) - len(todo))

        def count(samples: int) -> None:
            nonlocal written
            written += samples
            progress.update()
            progress.set_postfix(samples=written)

        engine.run(todo, partial(_writing, len(todo) == 1), count)
    records: dict[str, dict[str, Any]] = {split: {} for split in splits}
    for job in jobs:
        if (record := _read_record(job)) is None:
            if config.machines == 1:
                raise FileNotFoundError(f'{out.local / job.folder / _PART_FILE}, which another machine has written, is '
                                        'not here: machines that do not share the folder need out_remote')
            return None
        split, folder = job.folder.rsplit('/', 1)
        records[split][folder] = record
    # A dataset that grows keeps its shards where they were: sidecars rely on it.
    records = {split: {**{folder: parts[folder] for folder in there[split]}, **parts}
               for split, parts in records.items()}
    return _finish(records, dropped, out, config, about or {}, options)


def is_written(out: OutputFolder, about: Mapping[str, Any], config: WriterConfig) -> bool:
    """Whether a dataset is complete.

    Args:
        out: Its folder.
        about: Facts about its source, as `write_splits` was given them.
        config: As `write_splits` was given it.

    Raises:
        ConfigError: It is, but was written from another source or with other options.
    """
    if not out.fetch(CARD_FILE):
        return False
    card = read_json(out.local / CARD_FILE, dict)
    for name, value in _as_json(about).items():
        if name in card and card[name] != value:
            more = ', or extend it by extend=true' if _covers(card[name], value) else ''
            raise ConfigError(f'out: {out} is complete, but was written with another {name} ({out.local / CARD_FILE} '
                              f'has it); remove it to convert again{more}')
    options = _options(about, config)
    if card.get('leave_out') != options.get('leave_out'):
        raise ConfigError(f'out: {out} is complete, but was written with another leave_out; remove it to convert again')
    for split in card.get('samples', ()):
        for folder in _parts_of_index(out, split)[:1]:
            if out.fetch(name := f'{split}/{folder}/{_PART_FILE}'):
                _check_options(out, out.local / name, read_json(out.local / name, dict), options, True)
    return True


def _options(about: Mapping[str, Any], config: WriterConfig) -> dict[str, Any]:
    """What decides the samples of a part, as it comes back from its file."""
    options = {**about, 'image_max_side': config.image_max_side, 'image_quality': config.image_quality,
               'require_any_caption': config.require_any_caption}
    if config.leave_out is not None:  # of which earlier versions do not know
        options['leave_out'] = xxhash.xxh64(json.dumps(sorted(_left_out(config.leave_out)))).hexdigest()
    return _as_json(options)


def _check_options(
    out: OutputFolder, path: Path, record: Mapping[str, Any], options: Mapping[str, Any], extend: bool
) -> None:
    """Raise a ConfigError if a part was written with other options.

    Where a dataset is extended, that may have been for fewer files and with another `leave_out`.
    """
    found = record.get('options')
    if extend and isinstance(found, dict):
        found, options = ({name: value for name, value in one.items() if name != 'leave_out'}
                          for one in (found, options))
        if _covers(found.get('source'), options.get('source')):
            found['source'] = options['source']
    if found != options:
        raise ConfigError(f'out: {out} was begun with another source or other options ({path} has them); remove it '
                          'to convert again')


def _covers(before: Any, now: Any) -> bool:
    """Whether a source differs from an earlier one by more entries in its ``files`` alone."""
    if not isinstance(before, dict) or not isinstance(now, dict) or 'files' not in before or 'files' not in now:
        return False
    files, more = ([files] if isinstance(files, str) else files for files in (before['files'], now['files']))
    return {**before, 'files': None} == {**now, 'files': None} and {*files} <= {*more}


def _check_left_out(out: OutputFolder, split: str, folders: Sequence[str], path: str) -> None:
    """Raise a ConfigError if a part that is kept has a sample that is to be left out."""
    hashes = np.array([xxhash.xxh64_intdigest(name) for name in _left_out(path)], np.uint64)
    for folder in folders:
        if n := int(np.isin(_part_ids(out, split, folder), hashes).sum()):
            raise ConfigError(f'leave_out: {path} names {n:,} of the samples in {out.local / split / folder}, which is '
                              'kept as it is; remove that folder to convert it again')


@functools.cache
def _left_out(path: str) -> frozenset[str]:
    """The ids in a file of `leave_out`."""
    ids = read_json(path, list)
    if not all(isinstance(name, str) for name in ids):
        raise ConfigError(f'leave_out: {path} has entries that are no texts, expected a list of ids of samples')
    return frozenset(ids)


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as they come back from a JSON file."""
    return json.loads(json.dumps(value, default=str))


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


def _read_record(job: _Job) -> Optional[dict[str, Any]]:
    """What was written of a part; None if it is not complete, or has no sample and was written with other options.

    Raises:
        ConfigError: It has samples, and was written with other options.
        FileError: It is damaged.
    """
    path = job.out.local / job.folder / _PART_FILE
    if not job.out.fetch(f'{job.folder}/{_PART_FILE}'):
        return None
    record = read_json(path, dict)
    _check_record(record, path)
    try:
        _check_options(job.out, path, record, job.options, job.extend)
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


def _writing(alone: bool) -> Work[_Job, int]:
    """Write parts, and tell how many samples each has; a part that is alone has a bar of its own."""
    def work(jobs: Iterable[_Job], done: Callable[[int], object]) -> None:
        for job in jobs:
            folder = job.out.local / job.folder
            lock = folder.with_name(f'.{folder.name}.lock')
            # A worker that the engine takes for lost may still be writing.
            with locked(lock, folder):
                written = _write_part(job, alone)
                lock.unlink()
            done(written)

    return work


def _write_part(job: _Job, alone: bool) -> int:
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
        arrays: dict[str, np.ndarray] = {_IDS_FILE: np.array(ids, dtype=np.uint64)}
        if dropped.joined is not None:
            arrays[_JOINED_FILE] = np.array(dropped.joined, dtype=np.int64)
        for name, array in arrays.items():
            np.save(out / name, array)
    job.out.publish(*(f'{job.folder}/{path.name}' for path in sorted(folder.glob('shard.*'))), keep=config.keep_local)
    job.out.publish(*(f'{job.folder}/{name}' for name in arrays))
    record = {'options': job.options, 'samples': len(ids), 'dropped': dropped.reasons, 'filtered': dropped.filtered,
              'captions': vars(counts), 'shards': shards}
    job.out.commit(f'{job.folder}/{_PART_FILE}', json.dumps(record))
    return len(ids)


def _checked(samples: Iterable[Sample], dropped: Dropped, config: WriterConfig) -> Iterator[Sample]:
    """Leave out what cannot be used; an absent caption becomes an empty text."""
    for sample in samples:
        check_text(sample.sample_id, f'the id of sample {sample.sample_id!r}')
        for key, text in sample.captions.items():
            check_text(text, f'sample {sample.sample_id!r}: caption {key!r}')
        sample.captions = {key: text if text.strip() else '' for key, text in sample.captions.items()}
        missing = [key for key in sample.required if not sample.captions[key]]
        if config.leave_out is not None and sample.sample_id in _left_out(config.leave_out):
            dropped.filtered['named by leave_out'] += 1
        elif not any(sample.captions.values()):
            dropped.add('no caption', sample.sample_id)
        elif missing:
            dropped.add(f'no caption {" and ".join(missing)}', sample.sample_id)
        elif not _has_any(sample, config.require_any_caption):
            dropped.filtered[f'no caption {" or ".join(config.require_any_caption)}'] += 1
        elif (problem := _image_problem(sample, config)) is not None:
            dropped.add(problem, sample.sample_id)
        else:
            yield sample


def _has_any(sample: Sample, keys: Sequence[str]) -> bool:
    """Whether a sample has a caption of any of the keys; without keys, it has."""
    for key in keys:
        if key not in sample.captions:
            raise ConfigError(f'require_any_caption: there is no caption {key!r}; the samples have '
                              f'{", ".join(sample.captions)}')
    return not keys or any(sample.captions[key] for key in keys)


def _image_problem(sample: Sample, config: WriterConfig) -> Optional[str]:
    """Why a sample's image cannot be used; one that is too large is made smaller."""
    if sample.image is None:
        return None
    try:
        if config.image_max_side is None:
            decode_pixels(sample.image, sample.sample_id)
        else:
            image = decode_image(sample.image, sample.sample_id)
            if max(image.size) > config.image_max_side:
                image.thumbnail((config.image_max_side, config.image_max_side), Image.Resampling.BICUBIC)
                sample.image = encode_image(image, 'JPEG', quality=config.image_quality)
    except ValueError:
        name = unsupported_format(sample.image)
        return f'{name} is not supported; convert it to PNG or JPEG' if name else 'undecodable image'
    return None


def _finish(
    records: Mapping[str, Mapping[str, dict[str, Any]]], dropped: Dropped, out: OutputFolder, config: WriterConfig,
    about: Mapping[str, Any], options: Mapping[str, Any],
) -> dict[str, int]:
    """Check all parts together, then write the indices and last the card; `records` has, for each split, the folders
    of its parts with what was written of each."""
    written = {split: sum(record['samples'] for record in parts.values()) for split, parts in records.items()}
    left_out = Dropped()
    for parts in records.values():
        for record in parts.values():
            left_out.update(Dropped(record['dropped'], Counter(record['filtered'])))
    total = sum(written.values()) + len(left_out)
    if len(left_out) > config.max_dropped * total:
        examples = {reason: ids[:5] for reason, ids in left_out.reasons.items()}
        raise ValueError(f'{len(left_out)} of {total} samples were left out, more than max_dropped='
                         f'{config.max_dropped} allows: {examples}')
    left_out.update(dropped)
    filtered = dict(left_out.filtered)
    for split, parts in records.items():
        if not written[split]:
            raise ValueError(f'split {split!r} has no samples (left out: {left_out.counts()}, by filters: {filtered})')
        _check_unique(out, split, {folder: record['samples'] for folder, record in parts.items()})
        _check_same_columns(split, parts)
        if out.remote is None:
            _check_files(out.local / split, parts)
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


def _check_unique(out: OutputFolder, split: str, samples: Mapping[str, int]) -> None:
    """Raise an error if two samples have one id; `samples` has the folders of the parts with how many are in each."""
    ids = [_part_ids(out, split, folder, count) for folder, count in samples.items()]
    values, counts = np.unique(np.concatenate(ids), return_counts=True)
    if (twice := values[counts > 1]).size:
        where = [folder for folder, part_ids in zip(samples, ids) if np.isin(twice[0], part_ids)]
        raise ValueError(f'{twice.size} sample ids of split {split!r} occur in more than one input file, one of '
                         f'them in {" and ".join(where)}')


def _part_ids(out: OutputFolder, split: str, folder: str, count: Optional[int] = None) -> np.ndarray:
    """Hashes of the ids of a part's samples, of which there are so many if that is known."""
    expected = f'the ids of {"all" if count is None else count} samples'
    ids = _part_array(out, f'{split}/{folder}', _IDS_FILE, np.uint64, expected)
    if count not in (None, len(ids)):
        raise FileError(f'{out.local / split / folder / _IDS_FILE}: holds {len(ids)} values, expected {expected}')
    return ids


def _part_array(out: OutputFolder, folder: str, name: str, kind: type, expected: str) -> np.ndarray:
    """One of the arrays that were written beside a part's shards, or a FileError."""
    out.fetch(f'{folder}/{name}')
    path = out.local / folder / name
    expected = f'{expected}; remove {path.parent} to convert that part again'
    with reading(path, expected):
        array = np.load(path, allow_pickle=False)
    if array.ndim != 1 or array.dtype != kind:
        raise FileError(f'{path}: holds {array.dtype} values of shape {array.shape}, expected {expected}')
    return array


def _joined_counts(
    out: OutputFolder, records: Mapping[str, Mapping[str, dict[str, Any]]], tables: Mapping[str, int]
) -> dict[str, int]:
    """Where the rows of the tables went whose captions the images have, and how many images have none of them."""
    used = np.zeros(tables['rows'] - tables['without_key'], dtype=bool)
    without = 0
    for split, parts in records.items():
        for folder in parts:
            rows = _part_array(out, f'{split}/{folder}', _JOINED_FILE, np.int64, "the numbers of its images' rows")
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
