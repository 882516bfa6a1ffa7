# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Frozen vision tower that embeds images once, before a training (SAIL, arXiv 2412.04616)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from composer.core import DataSpec

from llm2clip.config import ExtractImagesConfig
from llm2clip.data.images import decode_pixels
from llm2clip.data.loader import streaming_dataset
from llm2clip.device import Device, exact_float32
from llm2clip.errors import under
from llm2clip.io.tensors import hash_tensors
from llm2clip.modeling.image_processing_llm2clip import resize_and_crop
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.teacher.embedder import Embedded, Embedder, OnBatch
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord, hash_settings

_Item = tuple[bytes, str]
"""File of an image, and its sample id."""


class FrozenTower(Embedder):
    """Vision tower that embeds images as its pooled features ``(N, width)``, in float32."""

    def __init__(self, encoder: VisionEncoder, config: ExtractImagesConfig) -> None:
        super().__init__(encoder.eval().requires_grad_(False), encoder.width, tower_fingerprint(encoder),
                         config.precision)
        self.config = config
        self.image_size = encoder.preprocessing.image_size
        # Each with one OpenMP thread, since libgomp's threads sleep if there are more than cores.
        self._threads = ThreadPoolExecutor(config.num_workers, initializer=torch.set_num_threads,
                                           initargs=(1,))

    def prepare(self, items: Sequence[_Item]) -> torch.Tensor:
        """Decode and crop images, as in evaluation, to ``(N, 3, image_size, image_size)`` in uint8."""
        return torch.stack([*self._threads.map(self._pixels, items)])

    def _pixels(self, item: _Item) -> torch.Tensor:
        data, sample_id = item
        return resize_and_crop(decode_pixels(data, sample_id), self.image_size)

    @torch.inference_mode()
    def embed_prepared(self, inputs: torch.Tensor, on_batch: OnBatch) -> Embedded:
        device = self.device
        vectors = []
        for pixels in inputs.split(self.config.batch_size):
            with exact_float32(device.type), torch.autocast(device.type, torch.bfloat16,
                                                            self.precision == 'amp_bf16'):
                vectors.append(self.module(pixels.to(device)).float())
            on_batch(len(pixels))
        return Embedded(torch.cat(vectors), len(inputs), 0)


def load_frozen_tower(config: ExtractImagesConfig, device: Device) -> FrozenTower:
    """Load the tower of an extraction."""
    with under('vision'):
        encoder = VisionEncoder(config.vision)
    tower = FrozenTower(encoder, config)
    device.module_to_device(tower.module).fuse_frozen_batch_norms()
    return tower


def tower_fingerprint(encoder: VisionEncoder) -> Fingerprint:
    """Return the fingerprint of unsharded towers, for each: hashes of weights and configuration, and
    preprocessing."""
    preprocessing = encoder.preprocessing
    trunk: Any = encoder.trunk
    weights = {name.removeprefix('trunk.'): value for name, value in trunk.state_dict().items()}
    settings = encoder.tower.architecture() or {'timm': trunk.pretrained_cfg['architecture']}
    if encoder.config.feature_levels:
        settings['feature_levels'] = encoder.config.feature_levels
    own = Fingerprint.of(hash_tensors(weights), {
        'config': hash_settings(settings), 'image_size': preprocessing.image_size,
        'mean': list(preprocessing.mean), 'std': list(preprocessing.std)})
    beside: Any = encoder.beside
    return Fingerprint.concatenate([own, *map(tower_fingerprint, beside)])


def check_tower(encoder: VisionEncoder, data: DataSpec) -> None:
    """Raise a ConfigError if image embeddings of a loader come from another tower than `encoder`."""
    expected = tower_fingerprint(encoder)
    for stream in streaming_dataset(data).streams:
        TeacherRecord.read(stream.local).teacher.check(expected, stream.local, 'model.vision')
