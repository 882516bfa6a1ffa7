# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The frozen teacher in the loop, in place of a sidecar: for data that is seen once, or captions that change."""

from collections.abc import Sequence
from typing import Optional

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from llm2clip.device import exact_float32
from llm2clip.teacher.caption_teacher import CaptionTeacher

__all__ = ['OnlineTeacher']


class OnlineTeacher(Algorithm):
    """Replace a batch's ``caption`` by ``text_embedding``, in float16 as a sidecar has it.

    Batches hold a list of B captions, or K of them where an image has K captions; the vector of an absent caption, an
    empty text, is zero.  It has to come after `GradCache` in the trainer's list of algorithms, and so before it in a
    step; the teacher then runs once per caption.

    Args:
        teacher: On its device.
        keep: Whether the batch keeps its ``caption``, for another encoder.
    """

    def __init__(self, teacher: CaptionTeacher, keep: bool = False) -> None:
        self.teacher, self.keep = teacher, keep

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
        """``(N, llm_embed_dim)`` in float16 on the teacher's device."""
        absent = [not text.strip() for text in texts]
        # A dash in place of an absent caption: every rank of a sharded encoder has something to read.
        with exact_float32(self.teacher.device.type):
            vectors = self.teacher.embed(['-' if gap else text for gap, text in zip(absent, texts)]).vectors.half()
        gaps = torch.tensor(absent)[:, None].to(vectors.device, non_blocking=True)
        return vectors.masked_fill_(gaps, 0)
