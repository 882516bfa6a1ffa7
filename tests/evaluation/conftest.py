# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Baselines of transformers with their own text towers."""

from pathlib import Path

import pytest
from clip_benchmark.metrics import zeroshot_classification
from towers import write_clip

# It takes the only value of an array to be a number, which numpy does not from 2.4 on.
vars(zeroshot_classification)['float'] = lambda value: value.item()


@pytest.fixture(scope='session', params=['clip', 'siglip'])
def baseline(request: pytest.FixtureRequest, llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP or SigLIP with the tiny LLM's tokenizer, whose texts have at most 12 tokens."""
    return write_clip(tmp_path_factory.mktemp(request.param), llm_folder, request.param)
