# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Small trainings of both stages."""

from pathlib import Path

import pytest
from launched import stage1_arguments, stage2_arguments
from set_files import SEVERAL_CLASSES, write_wds


@pytest.fixture
def stage1_args(image_dataset: Path, llm_folder: Path) -> list[str]:
    return stage1_arguments(image_dataset, llm_folder)


@pytest.fixture
def stage2_args(image_dataset: Path, embeddings: Path) -> list[str]:
    return stage2_arguments(image_dataset, embeddings)


@pytest.fixture
def zeroshot_args(teacher_folder: Path, tmp_path: Path) -> list[str]:
    """Of an evaluation on sets of which two ranks can share neither the images nor the five names evenly."""
    write_wds(tmp_path / 'sets/one', [i % 6 for i in range(17)])
    write_wds(tmp_path / 'sets/several', SEVERAL_CLASSES)
    return [f'teacher={teacher_folder}', 'eval_first=true',
            *(f'eval_zeroshot.{name}.source={{name: clip_benchmark, local: {tmp_path}/sets/{name}}}'
              for name in ('one', 'several'))]
