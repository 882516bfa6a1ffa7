# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A teacher's vectors of evaluation captions, computed once and kept by the teacher's fingerprint."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional, Union

import torch
import xxhash
from tqdm import tqdm

from llm2clip.folders import write_text
from llm2clip.teacher.caption_teacher import CaptionTeacher, Embedded, embed_or_load
from llm2clip.teacher.fingerprint import Fingerprint

__all__ = ['CachedTeacher']

# Texts of a file, embedded together: enough to sort by length, few enough to lose.
_BLOCK = 1024


class CachedTeacher:
    """Texts -> vectors, from files where they are known.

    Args:
        folder: Of the files; one below it holds those of one teacher.
        fingerprint: Of one teacher.
        precision: In which it computes.
        load: Loads the teacher, which happens only for texts that are not known.
    """

    def __init__(
        self, folder: Union[str, Path], fingerprint: Fingerprint, precision: str, load: Callable[[], CaptionTeacher]
    ) -> None:
        text = json.dumps({**fingerprint.to_json(), 'precision': precision}, indent=2, sort_keys=True) + '\n'
        self.folder = Path(folder, xxhash.xxh64(text).hexdigest())
        self._fingerprint_text = text
        self._load = load
        self._teacher: Optional[CaptionTeacher] = None

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        """``(N, D)`` in float32 on the CPU, and how many texts were longer than the teacher reads and lost their end.

        Killed, it goes on after the blocks that are done.
        """
        vectors, truncated = [], 0
        with tqdm(total=len(texts), desc='embed captions', unit=' captions') as progress:
            for start in range(0, len(texts), _BLOCK):
                block = list(texts[start:start + _BLOCK])
                embedded = embed_or_load(self.folder, block, self._embed)
                vectors.append(embedded.vectors)
                truncated += embedded.truncated
                progress.update(len(block))
        return torch.cat(vectors), truncated

    def _embed(self, texts: Sequence[str]) -> Embedded:
        self._teacher = self._teacher or self._load()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / 'fingerprint.json', self._fingerprint_text)
        return self._teacher.embed(texts)
