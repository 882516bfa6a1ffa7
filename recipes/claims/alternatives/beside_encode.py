# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The extraction beside `SentenceTransformer.encode`, of one teacher.

Both read the folder that `export_sentence_transformers` wrote of the teacher of stage 1, and compute in float32.
LLM2CLIP packs captions without padding; `encode` sorts them by length and pads batches of 32, its default.  Each
command runs on a few captions first, and what it takes for the others gives the captions per second.  A kill comes
after half of the time that the whole took.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from beside_sentence_transformers import SCRIPT
from safetensors.torch import load_file
from setting import Setting
from streaming import MDSWriter
from watched import kept, watch

from llm2clip.data.schema import EMBEDDING, IMAGE, read_columns, read_samples

__all__ = ['compare']

FEW = 4
"""Photographs, of whose captions the start is measured."""


class Extractor(NamedTuple):
    command: Callable[[Path, Path], Sequence[str]]
    """Dataset and a path for the vectors."""
    vectors: Callable[[Path], np.ndarray]
    """``(N, D)``, one per caption, sample by sample."""
    rescued: Callable[[Path], int]
    """How many captions are done in what a kill left at the path."""


def _our_command(teacher: Path, dataset: Path, out: Path) -> Sequence[str]:
    return [sys.executable, 'recipes/extract_embeddings.py', f'teacher={teacher}', f'out={out}', 'device=cpu',
            f'datasets.captions.local={dataset}', 'batch_tokens=1024', 'precision=fp32']


def _our_vectors(out: Path) -> np.ndarray:
    return np.stack([vector for sample in read_samples(out / 'captions')
                     for key, vector in sorted(sample.items()) if key.startswith(EMBEDDING)]).astype(np.float32)


def _our_blocks(out: Path) -> int:
    return sum(len(load_file(path)['text_embedding']) for path in out.glob('captions/*.blocks/*.safetensors'))


def _their_command(teacher: Path, dataset: Path, out: Path) -> Sequence[str]:
    return [*SCRIPT, 'encode', str(teacher), str(dataset), str(out)]


def _their_file(out: Path) -> Path:
    return out.with_name(f'{out.name}.npy')


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Largest distance of two vectors of a caption, relative to the length of the second."""
    return float((np.linalg.norm(first - second, axis=1) / np.linalg.norm(second, axis=1)).max())


def write_few(dataset: Path, folder: Path) -> dict[str, Any]:
    """The captions of the first photographs, as a dataset."""
    shutil.rmtree(folder, ignore_errors=True)
    columns = {name: kind for name, kind in read_columns(dataset).items() if name != IMAGE}
    with MDSWriter(out=str(folder), columns=columns, hashes=['xxh64']) as writer:
        for sample in read_samples(dataset)[:FEW]:
            writer.write({name: sample[name] for name in columns})
    return {'photographs': FEW}


def measure(extractor: Extractor, dataset: Path, few: Path, out: Path) -> dict[str, Any]:
    """Embed a few captions, all, and all with a kill in the middle; `all` is left below `out`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    start = watch(extractor.command(few, out / 'few'), out / 'few.log')
    whole = watch(extractor.command(dataset, out / 'all'), out / 'all.log')
    command, half = extractor.command(dataset, out / 'killed'), whole['seconds'] / 2
    watch(command, out / 'killed_first.log', kill_when=lambda seconds: seconds > half)
    rescued = extractor.rescued(out / 'killed')
    again = watch(command, out / 'killed.log')
    few_vectors, vectors, killed = (extractor.vectors(out / name) for name in ('few', 'all', 'killed'))
    return {'captions': len(vectors), 'peak_gib': whole['peak_gib'], 'seconds_few': start['seconds'],
            'captions_per_second': (len(vectors) - len(few_vectors)) / (whole['seconds'] - start['seconds']),
            'kill': {'killed_after': half, 'rescued': rescued, 'seconds': whole['seconds'],
                     'seconds_again': again['seconds'], 'difference': difference(killed, vectors)}}


def compare(setting: Setting) -> dict[str, Any]:
    """Rows by name, and the largest difference of the vectors."""
    out = setting.out / 'extraction'
    teacher = out / 'teacher'
    kept(out / 'teacher.json', lambda: watch(
        [sys.executable, 'recipes/export_sentence_transformers.py', f'teacher={setting.teacher}', f'out={teacher}'],
        out / 'teacher.log'))
    kept(out / 'few.json', lambda: write_few(setting.test, out / 'few'))
    extractors = {
        'llm2clip': Extractor(partial(_our_command, teacher), _our_vectors, _our_blocks),
        'SentenceTransformer.encode': Extractor(
            partial(_their_command, teacher), lambda path: np.load(_their_file(path)), lambda _: 0)}
    rows = {name: kept(out / f'{name}.json', partial(measure, extractor, setting.test, out / 'few', out / name))
            for name, extractor in extractors.items()}
    ours, theirs = (extractor.vectors(out / name / 'all') for name, extractor in extractors.items())
    return {'rows': rows, 'largest_difference': difference(ours, theirs)}
