# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What `llm2clip.data.streams` relies on in mosaicml-streaming, shown on Streaming's own classes.

When an upgrade of Streaming fails here, the module that `llm2clip.data.streams` names for the member needs a look.
"""

import ast
import gc
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import streaming
from parts import make_samples, write_dataset
from streaming import Stream, StreamingDataset
from streaming.base.constant import LOCALS
from streaming.base.dataset import _ShardState
from streaming.base.format.base.reader import Reader
from streaming.base.util import clean_stale_shared_memory

from llm2clip.data.streams.paired_stream import PairedReader, PairedStream
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.streams.verified_stream import VerifiedStream

ROOT = Path(__file__).parents[2]
N = 12

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope='module')
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A dataset of several shards."""
    folder = tmp_path_factory.mktemp('members')
    write_dataset(make_samples(N), folder, size_limit='1kb')
    assert len(list((folder / 'train').rglob('*.mds'))) > 3
    yield folder / 'train'
    gc.collect()
    clean_stale_shared_memory()


@pytest.fixture
def open_dataset(remote: Path, tmp_path: Path) -> Callable[..., Any]:
    """Makes a dataset over an empty cache of the remote."""
    def open_it(
        dataset: type[StreamingDataset] = StreamingDataset, stream: type[Stream] = Stream, **options: Any
    ) -> Any:
        return dataset(streams=[stream(remote=str(remote), local=str(tmp_path / 'cache'))], batch_size=1, **options)

    return open_it


def test_the_thread_that_says_what_is_ready(open_dataset: Callable[..., Any]) -> None:
    """`_ready_thread`: called once an epoch with its state; only samples before `ready_index` are delivered, and
    `prepare_index` stands behind those whose shards have been asked for, of which `get_item` gets what is missing."""
    states: list[Any] = []

    class Dataset(StreamingDataset):
        def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
            if blocking:
                super().prepare_shard(shard_id)

        def _ready_thread(self, it: Any) -> None:
            states.append(it)
            assert (it.ready_index, it.yield_index, it.total) == (0, 0, len(it.sample_ids)) and not it.should_exit()
            it.ready_index = 3
            while it.yield_index < 3:
                pass
            assert len(delivered) == 3
            while it.prepare_index < it.total:
                pass
            it.ready_index = it.total
            it.on_exit()

    delivered: list[Any] = []
    dataset = open_dataset(Dataset, predownload=100)
    for sample in dataset:
        delivered.append(sample)
    assert len(delivered) == N and len(states) == 1
    assert sorted(i for i in states[0].sample_ids if i != -1) == list(range(N))


def test_the_states_of_shards(open_dataset: Callable[..., Any]) -> None:
    """`_shard_states`: REMOTE, PREPARING while a stream prepares it, LOCAL; PREPARING for ever if that fails."""
    seen: list[int] = []

    class Watched(Stream):
        def prepare_shard(self, shard: Reader) -> int:
            seen.append(int(dataset._shard_states[0]))
            if len(seen) == 1:
                raise OSError('no network')
            return super().prepare_shard(shard)

    dataset = open_dataset(stream=Watched)
    assert set(dataset._shard_states.numpy()) == {_ShardState.REMOTE}
    with pytest.raises(OSError, match='no network'):
        dataset.prepare_shard(0)
    assert dataset._shard_states[0] == _ShardState.PREPARING
    dataset._shard_states[0] = _ShardState.REMOTE
    dataset.prepare_shard(0)
    assert seen == [_ShardState.PREPARING] * 2 and dataset._shard_states[0] == _ShardState.LOCAL


def test_names_and_folders_in_shared_memory(open_dataset: Callable[..., Any]) -> None:
    """All names of a dataset begin with its number, and that which ends in ``_locals`` holds its absolute folders."""
    before = set(os.listdir('/dev/shm'))
    dataset = open_dataset()
    names = set(os.listdir('/dev/shm')) - before
    name, = (name for name in names if name.endswith(f'_{LOCALS}'))
    assert len(name) == 7 + len(LOCALS) and len({name[:7] for name in names}) == 1 < len(names)
    text = Path('/dev/shm', name).read_bytes()[4:].decode()
    assert text.split('\0')[0] == os.path.abspath(dataset.streams[0].local)


@pytest.mark.parametrize('repaired', [SafeDataset, VerifiedStream, PairedStream, PairedReader])
def test_what_is_overridden_is_still_there_and_takes_the_same(repaired: type) -> None:
    ours = [base for base in repaired.__mro__ if base.__module__.startswith('llm2clip')]
    upstream = next(base for base in repaired.__mro__ if base.__module__.startswith('streaming'))
    for name in {name for base in ours for name in vars(base)} & set(dir(upstream)):
        if inspect.isfunction(function := getattr(upstream, name)) and name != '__init__':
            assert list(inspect.signature(getattr(repaired, name)).parameters) == \
                list(inspect.signature(function).parameters), name


def _private_names(path: Path) -> set[str]:
    """Names with one underscore that a module asks for as an attribute, defines, or imports from Streaming."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('streaming'):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name.startswith('_') and not name.startswith('__')}


def test_nothing_else_touches_what_is_private_in_streaming() -> None:
    upstream = set()
    for path in Path(streaming.__file__).parent.joinpath('base').rglob('*.py'):
        upstream |= _private_names(path)
    touched = {str(path.relative_to(ROOT)): names for folder in ('llm2clip', 'recipes')
               for path in sorted((ROOT / folder).rglob('*.py')) if 'streaming' in path.read_text()
               if (names := _private_names(path) & upstream)}
    assert touched == {'llm2clip/data/streams/safe_dataset.py': {'_ready_thread', '_shard_states', '_ShardState'}}
