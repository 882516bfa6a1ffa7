# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A teacher's vectors of evaluation captions, computed once and kept by the teacher's fingerprint."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
import xxhash
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from llm2clip.models.caption_teacher import CaptionTeacher

__all__ = ['CachedTeacher']

# Texts that are embedded together: enough to sort by length, few enough to show progress.
_BLOCK = 1024


class CachedTeacher:
    """Texts -> vectors, from files where they are known.

    Args:
        folder: Of the files; one below it holds those of one teacher.
        fingerprint: What decides the vectors.
        load: Loads the teacher, which happens only for texts that are not known.
    """

    def __init__(
        self, folder: Union[str, Path], fingerprint: Mapping[str, Any], load: Callable[[], CaptionTeacher]
    ) -> None:
        self.fingerprint = dict(fingerprint)
        text = json.dumps(self.fingerprint, indent=2, sort_keys=True) + '\n'
        self.folder = Path(folder, xxhash.xxh64(text).hexdigest())
        self._fingerprint_text = text
        self._load = load
        self._teacher: Optional[CaptionTeacher] = None

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """``(N, D)`` in float32 on the CPU."""
        path = self.folder / f'{xxhash.xxh64(json.dumps(list(texts))).hexdigest()}.safetensors'
        if not path.is_file():
            self._teacher = self._teacher or self._load()
            vectors = self._embed(self._teacher, texts)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / 'fingerprint.json').write_text(self._fingerprint_text)
            partial = path.with_suffix('.tmp')
            save_file({'text_embedding': vectors}, partial)
            partial.replace(path)
        return load_file(path)['text_embedding']

    @staticmethod
    def _embed(teacher: CaptionTeacher, texts: Sequence[str]) -> torch.Tensor:
        blocks = []
        with tqdm(total=len(texts), desc='embed captions', unit=' captions') as progress:
            for start in range(0, len(texts), _BLOCK):
                blocks.append(teacher.embed(texts[start:start + _BLOCK]).vectors)
                progress.update(len(blocks[-1]))
        return torch.cat(blocks)
