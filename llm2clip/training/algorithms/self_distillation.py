# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What the image features were before training, beside each batch: the targets of self-distillation (ProCLIP, arXiv
2510.18795)."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from composer.core import Algorithm, Event, State, get_precision_context
from composer.devices import Device
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from llm2clip.models.llm2clip import LLM2CLIP

__all__ = ['InitialImages', 'SelfDistillation']


class InitialImages(nn.Module):
    """A frozen copy of a model's vision tower and projection, as they are now.

    Args:
        model: Not sharded yet.
    """

    def __init__(self, model: LLM2CLIP) -> None:
        super().__init__()
        self.vision_encoder = copy.deepcopy(model.vision_encoder)
        self.visual_projection = copy.deepcopy(model.visual_projection)
        self.eval().requires_grad_(False)

    def on(self, device: Device, sharded: bool) -> 'InitialImages':
        """The same on a device; `sharded`, spread over all ranks."""
        if not sharded:
            return device.module_to_device(self)
        self.shard(init_device_mesh('cpu' if device.name == 'cpu' else 'cuda', (dist.get_world_size(),)))
        return self

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread it over the ranks of a mesh, a block of the tower at a time."""
        for module in self.vision_encoder.modules():
            if self.vision_encoder.is_block(module):
                fully_shard(module, mesh=mesh)
        fully_shard(self, mesh=mesh)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(B, 3, H, W)`` -> ``(B, embed_dim)``, L2-normalised, in float32."""
        return F.normalize(self.visual_projection(self.vision_encoder(pixel_values)).float(), dim=-1)


class SelfDistillation(Algorithm):
    """Give each training batch its ``initial_image_features`` ``(B, embed_dim)``, which the loss compares with.

    It has to come after `GradCache` in the trainer's list of algorithms, and so before it in a step.

    Args:
        initial: On its device.
        split_batch: (batch, microbatch size) -> microbatches, the loader's own.
    """

    def __init__(
        self, initial: InitialImages, split_batch: Callable[[dict[str, Any], int], Sequence[dict[str, Any]]]
    ) -> None:
        self.initial, self.split_batch = initial, split_batch

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_DATALOADER

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        assert isinstance(state.device_train_microbatch_size, int)
        pixels = {name: state.batch[name] for name in ('index', 'pixel_values')}
        with get_precision_context(state.precision, state.precision_config):
            features = [self.initial(state.device.batch_to_device(part)['pixel_values'])
                        for part in self.split_batch(pixels, state.device_train_microbatch_size)]
        state.batch['initial_image_features'] = torch.cat(features)
