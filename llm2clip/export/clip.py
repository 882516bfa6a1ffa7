# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A CLIP whose text tower was trained with its vision tower, as one `CLIPModel` of transformers."""

from pathlib import Path
from typing import Any, Union

import torch.nn as nn
from composer.devices import DeviceCPU
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextModelWithProjection, CLIPVisionModel

from llm2clip.config import ConfigError, ModelConfig, Stage2Config
from llm2clip.data.image_processing_llm2clip import upright_rgb
from llm2clip.export.check import check_pictures, check_same
from llm2clip.export.hf import KIND, PIPELINE
from llm2clip.export.model_card import model_card
from llm2clip.export.vision import image_processor, upright_source
from llm2clip.folders import atomic_folder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.remote_code.checks_llm2clip import load_tokenizer
from llm2clip.teacher.sources import ClipText

__all__ = ['export_clip']

# The second is cut.
TEXTS = ['a red square', 'a blue circle on a plain wall, painted by somebody ' + 'who likes walls ' * 50]


def export_clip(
    model: LLM2CLIP, config: ModelConfig, run: Stage2Config, clip_text: Union[str, Path], out: Union[str, Path]
) -> None:
    """Write the folder of a `CLIPModel` with its processor, which is read back and has the features of `model`.

    Args:
        model: The trained model, in evaluation mode.
        config: Its configuration.
        run: Configuration of the run, for the model card.
        clip_text: Folder of the text tower that the run has trained.
        out: The folder to write.

    Raises:
        ConfigError: A part is none of a `CLIPModel`, or what was written gives other features.
    """
    text: Any = ClipText(clip_text, cut=True).load(DeviceCPU())
    vision = model.vision_encoder
    text_tower, projection, adapter = text.module.trunk, model.visual_projection, model.adapter
    vision_tower: Any = vision.trunk
    fitting = {
        f'the text tower {type(text_tower).__name__}': isinstance(text_tower, CLIPTextModelWithProjection),
        f'the vision tower {type(vision_tower).__name__}': isinstance(vision_tower, CLIPVisionModel),
        'model.visual_projection': isinstance(projection, nn.Linear) and projection.bias is None,
        'model.adapter': isinstance(adapter, nn.Identity) or (
            isinstance(adapter, nn.Linear) and (adapter.bias is None or not adapter.bias.any())),
        'model.logit_bias': model.logit_bias is None}
    if unfitting := [name for name, fits in fitting.items() if not fits]:
        raise ConfigError(f'run: has {", ".join(unfitting)}, which a CLIPModel of transformers has no place for; '
                          'expected the towers of a CLIP, projections without bias and no logit_bias. export_vision '
                          f'exports the vision tower alone, and {clip_text} is the text tower')
    clip = CLIPModel(CLIPConfig(text_config=text_tower.config.to_dict(), vision_config=vision_tower.config.to_dict(),
                                projection_dim=config.embed_dim))
    clip.vision_model.load_state_dict(vision_tower.vision_model.state_dict())
    clip.text_model.load_state_dict(text_tower.text_model.state_dict())
    clip.visual_projection.load_state_dict(projection.state_dict())
    weight = text_tower.text_projection.weight
    clip.text_projection.weight.data = adapter.weight @ weight if isinstance(adapter, nn.Linear) else weight
    clip.logit_scale.data = model.logit_scale.data.cpu().reshape(())
    tokenizer = load_tokenizer(clip_text, model_input_names=['input_ids', 'attention_mask'],
                               model_max_length=text.tokenizer.max_length)
    with atomic_folder(out, KIND) as partial:
        clip.save_pretrained(partial, safe_serialization=True)
        CLIPProcessor(image_processor(vision.preprocessing), tokenizer).save_pretrained(partial)
        card = model_card(config, None, run, template='clip.md.j2', title='CLIP', pipeline_tag=PIPELINE,
                          upright_source=upright_source())
        card.save(partial / 'README.md')
        loaded: Any = CLIPModel.from_pretrained(partial).eval()
        processor: Any = CLIPProcessor.from_pretrained(partial, use_fast=True)

        def outputs(image: Image.Image) -> Any:
            return loaded(**processor(text=TEXTS, images=upright_rgb(image), return_tensors='pt', padding=True,
                                      truncation=True))

        check_pictures(lambda image: outputs(image).image_embeds, model.get_image_features, vision.preprocessing,
                       'CLIPModel')
        check_same(lambda _: outputs(Image.new('RGB', (9, 9))).text_embeds, model.get_text_features,
                   text.embed(TEXTS).vectors, 'CLIPModel, texts')
