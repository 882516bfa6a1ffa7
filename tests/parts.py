# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures and captions for tests."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from composer.devices import DeviceCPU
from PIL import Image
from streaming import StreamingDataLoader
from streaming.base.util import clean_stale_shared_memory

from llm2clip.config import DatasetConfig, LoraConfig, TextEncoderConfig, WriterConfig
from llm2clip.data.convert.samples import Dropped, Sample, one_part
from llm2clip.data.convert.writer import write_splits
from llm2clip.io.remotes import OutputFolder
from llm2clip.modeling.text_encoder import CaptionTokenizer, TextEncoder
from llm2clip.teacher.extraction import ExtractionTask, write_embeddings
from llm2clip.teacher.llm import build_text_encoder, load_caption_tokenizer
from llm2clip.teacher.sources import TeacherFolder

COLORS = ['red', 'green', 'blue', 'yellow', 'purple', 'orange', 'black', 'white', 'pink', 'brown']
UNDECODABLE = 'undecodable image, expected JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, PPM'
SHAPES = ['square', 'circle', 'cross', 'stripe']


def text_encoder_from_config(
    config: TextEncoderConfig, lora: Optional[LoraConfig] = None, std: float = 0.0
) -> tuple[TextEncoder, CaptionTokenizer]:
    """The encoder, whose LoRA has no effect unless `std` is given, and its tokenizer."""
    encoder = build_text_encoder(config, lora)
    for name, parameter in encoder.named_parameters():
        if std and 'lora_B' in name:
            torch.nn.init.normal_(parameter, std=std)
    return encoder, load_caption_tokenizer(config)


def picture(seed: int, size: int = 48) -> bytes:
    rng = random.Random(seed)
    image = Image.new('RGB', (size, size), tuple(rng.randrange(256) for _ in range(3)))
    image.paste(tuple(rng.randrange(256) for _ in range(3)), (size // 4, size // 4, size // 2, size // 2))
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return buffer.getvalue()


def make_samples(n: int, images: bool = True, prefix: str = 's') -> list[Sample]:
    samples = []
    for i in range(n):
        short = f'a {COLORS[i % 10]} {SHAPES[i // 10 % 4]}'
        long = f'{short} number {i}, painted on a plain wall by somebody who likes {COLORS[(i * 7 + 3) % 10]}'
        samples.append(Sample(f'{prefix}{i:04}', {'short': short, 'long': long}, picture(i) if images else None))
    return samples


def check_resumed(make: Callable[[], StreamingDataLoader]) -> None:
    """An epoch that is resumed after two batches has those that are left of it."""
    whole = [batch['sample_id'] for batch in make()]
    clean_stale_shared_memory()
    loader = make()
    assert len(whole) == len(loader) > 2
    batches = iter(loader)
    assert [next(batches)['sample_id'] for _ in range(2)] == whole[:2]
    state = loader.state_dict()
    del loader, batches
    clean_stale_shared_memory()
    loader = make()
    loader.load_state_dict(state)
    assert [batch['sample_id'] for batch in loader] == whole[2:]


def write_dataset(samples: list[Sample], out: Path, **options: Any) -> Optional[dict[str, int]]:
    return write_splits({'train': one_part(samples)}, Dropped(), out, WriterConfig(**options))


def write_text_embeddings(dataset: Path, out: Path, teacher: Path, **options: Any) -> dict[str, int]:
    part_tokens = options.pop('part_tokens', 32768)
    embeddings = ExtractionTask(DatasetConfig(local=str(dataset)), OutputFolder(out), **options)
    return write_embeddings(embeddings, TeacherFolder(teacher).load(DeviceCPU()), part_tokens)
