# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Write checkpoints that survive a loss of power, find the newest complete one, and read it without running
code.

Composer's own autoresume trusts the `latest` link, which may be missing after a kill.  It also lets all nodes
create and delete the same file in a folder that they may share.
"""

import datetime
import errno
import io
import os
import pickle
import re
import tempfile
import uuid
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np
import torch
import torch.torch_version
from composer import State
from composer.utils import checkpoint, maybe_create_object_store_from_uri, parse_uri
from composer.utils.object_store import ObjectStore
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from llm2clip.errors import ConfigError, FileError
from llm2clip.io.files import flush, reading, remove_folder
from llm2clip.io.remotes import reaching
from llm2clip.io.tensors import read_pickle
from llm2clip.modeling.loaders import check_finite
from llm2clip.ranks import broadcast_from_rank0, dist, is_first

# Types in a Composer checkpoint beside tensors and plain containers.
torch.serialization.add_safe_globals([
    datetime.timedelta, torch.torch_version.TorchVersion, np.ndarray, np.dtype, np.dtypes.UInt32DType,
    np._core.multiarray._reconstruct,  # pyright: ignore[reportAttributeAccessIssue]
])
# Types in the index of a sharded checkpoint; Python 3.13 defines paths in `pathlib._local`.
_METADATA_GLOBALS = {
    ('collections', 'OrderedDict'), (type(Path()).__module__, 'PosixPath'), ('torch', 'Size'),
    ('torch.serialization', '_get_layout'),
    ('torch.distributed.checkpoint.filesystem', '_StorageInfo'),
}
_METADATA_GLOBALS |= {('torch.distributed.checkpoint.metadata', name) for name in (
    'BytesStorageMetadata', 'ChunkStorageMetadata', 'Metadata', 'MetadataIndex', 'StorageMeta',
    'TensorProperties', 'TensorStorageMetadata', '_MEM_FORMAT_ENCODING')}
_METADATA = '.metadata'
_LATEST = 'latest-rank0.pt'
_EXPECTED = 'a checkpoint of this project'
_NAME = re.compile(r'ep\d+-ba(\d+)(-rank0\.pt)?')
# Errors of the system that a damaged file can cause: a missing part, and a seek to before its start.
_DAMAGE = (None, errno.ENOENT, errno.EINVAL)


def _save_flushed(state: State, filename: str, **options: Any) -> Optional[str]:
    """Composer's `save_checkpoint`, which also flushes the files, before Composer deletes older checkpoints,
    and raises a FileError with the system's reason if they cannot be written."""
    try:
        saved = _save_checkpoint(state, filename, **options)
        if saved is not None:
            # A sharded checkpoint is a folder, and `saved` the file of this rank in it.
            for path in (saved, *Path(saved).parents[:2]):
                flush(path)
    except (OSError, RuntimeError, CheckpointException) as error:  # the last is not an Exception
        path = Path(checkpoint.get_save_filename(state, filename))
        raise FileError(f'cannot be written ({_write_failure(error, path.parent)})', path) from error
    return saved


# Composer calls it by this name.  A callback would come too late, or before the checkpoint.
_save_checkpoint = checkpoint.save_checkpoint
checkpoint.save_checkpoint = _save_flushed


def _write_failure(error: BaseException, folder: Path) -> str:
    """Return the system's reason why a checkpoint in a folder was not written, or the first line of torch's.

    torch's errors have no `errno`, and lose their context on the way to other ranks.
    """
    causes = [error.__context__, error]
    if isinstance(error, CheckpointException):
        causes = [failure for failure, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError):
            return str(cause.strerror)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**26))  # some may be free on a full disk
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as reason:
        return str(reason.strerror)
    return str(causes[-1]).partition('\n')[0]


class _Index(pickle.Unpickler):
    """Reads the index of a sharded checkpoint; a ConfigError if it would run code."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.BytesIO(path.read_bytes()))
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _METADATA_GLOBALS:
            raise ConfigError(f'{self.path} holds {module}.{name}, which would run code')
        return super().find_class(module, name)


def _check_archive(file: BinaryIO, name: Path) -> None:
    """Raise an error if a torch file is incomplete or damaged, or a ConfigError if it would run code."""
    with zipfile.ZipFile(file) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise zipfile.BadZipFile(f'the checksum of {bad} is wrong')
    file.seek(0)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if unsafe:
        raise ConfigError(f'{name} holds {", ".join(sorted(unsafe))}, which would run code')


def _check_checkpoint(path: Path) -> None:
    """Apply `_check_archive` to all parts of a checkpoint, full or sharded; a FileError if it is damaged."""
    with reading(path, _EXPECTED):
        if not path.is_dir():
            with path.open('rb') as file:
                _check_archive(file, path)
            return
        for part in _Index(path / _METADATA).load().storage_data.values():
            shard = path / part.relative_path
            with shard.open('rb') as file:
                file.seek(part.offset)
                _check_archive(io.BytesIO(file.read(part.length)), shard)


def _newest_first(names: Iterable[str]) -> list[tuple[int, str]]:
    """Return (batch, name) of the names that Composer gives to checkpoints, newest first."""
    checkpoints: list[tuple[int, str]] = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match is not None:
            checkpoints.append((int(match[1]), name))
    return sorted(checkpoints, reverse=True)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    return [(batch, folder / name) for batch, name in _newest_first(path.name for path in folder.glob('*'))]


def _remove(checkpoint: Path) -> None:
    if checkpoint.is_dir():
        remove_folder(checkpoint)
    else:
        checkpoint.unlink()


def newest_checkpoint(folder: Path) -> Optional[Path]:
    """Return the newest complete checkpoint of a local folder: a file, a folder of shards, or None.
    `latest-rank0.pt` is set to point to it.  Newer, incomplete ones of a killed run are removed,
    with a warning.

    Raises:
        ConfigError: A checkpoint would run code, or checkpoints exist but none is complete.
        FileError: The disk cannot be read.
    """
    damaged: dict[Path, str] = {}
    newest = None
    for _, path in _checkpoints(folder):
        try:
            _check_checkpoint(path)
            newest = path
            break
        except FileError as error:
            # A disk that cannot be read says nothing about the checkpoint, which would be removed below.
            if isinstance(error.__cause__, OSError) and error.__cause__.errno not in _DAMAGE:
                raise
            damaged[path] = str(error)
    latest = folder / _LATEST
    # A single damaged checkpoint without a link is the first of a run that was killed while writing it.
    if newest is None and damaged and (latest.is_symlink() or len(damaged) > 1):
        raise ConfigError(f'every checkpoint is incomplete or damaged: {"; ".join(damaged.values())}; choose '
                          'another save_folder, or remove them to begin again')
    if newest is not None and damaged:
        warnings.warn(f'removed incomplete checkpoints: {"; ".join(damaged.values())}; resuming from '
                      f'{newest.name}', stacklevel=2)
    for unfinished in damaged:
        _remove(unfinished)
    if newest is not None:
        new = folder / '.latest.tmp'
        new.unlink(missing_ok=True)
        new.symlink_to(newest.name)
        new.replace(latest)
    return newest


def _newest_remote(store: ObjectStore, folder: str) -> Optional[tuple[str, list[str], str]]:
    """Find the newest complete checkpoint in an object store: its name, its objects, and their prefix."""
    path = parse_uri(folder)[2].strip('/')
    prefix = f'{path}/'.removeprefix('/')  # empty for a whole bucket
    names = [name.removeprefix(prefix) for name in store.list_objects(prefix)]
    top_level = {name.split('/')[0] for name in names}
    for _, name in _newest_first(top_level):
        if name in names:  # a file
            return name, [name], prefix
        objects = [object_name for object_name in names if object_name.startswith(f'{name}/')]
        if f'{name}/{_METADATA}' not in objects:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            index = Path(scratch, 'metadata')
            store.download_object(f'{prefix}{name}/{_METADATA}', str(index))
            with reading(f'{prefix}{name}', _EXPECTED):
                parts = {part.relative_path for part in _Index(index).load().storage_data.values()}
        if all(f'{name}/{part}' in objects for part in parts):
            return name, objects, prefix
    return None


def check_shared(folder: str) -> None:
    """Raise a ConfigError if some nodes do not share the folder of checkpoints.  Every rank calls this."""
    if '://' in folder:
        return

    def write() -> Path:
        path = Path(folder, f'.{uuid.uuid4().hex}')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    path = broadcast_from_rank0(write)
    seen = dist.all_gather_object(path.exists())
    if is_first():
        path.unlink()
    if not all(seen):
        raise ConfigError(f'the nodes do not share {folder}, so some could not resume from it; expected a '
                          'folder on a shared disk, or s3://…', key='checkpoint_folder')


def find_checkpoint(folder: str, sharded: bool) -> Optional[str]:
    """Return the path or URI of the newest complete checkpoint, or None.  Every rank calls this; rank 0
    inspects the folder, local or in an object store.  Afterwards, this process refuses to load checkpoints
    that would run code.

    Raises:
        ConfigError: As for `newest_checkpoint`, or the checkpoint is full although `sharded` is set, or vice
            versa, or credentials are missing.
    """
    def find() -> Optional[str]:
        store = maybe_create_object_store_from_uri(folder)
        if store is None:
            path = newest_checkpoint(Path(folder))
            return None if path is None else str(path.absolute())
        with reaching(folder):
            newest = _newest_remote(store, folder)
        return None if newest is None else f'{folder.rstrip("/")}/{newest[0]}'

    # Composer 0.32.1 lets torch unpickle everything; its later versions use a list of allowed types, as here.
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
    checkpoint = broadcast_from_rank0(find)
    if checkpoint is not None and sharded == checkpoint.endswith('.pt'):
        raise ConfigError(f'{checkpoint} was written with the other state_dict_type, but this run writes and '
                          'reads only its own', key='fsdp.state_dict_type')
    return checkpoint


def written_checkpoints(folder: str, batch: int, num_to_keep: int) -> list[str]:
    """List local checkpoints of previous processes, oldest first, in the format of Composer's saver.

    More than `num_to_keep`, unless that is -1, are removed: a process was killed before it did so.

    Without this list, Composer 0.32.1 counts only checkpoints of its own process towards
    `save_num_checkpoints_to_keep`.  Checkpoints after `batch`, where the run resumes,
    are left out: it overwrites them.
    """
    if '://' in folder:
        return []
    checkpoints = reversed(_checkpoints(Path(folder)))
    paths = [path for written_at, path in checkpoints if written_at <= batch]
    if num_to_keep > 0:
        for surplus in paths[:-num_to_keep]:
            _remove(surplus)
        paths = paths[-num_to_keep:]
    # For a sharded checkpoint, Composer lists a file inside its folder.
    return [str(path / _METADATA if path.is_dir() else path) for path in paths]


def read_model(path: Path) -> dict[str, torch.Tensor]:
    """Read the model's weights from a checkpoint, on the CPU; errors as for `read_latest`."""
    _check_checkpoint(path)
    with reading(path, _EXPECTED):
        if not path.is_dir():
            model = dict(read_pickle(path)['state']['model'])
        else:
            prefix = 'state.model.'
            state: dict[str, Any] = {}
            for name, metadata in _Index(path / _METADATA).load().state_dict_metadata.items():
                if name.startswith(prefix):
                    state[name] = torch.empty(metadata.size, dtype=metadata.properties.dtype)
            load(state, storage_reader=FileSystemReader(path), no_dist=True)
            model = {name.removeprefix(prefix): value for name, value in state.items()}
    check_finite(model, path)
    return model


def read_latest(folder: str) -> dict[str, torch.Tensor]:
    """Read the model's weights from the latest checkpoint in a folder or an object store, on the CPU.

    Raises:
        ConfigError: There is no complete checkpoint, it would run code, or credentials are missing.
        FileError: The checkpoint is damaged.
        LoadError: A weight is not finite.
    """
    store = maybe_create_object_store_from_uri(folder)
    if store is None:
        path = Path(folder, _LATEST)
        if not path.exists():
            raise ConfigError(f'there is no checkpoint {path}')
        return read_model(path)
    with reaching(folder):
        newest = _newest_remote(store, folder)
    if newest is None:
        raise ConfigError(f'there is no complete checkpoint in {folder}')
    name, objects, prefix = newest
    with tempfile.TemporaryDirectory() as scratch:
        for object_name in objects:
            path = Path(scratch, object_name)
            path.parent.mkdir(exist_ok=True)
            with reaching(folder):
                store.download_object(prefix + object_name, str(path))
        return read_model(Path(scratch, name))
