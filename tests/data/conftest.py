# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What the tests of data share."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths lead into an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = pytest.importorskip('datasets', reason='the package datasets is not installed')
    monkeypatch.setattr(library.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    monkeypatch.setattr(library.config, 'HF_HUB_OFFLINE', True)
    return library
