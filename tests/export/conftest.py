# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Teachers beside `teacher_folder`, which pools the mean within a chat template."""

from pathlib import Path
from typing import Any

import pytest

from llm2clip.config import TextEncoderConfig
from llm2clip.models.teacher import save_teacher
from llm2clip.models.text_encoder import text_encoder_from_config


def _teacher(llm_folder: Path, folder: Path, **options: Any) -> Path:
    config = TextEncoderConfig(pretrained=str(llm_folder), chat_template=False, **options)
    save_teacher(*text_encoder_from_config(config), None, folder)
    return folder


@pytest.fixture(scope='session')
def causal_teacher(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Causal, without template, by its end token."""
    return _teacher(llm_folder, tmp_path_factory.mktemp('causal') / 'teacher', bidirectional=False, pooling='last')


@pytest.fixture(scope='session')
def weighted_teacher(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By a weighted mean of eight tokens at most."""
    return _teacher(llm_folder, tmp_path_factory.mktemp('weighted') / 'teacher', pooling='weighted_mean', max_length=8)
