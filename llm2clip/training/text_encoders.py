# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Load the text encoder that stage 2 trains, and write it at the end of the run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from composer.utils import reproducibility
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from llm2clip.config import LoraConfig, Stage2Config, TextEncoderConfig, TrainableTextConfig
from llm2clip.errors import under
from llm2clip.modeling.text_encoder import TextEncoder
from llm2clip.ranks import dist, is_first, once_per_node
from llm2clip.teacher.clip_text import KIND as CLIP_TEXT_KIND
from llm2clip.teacher.clip_text import ClipTextTower, load_clip_text, load_clip_tokenizer, save_clip_text
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord
from llm2clip.teacher.llm import KIND as TEACHER_KIND
from llm2clip.teacher.llm import build_text_encoder, load_caption_tokenizer, save_teacher, teacher_config
from llm2clip.teacher.sources import teacher_source
from llm2clip.training.runs import CLIP_TEXT_FOLDER, TEACHER_FOLDER

KEY = 'trainable_text.clip'


class TrainedText(NamedTuple):
    """Trainable text encoder of a run, its tokenizer function, and the tokenizer to write with it."""

    encoder: Union[TextEncoder, ClipTextTower]
    tokenize: Callable[..., dict[str, Any]]
    tokenizer: Any = None

    @classmethod
    def load(cls, config: Stage2Config) -> 'TrainedText':
        """Load the encoder with its initial weights, which the checkpoint of a resumed run replaces."""
        reproducibility.seed_all(config.seed)
        clip = config.trainable_text.clip
        if clip is not None:
            with under(KEY):
                tokenizer = load_clip_tokenizer(clip)
            return cls(load_trained_encoder(config.trainable_text), tokenizer, tokenizer)
        # LoRA is merged in float32, and FSDP needs one dtype for all weights.
        llm = dataclasses.replace(teacher_config(config.teacher), dtype='float32')
        on_meta = config.fsdp is not None and not is_first()
        encoder = load_trained_encoder(config.trainable_text, llm, on_meta)
        tokenizer = load_caption_tokenizer(llm)
        return cls(encoder, tokenizer.packed, tokenizer)

    def record(self, config: Stage2Config) -> TeacherRecord:
        """Return the record of the encoder before training; every rank calls this."""
        if config.trainable_text.clip is None:
            source = teacher_source(config.teacher)
            fingerprint = once_per_node(source.fingerprint, f'teacher {source.name}')
        else:
            encoding = {'clip_text': self.encoder.config.model_type}
            encoding |= dataclasses.asdict(config.trainable_text.clip)
            fingerprint = Fingerprint.of('trained with the vision tower', encoding)
        return TeacherRecord(fingerprint, {'llm_embed_dim': self.encoder.llm_embed_dim})

    def save(self, lora: Optional[LoraConfig], run: str) -> None:
        """Write the trained encoder into a run's folder; every rank calls this."""
        if isinstance(self.encoder, TextEncoder):
            save_teacher(self.encoder, self.tokenizer, lora, Path(run, TEACHER_FOLDER))
            return
        weights: Any = get_model_state_dict(
            self.encoder, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if is_first():
            save_clip_text(self.encoder, weights, self.tokenizer, Path(run, CLIP_TEXT_FOLDER))
        dist.barrier()


def load_trained_encoder(
    texts: TrainableTextConfig, llm: Optional[TextEncoderConfig] = None, on_meta: bool = False,
    load_weights: bool = True,
) -> Union[TextEncoder, ClipTextTower]:
    """Load CLIP's text tower, or the teacher's LLM `llm` with new LoRA weights.

    With `on_meta`, the LLM's weights are on the meta device, as on all ranks but the first under FSDP.
    `load_weights` loads the tower's weights.
    """
    if texts.clip is not None:
        with under(KEY):
            return load_clip_text(texts.clip, load_weights)
    assert llm is not None
    with under('trainable_text'):
        return build_text_encoder(llm, texts.lora, on_meta)


def text_folders(texts: TrainableTextConfig, run: str) -> dict[Path, str]:
    """Map the output folder of a run's trained encoder, if any, to its kind."""
    folders: dict[Path, str] = {}
    if texts.lora is not None:
        folders[Path(run, TEACHER_FOLDER)] = TEACHER_KIND
    if texts.clip is not None:
        folders[Path(run, CLIP_TEXT_FOLDER)] = CLIP_TEXT_KIND
    return folders
