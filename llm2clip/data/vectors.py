# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How a sidecar stores the teacher's vectors: as float16, or as int8 with a float32 scale a vector."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm2clip.data.schema import SAMPLE_ID, embedding_column, scale_column

__all__ = ['STORAGES', 'dequantize', 'quantize', 'read_vector', 'vector_columns', 'vector_rows']

STORAGES = ('float16', 'int8')


def quantize(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 with one scale a vector, the largest magnitude over 127.

    Args:
        vectors: ``(…, D)`` of any float type.

    Returns:
        ``(…, D)`` int8 and ``(…)`` float32.  Each value is off by at most half the scale.
    """
    scale = (np.abs(vectors).max(-1) / 127).astype(np.float32)
    safe = np.where(scale > 0, scale, 1)[..., None]
    return np.clip(np.rint(vectors / safe), -127, 127).astype(np.int8), scale


def dequantize(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The inverse of `quantize`, in float32."""
    return np.multiply(values, np.asarray(scale)[..., None], dtype=np.float32)


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
