# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Tiny official checkpoints.  Their names and shapes are written down by hand, from the code that trained them."""

import re
from pathlib import Path
from typing import Any

import torch
from timm.models import register_model
from timm.models.eva import Eva
from torch.nn import functional as F

HALF = {'mean': [0.5, 0.5, 0.5], 'std': [0.5, 0.5, 0.5]}


@register_model
def tiny_eva_clip(pretrained: bool = False, **kwargs: Any) -> Eva:
    """EVA02-CLIP with two blocks, 32 wide."""
    del pretrained
    sizes = {'img_size': 56, 'num_classes': 16, **{k: v for k, v in kwargs.items() if k in ('img_size', 'num_classes')}}
    model = Eva(patch_size=14, embed_dim=32, depth=2, num_heads=2, mlp_ratio=4 * 2 / 3, qkv_fused=False,
                swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True, ref_feat_shape=(4, 4),
                global_pool='token', **sizes)
    model.pretrained_cfg = {}
    return model


# `layer: 32 64` stands for `layer.weight 32 64` and `layer.bias 32`; a prefix stands before all that follow it.
ADAPTOR = """
{prefix}.{i}. fn.0: 64 32, fn.3: 32 64, ln: 32
"""
ADAPTOR_END = """
{prefix}. 2: 32, 3: 16 32
"""
EVA = """
logit_scale
visual. cls_token 1 1 32, pos_embed 1 17 32, patch_embed.proj: 32 3 14 14, norm: 32, head: 16 32
visual.rope. freqs_cos 16 16, freqs_sin 16 16
"""
EVA_BLOCK = """
visual.blocks.{i}. norm1: 32, norm2: 32
visual.blocks.{i}.attn. q_proj: 32 32, k_proj.weight 32 32, v_proj: 32 32, inner_attn_ln: 32, proj: 32 32
visual.blocks.{i}.attn.rope. freqs_cos 16 16, freqs_sin 16 16
visual.blocks.{i}.mlp. w1: 85 32, w2: 85 32, ffn_ln: 85, w3: 32 85
"""
HF = """
logit_scale
vision_model.embeddings. class_embedding 32, patch_embedding.weight 32 3 8 8, position_embedding.weight 17 32
vision_model. pre_layrnorm: 32, post_layernorm: 32
visual_projection.weight 16 32
"""
HF_BLOCK = """
vision_model.encoder.layers.{i}. layer_norm1: 32, layer_norm2: 32
vision_model.encoder.layers.{i}.self_attn. k_proj: 32 32, v_proj: 32 32, q_proj: 32 32, out_proj: 32 32
vision_model.encoder.layers.{i}.mlp. fc1: 64 32, fc2: 32 64
"""
HF_CONFIG = {
    'architectures': ['LLM2CLIPModel'], 'model_type': 'clip', 'projection_dim': 16,
    'auto_map': {'AutoConfig': 'configuration_clip.CLIPConfig', 'AutoModel': 'modeling_clip.LLM2CLIPModel'},
    'text_config': {'model_type': 'clip_text_model'},
    'vision_config': {'model_type': 'clip_vision_model', 'hidden_size': 32, 'intermediate_size': 64, 'image_size': 32,
                      'num_hidden_layers': 2, 'num_attention_heads': 4, 'patch_size': 8, 'projection_dim': 16,
                      'dropout': 0.0},
}


def _random(lines: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for line in filter(None, lines.split('\n')):
        prefix, names = re.fullmatch(r'(\S+\. )?(.*)', line).groups('')
        for entry in re.sub(r'([\w.]+): ((\d+)[\d ]*)', r'\1.weight \2, \1.bias \3', names).split(', '):
            name, *shape = entry.split()
            value = torch.randn([int(n) for n in shape], generator=generator) * 0.2
            is_norm = len(shape) == 1 and name.endswith('weight')
            state[prefix.strip() + name] = value + 1.0 if is_norm else value
    return state


def _both(block: str, **names: str) -> str:
    return ''.join(block.format(i=i, **names) for i in range(2))


def _adaptor(prefix: str) -> str:
    return _both(ADAPTOR, prefix=prefix) + ADAPTOR_END.format(prefix=prefix)


def eva_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """As the official code writes it: two blocks, an adaptor of two blocks from 32 to 16 dimensions."""
    return _random(EVA + _both(EVA_BLOCK) + _adaptor('text.text_adaptor'), seed)


def hf_state(seed: int = 0) -> dict[str, torch.Tensor]:
    return _random(HF + _both(HF_BLOCK) + _adaptor('text_adapter.adaptor'), seed)


def timm_state(tower: dict[str, torch.Tensor], width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """As the official code writes a timm tower of the `tower`'s weights: its LLM is there, a projection is not."""
    adaptor = _adaptor('text.text_proj.text_adaptor').replace(' 16', f' {width}')
    llm = {'text.text.model.layers.0.mlp.up_proj.weight': torch.zeros(3, 3)}
    return {**_random('logit_scale' + adaptor, seed), **llm, **{f'visual.trunk.{k}': v for k, v in tower.items()}}


def adaptor_features(state: dict[str, torch.Tensor], prefix: str, x: torch.Tensor, normalize: bool) -> torch.Tensor:
    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f'{prefix}.{name}.weight'].T + state[f'{prefix}.{name}.bias']

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (32,), state[f'{prefix}.{name}.weight'], state[f'{prefix}.{name}.bias'])

    x = x / x.norm(dim=-1, keepdim=True) if normalize else x
    for i in range(2):
        x = x + linear(f'{i}.fn.3', F.gelu(linear(f'{i}.fn.0', norm(f'{i}.ln', x))))
    return linear('3', norm('2', x))


def save_eva(path: Path, state: dict[str, torch.Tensor], wrapper: str = '', prefix: str = '') -> Path:
    renamed = {f'{prefix}{name}': value for name, value in state.items()}
    torch.save({'epoch': 4, wrapper: renamed} if wrapper else renamed, path)
    return path
