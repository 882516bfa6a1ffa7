# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The extraction beside `SentenceTransformer.encode`, of one teacher.

Both read the folder that `export_sentence_transformers` wrote of the teacher of stage 1, and compute in float32.
LLM2CLIP packs captions without padding; `encode` sorts them by length and pads batches of 32, its default.  Each
command runs on a few captions first, and what it takes for the others gives the captions per second.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from streaming import MDSWriter

from llm2clip.data.schema import EMBEDDING, IMAGE, read_columns, read_samples
from recipes.baselines.setting import Setting
from recipes.baselines.stage1 import SCRIPT
from recipes.benchmarks.measuring import kept, watch

__all__ = ['compare']

FEW = 4
"""Photographs, of whose captions the start is measured."""


class Extractor(NamedTuple):
    command: Callable[[Path, Path], Sequence[str]]
    """Of a dataset and a path for the vectors."""
    vectors: Callable[[Path], np.ndarray]
    """``(N, D)``, one per caption, sample by sample."""


def write_few(dataset: Path, folder: Path) -> None:
    """The captions of the first photographs, as a dataset."""
    shutil.rmtree(folder, ignore_errors=True)
    columns = {name: kind for name, kind in read_columns(dataset).items() if name != IMAGE}
    with MDSWriter(out=str(folder), columns=columns, hashes=['xxh64']) as writer:
        for sample in read_samples(dataset)[:FEW]:
            writer.write({name: sample[name] for name in columns})


def our_vectors(out: Path) -> np.ndarray:
    return np.stack([vector for sample in read_samples(out / 'captions')
                     for key, vector in sorted(sample.items()) if key.startswith(EMBEDDING)]).astype(np.float32)


def measure(extractor: Extractor, dataset: Path, few: Path, out: Path) -> dict[str, Any]:
    """Embed a few captions, and all, which are left below `out`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    start = watch(extractor.command(few, out / 'few'), out / 'few.log')
    whole = watch(extractor.command(dataset, out / 'all'), out / 'all.log', memory=True)
    n_few, n_all = (len(extractor.vectors(out / name)) for name in ('few', 'all'))
    return {'captions': n_all, 'peak_gib': whole['peak_gib'],
            'captions_per_second': (n_all - n_few) / (whole['seconds'] - start['seconds'])}


def compare(setting: Setting) -> dict[str, Any]:
    """Rows by name, and the largest difference of two vectors of a caption, relative to their length."""
    out = setting.out / 'extraction'
    teacher = out / 'teacher'
    kept(out / 'teacher.json', lambda: watch(
        [sys.executable, 'recipes/export_sentence_transformers.py', f'teacher={setting.teacher}', f'out={teacher}'],
        out / 'teacher.log'))
    write_few(setting.test, out / 'few')
    extractors = {
        'llm2clip': Extractor(lambda dataset, path: [
            sys.executable, 'recipes/extract_embeddings.py', f'teacher={teacher}', f'out={path}', 'device=cpu',
            f'datasets.captions.local={dataset}', 'batch_tokens=1024', 'precision=fp32'], our_vectors),
        'SentenceTransformer.encode': Extractor(
            lambda dataset, path: [*SCRIPT, 'encode', str(teacher), str(dataset), str(path)],
            lambda path: np.load(path.with_name(f'{path.name}.npy')))}
    rows = {name: kept(out / f'{name}.json', partial(measure, extractor, setting.test, out / 'few', out / name))
            for name, extractor in extractors.items()}
    ours, theirs = (extractor.vectors(out / name / 'all') for name, extractor in extractors.items())
    difference = float((np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max())
    return {'rows': rows, 'largest_difference': difference}
