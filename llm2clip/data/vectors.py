# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Vectors of embeddings datasets, as stored and as the models read them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from llm2clip.data.schema import EMBEDDING, EMBEDDING_SCALE


def stored_vector(row: Mapping[str, Any], key: str, name: str = 'text_embedding') -> dict[str, Any]:
    """Return a stored vector, `name` ``(D,)``, and for int8 its ``<name>_scale`` ``()``."""
    values = torch.as_tensor(row[EMBEDDING + key])
    if values.dtype != torch.int8:
        return {name: values}
    return {name: values, f'{name}_scale': torch.as_tensor(row[EMBEDDING_SCALE + key])}


def dequantize(batch: Mapping[str, torch.Tensor], name: str = 'text_embedding') -> torch.Tensor:
    """Return the vectors ``(…, D)`` of a batch or `stored_vector`, with int8 dequantised to float32."""
    scale = batch.get(f'{name}_scale')
    if scale is None:
        return batch[name]
    return batch[name] * scale.float()[..., None]


def concatenate(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate the vectors ``(…, D1)``, ``(…, D2)``, … of several teachers, each scaled to length 1; the
    vectors of a single teacher are returned unchanged."""
    if len(vectors) == 1:
        return vectors[0]
    return torch.cat([F.normalize(part, dim=-1) for part in vectors], dim=-1)


def text_embedding(rows: Sequence[Mapping[str, Any]], key: str, as_stored: bool) -> dict[str, torch.Tensor]:
    """Return ``text_embedding`` ``(D,)`` of one caption, from the sample's row of each teacher's embeddings.

    With `as_stored`, the vector of the only teacher stays as stored, for int8 with ``text_embedding_scale``.
    Otherwise it is float32, and the vectors of several teachers are concatenated.
    """
    vectors = [stored_vector(row, key) for row in rows]
    if as_stored:
        return vectors[0]
    return {'text_embedding': concatenate([dequantize(vector).float() for vector in vectors])}


def float_vectors(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with the vectors from `dequantize`, without their scales.

    Used as ``microbatch_transforms``, so that int8 vectors are dequantised after the copy to the device.
    """
    floats = {name: value for name, value in batch.items() if not name.endswith('_embedding_scale')}
    for name in floats:
        if name.endswith('_embedding'):
            floats[name] = dequantize(batch, name)
    return floats
