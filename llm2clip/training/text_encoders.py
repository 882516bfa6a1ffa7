# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Load the text encoders that stage 2 trains, and write them at the end of the run."""

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
    """Trainable text encoders of a run, each with its tokenizer function."""

    llm: Optional[tuple[TextEncoder, Callable[..., dict[str, Any]]]] = None
    clip: Optional[tuple[ClipTextTower, Callable[..., dict[str, Any]]]] = None
    llm_tokenizer: Optional[CaptionTokenizer] = None
    """Tokenizer to write with the LLM."""

    @classmethod
    def load(cls, config: Stage2Config) -> 'TrainedTexts':
        """Load the encoders with initial weights; a resumed run then loads trained weights from its checkpoint."""
        reproducibility.seed_all(config.seed)
        llm = None
        if config.trainable_text.lora is not None:
            # LoRA is merged in float32, and FSDP needs one dtype for all weights.
            llm = dataclasses.replace(teacher_config(config.teacher), dtype='float32')
        encoder, tower = load_trained_encoders(
            config.trainable_text, llm, config.fsdp is not None and dist.get_global_rank() > 0)
        tokenizer, clip = None if llm is None else load_caption_tokenizer(llm), config.trainable_text.clip
        return cls(
            None if encoder is None or tokenizer is None else (encoder, tokenizer.packed),
            None if tower is None or clip is None else (tower, load_clip_tokenizer(clip, KEY)), tokenizer)

    def save(self, lora: Optional[LoraConfig], trainer: Trainer, run: str) -> None:
        """Write the trained encoders (their averaged weights with `ema`) into a run's folder; every rank calls this."""
        state = trainer.state
        model: Any = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
        with averaged_weights(state):
            if self.llm_tokenizer is not None:
                save_teacher(model.text_encoder, self.llm_tokenizer, lora, Path(run, TEACHER_FOLDER))
            if self.clip is not None:
                tokenizer: Any = self.clip[1]
                holder = model.text_encoder if model.beside is None else model.beside  # sharded by FSDP2 as a whole
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
    """Load the teacher's LLM with new LoRA weights, and CLIP's text tower; None for an encoder that is not trained.

    With `on_meta`, the LLM's weights are on the meta device, as on all ranks but the first under FSDP.  `load_weights`
    loads the tower's weights.
    """
    encoder = None
    if texts.lora is not None and llm is not None:
        encoder = build_text_encoder(llm, texts.lora, on_meta, 'trainable_text.lora')
    return encoder, None if texts.clip is None else load_clip_text(texts.clip, KEY, load_weights)


def text_folders(texts: TrainableTextConfig, run: str) -> dict[Path, str]:
    """Map the output folders of a run's trained encoders to their kinds."""
    return {**({Path(run, TEACHER_FOLDER): TEACHER_KIND} if texts.lora is not None else {}),
            **({Path(run, CLIP_TEXT_FOLDER): CLIP_TEXT_KIND} if texts.clip is not None else {})}
