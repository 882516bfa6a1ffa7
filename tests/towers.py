# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Vision towers of both libraries, and whole CLIPs, random and small."""

from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipModel

from llm2clip.config import VisionConfig

SMALL = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 3, 'num_attention_heads': 2,
         'patch_size': 8, 'image_size': 32}
HALF = {'mean': [0.5, 0.5, 0.5], 'std': [0.5, 0.5, 0.5]}


def hf_tower(model_type: str, **options: Any) -> VisionConfig:
    architecture = {'model_type': model_type, **SMALL}
    return VisionConfig('a folder', False, architecture=architecture, image_size=32, **HALF, **options)


def timm_tower(name: str, **options: Any) -> VisionConfig:
    return VisionConfig(name, **{'pretrained': False, 'image_size': 64, **options})


TOKEN_TOWERS = {
    'clip': hf_tower('clip_vision_model'), 'siglip': hf_tower('siglip_vision_model'), 'vit': hf_tower('vit'),
    'dinov2': hf_tower('dinov2'), 'timm_vit': timm_tower('test_vit'),
    'timm_eva': timm_tower('eva02_tiny_patch14_224', image_size=56),
}
TOWERS = {
    **TOKEN_TOWERS, 'timm_convnet': timm_tower('test_efficientnet'), 'timm_convnext': timm_tower('convnext_atto'),
    'timm_resnet': timm_tower('test_resnet'), 'timm_levels': timm_tower('test_efficientnet', feature_levels=2),
}


def projected(features: Any) -> torch.Tensor:
    """Features of a whole CLIP, which transformers 4 returns, and 5 in an output object."""
    return getattr(features, 'pooler_output', features)


def write_clip(out: Path, tokenizer_folder: Path, kind: str = 'clip') -> Path:
    """A random CLIP or SigLIP with the tokenizer of a folder, whose texts have at most 12 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.pad_token = '</s>'
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)])
    tokenizer.save_pretrained(out)
    small = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 2}
    text = {**small, 'vocab_size': 400, 'max_position_embeddings': 12, 'projection_dim': 32, 'bos_token_id': 0,
            'eos_token_id': 1, 'pad_token_id': 1}
    vision = {**small, 'image_size': 32, 'patch_size': 16, 'projection_dim': 32}
    torch.manual_seed(0)
    if kind == 'clip':
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    model.save_pretrained(out)
    CLIPImageProcessor(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32}).save_pretrained(out)
    return out
