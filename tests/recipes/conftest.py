# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Small trainings of both stages."""

from pathlib import Path

import pytest
from launched import stage1_arguments, stage2_arguments


@pytest.fixture
def stage1_args(image_dataset: Path, llm_folder: Path) -> list[str]:
    return stage1_arguments(image_dataset, llm_folder)


@pytest.fixture
def stage2_args(image_dataset: Path, sidecar: Path) -> list[str]:
    return stage2_arguments(image_dataset, sidecar)
