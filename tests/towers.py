# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Vision towers of both libraries, random and small."""

from typing import Any

from llm2clip.config import VisionConfig

SMALL = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 3, 'num_attention_heads': 2,
         'patch_size': 8, 'image_size': 32}
HALF = {'mean': [0.5, 0.5, 0.5], 'std': [0.5, 0.5, 0.5]}


def hf_tower(model_type: str, **options: Any) -> VisionConfig:
    return VisionConfig('a folder', architecture={'model_type': model_type, **SMALL}, image_size=32, **HALF, **options)


def timm_tower(name: str, **options: Any) -> VisionConfig:
    return VisionConfig(name, **{'image_size': 64, **options})


TOKEN_TOWERS = {
    'clip': hf_tower('clip_vision_model'), 'siglip': hf_tower('siglip_vision_model'), 'vit': hf_tower('vit'),
    'dinov2': hf_tower('dinov2'), 'timm_vit': timm_tower('test_vit'),
    'timm_eva': timm_tower('eva02_tiny_patch14_224', image_size=56),
}
TOWERS = {
    **TOKEN_TOWERS, 'timm_convnet': timm_tower('test_efficientnet'), 'timm_convnext': timm_tower('convnext_atto'),
    'timm_resnet': timm_tower('test_resnet'),
}
