# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Captions that were embedded together, and the files that keep them until a longer work is done."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import xxhash

from llm2clip.files import FileError, reading
from llm2clip.remote_code.checks_llm2clip import check_finite
from llm2clip.weights import read_safetensors, write_safetensors

__all__ = ['Embedded', 'keep_block', 'load_block']


class Embedded(NamedTuple):
    """Vectors of N captions, and what they took."""

    vectors: torch.Tensor
    """``(N, D)`` in float32 on the teacher's device."""
    tokens: int
    """Tokens read, without padding."""
    truncated: int
    """Captions that were longer than `max_length` and lost their end."""
    left_out: int = 0
    """Captions that the teacher cannot read to their end and does not read at all; their vectors are 0."""

    def cpu(self) -> 'Embedded':
        """The same, with the vectors on the CPU."""
        return self._replace(vectors=self.vectors.cpu())


def load_block(folder: Path, texts: Sequence[str]) -> Optional[Embedded]:
    """A block of captions, on the CPU, from the file that `keep_block` wrote, None if there is none.

    Args:
        folder: Of blocks of one teacher.
        texts: The captions.

    Raises:
        FileError, LoadError: The file is damaged; removed, it is written anew.
    """
    path = _block_file(folder, texts)
    if not path.is_file():
        return None
    expected = f'{len(texts)} vectors of captions; remove it, and they are embedded again'
    tensors, counts = read_safetensors(path, expected)
    with reading(path, expected):
        # Earlier versions did not count tokens.
        found = Embedded(tensors['text_embedding'], int(counts.get('tokens', 0)), int(counts['truncated']),
                         int(counts.get('left_out', 0)))
    if found.vectors.ndim != 2 or len(found.vectors) != len(texts):
        raise FileError(f'{path}: holds vectors of the shape {tuple(found.vectors.shape)}, expected {expected}')
    return found


def keep_block(folder: Path, texts: Sequence[str], embedded: Embedded) -> None:
    """Write the file of a block of captions; arguments as of `load_block`, and their vectors, on the CPU.

    Raises:
        FileError: It cannot be written.
        LoadError: A vector is not finite.
    """
    check_finite({'a vector of the teacher': embedded.vectors}, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(_block_file(folder, texts), {'text_embedding': embedded.vectors},
                      {name: str(getattr(embedded, name)) for name in ('tokens', 'truncated', 'left_out')})


def _block_file(folder: Path, texts: Sequence[str]) -> Path:
    return folder / f'{xxhash.xxh64(json.dumps(list(texts))).hexdigest()}.safetensors'
