# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Samples -> MDS datasets that appear only when they are complete, with a card of what went in.

Every part of a split becomes a folder of shards, written by one process; when all are there, on whichever machine, one
index over all of them makes the dataset readable.
"""

import io
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import xxhash
from PIL import Image
from streaming import MDSWriter
from tqdm import tqdm

from llm2clip.config import ConfigError, WriterConfig
from llm2clip.data.convert.card import LENGTH_BINS, write_card
from llm2clip.data.convert.samples import Dropped, Part, Sample
from llm2clip.data.images import decode_image, decode_pixels
from llm2clip.data.schema import IMAGE, SAMPLE_ID, caption_column
from llm2clip.folders import OutputFolder, complete_folder

__all__ = ['CARD_FILE', 'is_complete', 'write_splits']

CARD_FILE = 'dataset.json'
_BEGUN_FILE = 'begun.json'
_PART_FILE = 'part.json'
_IDS_FILE = 'ids.npy'
# Set before the processes fork, so that sources need not be picklable.
_jobs: list[tuple[OutputFolder, str, Part, WriterConfig]] = []


def is_complete(out: OutputFolder) -> bool:
    """Whether `write_splits` has finished in this folder."""
    return out.fetch(CARD_FILE)


def write_splits(
    splits: Mapping[str, list[Part]],
    dropped: Dropped,
    out: Union[str, Path, OutputFolder],
    config: Optional[WriterConfig] = None,
    about: Optional[Mapping[str, Any]] = None,
) -> Optional[dict[str, int]]:
    """Write one MDS dataset a split, and their card beside them.

    Every image is decoded to check it; a sample whose image does not decode or that has an empty caption is left out
    and counted.  Parts that are there already are kept.  With several machines each writes its share, and the last one
    to finish writes the indices.

    Args:
        splits: Name -> parts.
        dropped: What the source left out before the parts.
        out: The folder; a part that is complete is uploaded if it has a remote.
        config: How to write.
        about: Facts about the source for the card; a folder that was begun with others is refused.

    Returns:
        Samples written, a split; None if other machines are not done.

    Raises:
        ConfigError: The folder was begun with another configuration.
        ValueError: Two samples have the same id, the captions' keys differ, a split is empty, or more samples were
            left out than `max_dropped` allows.
    """
    out, config = out if isinstance(out, OutputFolder) else OutputFolder(out), config or WriterConfig()
    _begin(out, {**(about or {}), 'image_max_side': config.image_max_side, 'image_quality': config.image_quality})
    jobs = [(out, f'{split}/{part.name}', part, config) for split, parts in splits.items() for part in parts]
    names = Counter(folder for _, folder, _, _ in jobs)
    if max(names.values(), default=0) > 1:
        raise ValueError(f'two input files would be written to {names.most_common(1)[0][0]}; give them different names')
    _jobs[:] = [job for job in jobs[config.machine::config.machines] if not out.fetch(f'{job[1]}/{_PART_FILE}')]
    total = len(jobs[config.machine::config.machines])
    with tqdm(total=total, desc=f'write {out.local.name}', unit=' parts') as progress:
        progress.update(total - len(_jobs))
        for n in _run(min(config.num_workers, len(_jobs))):
            progress.update()
            progress.set_postfix(samples=n)
    if not all(out.fetch(f'{folder}/{_PART_FILE}') for _, folder, _, _ in jobs):
        return None
    return _finish(splits, dropped, out, config, about or {})


def _begin(out: OutputFolder, about: dict[str, Any]) -> None:
    path, text = out.local / _BEGUN_FILE, json.dumps(about, indent=2, sort_keys=True, default=str) + '\n'
    if out.fetch(_BEGUN_FILE):
        if path.read_text() != text:
            raise ConfigError(f'out: {out} was begun with another source or other image options ({path} has them); '
                              'remove it to convert again')
        return
    out.commit(_BEGUN_FILE, text)


def _run(num_workers: int) -> Iterator[int]:
    """Write all jobs; yields how many samples have been written so far."""
    total = 0
    if num_workers <= 1:
        for job in range(len(_jobs)):
            total += _write_part(job)
            yield total
        return
    pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context('fork'))
    try:
        for future in as_completed([pool.submit(_write_part, job) for job in range(len(_jobs))]):
            total += future.result()
            yield total
    finally:
        # After an error the parts that are being written are finished, the others are not begun.
        pool.shutdown(wait=False, cancel_futures=True)


def _write_part(job: int) -> int:
    """Write one part into its folder; returns how many samples."""
    target, name, part, config = _jobs[job]
    folder = target.local / name
    dropped, ids, seen = Dropped(), [], set()
    lengths: dict[str, np.ndarray] = {}
    with complete_folder(folder) as out:
        checked = _checked(part.read(dropped), dropped, config)
        first = next(checked, None)
        if first is not None:
            columns = {SAMPLE_ID: 'str', **({IMAGE: 'bytes'} if first.image is not None else {}),
                       **{caption_column(key): 'str' for key in first.captions}}
            lengths = {key: np.zeros(LENGTH_BINS, dtype=np.int64) for key in first.captions}
            with MDSWriter(out=str(out), columns=columns, hashes=['xxh64'], size_limit=config.size_limit,
                           compression=config.compression) as writer:
                for sample in tqdm(_chain(first, checked), desc=part.name, unit=' samples', disable=len(_jobs) > 1):
                    if sample.sample_id in seen:
                        raise ValueError(f'sample id {sample.sample_id!r} occurs twice in {folder}')
                    if sample.captions.keys() != first.captions.keys():
                        raise ValueError(f'sample {sample.sample_id!r} has captions {sorted(sample.captions)}, '
                                         f'expected {sorted(first.captions)}')
                    seen.add(sample.sample_id)
                    ids.append(xxhash.xxh64_intdigest(sample.sample_id))
                    for key, text in sample.captions.items():
                        lengths[key][min(len(text.split()), LENGTH_BINS - 1)] += 1
                    captions = {caption_column(k): text for k, text in sample.captions.items()}
                    image = {IMAGE: sample.image} if sample.image is not None else {}
                    writer.write({SAMPLE_ID: sample.sample_id, **captions, **image})
        np.save(out / _IDS_FILE, np.array(ids, dtype=np.uint64))
    target.publish(*(f'{name}/{path.name}' for path in sorted(folder.glob('shard.*'))), keep=config.keep_local)
    target.publish(*(f'{name}/{path.name}' for path in (folder / 'index.json', folder / _IDS_FILE) if path.is_file()))
    record = {'samples': len(ids), 'dropped': dropped.reasons, 'filtered': dropped.filtered,
              'words': {key: counts.tolist() for key, counts in lengths.items()}}
    target.commit(f'{name}/{_PART_FILE}', json.dumps(record))
    return len(ids)


def _checked(samples: Iterable[Sample], dropped: Dropped, config: WriterConfig) -> Iterator[Sample]:
    for sample in samples:
        if not all(text.strip() for key, text in sample.captions.items() if key not in sample.may_be_empty):
            dropped.add('empty caption', sample.sample_id)
            continue
        if sample.image is not None:
            try:
                if config.image_max_side is None:
                    decode_pixels(sample.image, sample.sample_id)
                else:
                    image = decode_image(sample.image, sample.sample_id)
                    if max(image.size) > config.image_max_side:
                        sample.image = _smaller(image, config.image_max_side, config.image_quality)
            except ValueError:
                dropped.add('undecodable image', sample.sample_id)
                continue
        yield sample


def _smaller(image: Image.Image, max_side: int, quality: int) -> bytes:
    image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=quality)
    return buffer.getvalue()


def _chain(first: Sample, rest: Iterator[Sample]) -> Iterator[Sample]:
    yield first
    yield from rest


def _finish(
    splits: Mapping[str, list[Part]], dropped: Dropped, out: OutputFolder, config: WriterConfig,
    about: Mapping[str, Any],
) -> dict[str, int]:
    """Check all parts together, then write the indices and last the card."""
    for split, parts in splits.items():
        for part in parts:
            for name in ('index.json', _IDS_FILE):
                out.fetch(f'{split}/{part.name}/{name}')
    records = {split: [json.loads((out.local / split / part.name / _PART_FILE).read_text()) for part in parts]
               for split, parts in splits.items()}
    written = {split: sum(record['samples'] for record in rows) for split, rows in records.items()}
    left_out = Dropped()
    for rows in records.values():
        for record in rows:
            left_out.update(Dropped(record['dropped'], record['filtered']))
    total = sum(written.values()) + len(left_out)
    if len(left_out) > config.max_dropped * total:
        examples = {reason: ids[:5] for reason, ids in left_out.reasons.items()}
        raise ValueError(f'{len(left_out)} of {total} samples were left out, more than max_dropped='
                         f'{config.max_dropped} allows: {examples}')
    left_out.update(dropped)
    for split, parts in splits.items():
        if not written[split]:
            raise ValueError(f'split {split!r} has no samples (left out: {left_out.counts()})')
        _check_unique(out.local / split, parts)
        _check_same_columns(out.local / split, parts)
        out.commit(f'{split}/index.json', _merged_index(out.local / split, parts))
    card = {**about, 'samples': written, 'dropped': left_out.counts(), 'dropped_ids': left_out.reasons}
    words = {split: _sum(record['words'] for record in rows) for split, rows in records.items()}
    write_card(out, card, words, CARD_FILE)
    return written


def _sum(histograms: Iterable[dict[str, list[int]]]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for histogram in histograms:
        for key, counts in histogram.items():
            total[key] = total.get(key, 0) + np.array(counts)
    return total


def _index(folder: Path) -> list[dict[str, Any]]:
    path = folder / 'index.json'
    return json.loads(path.read_text())['shards'] if path.is_file() else []


def _check_unique(split: Path, parts: list[Part]) -> None:
    ids = [np.load(split / part.name / _IDS_FILE, allow_pickle=False) for part in parts]
    values, counts = np.unique(np.concatenate(ids), return_counts=True)
    if (twice := values[counts > 1]).size:
        where = [part.name for part, part_ids in zip(parts, ids) if np.isin(twice[0], part_ids)]
        raise ValueError(f'{twice.size} sample ids of split {split.name!r} occur in more than one input file, one of '
                         f'them in {" and ".join(where)}')


def _check_same_columns(split: Path, parts: list[Part]) -> None:
    first: Optional[tuple[str, list[str]]] = None
    for part in parts:
        for shard in _index(split / part.name)[:1]:
            first = first or (part.name, shard['column_names'])
            if shard['column_names'] != first[1]:
                raise ValueError(f'part {part.name} of split {split.name!r} has columns {shard["column_names"]}, but '
                                 f'{first[0]} has {first[1]}')


def _merged_index(split: Path, parts: list[Part]) -> str:
    """One index over the parts' shards, which stay where they are."""
    shards = []
    for part in parts:
        for shard in _index(split / part.name):
            for kind in ('raw_data', 'zip_data'):
                if shard[kind]:
                    shard[kind]['basename'] = f'{part.name}/{shard[kind]["basename"]}'
            shards.append(shard)
    return json.dumps({'version': 2, 'shards': shards}, sort_keys=True)
