# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Compare the extraction with `SentenceTransformer.encode`, with the same teacher.

Both load the teacher of stage 1 from the folder that `export_sentence_transformers` wrote, and compute in float32.
LLM2CLIP packs captions without padding; `encode` sorts them by length and pads batches of 32, its default.  Captions
per second are those of the whole command, with its start.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm2clip.data.schema import EMBEDDING, read_samples
from recipes.baselines.setting import Setting
from recipes.baselines.stage1 import SCRIPT
from recipes.benchmarks.measuring import kept, watch

__all__ = ['compare']

class Extractor(NamedTuple):
    command: Callable[[Path, Path], Sequence[str]]
    """Dataset and output path -> command."""
    vectors: Callable[[Path], np.ndarray]
    """Output path -> vectors ``(N, D)``, one per caption, sample by sample."""


def our_vectors(out: Path) -> np.ndarray:
    return np.stack([vector for sample in read_samples(out / 'captions')
                     for key, vector in sorted(sample.items()) if key.startswith(EMBEDDING)]).astype(np.float32)


def measure(extractor: Extractor, dataset: Path, out: Path) -> dict[str, Any]:
    """Embed all captions below `out`; return number, rate and peak memory (GiB)."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    whole = watch(extractor.command(dataset, out / 'all'), out / 'all.log', memory=True)
    captions = len(extractor.vectors(out / 'all'))
    return {'captions': captions, 'captions_per_second': captions / whole['seconds'], 'peak_gib': whole['peak_gib']}


def compare(setting: Setting) -> dict[str, Any]:
    """Return rows by name, and the largest relative difference between the two vectors of a caption."""
    out = setting.out / 'extraction'
    teacher = out / 'teacher'
    kept(out / 'teacher.json', lambda: watch(
        [sys.executable, 'recipes/export_sentence_transformers.py', f'teacher={setting.teacher}', f'out={teacher}'],
        out / 'teacher.log'))
    extractors = {
        'llm2clip': Extractor(lambda dataset, path: [
            sys.executable, 'recipes/extract_embeddings.py', f'teacher={teacher}', f'out={path}', 'device=cpu',
            f'datasets.captions.local={dataset}', 'batch_tokens=1024', 'precision=fp32'], our_vectors),
        'SentenceTransformer.encode': Extractor(
            lambda dataset, path: [*SCRIPT, 'encode', str(teacher), str(dataset), str(path)],
            lambda path: np.load(path.with_name(f'{path.name}.npy')))}
    rows = {name: kept(out / f'{name}.json', partial(measure, extractor, setting.test, out / name))
            for name, extractor in extractors.items()}
    ours, theirs = (extractor.vectors(out / name / 'all') for name, extractor in extractors.items())
    difference = float((np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max())
    return {'rows': rows, 'largest_difference': difference}
