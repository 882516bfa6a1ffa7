# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

import sys

# timm imports wandb if it can, which takes seconds at the start of each recipe, and nothing here uses it.
if 'wandb' not in sys.modules:
    sys.modules['wandb'] = None  # pyright: ignore[reportArgumentType]
    import timm  # noqa: F401
    del sys.modules['wandb']
