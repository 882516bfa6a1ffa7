# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The command that each step names next is one that works, and a stopped one says how it goes on."""

from dataclasses import fields
from pathlib import Path

from recipes_in_process import SCHEMAS

from llm2clip.config import (
    ReportConfig,
    Stage2Config,
)
from llm2clip.config.files import load_config
from llm2clip.steps import goes_on, step_folder

TRAIN = ['run_name=r', 'max_duration=1ep', 'global_train_batch_size=8', 'optimizer.lr=1e-3',
         'train_data.streams.p.local=data']


def test_how_a_stopped_step_goes_on(tmp_path: Path) -> None:
    args = [*TRAIN, 'model.vision.name=x', f'save_folder={tmp_path}']
    assert 'from the beginning' in goes_on(load_config(Stage2Config, args))
    checkpoints = tmp_path / 'checkpoints'
    checkpoints.mkdir()
    for name in ('ep0-ba120-rank0.pt', 'ep1-ba240'):
        (checkpoints / 'latest-rank0.pt').unlink(missing_ok=True)
        (checkpoints / 'latest-rank0.pt').symlink_to(name)
        batch = name.split('-')[1].removeprefix('ba')
        assert goes_on(load_config(Stage2Config, args)) == f'the same command goes on from batch {batch}'
    assert 's3://b/c' in goes_on(load_config(Stage2Config, [*args, 'checkpoint_folder=s3://b/c']))
    assert goes_on(load_config(Stage2Config, [*args, 'autoresume=false'])) == ''
    assert goes_on(load_config(ReportConfig, ['results=r', 'out=o', 'steps.a=b'])) == ''


def test_every_step_that_writes_a_folder_of_its_own_keeps_its_seconds_there() -> None:
    for recipe, schema in SCHEMAS.items():
        names = {field.name for field in fields(schema)}
        config = schema(**{name: name for name in ('out', 'save_folder') if name in names})
        kept = step_folder(config)
        # These write what others read, or nothing.
        assert kept is None if recipe in ('report', 'search', 'export_vision') else kept in ('out', 'save_folder')
