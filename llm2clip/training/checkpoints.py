# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which checkpoint a run goes on from: the newest one that is whole, read without running code.

Composer's own autoresume trusts the `latest` link, which a kill at the wrong moment leaves missing, and lets all nodes
create and delete one file in a folder that they may share.
"""

import datetime
import io
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
import torch.torch_version
from composer.utils import maybe_create_object_store_from_uri, parse_uri
from composer.utils.object_store import ObjectStore
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from llm2clip.config import ConfigError
from llm2clip.files import FileError, reading
from llm2clip.ranks import broadcast_from_rank0
from llm2clip.remote_code.checks_llm2clip import check_finite
from llm2clip.remotes import reaching
from llm2clip.weights import read_pickle

__all__ = ['find_checkpoint', 'read_latest', 'written_checkpoints']

# What a Composer checkpoint holds beside tensors and plain containers.
torch.serialization.add_safe_globals([
    datetime.timedelta, torch.torch_version.TorchVersion, np.ndarray, np.dtype, np.dtypes.UInt32DType,
    np._core.multiarray._reconstruct,  # pyright: ignore[reportAttributeAccessIssue]
])
# What the index of a sharded checkpoint is made of; Python 3.13 has its paths in `pathlib._local`.
_METADATA_GLOBALS = {
    ('collections', 'OrderedDict'), (type(Path()).__module__, 'PosixPath'), ('torch', 'Size'),
    ('torch.serialization', '_get_layout'),
    *(('torch.distributed.checkpoint.metadata', name) for name in (
        'BytesStorageMetadata', 'ChunkStorageMetadata', 'Metadata', 'MetadataIndex', 'StorageMeta',
        'TensorProperties', 'TensorStorageMetadata', '_MEM_FORMAT_ENCODING')),
    ('torch.distributed.checkpoint.filesystem', '_StorageInfo'),
}
_METADATA = '.metadata'
_LATEST = 'latest-rank0.pt'
_EXPECTED = 'a checkpoint of this project'
_NAME = re.compile(r'ep\d+-ba(\d+)(-rank0\.pt)?')


class _Damaged(Exception):
    """A checkpoint that is not whole."""


class _MetadataUnpickler(pickle.Unpickler):

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_GLOBALS and not (
                module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)):
            raise ConfigError(f'its index holds {module}.{name}, which would run code')
        return super().find_class(module, name)


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open('rb') as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f'holds a {type(metadata).__name__} and no index')
    except FileNotFoundError:
        raise _Damaged(f'there is no {_METADATA}, which is written last') from None
    except ConfigError:
        raise
    except Exception as error:  # whatever pickle makes of other bytes
        raise _Damaged(f'{_METADATA}: {error}') from None
    return metadata


def _check_archive(file: Any, name: str) -> None:
    """Raise for a file of torch that is not whole, or holds more than data (a ConfigError)."""
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
        if not isinstance(file, Path):
            file.seek(0)
        unsafe = [] if bad else torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception as error:  # whatever zipfile and torch make of other bytes
        raise _Damaged(f'{name}: {error}') from None
    if bad is not None:
        raise _Damaged(f'{name}: the checksum of {bad} is wrong')
    if unsafe:
        raise ConfigError(f'it holds {", ".join(sorted(unsafe))}, which would run code')


def _check_checkpoint(path: Path) -> None:
    """The same for a checkpoint, full or sharded."""
    if not path.is_dir():
        _check_archive(path, path.name)
        return
    for index, part in (_read_metadata(path / _METADATA).storage_data or {}).items():
        shard = path / part.relative_path
        if not shard.is_file() or shard.stat().st_size < part.offset + part.length:
            raise _Damaged(f'{part.relative_path} is missing or too short')
        with shard.open('rb') as file:
            file.seek(part.offset)
            _check_archive(io.BytesIO(file.read(part.length)), f'{part.relative_path}, {index.fqn}')


def _newest_first(names: Iterable[str]) -> list[tuple[int, str]]:
    """Those of checkpoints, as Composer names them, with their batches."""
    matches = {name: _NAME.fullmatch(name) for name in names}
    return sorted(((int(match[1]), name) for name, match in matches.items() if match), reverse=True)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    return [(batch, folder / name) for batch, name in _newest_first(path.name for path in folder.glob('*'))]


def newest_checkpoint(folder: Path) -> Optional[Path]:
    """The newest whole checkpoint of a local folder, to which `latest-rank0.pt` then points: a file, a folder of
    shards, or None.  Newer ones that a killed run left unfinished are removed, with a warning.

    Raises:
        ConfigError: A checkpoint would run code, or there are some but none is whole.
    """
    there, damaged, newest = [path for _, path in _checkpoints(folder)], [], None
    for path in there:
        try:
            _check_checkpoint(path)
        except _Damaged as error:
            damaged.append(f'{path.name} ({error})')
        except ConfigError as error:
            raise ConfigError(f'checkpoint {path}: {error}') from None
        else:
            newest = path
            break
    latest = folder / _LATEST
    # A single one without a link is that of a run that was killed while it wrote its first.
    if newest is None and damaged and (latest.is_symlink() or len(damaged) > 1):
        raise ConfigError(f'{folder}: no checkpoint is whole: {"; ".join(damaged)}. Choose another save_folder, or '
                          'remove them to begin again')
    if newest is not None and damaged:
        warnings.warn(f'{folder}: not whole, and removed: {"; ".join(damaged)}. Going on from {newest.name}',
                      stacklevel=2)
    for unfinished in there[:len(damaged)]:
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
    if newest is not None:
        new = folder / '.latest.tmp'
        new.unlink(missing_ok=True)
        new.symlink_to(newest.name)
        new.replace(latest)
    return newest


def _newest_remote(store: ObjectStore, folder: str) -> Optional[tuple[str, list[str], str]]:
    """The same for an object store, where an object that exists is whole: its name, its objects, and their prefix."""
    prefix = f'{path}/' if (path := parse_uri(folder)[2].strip('/')) else ''
    there = [name.removeprefix(prefix) for name in store.list_objects(prefix or None)]
    for _, name in _newest_first({name.split('/')[0] for name in there}):
        if name in there:
            return name, [name], prefix
        objects = [found for found in there if found.startswith(f'{name}/')]
        if f'{name}/{_METADATA}' not in objects:
            continue
        with tempfile.TemporaryDirectory() as scratch, _named(f'{prefix}{name}'):
            path = Path(scratch, 'metadata')
            store.download_object(f'{prefix}{name}/{_METADATA}', str(path))
            parts = {part.relative_path for part in (_read_metadata(path).storage_data or {}).values()}
        if all(f'{name}/{part}' in objects for part in parts):
            return name, objects, prefix
    return None


def find_checkpoint(folder: str, sharded: bool) -> Optional[str]:
    """Where every rank finds the newest whole checkpoint, or None; every rank calls this, and the first looks into the
    folder, local or of an object store.  From then on, this process reads no checkpoint that would run code.

    Raises:
        ConfigError: As for `newest_checkpoint`, the checkpoint is full and not `sharded` or the other way round, or
            there are no credentials.
    """
    def find() -> Optional[str]:
        store = maybe_create_object_store_from_uri(folder)
        if store is None:
            path = newest_checkpoint(Path(folder))
            return None if path is None else str(path.absolute())
        with reaching(folder):
            newest = _newest_remote(store, folder)
        return None if newest is None else f'{folder.rstrip("/")}/{newest[0]}'

    # Composer 0.32.1 asks torch for a full unpickling; its later versions keep a list of what is allowed, as here.
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
    found = broadcast_from_rank0(find)
    if found is not None and sharded == found.endswith('.pt'):
        kind, expected = ('full', 'sharded') if sharded else ('sharded', 'full')
        raise ConfigError(f'fsdp.state_dict_type: {found} is a {kind} checkpoint, but this run writes and reads '
                          f'{expected} ones')
    return found


def written_checkpoints(folder: str, batch: int) -> list[str]:
    """Checkpoints on this disk that an earlier process wrote, oldest first, as Composer's CheckpointSaver lists them.

    Composer 0.32.1 counts only those of its own process towards `save_num_checkpoints_to_keep`, unless it is told.
    Those after the batch from which the run goes on will be written again.
    """
    # Of a sharded checkpoint it lists a file in its folder.
    return [str(path / _METADATA if path.is_dir() else path)
            for found, path in reversed(_checkpoints(Path(parse_uri(folder)[2]))) if found <= batch]


@contextmanager
def _named(path: Union[str, Path]) -> Iterator[None]:
    """Say which checkpoint is damaged or holds code."""
    try:
        yield
    except (_Damaged, ConfigError) as error:
        raise FileError(f'{path}: {error}, expected {_EXPECTED}') from None


def read_model(path: Path) -> dict[str, torch.Tensor]:
    """The model's weights in a full or sharded checkpoint, whole, on the CPU; errors are those of `read_latest`."""
    with _named(path):
        _check_checkpoint(path)
    with reading(path, _EXPECTED):
        if not path.is_dir():
            model = dict(read_pickle(path)['state']['model'])
        else:
            prefix = 'state.model.'
            state = {name: torch.empty(about.size, dtype=about.properties.dtype)
                     for name, about in _read_metadata(path / _METADATA).state_dict_metadata.items()
                     if name.startswith(prefix) and isinstance(about, TensorStorageMetadata)}
            load(state, storage_reader=FileSystemReader(path), no_dist=True)
            model = {name.removeprefix(prefix): value for name, value in state.items()}
        if not model:
            raise FileError(f'{path}: holds no model, expected {_EXPECTED}')
    check_finite(model, path)
    return model


def read_latest(folder: str) -> dict[str, torch.Tensor]:
    """The model's weights in the latest checkpoint of a folder, local or in an object store, on the CPU.

    Raises:
        ConfigError: There is none, or there are no credentials.
        FileError: The checkpoint is damaged, would run code, or holds no model.
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
        raise ConfigError(f'there is no whole checkpoint in {folder}')
    name, objects, prefix = newest
    with tempfile.TemporaryDirectory() as scratch:
        for found in objects:
            path = Path(scratch, found)
            path.parent.mkdir(exist_ok=True)
            store.download_object(prefix + found, str(path))
        return read_model(Path(scratch, name))
