# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Export of the trained vision tower in the class of its library, or of both trained towers as a
`CLIPModel`."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import timm
import timm.models
import torch
import torch.nn as nn
from markupsafe import Markup
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from llm2clip.config import ModelConfig, Stage2Config
from llm2clip.data.images import Preprocessing
from llm2clip.device import get_device
from llm2clip.errors import ConfigError
from llm2clip.export.check import check_pictures, check_pixels, check_same, noise
from llm2clip.export.hf import KIND as MODEL_KIND
from llm2clip.export.model_card import model_card
from llm2clip.io.files import write_json
from llm2clip.io.folders import atomic_folder
from llm2clip.io.tensors import published_state
from llm2clip.modeling.image_processing_llm2clip import upright_rgb
from llm2clip.modeling.loaders import keep_readable, load_tokenizer
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.towers import TimmTower, copy_registration
from llm2clip.teacher.clip_text import ClipText
from llm2clip.teacher.fingerprint import TeacherRecord

KIND = 'vision tower'
# The second text is truncated.
_TEXTS = ['a red square', 'a blue circle on a plain wall, painted by somebody ' + 'who likes walls ' * 50]
_Features = Callable[[torch.Tensor], torch.Tensor]


def export_vision(
    model: LLM2CLIP, config: ModelConfig, record: TeacherRecord, out: Union[str, Path],
    projection: bool = True, run: Optional[Stage2Config] = None, wise_ft_alpha: float = 1.0,
) -> str:
    """Write a folder that transformers or timm loads without this package;
    return the name of the class or model.

    The folder is read back, and appears only if it gives the features of `model`, which is in evaluation
    mode.  `projection` includes the projection into the joint space if the class has a place for it: in a
    `CLIPVisionModelWithProjection`, or as the classifier of a timm model.  The rest is for the model card.

    Raises:
        ConfigError: The projection does not fit the class, or the export does not give the tower's features.
    """
    if config.vision.feature_levels or config.vision.beside:
        raise ConfigError('has features of several maps or towers (model.vision.feature_levels, beside), but '
                          'a model of timm or transformers has its pooled features only; export_hf exports '
                          'the whole model', key='run')
    is_timm = isinstance(model.vision_encoder.tower, TimmTower)
    has_place = is_timm or isinstance(model.vision_encoder.trunk, CLIPVisionModel)
    projection = projection and has_place and isinstance(model.visual_projection, nn.Linear)

    def expected(pixels: torch.Tensor) -> torch.Tensor:
        """Features of the checkpoint before L2 normalisation."""
        pooled = model.vision_encoder(pixels.to(model.logit_scale.device))
        return model.visual_projection(pooled) if projection else pooled

    with atomic_folder(out, KIND) as unfinished:
        if is_timm:
            library = 'timm'
            name = _save_timm(model, unfinished, projection, expected)
            values = {}
        else:
            library = 'transformers'
            name, values = _save_transformers(model, unfinished, projection, expected)
        has_code = copy_registration(model.vision_encoder.trunk, unfinished)
        card = model_card(config, record.teacher, run, wise_ft_alpha, template='vision.md.j2',
                          title=f'Vision tower of LLM2CLIP, {name}', projection=projection,
                          upright_source=upright_source(), library_name=library, has_code=has_code,
                          pipeline_tag='image-feature-extraction', **values)
        card.save(unfinished / 'README.md')
    return name


def upright_source() -> Markup:
    """Source code of `upright_rgb` for model cards, without imports."""
    return Markup(inspect.getsource(upright_rgb).strip())


def save_image_processor(preprocessing: Preprocessing, folder: Path) -> None:
    """Save the evaluation transform for upright RGB pictures as an image processor of transformers."""
    size = preprocessing.image_size
    write_json(folder / 'preprocessor_config.json', {
        'crop_size': {'height': size, 'width': size},
        'do_center_crop': True,
        'do_convert_rgb': True,
        'do_normalize': True,
        'do_rescale': True,
        'do_resize': True,
        'image_mean': preprocessing.mean,
        # Both versions of transformers know this name; in 4, the one without `Fast` has different pixels.
        'image_processor_type': 'CLIPImageProcessorFast',
        'image_std': preprocessing.std,
        'resample': Image.Resampling.BICUBIC,
        'rescale_factor': 1 / 255,
        'size': {'shortest_edge': size},
    })


def _save_timm(model: LLM2CLIP, folder: Path, projection: bool, expected: _Features) -> str:
    """Save the tower in timm's Hub layout, and return the name of the architecture."""
    encoder = model.vision_encoder
    # After training, weights may be in `channels_last`, which safetensors does not accept.
    trunk: Any = copy.deepcopy(encoder.trunk)
    trunk = trunk.cpu().to(memory_format=torch.contiguous_format)
    name = trunk.pretrained_cfg['architecture']
    if projection:
        trunk.reset_classifier(model.visual_projection.out_features)
        head = trunk.get_classifier()
        if not isinstance(head, nn.Linear):
            raise ConfigError(f'{name} has no linear classifier in whose place it could be; leave it out by '
                              'projection=false', key='projection')
        # The classifier has a bias, the projection may have none.
        state = model.visual_projection.state_dict()
        state.setdefault('bias', torch.zeros(head.out_features))
        head.load_state_dict(state)
    preprocessing = encoder.preprocessing
    size = preprocessing.image_size
    timm.models.save_for_hf(trunk, str(folder), safe_serialization=True, data_config={
        'input_size': (3, size, size), 'mean': preprocessing.mean, 'std': preprocessing.std,
        'interpolation': 'bicubic', 'crop_pct': 1.0, 'crop_mode': 'center'})
    device = model.logit_scale.device
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval().to(device)
    check_same(loaded, expected, noise(2, 3, size, size).to(device), f'timm model {name}')
    transform: Any = create_transform(**resolve_model_data_config(loaded), is_training=False)
    check_pixels(lambda image: transform(upright_rgb(image)), preprocessing, "timm's transform")
    return name


def _save_transformers(
    model: LLM2CLIP, folder: Path, projection: bool, expected: _Features
) -> tuple[str, dict[str, Any]]:
    """Save a model and its image processor; return the class name and values for the card's template."""
    trunk: Any = model.vision_encoder.trunk
    native: Any = trunk
    if projection:
        linear: Any = model.visual_projection
        if linear.bias is not None:
            raise ConfigError('the projection of CLIPVisionModelWithProjection has no bias, that of this '
                              'model has one; leave it out by projection=false', key='projection')
        config = copy.deepcopy(trunk.config)
        config.projection_dim = linear.out_features
        native = CLIPVisionModelWithProjection(config)
        native.load_state_dict(published_state(trunk) | {'visual_projection.weight': linear.weight})
    native.save_pretrained(folder, safe_serialization=True, state_dict=published_state(native))
    preprocessing = model.vision_encoder.preprocessing
    save_image_processor(preprocessing, folder)

    name = type(native).__name__
    has_pooler = getattr(trunk, 'pooler', 0) is not None
    output = 'pooler_output'
    arguments = {}
    if projection:
        output = 'image_embeds'
    elif not has_pooler:
        output = 'last_hidden_state'
        arguments['add_pooling_layer'] = False
    device = model.logit_scale.device
    loaded = type(native).from_pretrained(folder, **arguments).eval().to(device)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        values = loaded(pixels)[output]
        return values.flatten(1) if has_pooler else values[:, 0]

    pixels = noise(2, 3, preprocessing.image_size, preprocessing.image_size)
    check_same(features, expected, pixels.to(device), name)
    processor: Any = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    check_pictures(
        lambda image: features(processor(upright_rgb(image), return_tensors='pt')['pixel_values'].to(device)),
        expected, preprocessing, name)
    return name, {'class_name': name, 'output': output, 'pooler': has_pooler}


def export_clip(
    model: LLM2CLIP, config: ModelConfig, run: Stage2Config, clip_text: Union[str, Path],
    out: Union[str, Path]
) -> None:
    """Write a `CLIPModel` with its processor as a folder, which is read back and must have the features of
    `model`.

    `model` is in evaluation mode.  `clip_text` is the folder of the text tower that the run has trained.

    Raises:
        ConfigError: A part does not fit a `CLIPModel`, or the export gives other features.
    """
    text: Any = ClipText(clip_text, cut=True).load(get_device('cpu'))
    text_tower = text.module.trunk
    vision_tower: Any = model.vision_encoder.trunk
    preprocessing = model.vision_encoder.preprocessing
    projection = model.visual_projection
    adapter = model.adapter
    has_linear_adapter = isinstance(adapter, nn.Linear) and (adapter.bias is None or not adapter.bias.any())
    fitting = {
        f'the text tower {type(text_tower).__name__}': isinstance(text_tower, CLIPTextModelWithProjection),
        f'the vision tower {type(vision_tower).__name__}': isinstance(vision_tower, CLIPVisionModel),
        'model.vision.beside': not config.vision.beside,
        'model.visual_projection': isinstance(projection, nn.Linear) and projection.bias is None,
        'model.adapter': isinstance(adapter, nn.Identity) or has_linear_adapter,
        'model.logit_bias': model.logit_bias is None,
    }
    unfitting = [name for name, fits in fitting.items() if not fits]
    if unfitting:
        raise ConfigError(f'has {", ".join(unfitting)}, which a CLIPModel of transformers has no place for; '
                          'expected the towers of a CLIP, projections without bias and no logit_bias. '
                          f'export_vision exports the vision tower alone, and {clip_text} is the text tower',
                          key='run')
    clip = CLIPModel(CLIPConfig(text_config=text_tower.config.to_dict(),
                                vision_config=vision_tower.config.to_dict(), projection_dim=config.embed_dim))
    state = published_state(vision_tower) | published_state(text_tower)
    if isinstance(adapter, nn.Linear):
        state['text_projection.weight'] = adapter.weight @ state['text_projection.weight']
    clip.load_state_dict(state | {
        'visual_projection.weight': projection.weight, 'logit_scale': model.logit_scale.reshape(())})
    tokenizer = load_tokenizer(clip_text, model_input_names=['input_ids', 'attention_mask'],
                               model_max_length=text.tokenizer.max_length)
    with atomic_folder(out, MODEL_KIND) as partial:
        clip.save_pretrained(partial, safe_serialization=True)
        tokenizer.save_pretrained(partial)
        keep_readable(partial)
        save_image_processor(preprocessing, partial)
        card = model_card(config, None, run, template='clip.md.j2', title='CLIP',
                          pipeline_tag='zero-shot-image-classification', upright_source=upright_source())
        card.save(partial / 'README.md')
        loaded: Any = CLIPModel.from_pretrained(partial).eval()
        processor: Any = CLIPProcessor.from_pretrained(partial, use_fast=True)

        def outputs(image: Image.Image) -> Any:
            inputs = processor(
                text=_TEXTS, images=upright_rgb(image), return_tensors='pt', padding=True, truncation=True)
            return loaded(**inputs)

        check_pictures(
            lambda image: outputs(image).image_embeds, model.get_image_features, preprocessing, 'CLIPModel')
        check_same(lambda _: outputs(Image.new('RGB', (9, 9))).text_embeds, model.get_text_features,
                   text.embed(_TEXTS).vectors, 'CLIPModel, texts')
