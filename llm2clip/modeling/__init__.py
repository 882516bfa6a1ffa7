# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What exported models carry along, so that they load without this package; imports nothing else of it."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Union


def copy_code(names: Sequence[str], folder: Union[str, Path]) -> None:
    """Copy modules of this package, by name, into an exported folder."""
    for name in names:
        shutil.copy(Path(__file__).with_name(f'{name}.py'), folder)
