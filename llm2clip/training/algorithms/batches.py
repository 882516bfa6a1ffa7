# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Algorithms on the batches of stage 2: text embeddings from a teacher in the loop, image features of the
initial model (ProCLIP, arXiv 2510.18795), and patch dropout (FLIP, arXiv 2212.00794)."""

import copy
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from llm2clip.device import Device, exact_float32, get_precision_context
from llm2clip.models.joint import Captions, embed_captions
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.ranks import dist
from llm2clip.teacher.caption_teacher import CaptionTeacher


class TextEncoderInLoop(Algorithm):
    """Replace a batch's ``caption`` by ``text_embedding`` ``(B, llm_embed_dim)`` in float16.

    Batches hold a list of B captions or, with K captions per image, K such lists, which yield
    ``(B, K, llm_embed_dim)``.  An absent caption is an empty text, and its vector is zero.  List it after
    `GradCache` in the trainer's algorithms: it then runs first, once per caption.
    """

    def __init__(self, teacher: CaptionTeacher) -> None:
        self.teacher = teacher

    def match(self, event: Event, state: State) -> bool:
        # Batches of zero-shot sets have no captions.
        return event in (Event.AFTER_DATALOADER, Event.EVAL_BATCH_START) and 'caption' in state.batch

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        state.batch['text_embedding'] = self.embed(state.batch.pop('caption'))

    def embed(self, captions: Captions) -> torch.Tensor:
        """Embed captions, as `embed_captions`, in float16 on the teacher's device."""
        with exact_float32(self.teacher.device.type):
            return embed_captions(captions, lambda texts: self.teacher.embed(texts).vectors.half())


class InitialImages(nn.Module):
    """Frozen copy of the current vision tower and projection of a model that is not sharded yet."""

    def __init__(self, model: LLM2CLIP) -> None:
        super().__init__()
        self.vision_encoder = copy.deepcopy(model.vision_encoder)
        self.visual_projection = copy.deepcopy(model.visual_projection)
        self.eval().requires_grad_(False)

    def on(self, device: Device, sharded: bool) -> 'InitialImages':
        """Move the copy to a device, or shard it over all ranks; return it."""
        if not sharded:
            return device.module_to_device(self)
        self.shard(init_device_mesh('cpu' if device.name == 'cpu' else 'cuda', (dist.get_world_size(),)))
        return self

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard over the ranks of a mesh, with each block of the tower as a unit."""
        for block in filter(self.vision_encoder.is_block, self.vision_encoder.modules()):
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images ``(B, 3, H, W)`` as ``(B, embed_dim)``, L2-normalised, in float32."""
        return F.normalize(self.visual_projection(self.vision_encoder(pixel_values)).float(), dim=-1)


class SelfDistillation(Algorithm):
    """Add ``initial_image_features`` ``(B, embed_dim)``, the targets of self-distillation, to each batch.

    List it after `GradCache` in the trainer's algorithms, so that it runs before `GradCache` in a step.
    `split_batch` is the loader's function that splits a batch into microbatches.
    """

    def __init__(
        self, initial: InitialImages, split_batch: Callable[[dict[str, Any], int], Sequence[dict[str, Any]]]
    ) -> None:
        self.initial, self.split_batch = initial, split_batch

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_DATALOADER

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        size: Any = state.device_train_microbatch_size
        pixels = {name: state.batch[name] for name in ('index', 'pixel_values')}
        with get_precision_context(state.precision, state.precision_config):
            features = [self.initial(state.device.batch_to_device(part)['pixel_values'])
                        for part in self.split_batch(pixels, size)]
        state.batch['initial_image_features'] = torch.cat(features)


class PatchDropout(Algorithm):
    """Leave out a share of the patches in every vision tower of a model during training.

    The choice of patches depends on the ``sample_seed`` of the batch, not on the microbatch or the rank.

    Args:
        rate: Share of the patches to leave out.
    """

    def __init__(self, rate: Annotated[float, Field(ge=0, lt=1)] = 0.5) -> None:
        self.rate = rate

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        for module in state.model.modules():
            if isinstance(module, VisionEncoder):
                module.drop_patches(self.rate)
