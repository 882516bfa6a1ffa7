# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Models that can be evaluated: a stage-2 run, an exported folder, or a Hugging Face CLIP with its text
tower."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModel

from llm2clip.config import ClipTextConfig, EvaluatedModelConfig
from llm2clip.config.ranges import TeacherPrecision
from llm2clip.data.images import decode_image, decode_pixels
from llm2clip.data.vectors import concatenate
from llm2clip.device import Device
from llm2clip.errors import ConfigError, under
from llm2clip.export.hf import LLM2CLIPConfig, LLM2CLIPModel, is_exported
from llm2clip.io.files import reading
from llm2clip.modeling.image_processing_llm2clip import resize_and_crop
from llm2clip.modeling.loaders import load_checked, load_config
from llm2clip.models.llm2clip import LLM2CLIP, check_truncate_dim, truncate_dims
from llm2clip.ranks import once_per_node, round_robin, rows
from llm2clip.teacher.caption_teacher import CachedTeacher, TeacherSource
from llm2clip.teacher.clip_text import ClipText, load_clip_tokenizer
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.teacher.sources import teacher_in, teacher_sources
from llm2clip.training.runs import Stage2Run

_TEXTS = 256
Teacher = Callable[[Sequence[str]], tuple[torch.Tensor, int]]


def _preprocess(image_size: int, data: bytes, name: str) -> torch.Tensor:
    """Decode, resize and crop an image to uint8 ``(3, H, W)``, as the evaluation during training does."""
    return resize_and_crop(decode_pixels(data, name), image_size)


class TrainedLLM2CLIP:
    """Vision tower, text adapter and teacher, which map images and texts to unit vectors in one space.

    `preprocess` is picklable and turns an encoded image and its name into pixels ``(3, H, W)``.  `teacher`
    turns texts into text embeddings ``(N, llm_embed_dim)`` on the CPU and the number of truncated texts.
    """

    def __init__(self, model: LLM2CLIP, teacher: Teacher, precision: TeacherPrecision = 'fp32') -> None:
        self.model, self.teacher, self.precision = model, teacher, precision
        self.device = model.logit_scale.device
        self.preprocess = partial(_preprocess, model.vision_encoder.preprocessing.image_size)

    @torch.no_grad()
    def image_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features ``(B, D)`` and pooled states ``(B, W)`` of pixels ``(B, 3, H, W)`` on `device`."""
        with _autocast(self):
            pooled = self.model.vision_encoder(pixel_values)
            projected = self.model.visual_projection(pooled)
        return F.normalize(projected.float(), dim=-1), pooled.float()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        """Return the features ``(N, D)`` of N texts on the CPU, and the number of truncated texts.

        Every rank calls this and embeds a share of the texts; only the first rank gets rows.
        """
        vectors, truncated = self.teacher(texts)
        with _autocast(self):
            features = [self.model.get_text_features(block.to(self.device)).cpu()
                        for block in vectors.split(4096) if len(block)]
        return rows(features), truncated


def _preprocess_theirs(processor: Any, data: bytes, name: str) -> torch.Tensor:
    """Preprocess an image with a Hugging Face image processor."""
    return processor(images=decode_image(data, name), return_tensors='pt')['pixel_values'][0]


def _tensor(features: Any) -> torch.Tensor:
    """Tensor of a model's features: transformers 4 returns the tensor, transformers 5 an output object."""
    return getattr(features, 'pooler_output', features)


class HuggingFaceCLIP:
    """CLIP, SigLIP or another model of transformers, with the interface of `TrainedLLM2CLIP`.

    Raises:
        FileError, LoadError: The model is missing or damaged.
    """

    def __init__(self, name: str, device: Device, precision: TeacherPrecision = 'fp32') -> None:
        self.precision = precision
        where = f'pretrained: {name}'
        model, _ = load_checked(AutoModel.from_pretrained, name, where=where, more=True,
                                trust_remote_code=False, config=load_config(name, where), dtype=torch.float32)
        self.tokenizer = load_clip_tokenizer(ClipTextConfig(name))
        with reading(where, 'an image processor of transformers'):
            self.preprocess = partial(_preprocess_theirs,
                                      AutoImageProcessor.from_pretrained(name, trust_remote_code=False))
        self.model: Any = device.module_to_device(model.eval().requires_grad_(False))
        self.device = next(self.model.parameters()).device
        self._pooled = torch.empty(0)
        # transformers 5 overwrites the pooled features in the output object, but not this tensor.
        self.model.vision_model.register_forward_hook(
            lambda module, inputs, outputs: setattr(self, '_pooled', outputs.pooler_output))

    @torch.no_grad()
    def image_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with _autocast(self):
            projected = _tensor(self.model.get_image_features(pixel_values=pixel_values))
        return F.normalize(projected.float(), dim=-1), self._pooled.float()

    def text_features(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        blocks = [list(texts[start:start + _TEXTS]) for start in range(0, len(texts), _TEXTS)]
        encoded = list(round_robin(blocks, partial(map, self._encode_texts)))
        return rows(features for features, _ in encoded), sum(truncated for _, truncated in encoded)

    @torch.no_grad()
    def _encode_texts(self, texts: list[str]) -> tuple[torch.Tensor, int]:
        tokens = self.tokenizer.tokenize(texts)
        batch = {name: ids.to(self.device) for name, ids in self.tokenizer.pad(tokens).items()}
        with _autocast(self):
            features = _tensor(self.model.get_text_features(**batch))
        return F.normalize(features.float(), dim=-1).cpu(), sum(text.cut > 0 for text in tokens)


EvaluatedModel = Union[TrainedLLM2CLIP, HuggingFaceCLIP]


def _autocast(model: EvaluatedModel) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.precision == 'amp_bf16')


def check_evaluated_model(config: EvaluatedModelConfig) -> list[tuple[TeacherSource, Optional[Fingerprint]]]:
    """Check the folders of a model, without reading weights.

    Returns:
        Teachers of the model, each with the fingerprint of the teacher of its training, if known; none for
        `pretrained`.

    Raises:
        ConfigError: A folder is of the wrong kind, or the teacher is missing.
        ValueError: The teacher is not the one that the model was trained with.
    """
    if config.pretrained is not None:
        return []
    folder = config.run or config.export
    teachers = teacher_sources(config.teacher)
    if config.run is not None:
        run = Stage2Run(config.run, config.weights, config.wise_ft_alpha)
        check_truncate_dim(config.truncate_dim, run.config.model)
        if run.clip_text is not None:
            return [(ClipText(run.clip_text, cut=True), None)]
        expected = run.final_record.teacher
        teachers = teachers or teacher_sources(run.teacher, config.trust_remote_code)
    else:
        assert config.export is not None
        if not is_exported(config.export):
            raise ConfigError(f'{config.export} is no folder that export_hf wrote (it has no config.json of '
                              f'model_type {LLM2CLIPConfig.model_type})', key='export')
        exported = LLM2CLIPConfig.from_pretrained(config.export)
        check_truncate_dim(config.truncate_dim, exported.model_config())
        expected = exported.teachers()
        if not teachers:
            folders = filter(Path.is_dir, LLM2CLIPModel.teacher_folders(Path(config.export)))
            teachers = [teacher_in(path, fingerprint, config.trust_remote_code)
                        for path, fingerprint in zip(folders, expected)]
    if len(teachers) != len(expected):
        raise ConfigError(f'{len(teachers)} teachers named here or by {folder}, expected {len(expected)}, in '
                          'the order of training', key='teacher')
    for teacher, fingerprint in zip(teachers, expected):
        with under('teacher'):
            teacher.check_encoding(fingerprint, str(folder))
    return list(zip(teachers, expected))


def load_evaluated_model(
    config: EvaluatedModelConfig, cache: Union[str, Path], device: Device
) -> EvaluatedModel:
    """Load a configured model and its teachers on a device; `cache` is a folder of text embeddings.

    Raises the errors of `check_evaluated_model` and of damaged files.
    """
    sources = check_evaluated_model(config)
    if config.pretrained is not None:
        return HuggingFaceCLIP(config.pretrained, device, config.precision)
    if config.run is not None:
        run = Stage2Run(config.run, config.weights, config.wise_ft_alpha)
        model, model_config = run.load_model(), run.config.model
    else:
        exported = LLM2CLIPModel.from_pretrained(config.export).eval()
        model, model_config = exported.model, exported.config.model_config()
    truncate_dims(model, model_config, config.truncate_dim)
    teachers = []
    for source, expected in sources:
        fingerprint = once_per_node(source.fingerprint, f'teacher {source.name}')
        if expected is not None:
            fingerprint.check(expected, source.name, str(config.run or config.export))
        load = partial(source.load, device, config.batch_tokens, config.precision, fingerprint)
        teachers.append(CachedTeacher(cache, fingerprint, config.precision, load))

    def concatenated(texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        """Text embeddings of all teachers, and the number of texts that the teacher with most truncated."""
        vectors, truncated = zip(*(teacher(texts) for teacher in teachers))
        return concatenate(vectors), max(truncated)

    return TrainedLLM2CLIP(device.module_to_device(model), concatenated, config.precision)
