# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How a sidecar stores the teacher's vectors: as float16, or as int8 with a float32 scale a vector.

LLMs have a few dimensions that are ten times as large as the others, at which one scale a vector is wasted.  So vectors
are rotated before they are rounded, which spreads those dimensions over all (as QuaRot, arXiv 2404.00456, does for
activations), and rotated back when they are read.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm2clip.data.schema import SAMPLE_ID, embedding_column, scale_column

__all__ = ['STORAGES', 'dequantize', 'quantize', 'read_vector', 'vector_columns', 'vector_rows']

STORAGES = ('float16', 'int8')


@functools.cache
def _rotations(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Two orthogonal matrices, the Kronecker product of which rotates vectors of `dim` values.

    They are cosine transforms of the two factors of `dim` that are next to its square root, with signs in between that
    make them mix what is smooth, too.
    """
    rows = next(n for n in range(math.isqrt(dim), 0, -1) if dim % n == 0)
    return _orthogonal(rows), _orthogonal(dim // rows)


def _orthogonal(n: int) -> np.ndarray:
    k, i = np.mgrid[0:n, 0:n]
    cosines = np.cos(np.pi * (i + 0.5) * k / n) * np.sqrt(np.where(k == 0, 1, 2) / n)
    signs = np.where(i * (i + 1) // 2 % 2, -1, 1)
    return (cosines * signs).astype(np.float32)


def _rotate(vectors: np.ndarray, back: bool = False) -> np.ndarray:
    left, right = _rotations(vectors.shape[-1])
    grid = vectors.reshape(*vectors.shape[:-1], len(left), len(right)).astype(np.float32, copy=False)
    turned = left.T @ grid @ right if back else left @ grid @ right.T
    return turned.reshape(vectors.shape)


def quantize(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotated, then symmetric int8 with one scale a vector, the largest magnitude over 127.

    Args:
        vectors: ``(…, D)`` of any float type.

    Returns:
        ``(…, D)`` int8 and ``(…)`` float32.  A vector is off by at most half the scale times the root of D.
    """
    vectors = _rotate(vectors)
    scale = (np.abs(vectors).max(-1) / 127).astype(np.float32)
    safe = np.where(scale > 0, scale, 1)[..., None]
    return np.clip(np.rint(vectors / safe), -127, 127).astype(np.int8), scale


def dequantize(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The inverse of `quantize`, in float32."""
    return _rotate(np.multiply(values, np.asarray(scale)[..., None], dtype=np.float32), back=True)


def vector_columns(keys: Sequence[str], dim: int, storage: str) -> dict[str, str]:
    """Sidecar columns, name -> MDS type: ``2 * dim`` bytes a caption as float16, ``dim + 4`` as int8."""
    columns = {SAMPLE_ID: 'str', **{embedding_column(key): f'ndarray:{storage}:{dim}' for key in keys}}
    if storage == 'int8':
        columns.update({scale_column(key): 'float32' for key in keys})
    return columns


def vector_rows(ids: Sequence[str], keys: Sequence[str], vectors: np.ndarray, storage: str) -> list[dict[str, Any]]:
    """Sidecar samples.

    Args:
        ids: N sample ids.
        keys: K caption keys.
        vectors: ``(N, K, D)`` in float32.
        storage: One of `STORAGES`.

    Raises:
        ValueError: A value is not finite, or too large for float16; names the sample and caption.
    """
    with np.errstate(over='ignore'):
        values = vectors.astype(np.float16) if storage == 'float16' else vectors
    bad = ~np.isfinite(values).all(-1)
    if bad.any():
        i, j = np.argwhere(bad)[0]
        raise ValueError(f'the embedding of caption {keys[j]!r} of sample {ids[i]!r} is not finite in {storage}')
    scales = None
    if storage == 'int8':
        values, scales = quantize(vectors)
    rows = []
    for i, sample_id in enumerate(ids):
        row = {SAMPLE_ID: sample_id, **{embedding_column(key): values[i, j] for j, key in enumerate(keys)}}
        if scales is not None:
            row.update({scale_column(key): scales[i, j] for j, key in enumerate(keys)})
        rows.append(row)
    return rows


def read_vector(sample: Mapping[str, Any], key: str) -> np.ndarray:
    """One caption's vector ``(D,)``: float16 as it is stored, or float32 from int8."""
    values = sample[embedding_column(key)]
    return dequantize(values, sample[scale_column(key)]) if values.dtype == np.int8 else values.copy()
