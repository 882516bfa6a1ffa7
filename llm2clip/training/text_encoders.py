# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The text encoders that stage 2 trains: loaded, put into its model, and written when it ends."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

from composer import Trainer
from composer.utils import dist, reproducibility
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from llm2clip.config import LoraConfig, Stage2Config, TextEncoderConfig, TrainableTextConfig
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer, TextEncoder
from llm2clip.teacher.clip_text import KIND as CLIP_TEXT_KIND
from llm2clip.teacher.clip_text import ClipTextTower, load_clip_text, load_clip_tokenizer, save_clip_text
from llm2clip.teacher.llm import KIND as TEACHER_KIND
from llm2clip.teacher.llm import build_text_encoder, load_caption_tokenizer, save_teacher, teacher_config
from llm2clip.training.algorithms.weights import averaged_weights
from llm2clip.training.runs import CLIP_TEXT_FOLDER, TEACHER_FOLDER

__all__ = ['TrainedTexts', 'load_trained_encoders', 'text_folders']

KEY = 'trainable_text.clip'


class TrainedTexts(NamedTuple):
    """The encoders that a run trains, each with what tokenises for it."""

    llm: Optional[tuple[TextEncoder, Callable[..., dict[str, Any]]]] = None
    clip: Optional[tuple[ClipTextTower, Callable[..., dict[str, Any]]]] = None
    llm_tokenizer: Optional[CaptionTokenizer] = None
    """What is written with the LLM."""

    @classmethod
    def load(cls, config: Stage2Config) -> 'TrainedTexts':
        """The encoders of a training that begins; one that is resumed gets their weights from its checkpoint."""
        reproducibility.seed_all(config.seed)
        llm = None
        if config.trainable_text.lora is not None:
            # In which LoRA is merged, and of which FSDP needs all weights to be.
            llm = dataclasses.replace(teacher_config(config.teacher), dtype='float32')
        encoder, tower = load_trained_encoders(
            config.trainable_text, llm, config.fsdp is not None and dist.get_global_rank() > 0)
        tokenizer, clip = None if llm is None else load_caption_tokenizer(llm), config.trainable_text.clip
        return cls(
            None if encoder is None or tokenizer is None else (encoder, tokenizer.packed),
            None if tower is None or clip is None else (tower, load_clip_tokenizer(clip, KEY)), tokenizer)

    def save(self, lora: Optional[LoraConfig], trainer: Trainer, run: str) -> None:
        """Write the encoders that a trainer has trained, with `ema` their averaged weights, into the folder of its run;
        every rank calls this."""
        state = trainer.state
        model: Any = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
        with averaged_weights(state):
            if self.llm_tokenizer is not None:
                save_teacher(model.text_encoder, self.llm_tokenizer, lora, Path(run, TEACHER_FOLDER))
            if self.clip is not None:
                tokenizer: Any = self.clip[1]
                holder = model.text_encoder if model.beside is None else model.beside  # which FSDP2 shards as one
                weights: Any = get_model_state_dict(
                    holder, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
                if dist.get_global_rank() == 0:
                    prefix = '' if model.beside is None else 'tower.'
                    more = {name: value for name, value in weights.items() if not name.startswith(prefix)}
                    tower = {name.removeprefix(prefix): value for name, value in weights.items() if name not in more}
                    save_clip_text(self.clip[0], tower, tokenizer, Path(run, CLIP_TEXT_FOLDER), more)
                dist.barrier()


def load_trained_encoders(
    texts: TrainableTextConfig, llm: Optional[TextEncoderConfig], on_meta: bool = False, load_weights: bool = True
) -> tuple[Optional[TextEncoder], Optional[ClipTextTower]]:
    """The teacher's LLM with new LoRA weights, and CLIP's text tower, with its weights or not, where a run trains them.

    With `on_meta`, the LLM has no memory for its weights.  Under FSDP every rank but the first does so.
    """
    encoder = None
    if texts.lora is not None and llm is not None:
        encoder = build_text_encoder(llm, texts.lora, on_meta, 'trainable_text.lora')
    return encoder, None if texts.clip is None else load_clip_text(texts.clip, KEY, load_weights)


def text_folders(texts: TrainableTextConfig, run: str) -> dict[Path, str]:
    """Where a run writes the encoders that it trains when it ends, and what they are."""
    return {**({Path(run, TEACHER_FOLDER): TEACHER_KIND} if texts.lora is not None else {}),
            **({Path(run, CLIP_TEXT_FOLDER): CLIP_TEXT_KIND} if texts.clip is not None else {})}
