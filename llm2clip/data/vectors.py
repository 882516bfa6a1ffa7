# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How an embeddings dataset stores the teacher's vectors: as float16, or as int8 with a float32 scale per vector, its
largest magnitude over 127, so that a value is off by at most half the scale."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from llm2clip.data.schema import SAMPLE_ID, embedding_column, scale_column

__all__ = [
    'STORAGES', 'concatenate', 'float_vectors', 'stored_vector', 'vector_columns', 'vector_rows', 'vectors_of',
]

STORAGES = ('float16', 'int8')


def vector_columns(keys: Sequence[str], dim: int, storage: str) -> dict[str, str]:
    """Embeddings dataset columns, name -> MDS type: ``2 * dim`` bytes per caption as float16, ``dim + 4`` as int8."""
    columns = {SAMPLE_ID: 'str', **{embedding_column(key): f'ndarray:{storage}:{dim}' for key in keys}}
    if storage == 'int8':
        columns.update({scale_column(key): 'float32' for key in keys})
    return columns


def vector_rows(ids: Sequence[str], keys: Sequence[str], vectors: np.ndarray, storage: str) -> list[dict[str, Any]]:
    """Embeddings dataset samples.

    Args:
        ids: N sample ids.
        keys: K caption keys.
        vectors: ``(N, K, D)`` in float32; zero for a caption that a sample does not have.
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
    scales = {}
    if storage == 'int8':
        scale = (np.abs(vectors).max(-1) / 127).astype(np.float32)
        safe = np.where(scale > 0, scale, 1)[..., None]
        values = np.clip(np.rint(vectors / safe), -127, 127).astype(np.int8)
        scales = {scale_column(key): scale[:, j] for j, key in enumerate(keys)}
    columns = {embedding_column(key): values[:, j] for j, key in enumerate(keys)} | scales
    return [{SAMPLE_ID: sample_id, **{name: column[i] for name, column in columns.items()}}
            for i, sample_id in enumerate(ids)]


def stored_vector(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """One caption's vector as an embeddings dataset's row has it, for a batch: ``text_embedding`` ``(D,)``, and if that
    is int8, ``text_embedding_scale``."""
    values = torch.as_tensor(row[embedding_column(key)])
    if values.dtype != torch.int8:
        return {'text_embedding': values}
    return {'text_embedding': values, 'text_embedding_scale': torch.as_tensor(row[scale_column(key)])}


def vectors_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The ``text_embedding`` ``(…, D)`` of a batch or of `stored_vector`, int8 turned back into float32."""
    values, scale = batch['text_embedding'], batch.get('text_embedding_scale')
    return values if scale is None else values * scale.float()[..., None]


def concatenate(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The vectors ``(…, D1)``, ``(…, D2)``, … of several teachers, scaled to length 1 and one after the other; those of
    a single teacher as they are."""
    if len(vectors) == 1:
        return vectors[0]
    return torch.cat([F.normalize(part, dim=-1) for part in vectors], dim=-1)


def float_vectors(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its ``text_embedding`` as `vectors_of` gives it, and no ``text_embedding_scale``.

    A loader's ``microbatch_transforms``: small vectors travel to the device, the model sees those of the teacher.
    """
    if 'text_embedding_scale' not in batch:
        return batch
    rest = {name: value for name, value in batch.items() if name != 'text_embedding_scale'}
    return {**rest, 'text_embedding': vectors_of(batch)}
