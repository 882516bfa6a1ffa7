# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The export recipes: what they take from the run, and what they refuse before weights are loaded."""

import sys
from pathlib import Path
from typing import Any, Optional

import pytest
from recipes_in_process import run_recipe
from trained import Trained, save_run_config, trained

import llm2clip.export.hf
import llm2clip.teacher.sources
from llm2clip.errors import ConfigError
from llm2clip.io.folders import MANIFEST
from llm2clip.training.runs import Stage2Run


def save_run(folder: Path, of_run: Trained, teacher: Optional[Path] = None) -> Path:
    save_run_config(folder, of_run.config, teacher=None if teacher is None else str(teacher))
    of_run.record.write(folder)
    return folder


@pytest.fixture
def loaded(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by each run whose weights are loaded."""
    runs: list[str] = []

    def load_model(run: Stage2Run) -> Any:
        runs.append(str(run.folder))
        teachers = [teacher_folder] * (run.record.llm_embed_dim // 32)
        return trained('timm:test_efficientnet', teachers).model

    monkeypatch.setattr(Stage2Run, 'load_model', load_model)
    return runs


def test_the_teacher_is_the_one_that_the_run_names(
    loaded: list[str], teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = save_run(tmp_path / 's2', trained('timm:test_efficientnet', [teacher_folder]), teacher_folder)
    for _ in range(2):
        run_recipe(monkeypatch, 'export_hf', f'run={run}', f'out={tmp_path}/export')
    folder = tmp_path / 'export/llm2clip'
    assert (folder / 'teacher/text_encoder.json').is_file() and (folder / MANIFEST).is_file() and len(loaded) == 2
    run_recipe(monkeypatch, 'export_vision', f'run={run}', f'out={tmp_path}/vision')
    assert capsys.readouterr().out.endswith(f'wrote test_efficientnet: {tmp_path}/vision\n')


def test_a_missing_package_is_named(teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('llm2clip.export.sentence_model', 'llm2clip.modeling.caption_encoder'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, 'sentence_transformers', None)
    with pytest.raises(ConfigError, match='needs the extra sentence-transformers'):
        run_recipe(monkeypatch, 'export_sentence_transformers', f'teacher={teacher_folder}', f'out={tmp_path}/st')


def test_several_teachers_are_named_in_order(
    loaded: list[str], teacher_folder: Path, causal_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = trained('timm:test_efficientnet', [teacher_folder, causal_teacher])
    run = save_run(tmp_path / 's2', two, teacher_folder)
    run_recipe(monkeypatch, 'export_hf', f'run={run}', f'out={tmp_path}/export',
               f'teacher=[{teacher_folder},{causal_teacher}]')
    assert (tmp_path / 'export/llm2clip/teacher/1/text_encoder.json').is_file()
    assert (tmp_path / 'export/llm2clip/modeling_llm2clip.py').is_file() and len(loaded) == 1
    with pytest.raises(ValueError, match='another teacher than the run'):
        run_recipe(monkeypatch, 'export_hf', f'run={run}', f'out={tmp_path}/export',
                   f'teacher=[{causal_teacher},{teacher_folder}]')
    assert len(loaded) == 1


def test_settings_are_checked_before_weights_are_read(
    loaded: list[str], teacher_folder: Path, causal_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / 's2', trained('timm:test_efficientnet', [teacher_folder]))

    monkeypatch.setattr(llm2clip.teacher.sources, 'teacher_fingerprint', None)
    before, source = sorted(tmp_path.rglob('*')), f'run={run}'
    out, teacher, replaced = f'out={tmp_path}/export', f'teacher={teacher_folder}', 'is not replaced by a new'
    for recipe, args, message in (
            ('export_hf', [source, out], 'teacher: 0 .*, expected 1'),
            ('export_hf', [source, out, f'teacher={causal_teacher}'], 'another teacher than the run: bidirectional'),
            ('export_hf', [source, out, teacher, 'truncate_dim=33'], 'truncate_dim: 33'),
            ('export_vision', [source, f'out={run}'], replaced),
            ('export_sentence_transformers', [teacher, f'out={run}'], replaced)):
        with pytest.raises(ValueError, match=message):
            run_recipe(monkeypatch, recipe, *args)
    assert not loaded and sorted(tmp_path.rglob('*')) == before
