# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Batches as the loaders make them, but without content, and how long a core takes over a sample."""

import io
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from llm2clip.config import ImageDataConfig
from llm2clip.data.images import decode_pixels
from llm2clip.data.transforms import pixels_needed, seeded, train_transform

__all__ = ['image_batch', 'seconds_per_image', 'target_batch', 'text_batch']

Batch = dict[str, torch.Tensor]


def image_batch(n: int, image_size: int, vector: Batch, captions: int = 1, texts: bool = False) -> dict[str, Any]:
    """A batch of stage 2.

    Args:
        n: Samples.
        image_size: In pixels.
        vector: What stands for one caption, ``(1, …)`` each: its vector as it is stored.
        captions: Per image.
        texts: Whether the captions are there, too.
    """
    shape = (n,) if captions == 1 else (n, captions)
    ids = {name: torch.zeros(n, dtype=torch.long) for name in ('index', 'sample_seed')}
    vectors = {name: torch.empty(*shape, *value.shape[1:], dtype=value.dtype) for name, value in vector.items()}
    return {**ids, 'text_id': torch.zeros(shape, dtype=torch.long),
            'pixel_values': torch.empty(n, 3, image_size, image_size, dtype=torch.uint8), **vectors,
            **({'caption': ['-'] * n if captions == 1 else [['-'] * n] * captions} if texts else {})}


def text_batch(n: int, sides: list[str], tokens: int) -> Batch:
    """A batch of stage 1.

    Args:
        n: Samples.
        sides: Prefixes of its texts; those of a single one are not pooled.
        tokens: Of each text.
    """
    batch = {'index': torch.zeros(n, dtype=torch.long)}
    for side in sides:
        batch[f'{side}text_id'] = torch.zeros(n, dtype=torch.long)
        for name in ('input_ids', 'attention_mask', *(['embed_mask'] if side else [])):
            batch[side + name] = torch.ones(n, tokens, dtype=torch.long)
    return batch


def target_batch(n: int, llm_embed_dim: int, embed_dim: int) -> Batch:
    """A batch of inheritance.

    Args:
        n: Samples.
        llm_embed_dim: Width of the teacher's vectors.
        embed_dim: Width of the targets.
    """
    return {'index': torch.zeros(n, dtype=torch.long), 'counted': torch.ones(n, dtype=torch.bool),
            'text_embedding': torch.empty(n, llm_embed_dim, dtype=torch.float16), 'target': torch.empty(n, embed_dim)}


def seconds_per_image(config: ImageDataConfig, image_size: int, images: int = 20) -> float:
    """How long one core of this machine takes to decode, crop and resize an image of 640 × 480 pixels.

    Args:
        config: Crops and colours.
        image_size: In pixels.
        images: How many are tried.
    """
    blurred = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).resize((640, 480))
    blurred.save(file := io.BytesIO(), 'JPEG', quality=90)
    transform = train_transform(image_size, config.crop_scale, config.color_jitter, config.grayscale,
                                config.horizontal_flip)
    needed = pixels_needed(image_size, config.crop_scale[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        for seed in range(images):
            seeded(transform, decode_pixels(file.getvalue(), 'a sample', needed), seed)
        return (time.process_time() - start) / images
    finally:
        torch.set_num_threads(threads)
