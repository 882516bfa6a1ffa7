# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What was measured of each variant and seed, in one file: it is kept when runs are removed, and goes on elsewhere."""

import json
from pathlib import Path
from threading import Lock
from typing import Any

from llm2clip.files import write_json


class Record:
    """Variant -> seed -> what was found.

    Args:
        file: It is read if it is there, and written whenever something is added.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._lock = file, Lock()
        self.found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}

    def has(self, name: str, seed: int) -> bool:
        return str(seed) in self.found.get(name, {})

    def add(self, name: str, seed: int, found: Any) -> None:
        with self._lock:
            self.found.setdefault(name, {})[str(seed)] = found
            write_json(self.file, self.found)

    def of(self, name: str) -> list[Any]:
        """What was found of a variant, by seed."""
        return [found for _, found in sorted(self.found.get(name, {}).items())]
