# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The frozen LLM in the loop, in place of a sidecar: for data that is seen once, or captions that change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from composer.core import Algorithm, Event, State
from composer.devices import Device
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from llm2clip.float32 import exact_float32
from llm2clip.remote_code.text_encoder_llm2clip import TextEncoder, encode_tokens
from llm2clip.teacher.folder import load_teacher

__all__ = ['OnlineTeacher', 'load_online_teacher', 'shard_encoder']


def shard_encoder(encoder: TextEncoder, mesh: DeviceMesh) -> None:
    """Spread a frozen encoder over the ranks of a mesh with FSDP2, a decoder layer at a time."""
    for module in encoder.modules():
        if encoder.fsdp_wrap_fn(module):
            fully_shard(module, mesh=mesh)
    fully_shard(encoder, mesh=mesh)


class OnlineTeacher(Algorithm):
    """Replace a batch's ``caption`` by ``text_embedding``, in float16 as a sidecar has it.

    Batches hold a list of B captions, or K of them where an image has K captions; the vector of an absent caption, an
    empty text, is zero.  It has to come after `GradCache` in the trainer's list of algorithms, and so before it in a
    step; the LLM then runs once per caption.

    Args:
        encoder: Frozen, in evaluation mode, on its device.
        tokenizer: The encoder's.
        batch_tokens: Tokens per forward pass.
        precision: ``fp32``, or ``amp_bf16`` for autocast.
        sharded: Whether `shard_encoder` spread the encoder.
        keep: Whether the batch keeps its ``caption``, for another encoder.
    """

    def __init__(
        self, encoder: TextEncoder, tokenizer: Any, batch_tokens: int = 4096, precision: str = 'fp32',
        sharded: bool = False, keep: bool = False,
    ) -> None:
        self.encoder, self.tokenizer = encoder, tokenizer
        self.batch_tokens, self.precision, self.sharded, self.keep = batch_tokens, precision, sharded, keep

    def match(self, event: Event, state: State) -> bool:
        # Batches of zero-shot sets have none.
        return event in (Event.AFTER_DATALOADER, Event.EVAL_BATCH_START) and 'caption' in state.batch

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        captions = state.batch['caption'] if self.keep else state.batch.pop('caption')
        if isinstance(captions[0], str):
            state.batch['text_embedding'] = self.embed(captions)
        else:
            state.batch['text_embedding'] = torch.stack([self.embed(column) for column in captions], dim=1)

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """``(N, llm_embed_dim)`` in float16 on the encoder's device."""
        absent = [not text.strip() for text in texts]
        # A dash in place of an absent caption: every rank of a sharded encoder has something to read.
        tokens = self.tokenizer.tokenize(['-' if gap else text for gap, text in zip(absent, texts)])
        with exact_float32(next(self.encoder.parameters()).device.type):
            vectors = encode_tokens(self.encoder, tokens, self.batch_tokens, self.precision, self.sharded).half()
        gaps = torch.tensor(absent)[:, None].to(vectors.device, non_blocking=True)
        return vectors.masked_fill_(gaps, 0)


def load_online_teacher(
    folder: Union[str, Path], device: Device, batch_tokens: int, precision: str, sharded: bool, keep: bool = False
) -> OnlineTeacher:
    """The teacher in a folder that stage 1 wrote.

    Args:
        folder: Of the teacher.
        device: Where it runs.
        batch_tokens: As for `OnlineTeacher`.
        precision: As for `OnlineTeacher`.
        sharded: Spread it over the ranks, which read it one after the other: a host holds it in full only once.
        keep: As for `OnlineTeacher`.
    """
    encoder = tokenizer = None
    for turn in range(dist.get_local_world_size()):
        if turn == dist.get_local_rank() or not sharded:
            # Sharding wants one type for all weights.
            encoder, tokenizer = load_teacher(folder, 'float32' if sharded else None)
            if sharded:
                device_type = 'cpu' if device.name == 'cpu' else 'cuda'
                shard_encoder(encoder, init_device_mesh(device_type, (dist.get_world_size(),)))
            else:
                encoder = device.module_to_device(encoder)
        if not sharded:
            break
        dist.barrier()
    assert encoder is not None
    return OnlineTeacher(encoder, tokenizer, batch_tokens, precision, sharded, keep)
