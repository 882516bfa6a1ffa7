# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A random exported model that knows its teacher, and baselines of transformers with their own text towers."""

from pathlib import Path

import pytest
from clip_benchmark.metrics import zeroshot_classification
from towers import write_clip
from trained import trained

from llm2clip.export.hf import export_folder
from llm2clip.models.llm2clip import LLM2CLIP

# It takes the only value of an array to be a number, which numpy does not from 2.4 on.
vars(zeroshot_classification)['float'] = lambda value: value.item()


@pytest.fixture(scope='session')
def exported(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM2CLIP, Path]:
    of_run = trained('timm:test_efficientnet', [teacher_folder], image_size=32, embed_dim=16)
    export_folder(*of_run, out := tmp_path_factory.mktemp('export') / 'model')
    return of_run.model, out


@pytest.fixture(scope='session', params=['clip', 'siglip'])
def baseline(request: pytest.FixtureRequest, llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP or SigLIP with the tiny LLM's tokenizer, whose texts have at most 12 tokens."""
    return write_clip(tmp_path_factory.mktemp(request.param), llm_folder, request.param)
