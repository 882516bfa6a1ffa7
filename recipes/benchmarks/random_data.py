# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Random images, captions, vectors and an LLM of realistic sizes, for benchmarks."""

import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, LlamaConfig, PreTrainedTokenizerFast

from llm2clip.config import DatasetConfig, WriterConfig
from llm2clip.data.convert.samples import Dropped, Sample, one_part
from llm2clip.data.convert.writer import write_splits
from llm2clip.io.remotes import OutputFolder
from llm2clip.teacher.embedder import Embedded
from llm2clip.teacher.extraction import ExtractionTask, write_embeddings
from llm2clip.teacher.fingerprint import Fingerprint

WORDS = [f'w{i}' for i in range(1000)]  # each is one token


def _write_samples(samples: Sequence[Sample], out: Path) -> None:
    write_splits({'train': one_part(samples)}, Dropped(), out, WriterConfig(size_limit='32mb'))


def _captions(rng: random.Random) -> dict[str, str]:
    lengths = {'short': (8, 24), 'long': (64, 192), 'other': (64, 192)}
    return {key: ' '.join(rng.choices(WORDS, k=rng.randint(low, high)))
            for key, (low, high) in lengths.items()}


def write_captions(n: int, out: Path) -> None:
    """Write the dataset `out/train` of `n` samples with one short and two long captions each."""
    rng = random.Random(0)
    _write_samples([Sample(f'{i}', _captions(rng)) for i in range(n)], out)


def write_images(n: int, out: Path, different: int) -> None:
    """Write the dataset `out/train` of `n` images, `different` of them distinct,
    with a short and a long caption."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(different):
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, 'JPEG', quality=90)
        pictures.append(buffer.getvalue())
    words = random.Random(0)
    samples = []
    for i in range(n):
        texts = _captions(words)
        samples.append(Sample(f'{i}', {key: texts[key] for key in ('short', 'long')},
                              pictures[i % different]))
    _write_samples(samples, out)


class _RandomTeacher:
    """Teacher with random vectors, as far as `write_embeddings` uses it."""

    fingerprint = Fingerprint.of('random', {})

    def __init__(self, width: int) -> None:
        self.width = width

    def prepare(self, items: Sequence[str]) -> Sequence[str]:
        return items

    def embed_prepared(self, inputs: Sequence[str], on_batch: Callable[[int], object]) -> Embedded:
        return Embedded(torch.randn(len(inputs), self.width), 0, 0)


def write_vectors(images: Path, out: Path, dim: int) -> None:
    """Write random int8 text embeddings of a dataset's captions."""
    teacher: Any = _RandomTeacher(dim)
    write_embeddings(ExtractionTask(DatasetConfig(local=str(images)), OutputFolder(out), 'int8'),
                            teacher)


def write_llm(config_file: str, changes: Mapping[str, Any], device: str, out: Path) -> None:
    """Write an LLM with random bfloat16 weights, from its `config.json` with changes,
    and a tokenizer of `WORDS`."""
    config = LlamaConfig(**json.loads(Path(config_file).read_text()) | changes)
    with torch.device(device):
        llm = AutoModel.from_config(config, dtype=torch.bfloat16)
    llm.cpu().save_pretrained(out, safe_serialization=True)
    vocabulary = {word: i for i, word in enumerate(['<unk>', '<s>', '</s>', *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token='<unk>', bos_token='<s>', eos_token='</s>'
                            ).save_pretrained(out)
