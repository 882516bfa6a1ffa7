# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Random LLMs of every supported architecture, small."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, PretrainedConfig

WINDOW = 4
SMALL = {'vocab_size': 400, 'hidden_size': 32, 'intermediate_size': 64, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'initializer_range': 0.2, 'pad_token_id': 0, 'bos_token_id': 0, 'eos_token_id': 1}
GEMMA = {'head_dim': 8, 'query_pre_attn_scalar': 8, 'sliding_window': WINDOW}
SLIDING = {'use_sliding_window': True, 'sliding_window': WINDOW, 'max_window_layers': 0}
VISION = {'hidden_size': 16, 'intermediate_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2,
          'image_size': 28, 'patch_size': 14}
CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    'llama': lambda **k: transformers.LlamaConfig(**SMALL, **k),
    'mistral': lambda **k: transformers.MistralConfig(**SMALL, sliding_window=WINDOW, **k),
    'qwen2': lambda **k: transformers.Qwen2Config(**SMALL, **SLIDING, **k),
    'qwen3': lambda **k: transformers.Qwen3Config(**SMALL, head_dim=8, **SLIDING, **k),
    'gemma2': lambda **k: transformers.Gemma2Config(**SMALL, **GEMMA, **k),
    'gemma3_text': lambda **k: transformers.Gemma3TextConfig(**SMALL, **GEMMA, **k),
    'gemma3': lambda **k: transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**SMALL, **GEMMA, **k), vision_config=VISION, mm_tokens_per_image=4,
        image_token_index=399, boi_token_index=397, eoi_token_index=398),
    'phi3': lambda **k: transformers.Phi3Config(**SMALL, sliding_window=WINDOW, **k),
    'olmo2': lambda **k: transformers.Olmo2Config(**SMALL, **k),
    'granite': lambda **k: transformers.GraniteConfig(**SMALL, **k),
    'smollm3': lambda **k: transformers.SmolLM3Config(
        **SMALL, use_sliding_window=True, sliding_window=WINDOW, no_rope_layer_interval=2, **k),
}
TEXTS = ['a red square', 'a blue circle on a wall', 'a', 'a purple stripe painted by somebody who likes green']


def save_llm(name: str, layers: int, tokenizer: Path, folder: Path) -> None:
    """Write one of `CONFIGS` with the tokenizer of another folder."""
    torch.manual_seed(0)
    AutoModel.from_config(CONFIGS[name](num_hidden_layers=layers)).save_pretrained(folder)
    for file in tokenizer.glob('*token*'):
        shutil.copy(file, folder)
