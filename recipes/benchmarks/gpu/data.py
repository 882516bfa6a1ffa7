# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Random data and a random LLM of real sizes, each made once."""

import io
import json
import random
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import OUT, SIZES, Sizes
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, LlamaConfig, PreTrainedTokenizerFast

from llm2clip.config import DatasetConfig, WriterConfig
from llm2clip.data.convert.samples import Dropped, Sample, one_part
from llm2clip.data.convert.writer import write_splits
from llm2clip.folders import OutputFolder
from llm2clip.teacher.caption_teacher import Embedded
from llm2clip.teacher.extraction import extract_sidecar
from llm2clip.teacher.fingerprint import Fingerprint

__all__ = ['make_images', 'make_texts']

LLAMA = 'yamls/llms/llama3.1_8b'
WORDS = [f'w{i}' for i in range(1000)]  # of which each is a token


def make_images(device: str) -> None:
    """Images of 640 × 480 pixels with a short and a long caption, and their vectors."""
    folder, sizes = OUT / 'data' / device, SIZES[device]
    _once(folder / 'images', partial(_write_images, sizes))
    _once(folder / 'vectors', partial(_write_vectors, folder / 'images/train', sizes))


def make_texts(device: str) -> None:
    """Captions, and an LLM of the shape of Llama 3.1 8B in bfloat16, 16 GB."""
    folder, sizes = OUT / 'data' / device, SIZES[device]
    for name, captions in (('captions', sizes.captions), ('warm_up', sizes.warm_up_captions)):
        _once(folder / name, partial(_write_captions, captions))
    _once(folder / 'llm', partial(_write_llm, sizes, 'cuda' if device == 'gpu' else 'cpu'))


def _once(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder that appears under its name when all is in it."""
    if not folder.is_dir():
        print(f'making {folder}', flush=True)
        partial = folder.with_name(f'{folder.name}.part')
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        partial.rename(folder)


def _write_samples(samples: Sequence[Sample], out: Path) -> None:
    write_splits({'train': one_part(samples)}, Dropped(), out, WriterConfig(size_limit='32mb'))


def _captions(rng: random.Random) -> dict[str, str]:
    return {key: ' '.join(rng.choices(WORDS, k=rng.randint(low, high)))
            for key, low, high in (('short', 8, 24), ('long', 64, 192), ('other', 64, 192))}


def _write_captions(n: int, out: Path) -> None:
    rng = random.Random(0)
    _write_samples([Sample(f'{i}', _captions(rng)) for i in range(n)], out)


def _write_images(sizes: Sizes, out: Path) -> None:
    rng, words, pictures = np.random.default_rng(0), random.Random(0), []
    for _ in range(sizes.pictures):
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(buffer := io.BytesIO(), 'JPEG', quality=90)
        pictures.append(buffer.getvalue())
    samples = []
    for i in range(sizes.images):
        captions = _captions(words)
        del captions['other']
        samples.append(Sample(f'{i}', captions, pictures[i % len(pictures)]))
    _write_samples(samples, out)


class _RandomTeacher:
    """What `extract_sidecar` asks of a teacher."""

    fingerprint = Fingerprint.of('random', {})

    def __init__(self, llm_embed_dim: int) -> None:
        self.llm_embed_dim = llm_embed_dim

    def tokenize(self, texts: Sequence[str]) -> Sequence[str]:
        return texts

    def embed_tokens(self, tokens: Sequence[str], on_batch: Callable[[int], object] = lambda texts: None) -> Embedded:
        return Embedded(torch.randn(len(tokens), self.llm_embed_dim), 0, 0)


def _write_vectors(images: Path, sizes: Sizes, out: Path) -> None:
    teacher: Any = _RandomTeacher(sizes.teacher_dim)
    extract_sidecar(DatasetConfig(local=str(images)), OutputFolder(out), teacher, 'int8')


def _write_llm(sizes: Sizes, device: str, out: Path) -> None:
    config = LlamaConfig(**{**json.loads(Path(LLAMA, 'config.json').read_text()), **sizes.llm})
    with torch.device('meta'):
        llm = AutoModel.from_config(config, dtype=torch.bfloat16)
    state = {name: (torch.ones if tensor.ndim == 1 else torch.randn)(tensor.shape, dtype=tensor.dtype, device=device)
             .mul_(1 if tensor.ndim == 1 else 0.02).cpu() for name, tensor in llm.state_dict().items()}
    llm.save_pretrained(out, state_dict=state, safe_serialization=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(['<unk>', '<s>', '</s>', *WORDS])},
                                           unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token='<unk>', bos_token='<s>', eos_token='</s>'
                            ).save_pretrained(out)
