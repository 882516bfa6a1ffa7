# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The trained vision tower alone, in the class of the library that it is from."""

import copy
import inspect
from pathlib import Path
from typing import Any, Optional, Union

import timm
import timm.models
import torch
import torch.nn as nn
from markupsafe import Markup
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from transformers import AutoImageProcessor, CLIPImageProcessorFast, CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.image_utils import PILImageResampling

from llm2clip.config import ConfigError, ModelConfig, Stage2Config
from llm2clip.data.image_processing_llm2clip import orientation, upright_rgb
from llm2clip.data.images import open_image
from llm2clip.data.transforms import Preprocessing
from llm2clip.export.check import check_pictures, check_same, noise, pictures, training_pixels
from llm2clip.export.model_card import model_card
from llm2clip.folders import complete_folder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.towers import TimmTower
from llm2clip.teacher.fingerprint import TeacherRecord

__all__ = ['KIND', 'export_vision', 'image_processor', 'upright_use']

KIND = 'vision tower'

SUMMARY = Markup(
    'The vision tower of an [LLM2CLIP](https://arxiv.org/abs/2411.04997) model, trained against the caption embeddings '
    'of a language model. Its features, scaled to length 1, are those of the whole model.')
TOWER_SUMMARY = SUMMARY[:SUMMARY.index(' Its')] + ' Its features are those before the projection into the joint space.'
USE = """```python
import numpy as np
from PIL import Image
{library}


{upright}


{code}
```

Training saw what `upright_rgb` makes of a picture; without it, EXIF orientation and transparency are lost, and 16-bit
greys are clipped. {precision}"""
TRANSFORMERS_USE = """folder = '.'  # of this file, or its name on the Hub
model = {name}.from_pretrained(folder{arguments})
processor = AutoImageProcessor.from_pretrained(folder)
image = upright_rgb(Image.open('picture.png'))
features = model(**processor(image, return_tensors='pt')).{output}"""
TIMM_USE = """model = timm.create_model('local-dir:.', pretrained=True).eval()  # or 'hf-hub:' and its name on the Hub
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = upright_rgb(Image.open('picture.png'))
features = model(transform(image)[None])"""
TIMM_PRECISION = ('Pillow, by which timm resizes, rounds otherwise than training did, by 2 of 255 at most, and timm '
                  'crops a quarter of all pictures one row or column later.')
# In the mean over a picture, of 255.  A picture that is not made upright RGB on white differs by 10 and more.
TIMM_TOLERANCE = 1.0


def export_vision(
    model: LLM2CLIP,
    config: ModelConfig,
    record: TeacherRecord,
    out: Union[str, Path],
    projection: bool = True,
    run: Optional[Stage2Config] = None,
    interpolate: float = 1.0,
) -> str:
    """Write a folder that transformers or timm load without this package.

    It is read back, and appears only if it gives the features of `model`.

    Args:
        model: The trained model, in evaluation mode.
        config: Its configuration.
        record: Which teacher it learned from, for the model card.
        out: The folder to write.
        projection: With the projection into the joint space, where the class has a place for one: in a
            `CLIPVisionModelWithProjection`, and as the classifier of a timm model.
        run: Configuration of the run, for the model card.
        interpolate: Share of the run's trained weights in those of the model, for the model card.

    Returns:
        The class that loads it.

    Raises:
        ConfigError: The projection does not fit into the class, or what was written does not give the tower's features.
    """
    of_timm = isinstance(model.vision_encoder.tower, TimmTower)
    projection = (projection and isinstance(model.visual_projection, nn.Linear)
                  and (of_timm or isinstance(model.vision_encoder.trunk, CLIPVisionModel)))
    with complete_folder(out, KIND) as partial:
        name, use = (_save_timm if of_timm else _save_transformers)(model, partial, projection)
        card = model_card(config, record.teacher, run, interpolate=interpolate,
                          title=f'Vision tower of LLM2CLIP, {name}', use=use,
                          summary=SUMMARY if projection else TOWER_SUMMARY,
                          library_name='timm' if of_timm else 'transformers', pipeline_tag='image-feature-extraction')
        card.save(partial / 'README.md')
    return name


def _check(found: Any, model: LLM2CLIP, projection: bool, what: str) -> None:
    """`found`, an image model, against the checkpoint's features, before they are scaled to length 1."""
    size = model.vision_encoder.preprocessing.image_size
    check_same(found, lambda pixels: _expected(model, projection, pixels),
               noise(2, 3, size, size).to(model.logit_scale.device), what)


def _expected(model: LLM2CLIP, projection: bool, pixels: torch.Tensor) -> torch.Tensor:
    pooled = model.vision_encoder(pixels)
    return model.visual_projection(pooled) if projection else pooled


def upright_use(code: str, library: str, precision: str = '') -> Markup:
    """The part of the card that says how to load the model."""
    upright = '\n\n'.join(map(inspect.getsource, (orientation, upright_rgb))).strip()
    return Markup(USE.format(code=code, library=library, upright=upright, precision=precision).strip())


def image_processor(preprocessing: Preprocessing) -> CLIPImageProcessorFast:
    """The evaluation transform of upright RGB pictures, as transformers has it."""
    size = preprocessing.image_size
    return CLIPImageProcessorFast(
        do_resize=True, size={'shortest_edge': size}, resample=PILImageResampling.BICUBIC, do_center_crop=True,
        crop_size={'height': size, 'width': size}, do_rescale=True, do_normalize=True,
        image_mean=list(preprocessing.mean), image_std=list(preprocessing.std), do_convert_rgb=True)


def _save_timm(model: LLM2CLIP, folder: Path, projection: bool) -> tuple[str, Markup]:
    """The layout of timm's models on the Hub: the class, and how to load it."""
    encoder = model.vision_encoder
    # Of a model that was just trained, the weights may lie in `channels_last`, which safetensors does not take.
    trunk: Any = copy.deepcopy(encoder.trunk)
    trunk = trunk.cpu().to(memory_format=torch.contiguous_format)
    name = trunk.pretrained_cfg['architecture']
    if projection:
        trunk.reset_classifier(model.visual_projection.out_features)
        head = trunk.get_classifier()
        if not isinstance(head, nn.Linear):
            raise ConfigError(f'projection: {name} has no linear classifier in whose place it could be; leave it out '
                              'by projection=false')
        # A classifier has a bias where the projection may have none.
        head.load_state_dict({'bias': torch.zeros(head.out_features), **model.visual_projection.state_dict()})
    data = encoder.preprocessing
    timm.models.save_for_hf(trunk, str(folder), safe_serialization=True, data_config={
        'input_size': (3, data.image_size, data.image_size), 'mean': data.mean, 'std': data.std,
        'interpolation': 'bicubic', 'crop_pct': 1.0, 'crop_mode': 'center'})
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    _check(loaded.to(model.logit_scale.device), model, projection, f'timm model {name}')
    transform = create_transform(**resolve_model_data_config(loaded), is_training=False)
    _check_timm_pixels(transform, data)
    return name, upright_use(TIMM_USE, 'import timm', precision=TIMM_PRECISION)


def _check_timm_pixels(transform: Any, preprocessing: Preprocessing) -> None:
    """timm's transform of upright RGB pictures against training's, within `TIMM_TOLERANCE`."""
    std = torch.tensor(preprocessing.std)[:, None, None]
    for name, data in pictures(preprocessing.image_size, cropped=6).items():
        found = transform(upright_rgb(open_image(data)))
        difference = 255 * ((found - training_pixels(data, preprocessing=preprocessing)) * std).abs().mean().item()
        if not difference <= TIMM_TOLERANCE:
            raise ConfigError(f"timm's transform of {name} differs from that of training by {difference:.1f} of 255 in "
                              'the mean')


def _save_transformers(model: LLM2CLIP, folder: Path, projection: bool) -> tuple[str, Markup]:
    """A model and its image processor: the class, and how to load it."""
    trunk: Any = model.vision_encoder.trunk
    native: Any = _clip_with_projection(trunk, model.visual_projection) if projection else trunk
    native.save_pretrained(folder, safe_serialization=True)
    preprocessing = model.vision_encoder.preprocessing
    image_processor(preprocessing).save_pretrained(folder)

    name, without_pooler = type(native).__name__, getattr(trunk, 'pooler', 0) is None
    arguments = {'add_pooling_layer': False} if without_pooler else {}
    loaded = type(native).from_pretrained(folder, **arguments).eval()
    output = 'image_embeds' if projection else 'last_hidden_state' if without_pooler else 'pooler_output'

    def features(pixels: torch.Tensor) -> torch.Tensor:
        values = loaded(pixels)[output]
        return values[:, 0] if without_pooler else values.flatten(1)

    loaded.to(device := model.logit_scale.device)
    _check(features, model, projection, name)
    processor: Any = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    check_pictures(
        lambda image: features(processor(upright_rgb(image), return_tensors='pt')['pixel_values'].to(device)),
        lambda pixels: _expected(model, projection, pixels.to(device)), preprocessing, name)
    code = TRANSFORMERS_USE.format(
        name=name, arguments=', add_pooling_layer=False' if without_pooler else '',
        output=f'{output}[:, 0]' if without_pooler else output)
    return name, upright_use(code, f'from transformers import AutoImageProcessor, {name}')


def _clip_with_projection(trunk: CLIPVisionModel, projection: nn.Module) -> CLIPVisionModelWithProjection:
    assert isinstance(projection, nn.Linear)
    if projection.bias is not None:
        raise ConfigError('projection: the projection of CLIPVisionModelWithProjection has no bias, that of this model '
                          'has one; leave it out by projection=false')
    config = copy.deepcopy(trunk.config)
    config.projection_dim = projection.out_features
    native = CLIPVisionModelWithProjection(config)
    native.vision_model.load_state_dict(trunk.vision_model.state_dict())
    native.visual_projection.load_state_dict(projection.state_dict())
    return native
