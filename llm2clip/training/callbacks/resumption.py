# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What Composer's checkpoints and its resumption lack."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from composer import Callback, Trainer
from composer.core import State
from composer.loggers import Logger
from composer.utils import reproducibility
from torch.distributed.checkpoint.api import CheckpointException

from llm2clip.config import TrainConfig
from llm2clip.config.loading import check_settings, learned_settings
from llm2clip.errors import ConfigError
from llm2clip.ranks import broadcast_from_rank0
from llm2clip.registry import check


@contextmanager
def naming_missing_states(config: TrainConfig) -> Iterator[None]:
    """Name the state that a sharded checkpoint lacks: that of a callback with which the run did not begin, or
    one that another version of this package, or a run with other settings, did not write."""
    try:
        yield
    except CheckpointException as error:
        for name, arguments in config.callbacks.items():
            kind = check('callbacks', name, arguments).__qualname__
            if f'state.callbacks.{kind}.' in str(error):
                raise ConfigError('its state is not in the sharded checkpoint, since the run began without '
                                  'it; expected only callbacks without a state to be added later',
                                  f'callbacks.{name}') from error
        missing = re.findall(r'Missing key in checkpoint state_dict: (\S+)\.\s', f'{error} ')
        if not missing:
            raise
        raise ConfigError(f'the newest checkpoint lacks {missing[-1]}, expected the version of llm2clip and '
                          'the settings with which the run began, or another folder',
                          'checkpoint_folder') from error


class KeepSettings(Callback):
    """Store the settings that affect learning in every checkpoint, and refuse to resume with other settings.
    On another machine, the checkpoint may be the only record of them, and of the `run_id`."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.run_id = broadcast_from_rank0(lambda: os.urandom(8).hex())

    def state_dict(self) -> dict[str, Any]:
        # One string, since sharded checkpoints load no keys that they were written without.
        return {'settings': json.dumps(learned_settings(self.config) | {'run_id': self.run_id})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        settings = json.loads(state['settings'])
        self.run_id = settings.pop('run_id', self.run_id)
        check_settings(settings, self.config, f'the run in {self.config.checkpoint_folder}')


class RemoveUploaded(Callback):
    """Remove the temporary files of sharded checkpoints for an object store, on a rank other than the first.

    The uploader has its own copies.  Composer 0.32.1 removes the temporary files of rank 0 only.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        for path in self.trainer.saved_checkpoints:
            shutil.rmtree(Path(path).parent, ignore_errors=True)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self.batch_checkpoint(state, logger)


class ResumeRandomState(Callback):
    """Restore a checkpoint's random state, one per rank, before the first batch of a resumed run.

    Composer 0.32.1 does not do so if the dataset itself resumes in the middle of an epoch,
    as Streaming's does.
    """

    def __init__(self, rng_state: list[dict[str, Any]]) -> None:
        self._rng_state: Optional[list[dict[str, Any]]] = rng_state

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self._rng_state is not None:
            reproducibility.load_rng_state(self._rng_state)
            self._rng_state = None
