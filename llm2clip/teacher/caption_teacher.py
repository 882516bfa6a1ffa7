# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Frozen text encoders: sources that are not loaded, loaded teachers, and a cache of text embeddings."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Optional, Union

import torch
import xxhash
from tqdm import tqdm

from llm2clip.device import Device
from llm2clip.errors import ConfigError
from llm2clip.io.files import reading, write_text
from llm2clip.io.tensors import read_safetensors, write_safetensors
from llm2clip.modeling.loaders import check_finite
from llm2clip.ranks import broadcast_from_rank0, is_first, once_per_node, round_robin, rows
from llm2clip.teacher.embedder import Embedder
from llm2clip.teacher.fingerprint import Fingerprint

# Texts per cache file: enough to sort by length, few enough to repeat after a kill.
_BLOCK = 1024


class CaptionTeacher(Embedder):
    """Text encoder that embeds captions, `batch_tokens` of their tokens per forward pass."""

    def __init__(self, module: Any, width: int, fingerprint: Fingerprint, batch_tokens: int, precision: str
                 ) -> None:
        super().__init__(module, width, fingerprint, precision)
        self.batch_tokens = batch_tokens


class TeacherSource(ABC):
    """Frozen text encoder that is not loaded yet; `name` is its folder or hub name."""

    name: str

    @abstractmethod
    def encoding(self) -> dict[str, Any]:
        """Return the encoding settings; raise a ConfigError if there is no such text encoder."""

    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint, after reading the weights."""

    @abstractmethod
    def _load(self, device: Device, fingerprint: Fingerprint, batch_tokens: int, precision: str, sharded: bool
              ) -> CaptionTeacher:
        """Implement `load` with a known fingerprint."""

    def load(
        self, device: Device, batch_tokens: int = 4096, precision: str = 'fp32',
        fingerprint: Optional[Fingerprint] = None, sharded: bool = False,
    ) -> CaptionTeacher:
        """Load the text encoder onto its device.

        Args:
            device: Device to run on.
            batch_tokens: Tokens per forward pass.
            precision: ``fp32``, or ``amp_bf16`` for autocast.
            fingerprint: Fingerprint of this text encoder, if known.  Otherwise one rank per node computes it
                from the weights, and every rank must call this method.
            sharded: Shard an LLM over the ranks, which load it in turn: a host holds one full copy at a time.

        Raises:
            ConfigError: The text encoder does not exist, or it cannot be sharded.
            FileError, LoadError: It is damaged, or needs code that is not trusted.
            ValueError: The nodes have different text encoders.
        """
        if fingerprint is None:
            fingerprint = once_per_node(self.fingerprint, f'teacher {self.name}')
        return self._load(device, fingerprint, batch_tokens, precision, sharded)

    def save(self, folder: Path, expected: Fingerprint) -> Fingerprint:
        """Save the text encoder as a folder for an exported model, and return the fingerprint of that folder.
        A ValueError if the fingerprint of this text encoder is not `expected`."""
        raise ConfigError(f'{self.name} cannot be part of an exported model', 'teacher')

    def check_encoding(self, expected: Fingerprint, reference: str) -> None:
        """Check the text encoder without reading weights.

        A ConfigError if there is none, or if it encodes captions differently than the text encoder with the
        fingerprint `expected`, which messages call `reference`.
        """
        Fingerprint.of('', self.encoding()).check(expected, self.name, reference,
                                                  ignored=('weights', 'config_and_tokenizer'))


class CachedTeacher:
    """Embeds texts with a cache on disk: one folder below `folder` per teacher and precision.

    `load` returns the teacher with this `fingerprint` and `precision`; it is called if a text is not cached.
    """

    def __init__(
        self, folder: Union[str, Path], fingerprint: Fingerprint, precision: str,
        load: Callable[[], CaptionTeacher]
    ) -> None:
        fields = fingerprint.to_json() | {'precision': precision}
        self._fingerprint_text = json.dumps(fields, indent=2, sort_keys=True) + '\n'
        self.folder = Path(folder, xxhash.xxh64(self._fingerprint_text).hexdigest())
        self._load = cache(load)

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        """Return vectors ``(N, D)`` in float32 on the CPU, and the number of truncated texts.

        Every rank must call this.  The ranks share the texts that are not cached.  Rank 0 alone reads and
        writes the cache and returns all vectors.  A killed run resumes after the finished blocks.

        Raises:
            FileError: A file is damaged.
            LoadError: A vector is not finite.
        """
        blocks = [list(texts[start:start + _BLOCK]) for start in range(0, len(texts), _BLOCK)]
        results: dict[int, tuple[torch.Tensor, int]] = {}

        def read_cached() -> list[int]:
            missing = []
            for i, block in enumerate(blocks):
                path = self._file(block)
                if path.is_file():
                    expected = f'{len(block)} vectors of captions; remove it, and they are embedded again'
                    tensors, metadata = read_safetensors(path, expected)
                    with reading(path, expected):
                        results[i] = tensors['text_embedding'], int(metadata['truncated'])
                else:
                    missing.append(i)
            return missing

        todo = broadcast_from_rank0(read_cached)
        embedded = round_robin([blocks[i] for i in todo], partial(map, self._embed))
        with tqdm(total=len(texts), initial=sum(len(blocks[i]) for i in results), desc='embed captions',
                  unit=' captions', disable=not is_first()) as progress:
            for i, (vectors, truncated) in zip(todo, embedded):
                check_finite({'a vector of the teacher': vectors}, self.folder)
                write_text(self.folder / 'fingerprint.json', self._fingerprint_text)
                write_safetensors(self._file(blocks[i]), {'text_embedding': vectors},
                                  {'truncated': str(truncated)})
                results[i] = vectors, truncated
                progress.update(len(blocks[i]))
        num_truncated = sum(truncated for _, truncated in results.values())
        return rows(results[i][0] for i in sorted(results)), num_truncated

    def _embed(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        embedded = self._load().embed(texts)
        return embedded.vectors.cpu(), embedded.truncated

    def _file(self, texts: Sequence[str]) -> Path:
        return self.folder / f'{xxhash.xxh64(json.dumps(list(texts))).hexdigest()}.safetensors'
