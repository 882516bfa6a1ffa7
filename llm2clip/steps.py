# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What each recipe leaves behind, and how it goes on after it was stopped."""

import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Optional

from llm2clip.config import (
    DuplicatesConfig,
    EvaluateConfig,
    ExportConfig,
    ExportTeacherConfig,
    ExportVisionConfig,
    ExtractConfig,
    ImportConfig,
    InheritanceConfig,
    PrepareConfig,
    ReportConfig,
    SearchConfig,
    Stage1Config,
    Stage2Config,
    TrainConfig,
)
from llm2clip.files import FileError, read_json
from llm2clip.folders import claimed, locked

__all__ = ['SECONDS_FILE', 'claim', 'goes_on', 'recorded_seconds', 'step_folder']


SECONDS_FILE = 'seconds.json'
_RECIPES = {
    PrepareConfig: 'prepare_data', Stage1Config: 'train_stage1', ExtractConfig: 'extract_embeddings',
    InheritanceConfig: 'train_inheritance', Stage2Config: 'train_stage2', EvaluateConfig: 'evaluate',
    ExportConfig: 'export_hf', ExportVisionConfig: 'export_vision', ExportTeacherConfig: 'export_sentence_transformers',
    ImportConfig: 'import_official', ReportConfig: 'report', SearchConfig: 'search',
    DuplicatesConfig: 'find_duplicates'}


def step_folder(config: Any) -> Optional[str]:
    """The folder of a step that keeps how long it took; None for one that keeps nothing."""
    if isinstance(config, TrainConfig):
        return config.save_folder
    if isinstance(config, (PrepareConfig, ExtractConfig, EvaluateConfig, ExportConfig, ExportTeacherConfig,
                           ImportConfig, DuplicatesConfig)):
        return config.out
    return None


def recorded_seconds(path: Path) -> float:
    """How long a step took, by its file; 0 if there is none, or it is damaged."""
    try:
        return float(read_json(path, dict)['seconds'])
    except (FileError, LookupError, TypeError, ValueError):
        return 0.0


def claim(config: Any) -> ExitStack:
    """Hold the folders that a step writes, in a block in which no other process can do so.

    Raises:
        ConfigError: On entering: another recipe's or somebody else's files are in one, or another process writes there.
    """
    held = ExitStack()
    recipe = _RECIPES[type(config)]
    if isinstance(config, TrainConfig):
        held.enter_context(claimed(config.save_folder, recipe))
        checkpoints = Path(os.path.abspath(config.checkpoint_folder))
        inside = checkpoints.is_relative_to(os.path.abspath(config.save_folder))
        if not inside and '://' not in config.checkpoint_folder:
            held.enter_context(claimed(checkpoints, recipe))
    elif isinstance(config, PrepareConfig):
        held.enter_context(claimed(config.out, recipe, part=config.machine))
    elif isinstance(config, ReportConfig):
        held.enter_context(claimed(config.out, recipe, ['report.html', 'results.json']))
    elif isinstance(config, SearchConfig):
        held.enter_context(claimed(config.index, recipe))
    elif isinstance(config, (ExportVisionConfig, ExportTeacherConfig)):
        # These replace the folder as a whole, by what its manifest says.
        out = Path(os.path.abspath(config.out))
        lock = out.with_name(f'.{out.name}.lock')
        held.enter_context(locked(lock, out))
        held.callback(lock.unlink)
    else:
        held.enter_context(claimed(config.out, recipe))
    return held


def goes_on(config: Any) -> str:
    """How the same command goes on after it was stopped; empty if it just begins again."""
    if isinstance(config, TrainConfig):
        if not config.autoresume:
            return ''
        if '://' in config.checkpoint_folder:
            return f'the same command goes on from the newest checkpoint in {config.checkpoint_folder}'
        batch = _newest_batch(config.checkpoint_folder)
        return 'there is no checkpoint yet, the same command begins from the beginning' if batch is None else \
            f'the same command goes on from batch {batch}'
    if isinstance(config, (PrepareConfig, ExtractConfig, EvaluateConfig, DuplicatesConfig, SearchConfig)):
        return 'the same command goes on with what is missing'
    return ''


def _newest_batch(checkpoints: str) -> Optional[int]:
    """The batch of the newest whole checkpoint, to which Composer links after it has written one."""
    try:
        return int(re.findall(r'-ba(\d+)', os.readlink(Path(checkpoints, 'latest-rank0.pt')))[-1])
    except (OSError, IndexError):
        return None
