# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The trained model as a Hugging Face folder, and the class that loads it."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModel, CLIPImageProcessorFast, PretrainedConfig, PreTrainedModel
from transformers.image_utils import PILImageResampling

from llm2clip.config import ModelConfig
from llm2clip.folders import complete_folder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.teacher import load_teacher
from llm2clip.models.text_encoder import encode_texts
from llm2clip.preprocessing import Preprocessing

__all__ = ['LLM2CLIPConfig', 'LLM2CLIPModel', 'export_folder', 'image_processor']

TEACHER_FOLDER = 'teacher'


class LLM2CLIPConfig(PretrainedConfig):
    """Configuration of `LLM2CLIPModel`.

    Args:
        model: The fields of `ModelConfig`.
        llm_embed_dim: Width of the teacher's vectors.
        teacher: Fingerprint of the teacher.
        **kwargs: Passed to PretrainedConfig.
    """

    model_type = 'llm2clip'

    def __init__(
        self,
        model: Optional[dict[str, Any]] = None,
        llm_embed_dim: int = 0,
        teacher: Optional[dict[str, Any]] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model = model or {}
        self.llm_embed_dim = llm_embed_dim
        self.teacher = teacher or {}

    def model_config(self) -> ModelConfig:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), self.model)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]


class LLM2CLIPModel(PreTrainedModel):
    """Vision tower, adapter and, on demand, the teacher that lies in the folder's ``teacher/``."""

    config_class = LLM2CLIPConfig
    main_input_name = 'pixel_values'

    def __init__(self, config: LLM2CLIPConfig) -> None:
        super().__init__(config)
        self.model = LLM2CLIP(config.model_config(), config.llm_embed_dim, load_weights=False)
        self._teacher: Optional[tuple[Any, Any]] = None

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Weights come from the folder."""

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(B, 3, H, W)`` from the image processor -> ``(B, embed_dim)``, L2-normalised."""
        return self.model.get_image_features(pixel_values)

    def get_text_features(
        self, texts: Optional[Sequence[str]] = None, text_embedding: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Captions, or the teacher's vectors ``(B, llm_embed_dim)`` -> ``(B, embed_dim)``, L2-normalised."""
        if (texts is None) == (text_embedding is None):
            raise ValueError('give either texts or text_embedding')
        if texts is not None:
            encoder, tokenizer = self.teacher()
            text_embedding = encode_texts(encoder, tokenizer, list(texts))
        assert text_embedding is not None
        return self.model.get_text_features(text_embedding.to(self.device))

    def teacher(self) -> tuple[Any, Any]:
        """The frozen text encoder and its tokenizer, loaded at the first call."""
        if self._teacher is None:
            encoder, tokenizer = load_teacher(Path(self.name_or_path or '.', TEACHER_FOLDER))
            # Held in a tuple, so that it is no submodule and not saved with this model.
            self._teacher = encoder.to(self.device), tokenizer
        return self._teacher

    def forward(self, pixel_values: torch.Tensor, text_embedding: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of both sides and ``logits_per_image`` ``(B_images, B_texts)``."""
        outputs = self.model(pixel_values, text_embedding)
        logits = outputs['logit_scale'].exp() * outputs['image_features'] @ outputs['text_features'].T
        return {'image_features': outputs['image_features'], 'text_features': outputs['text_features'],
                'logits_per_image': logits + outputs.get('logit_bias', 0.0)}


def image_processor(preprocessing: Preprocessing) -> CLIPImageProcessorFast:
    """The evaluation transform as transformers has it."""
    size = preprocessing.image_size
    return CLIPImageProcessorFast(
        do_resize=True, size={'shortest_edge': size}, resample=PILImageResampling.BICUBIC, do_center_crop=True,
        crop_size={'height': size, 'width': size}, do_rescale=True, do_normalize=True,
        image_mean=list(preprocessing.mean), image_std=list(preprocessing.std), do_convert_rgb=True)


def export_folder(
    model: LLM2CLIP, config: ModelConfig, record: dict[str, Any], teacher: Union[str, Path], out: Union[str, Path]
) -> None:
    """Write everything that `AutoModel.from_pretrained` needs after ``import llm2clip``.

    Args:
        model: The trained model.
        config: Its configuration.
        record: Teacher fingerprint and `llm_embed_dim` of the run.
        teacher: Folder of the teacher, copied into the export.
        out: The folder to write.
    """
    hf_config = LLM2CLIPConfig(model=_portable(model, config), llm_embed_dim=record['llm_embed_dim'],
                               teacher=record['teacher'])
    exported = LLM2CLIPModel(hf_config)
    exported.model.load_state_dict(model.state_dict())
    with complete_folder(out) as partial:
        exported.save_pretrained(partial, safe_serialization=True)
        image_processor(model.vision_encoder.preprocessing).save_pretrained(partial)
        shutil.copytree(teacher, partial / TEACHER_FOLDER)


def _portable(model: LLM2CLIP, config: ModelConfig) -> dict[str, Any]:
    """The model's configuration without where its first weights came from, and with all that was read there."""
    fields = dataclasses.asdict(config)
    vision = model.vision_encoder
    fields['vision'].update(pretrained=False, checkpoint=None, remap=False, mean=list(vision.preprocessing.mean),
                            std=list(vision.preprocessing.std), architecture=vision.tower.architecture())
    return fields


AutoConfig.register('llm2clip', LLM2CLIPConfig)
AutoModel.register(LLM2CLIPConfig, LLM2CLIPModel)
