# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Random exported models and pictures for them to find."""

import os
from pathlib import Path

import torch
from parts import picture

from llm2clip.config import AdapterConfig, ModelConfig, VisionConfig
from llm2clip.export.hf import export_folder
from llm2clip.models.llm2clip import LLM2CLIP


def write_export(out: Path, teacher: Path, seed: int = 3, embed_dim: int = 16) -> Path:
    """A random model with a tower for 32 x 32 pixels."""
    config = ModelConfig(VisionConfig('test_efficientnet', image_size=32), AdapterConfig(depth=1), embed_dim=embed_dim)
    torch.manual_seed(seed)
    model = LLM2CLIP(config, 32, load_weights=False).eval()
    export_folder(model, config, {'llm_embed_dim': 32, 'teacher': {'pooling': 'mean'}}, teacher, out)
    return out


def write_photo(path: Path, seed: int) -> None:
    """A picture that was last changed `seed` seconds after 1970."""
    path.write_bytes(picture(seed))
    os.utime(path, (seed, seed))
