# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Weights & Biases, also offline."""

import composer.loggers

__all__ = ['WandBLogger']


class WandBLogger(composer.loggers.WandBLogger):
    """Composer's logger by the same arguments, which a run without checkpoints on W&B can resume with.

    Autoresume asks every logger for a checkpoint when there is none on disk.  Composer's answers with a RuntimeError
    when W&B is offline; one that stores no artifacts has none to give.
    """

    def download_file(
        self, remote_file_name: str, destination: str, overwrite: bool = False, progress_bar: bool = True
    ) -> None:
        if not self._log_artifacts or not self.entity:
            raise FileNotFoundError(f'W&B holds no {remote_file_name}')
        super().download_file(remote_file_name, destination, overwrite, progress_bar)
