# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Frozen text encoders, captions -> vectors: before they are loaded, loaded, and with a cache of texts."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
import xxhash
from composer.devices import Device
from tqdm import tqdm

from llm2clip.config import ConfigError
from llm2clip.files import FileError, reading, write_text
from llm2clip.ranks import broadcast_from_rank0, is_first, once_per_node, round_robin, rows
from llm2clip.remote_code.checks_llm2clip import check_finite
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.weights import read_safetensors, write_safetensors

__all__ = ['CachedTeacher', 'CaptionTeacher', 'Embedded', 'TeacherSource']

# Texts of a file, embedded together: enough to sort by length, few enough to lose.
_BLOCK = 1024


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


class CaptionTeacher(ABC):
    """Turns captions into vectors, always the same ones.

    Args:
        module: What computes the vectors, frozen, in evaluation mode, on its device; it may be moved to another one.
        fingerprint: What decides the vectors.
        batch_tokens: Tokens per forward pass.
        precision: ``fp32``, or ``amp_bf16`` for autocast.
    """

    def __init__(
        self, module: Any, fingerprint: Fingerprint, batch_tokens: int = 4096, precision: str = 'fp32'
    ) -> None:
        self.module, self.fingerprint, self.batch_tokens, self.precision = module, fingerprint, batch_tokens, precision

    @property
    @abstractmethod
    def llm_embed_dim(self) -> int:
        """Width of the vectors."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Any:
        """What `embed_tokens` takes, of captions none of which is empty; another thread may call it meanwhile."""

    @abstractmethod
    def embed_tokens(self, tokens: Any, on_batch: Callable[[int], object] = lambda texts: None) -> Embedded:
        """Vectors of captions; `on_batch` is told, as it goes on, how many more are done."""

    def embed(self, texts: Sequence[str], on_batch: Callable[[int], object] = lambda texts: None) -> Embedded:
        """Both in one."""
        return self.embed_tokens(self.tokenize(texts), on_batch)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


class TeacherSource(ABC):
    """A frozen text encoder that is not loaded; `name` says where it lies."""

    name: str

    @abstractmethod
    def _encoding(self) -> dict[str, Any]:
        """How it turns captions into vectors; a ConfigError if there is no such text encoder."""

    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """What decides its vectors; the weights are read, unless `hash_files` knows them."""

    @abstractmethod
    def _load(self, device: Device, fingerprint: Fingerprint, batch_tokens: int, precision: str, sharded: bool
              ) -> CaptionTeacher:
        """As `load`, with the fingerprint."""

    def load(
        self, device: Device, batch_tokens: int = 4096, precision: str = 'fp32',
        fingerprint: Optional[Fingerprint] = None, sharded: bool = False,
    ) -> CaptionTeacher:
        """The text encoder, on its device.

        Args:
            device: Where it runs.
            batch_tokens: Tokens per forward pass.
            precision: ``fp32``, or ``amp_bf16`` for autocast.
            fingerprint: Of this text encoder, if it is known.  Otherwise one rank per node reads the weights for it,
                and every rank has to call this.
            sharded: Spread an LLM over the ranks, which read it one after the other, so that a host holds it in full
                only once.

        Raises:
            ConfigError: There is none, or it cannot be sharded.
            FileError, LoadError: It is damaged, or needs code that is not trusted.
            ValueError: The nodes have different ones.
        """
        if fingerprint is None:
            fingerprint = once_per_node(self.fingerprint, f'teacher {self.name}')
        return self._load(device, fingerprint, batch_tokens, precision, sharded)

    def save(self, folder: Path, expected: Fingerprint) -> Fingerprint:
        """Write it as a folder from which an exported model loads it; returns the fingerprint that it has there.

        Raises:
            ConfigError: No model is exported with a text encoder of this type.
            ValueError: It is not the expected one.
        """
        raise ConfigError(f'teacher: {self.name} cannot be part of an exported model')

    def check_encoding(self, expected: Optional[Fingerprint], reference: str) -> None:
        """Find out what is wrong without reading weights.

        Args:
            expected: Of the text encoder that it should be, if that is known.
            reference: What has that fingerprint, for messages.

        Raises:
            ConfigError: There is no such text encoder.
            ValueError: It turns captions into vectors otherwise.
        """
        found = Fingerprint.of('', self._encoding())
        if expected is not None:
            found.check(expected, self.name, reference, but=('weights',))

    def check(self, expected: Fingerprint, reference: str) -> None:
        """`check_encoding`, then the weights, which are read."""
        self.check_encoding(expected, reference)
        self.fingerprint().check(expected, self.name, reference)


class CachedTeacher:
    """Texts -> vectors, from files where they are known: those of each text encoder lie in a folder below `folder`.

    `fingerprint` and `precision` are those of one, which `load` loads if texts are not known.
    """

    def __init__(
        self, folder: Union[str, Path], fingerprint: Fingerprint, precision: str, load: Callable[[], CaptionTeacher]
    ) -> None:
        text = json.dumps({**fingerprint.to_json(), 'precision': precision}, indent=2, sort_keys=True) + '\n'
        self.folder, self._fingerprint_text = Path(folder, xxhash.xxh64(text).hexdigest()), text
        self._load, self._teacher = load, None

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        """``(N, D)`` in float32 on the CPU, and how many texts were longer than the teacher reads and lost their end.

        Every rank calls this.  They share the texts that are not known; all vectors come to the first, which alone
        reads and writes files, and the others have none.  Killed, it resumes after the blocks that are done.

        Raises:
            FileError: A file is damaged.
            LoadError: A vector is not finite.
        """
        blocks = [list(texts[start:start + _BLOCK]) for start in range(0, len(texts), _BLOCK)]
        found: dict[int, tuple[torch.Tensor, int]] = {}

        def unknown() -> list[int]:
            found.update({i: self._read(block) for i, block in enumerate(blocks) if self._file(block).is_file()})
            return [i for i in range(len(blocks)) if i not in found]

        todo = broadcast_from_rank0(unknown)
        with tqdm(total=len(texts), initial=sum(len(blocks[i]) for i in found), desc='embed captions',
                  unit=' captions', disable=not is_first()) as progress:
            for i, (vectors, truncated) in zip(todo, round_robin([blocks[i] for i in todo], partial(map, self._embed))):
                check_finite({'a vector of the teacher': vectors}, self.folder)
                write_text(self.folder / 'fingerprint.json', self._fingerprint_text)
                write_safetensors(self._file(blocks[i]), {'text_embedding': vectors}, {'truncated': str(truncated)})
                found[i] = vectors, truncated
                progress.update(len(blocks[i]))
        return rows(found[i][0] for i in sorted(found)), sum(truncated for _, truncated in found.values())

    def _embed(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        self._teacher = self._teacher or self._load()
        embedded = self._teacher.embed(texts)
        return embedded.vectors.cpu(), embedded.truncated

    def _file(self, texts: Sequence[str]) -> Path:
        return self.folder / f'{xxhash.xxh64(json.dumps(list(texts))).hexdigest()}.safetensors'

    def _read(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        path, expected = self._file(texts), f'{len(texts)} vectors of captions; remove it, and they are embedded again'
        tensors, about = read_safetensors(path, expected)
        with reading(path, expected):
            vectors, truncated = tensors['text_embedding'], int(about['truncated'])
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise FileError(f'{path}: holds vectors of the shape {tuple(vectors.shape)}, expected {expected}')
        return vectors, truncated
