# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Every shipped YAML loads into its schema, and its parts exist."""

from pathlib import Path

import pytest

from llm2clip.builders import SOURCES, check, check_train_config
from llm2clip.config import (
    EvaluateConfig,
    ExportConfig,
    ExtractConfig,
    PrepareConfig,
    ReportConfig,
    Stage1Config,
    Stage2Config,
    TrainConfig,
    load_config,
)

YAMLS = Path(__file__).parents[1] / 'yamls'
SCHEMAS = {'data': PrepareConfig, 'stage1': Stage1Config, 'extract': ExtractConfig, 'stage2': Stage2Config,
           'eval': EvaluateConfig, 'export': ExportConfig, 'report': ReportConfig}
USER_GIVES = {'data/image_folder.yaml': ['out=o', 'source.images=i', 'source.captions=c']}
FILES = sorted(str(path.relative_to(YAMLS)) for path in YAMLS.rglob('*.yaml'))


@pytest.mark.parametrize('file', FILES)
def test_yaml_loads(file: str) -> None:
    config = load_config(SCHEMAS[file.split('/')[0]], [str(YAMLS / file), *USER_GIVES.get(file, [])])
    if isinstance(config, TrainConfig):
        check_train_config(config)
    if isinstance(config, PrepareConfig):
        check(SOURCES, config.source.pop('name'), config.source, 'source')


@pytest.mark.parametrize('file', FILES)
def test_yaml_opens_with_its_launch_command(file: str) -> None:
    first = (YAMLS / file).read_text().splitlines()[0]
    assert 'recipes/' in first and f'yamls/{file}' in first
