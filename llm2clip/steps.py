# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What each recipe leaves behind, and how it goes on after it was stopped."""

import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Optional

from llm2clip.config import (
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
    ImportConfig: 'import_official', ReportConfig: 'report', SearchConfig: 'search'}


def step_folder(config: Any) -> Optional[str]:
    """The folder of a step that keeps how long it took; None for one that keeps nothing."""
    if isinstance(config, (ExportVisionConfig, ReportConfig, SearchConfig)):
        return None
    return config.save_folder if isinstance(config, TrainConfig) else config.out


def recorded_seconds(path: Path) -> float:
    """How long a step took, by its file; 0 if there is none, or it is damaged."""
    try:
        return float(read_json(path, dict)['seconds'])
    except (FileError, LookupError, TypeError, ValueError):
        return 0.0


def claim(config: Any) -> ExitStack:
    """Hold the folders that a step writes, until the stack is closed; no other process can do so meanwhile.

    Raises:
        ConfigError: Another recipe's or somebody else's files are in one, or another process writes there.
    """
    held = ExitStack()
    if isinstance(config, (ExportVisionConfig, ExportTeacherConfig)):
        # These replace the folder as a whole, by what its manifest says.
        out = Path(os.path.abspath(config.out))
        lock = out.with_name(f'.{out.name}.lock')
        held.enter_context(locked(lock, out))
        held.callback(lock.unlink)
        return held
    folders = [config.index if isinstance(config, SearchConfig) else step_folder(config) or config.out]
    if isinstance(config, TrainConfig) and '://' not in config.checkpoint_folder:
        checkpoints = Path(os.path.abspath(config.checkpoint_folder))
        folders += [] if checkpoints.is_relative_to(os.path.abspath(config.save_folder)) else [checkpoints]
    names = ['report.html', 'results.json'] if isinstance(config, ReportConfig) else None
    for folder in folders:
        held.enter_context(claimed(folder, _RECIPES[type(config)], names, getattr(config, 'machine', 0)))
    return held


def goes_on(config: Any) -> str:
    """How the same command goes on after it was stopped; empty if it just begins again."""
    if isinstance(config, (PrepareConfig, ExtractConfig, EvaluateConfig, SearchConfig)):
        return 'the same command goes on with what is missing'
    if not isinstance(config, TrainConfig) or not config.autoresume:
        return ''
    if '://' in config.checkpoint_folder:
        return f'the same command goes on from the newest checkpoint in {config.checkpoint_folder}'
    try:  # Composer links to the newest whole checkpoint after it has written it
        batch = re.findall(r'-ba(\d+)', os.readlink(Path(config.checkpoint_folder, 'latest-rank0.pt')))[-1]
    except (OSError, IndexError):
        return 'there is no checkpoint yet, the same command begins from the beginning'
    return f'the same command goes on from batch {int(batch)}'
