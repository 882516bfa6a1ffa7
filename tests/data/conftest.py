# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What the tests of data share."""

from pathlib import Path

import pytest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths lead into an empty folder."""
    monkeypatch.chdir(tmp_path)
