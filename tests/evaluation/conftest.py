# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A random exported model that knows its teacher, and baselines of transformers with their own text towers."""

from pathlib import Path

import pytest
import torch
from towers import write_clip

from llm2clip.config import AdapterConfig, ModelConfig, VisionConfig
from llm2clip.export.hf import export_folder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.fingerprint import TeacherRecord
from llm2clip.teacher.llm import teacher_fingerprint


@pytest.fixture(scope='session')
def exported(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM2CLIP, Path]:
    config = ModelConfig(VisionConfig('test_efficientnet', False, image_size=32), AdapterConfig(depth=1), embed_dim=16)
    torch.manual_seed(3)
    model = LLM2CLIP(config, 32, load_weights=False).eval()
    out = tmp_path_factory.mktemp('export') / 'model'
    record = TeacherRecord(teacher_fingerprint(teacher_folder), {'llm_embed_dim': 32})
    export_folder(model, config, record, teacher_folder, out)
    return model, out


@pytest.fixture(scope='session', params=['clip', 'siglip'])
def baseline(request: pytest.FixtureRequest, llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP or SigLIP with the tiny LLM's tokenizer, whose texts have at most 12 tokens."""
    return write_clip(tmp_path_factory.mktemp(request.param), llm_folder, request.param)
