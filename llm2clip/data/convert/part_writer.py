# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Samples of a part -> a folder of shards, without what cannot be used."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Optional

import numpy as np
import xxhash
from PIL import Image
from streaming import MDSWriter
from tqdm import tqdm

from llm2clip.config import ConfigError, WriterConfig
from llm2clip.data.caption_files import check_text
from llm2clip.data.convert.card import CaptionCounts
from llm2clip.data.convert.parts import IDS_FILE, JOINED_FILE, PART_FILE, PartJob, left_out_ids
from llm2clip.data.convert.samples import Dropped, Sample
from llm2clip.data.images import decode_image, decode_pixels, encode_image, unsupported_format
from llm2clip.data.schema import IMAGE, INDEX, SAMPLE_ID, caption_column
from llm2clip.engine import Work
from llm2clip.files import read_json
from llm2clip.folders import complete_folder, locked

__all__ = ['writing']


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
        arrays: dict[str, np.ndarray] = {IDS_FILE: np.array(ids, dtype=np.uint64)}
        if dropped.joined is not None:
            arrays[JOINED_FILE] = np.array(dropped.joined, dtype=np.int64)
        for name, array in arrays.items():
            np.save(out / name, array)
    job.out.publish(*(f'{job.folder}/{path.name}' for path in sorted(folder.glob('shard.*'))), keep=config.keep_local)
    job.out.publish(*(f'{job.folder}/{name}' for name in arrays))
    record = {'options': job.options, 'samples': len(ids), 'dropped': dropped.reasons, 'filtered': dropped.filtered,
              'left_out': dropped.left_out, 'captions': vars(counts), 'shards': shards}
    job.out.commit(f'{job.folder}/{PART_FILE}', json.dumps(record))
    return len(ids)


def _checked(samples: Iterable[Sample], dropped: Dropped, config: WriterConfig) -> Iterator[Sample]:
    """Leave out what cannot be used; an absent caption becomes an empty text."""
    for sample in samples:
        check_text(sample.sample_id, f'the id of sample {sample.sample_id!r}')
        for key, text in sample.captions.items():
            check_text(text, f'sample {sample.sample_id!r}: caption {key!r}')
        sample.captions = {key: text if text.strip() else '' for key, text in sample.captions.items()}
        missing = [key for key in sample.required if not sample.captions[key]]
        if config.leave_out is not None and sample.sample_id in left_out_ids(config.leave_out):
            dropped.filtered['named by leave_out'] += 1
            dropped.left_out.append(sample.sample_id)
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
