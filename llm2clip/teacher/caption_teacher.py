# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Frozen text encoders that are loaded, captions -> vectors: LLMs, sentence-transformers models, a cache of texts."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
import xxhash
from tqdm import tqdm

from llm2clip.files import FileError, reading, write_text
from llm2clip.ranks import broadcast_from_rank0, is_first, round_robin, rows
from llm2clip.remote_code.checks_llm2clip import check_finite
from llm2clip.remote_code.sentence_transformer_llm2clip import encode_sentences
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer, TextEncoder, Tokenized, encode_tokens
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.teacher.llm import upcast_where_slow
from llm2clip.weights import read_safetensors, write_safetensors

__all__ = ['CachedTeacher', 'CaptionTeacher', 'Embedded', 'LLMTeacher', 'SentenceTransformerTeacher']

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


class LLMTeacher(CaptionTeacher):
    """An LLM as text encoder, whose weights are cast to float32 where bfloat16 is slow.

    If it is `sharded`, spread over the ranks, they embed together, each as many captions.
    """

    def __init__(self, encoder: TextEncoder, tokenizer: CaptionTokenizer, fingerprint: Fingerprint,
                 batch_tokens: int = 4096, precision: str = 'fp32', sharded: bool = False) -> None:
        super().__init__(encoder, fingerprint, batch_tokens, precision)
        self.tokenizer, self.sharded = tokenizer, sharded
        if not sharded:
            upcast_where_slow(encoder.llm)

    @property
    def llm_embed_dim(self) -> int:
        return self.module.llm_embed_dim

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        return self.tokenizer.tokenize(texts)

    def embed_tokens(
        self, tokens: Sequence[Tokenized], on_batch: Callable[[int], object] = lambda texts: None
    ) -> Embedded:
        vectors = encode_tokens(self.module, tokens, self.batch_tokens, self.precision, self.sharded, on_batch)
        return Embedded(vectors, sum(len(text.ids) for text in tokens), sum(text.cut > 0 for text in tokens))


class SentenceTransformerTeacher(CaptionTeacher):
    """A SentenceTransformer, which brings its own tokens and pooling; `prompt` is put before every caption.

    `batch_tokens` counts padding.
    """

    def __init__(self, model: Any, fingerprint: Fingerprint, prompt: str = '', batch_tokens: int = 4096,
                 precision: str = 'fp32') -> None:
        super().__init__(model, fingerprint, batch_tokens, precision)
        self.prompt = prompt

    @property
    def llm_embed_dim(self) -> int:
        # Modules that a model brings along need not say it.
        return self.module.get_sentence_embedding_dimension() or self.embed(['a']).vectors.shape[1]

    def tokenize(self, texts: Sequence[str]) -> Sequence[str]:
        """The captions as they are: `encode` tokenises them, and a tokenizer does not work for two threads at once."""
        return texts

    def embed_tokens(self, tokens: Sequence[str], on_batch: Callable[[int], object] = lambda texts: None) -> Embedded:
        vectors, lengths = encode_sentences(self.module, tokens, self.prompt, self.batch_tokens, self.precision,
                                            on_batch)
        limit = self.module.max_seq_length or max(lengths, default=0)
        return Embedded(vectors, sum(min(length, limit) for length in lengths),
                        sum(length > limit for length in lengths))
