# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Settings in every checkpoint."""

import json
from typing import Any

from composer.core import Callback

from llm2clip.config import TrainConfig
from llm2clip.config.settings import check_settings, learned_settings

__all__ = ['KeepSettings']


class KeepSettings(Callback):
    """Write the settings that decide what is learned into every checkpoint, and refuse to resume with others.

    The run's folder has them as well, but a machine that takes over from another may have the checkpoints alone.

    Args:
        config: The run's.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        return {'settings': json.dumps(learned_settings(self.config))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_settings(json.loads(state['settings']), self.config, f'the run in {self.config.checkpoint_folder}')
