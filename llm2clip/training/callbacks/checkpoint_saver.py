# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints that are written while training goes on."""

import copy
import datetime
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, Optional

import composer.callbacks
import torch
import torch.distributed
from composer.callbacks import checkpoint_saver
from composer.core import State
from composer.loggers import Logger
from composer.utils import checkpoint, dist, parse_uri, reproducibility
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils._pytree import tree_map

__all__ = ['CheckpointError', 'CheckpointSaver', 'host_copy']

_FILE, _LATEST = 'ep{epoch}-ba{batch}-rank{rank}.pt', 'latest-rank{rank}.pt'


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message names it and says why."""


class CheckpointSaver(composer.callbacks.CheckpointSaver):
    """Composer's, but a step with a checkpoint takes no longer than copying it to host memory.

    Composer 0.32.1 writes a checkpoint, links to it, hands it to the uploader and removes old ones before the next step
    begins.  Here a thread does all that, in the same order, from a copy that is taken in between two steps.  For shards
    that is torch's `async_save`; a full checkpoint is copied and written by rank 0.

    There is one checkpoint in the making at most: the next one waits for it, and so does the end of training.  If it
    fails, the next step ends with a CheckpointError on the ranks that know, which are all for shards.

    Args:
        folder: Of the checkpoints, local or in an object store.
        save_interval: Time between two.
        num_checkpoints_to_keep: Newest ones that are kept on disk, -1 for all.
        overwrite: Write over what a run that was killed has left.
        timeout: Seconds that a rank waits for the others while they write.
    """

    def __init__(
        self, folder: str, save_interval: str, num_checkpoints_to_keep: int = -1, overwrite: bool = False,
        timeout: float = 300.0
    ) -> None:
        # The names that the Trainer gives.
        remote = Path(parse_uri(folder)[2])
        super().__init__(
            folder, _FILE, remote_file_name=str(remote / _FILE), latest_filename=_LATEST,
            latest_remote_file_name=str(remote / _LATEST), save_interval=save_interval, overwrite=overwrite,
            num_checkpoints_to_keep=num_checkpoints_to_keep)
        # Composer looks every 30 seconds whether all files are uploaded, and the end of a run waits for it to see them.
        self._symlink_upload_wait_before_next_try_in_seconds = 1.0
        self.timeout = timeout
        self._group: Optional[torch.distributed.ProcessGroup] = None
        self._thread = ThreadPoolExecutor(1, 'checkpoint')
        self._writing: Optional[Future[None]] = None

    def wait(self, seconds: Optional[float] = None) -> None:
        """Wait until no checkpoint is in the making, whether it succeeds or not, that many seconds at most."""
        if self._writing is not None:
            wait([self._writing], seconds)

    def finish(self) -> None:
        """The same, and raise a CheckpointError if it failed."""
        self.wait()  # which a signal may end
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._writing is None or self._writing.done():
            self.finish()
            super().batch_end(state, logger)
        elif self.remote_uploader is not None:
            # What else Composer does here would get into the way of the thread.
            self.remote_uploader.check_workers()

    def fit_end(self, state: State, logger: Logger) -> None:
        self.finish()
        super().fit_end(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        self.finish()
        super().close(state, logger)

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        """Copy the state, and have the thread write it."""
        self.finish()
        if self._group is None and dist.is_initialized():
            # Beside that of the training, whose order of calls a thread would disturb, and for objects in host memory.
            self._group = torch.distributed.new_group(backend='gloo', timeout=datetime.timedelta(seconds=self.timeout))
        path = checkpoint.get_save_filename(state, self.filename.format(state, keep_placeholders=True))
        self.last_checkpoint_batch = state.timestamp.batch
        self.all_saved_checkpoints_to_timestamp[path] = state.timestamp  # for it is part of the state
        write = self._copy(state, path)
        # What Composer asks of the state after it has written it.
        moment = SimpleNamespace(
            run_name=state.run_name, timestamp=state.timestamp, fsdp_config=state.fsdp_config,
            fsdp_sharded_state_dict_enabled=state.fsdp_sharded_state_dict_enabled)
        self._writing = self._thread.submit(self._complete, write, moment, path, logger)

    def _copy(self, state: State, path: str) -> Optional[Callable[[], Any]]:
        """Copy the state to host memory; returns what writes it, or None if this rank writes nothing."""
        content = {'state': state.state_dict(), 'rng': reproducibility.get_rng_state()}
        rank, folder = dist.get_global_rank(), os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        if state.fsdp_sharded_state_dict_enabled:
            if rank > 0:
                del content['rng']
            return async_save(
                content, storage_writer=_HostCopyWriter(folder, per_thread_copy_ahead=0),
                planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True), process_group=self._group).result
        return partial(checkpoint._write_checkpoint_file, host_copy(content), path) if rank == 0 else None

    def _complete(
        self, write: Optional[Callable[[], Any]], moment: SimpleNamespace, path: str, logger: Logger
    ) -> None:
        """In the thread: write the copy, then link to it, upload it and remove the oldest, which Composer's own method
        does, for which the checkpoint is there already and ranks talk in the thread's group."""
        saved = None if write is None else path
        written = SimpleNamespace(**{**vars(checkpoint), 'save_checkpoint': lambda **_: saved})
        talk = SimpleNamespace(get_global_rank=dist.get_global_rank,
                               all_gather_object=partial(dist.all_gather_object, group=self._group))
        publish = FunctionType(composer.callbacks.CheckpointSaver._save_checkpoint.__code__,
                               {**vars(checkpoint_saver), 'checkpoint': written, 'dist': talk})
        try:
            if write is not None:
                write()
            publish(self, moment, logger)
        except BaseException as error:
            name = os.path.dirname(path) if moment.fsdp_sharded_state_dict_enabled else path
            raise CheckpointError(f'{name}: the checkpoint could not be written: {_cause(error)}') from error


class _HostCopyWriter(FileSystemWriter):
    """torch's, but tensors are copied from the device once, all at the same time, where it copies each one twice, and
    the ranks hear of the error that came first: one that is sent loses those that led to it."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return host_copy(state_dict)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise _first(error) from None


def host_copy(content: Any) -> Any:
    """A copy of nested containers and all that is in them, with the tensors, also sharded ones, in host memory."""
    copied = tree_map(_copy, content)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _copy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    value = value.detach()
    # Without waiting, torch copies from a GPU to pinned memory, which it keeps for the next time.
    return value.clone() if value.device.type == 'cpu' else value.to('cpu', non_blocking=True)


def _cause(error: BaseException) -> str:
    """What went wrong, on the first rank where something did."""
    rank = ''
    if isinstance(error, CheckpointException) and error.failures:
        first = min(error.failures)
        rank, error = f' (rank {first})', error.failures[first][0]
    return f'{_first(error)}{rank}'


def _first(error: BaseException) -> BaseException:
    """What led to an error, back to one of the system: torch's file of tensors complains about a full disk in its own
    way."""
    while not isinstance(error, OSError) and (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error
