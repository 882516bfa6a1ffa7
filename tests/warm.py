# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Imported by the server of `launched.py` after all other modules, so that no run does what one can do for all."""

import gc
import sys

from composer.utils.collect_env import get_cpu_model

RECIPES_IMPORT_WANDB = sys.modules.get('wandb') is not None  # which takes seconds
import wandb  # noqa: E402, F401

get_cpu_model()  # starts an interpreter, and Composer remembers what it says
gc.collect()
gc.freeze()  # or each run would look through all that is imported, and copy it
