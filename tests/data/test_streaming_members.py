# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What `llm2clip.data.streams` relies on in mosaicml-streaming, shown on Streaming's own classes.

When an upgrade of Streaming fails here, the module that `llm2clip.data.streams` names for the member needs a look.
"""

import ast
import gc
import inspect
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import streaming
from parts import make_samples, write_dataset
from streaming import Stream, StreamingDataset
from streaming.base.constant import LOCALS
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.format.base.reader import Reader
from streaming.base.shared.prefix import _unpack_locals
from streaming.base.util import clean_stale_shared_memory

from llm2clip.data.streams.paired_stream import PairedReader, PairedStream
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.streams.verified_stream import ShardError, VerifiedStream

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


def open_files() -> int:
    """Of this process."""
    return len(os.listdir('/proc/self/fd'))


class Open:
    """Makes datasets over empty caches of the remote."""

    def __init__(self, remote: Path, folder: Path) -> None:
        self.remote, self.folder, self.made = remote, folder, 0

    def __call__(
        self, dataset: type[StreamingDataset] = StreamingDataset, stream: type[Stream] = Stream, **options: Any
    ) -> Any:
        self.made += 1
        local = self.folder / f'cache{self.made}'
        return dataset(streams=[stream(remote=str(self.remote), local=str(local))], batch_size=1, **options)


@pytest.fixture
def open_dataset(remote: Path, tmp_path: Path) -> Open:
    return Open(remote, tmp_path)


class Asked(threading.Event):
    """An event that knows which functions have asked it, and which have set it with what."""

    def __init__(self) -> None:
        super().__init__()
        self.by: set[str] = set()
        self.set_by: list[str] = []

    def is_set(self) -> bool:
        self.by.add(sys._getframe(1).f_code.co_name)
        return super().is_set()

    def set(self) -> None:
        self.set_by.append(sys._getframe(1).f_code.co_name)
        super().set()


def the_event(open_dataset: Open) -> None:
    """`_event`: an epoch uses the one that it finds; threads, loop and `get_item` ask it, and end when it is set."""
    dataset = open_dataset()
    dataset._event = event = Asked()
    samples = iter(dataset)
    next(samples)
    assert dataset._event is event
    event.set()
    with pytest.raises(RuntimeError, match='Background thread failed'):
        dataset.get_item(0)
    # The epoch ends early, and nobody is told: what `SafeDataset` is for.
    assert len(list(samples)) < N - 1
    assert {'_prepare_thread', '_ready_thread', '_each_sample_id', 'get_item'} <= event.by


def the_event_of_a_sample_that_cannot_be_had(open_dataset: Open) -> None:
    """`_event`: `get_item` sets it without a message before it raises an error that has one."""

    class Dataset(StreamingDataset):
        def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
            pass

    dataset = open_dataset(Dataset)
    dataset._event = event = Asked()
    with pytest.raises(RuntimeError, match='No such file.*Check if the shard file exists'):
        dataset.get_item(0)
    assert event.set_by == ['get_item']


def the_iterator(open_dataset: Open) -> None:
    """`_iterator`: there before the threads; an epoch ends when two of its parts have called `on_exit`, which a thread
    that fails does not do: then it waits for ever."""
    failed: list[Any] = []

    class Dataset(StreamingDataset):
        def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
            raise OSError('no network')

        def on_exception(self, future: Any) -> None:
            if isinstance(future.exception(), OSError):
                failed.append(self._iterator)
                if len(failed) == 2:
                    self._event.set()

    dataset = open_dataset(Dataset)
    exits: list[str] = []
    original = _Iterator.on_exit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Iterator, 'on_exit', lambda self: (
            exits.append(sys._getframe(1).f_code.co_name), original(self))[1])
        epoch = threading.Thread(target=lambda: list(dataset), daemon=True)
        epoch.start()
        _until(lambda: len(exits) == 1)
        epoch.join(0.2)
        assert epoch.is_alive() and failed == [dataset._iterator] * 2 and exits == ['_each_sample_id']
        dataset._iterator.on_exit()
        epoch.join(30)
        assert not epoch.is_alive()


def the_thread_that_says_what_is_ready(open_dataset: Open) -> None:
    """`_ready_thread`: called once an epoch with its state; only samples before `ready_index` are delivered."""
    states: list[Any] = []

    class Dataset(StreamingDataset):
        def _ready_thread(self, it: Any) -> None:
            states.append(it)
            assert (it.ready_index, it.yield_index, it.total) == (0, 0, len(it.sample_ids)) and not it.should_exit()
            it.ready_index = 3
            _until(lambda: it.yield_index == 3)
            self._event.set()
            it.on_exit()

    dataset = open_dataset(Dataset, predownload=100)
    assert len(list(dataset)) == 3
    assert states == [dataset._iterator] and sorted(i for i in states[0].sample_ids if i != -1) == list(range(N))


def the_ids_of_an_epoch(open_dataset: Open) -> None:
    """`_each_sample_id`: gives the ids whose samples an epoch delivers; what it raises leaves the epoch."""

    class Dataset(StreamingDataset):
        def _each_sample_id(self, it: Any) -> Iterator[int]:
            for _, sample_id in zip(range(2), super()._each_sample_id(it)):
                yield sample_id
            raise KeyError('enough')

    samples = iter(open_dataset(Dataset))
    assert [next(samples)['sample_id'] for _ in range(2)]
    with pytest.raises(KeyError, match='enough'):
        next(samples)


def the_shard_states(open_dataset: Open) -> None:
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


def the_lock_of_the_cache(open_dataset: Open) -> None:
    """`_cache_filelock`: `prepare_shard` makes it, holds it while it makes room, and keeps it if that fails."""
    dataset = open_dataset()
    dataset.prepare_shard(0)
    assert not dataset._cache_filelock.is_locked
    dataset._shard_states[0] = _ShardState.REMOTE
    dataset.cache_limit = 1
    with pytest.raises(ValueError, match='no shards present locally'):
        dataset.prepare_shard(1)
    assert dataset._cache_filelock.is_locked
    dataset._cache_filelock.release()


def the_number_of_the_shared_memory(open_dataset: Open) -> None:
    """`_shm_prefix_int`: all names of a dataset in shared memory begin with it, in six digits."""
    before = set(os.listdir('/dev/shm'))
    dataset = open_dataset()
    names = set(os.listdir('/dev/shm')) - before
    prefix = f'{dataset._shm_prefix_int:06}_'
    assert f'{prefix}{LOCALS}' in names and all(name.startswith(prefix) for name in names)


def the_folders_of_a_dataset(open_dataset: Open) -> None:
    """`_unpack_locals`: reads the absolute folders of a dataset from its shared memory."""
    dataset = open_dataset()
    data = Path(f'/dev/shm/{dataset._shm_prefix_int:06}_{LOCALS}').read_bytes()
    assert _unpack_locals(data)[0] == [os.path.abspath(dataset.streams[0].local)]


def the_download(open_dataset: Open) -> None:
    """`_download_file`: brings every file, the index under another name, which is then renamed."""
    names: list[tuple[str, Optional[str]]] = []

    class Watched(Stream):
        def _download_file(self, from_basename: str, to_basename: Optional[str] = None) -> str:
            names.append((from_basename, to_basename))
            return super()._download_file(from_basename, to_basename)

    dataset = open_dataset(stream=Watched)
    list(dataset)
    assert names[0] == ('index.json', 'index.json.tmp')
    assert sorted(names[1:]) == sorted((shard.raw_data.basename, None) for shard in dataset.shards)
    local = Path(dataset.streams[0].local)
    assert {str(path.relative_to(local)) for path in local.rglob('*') if path.is_file()} == {name for name, _ in names}


CHECKS: list[tuple[str, Callable[[Open], None]]] = [
    ('_event', the_event),
    ('_event', the_event_of_a_sample_that_cannot_be_had),
    ('_iterator', the_iterator),
    ('_ready_thread', the_thread_that_says_what_is_ready),
    ('_each_sample_id', the_ids_of_an_epoch),
    ('_shard_states', the_shard_states),
    ('_ShardState', the_shard_states),
    ('_cache_filelock', the_lock_of_the_cache),
    ('_shm_prefix_int', the_number_of_the_shared_memory),
    ('_unpack_locals', the_folders_of_a_dataset),
    ('_download_file', the_download),
]


@pytest.mark.parametrize('check', dict.fromkeys(check for _, check in CHECKS), ids=lambda check: check.__name__)
def test_streaming_behaves_as_its_repairs_need(check: Callable[[Open], None], open_dataset: Open) -> None:
    check(open_dataset)


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
    touched = {path: _private_names(path) & upstream for folder in ('llm2clip', 'recipes')
               for path in sorted((ROOT / folder).rglob('*.py')) if 'streaming' in path.read_text()}
    streams = {path for path in touched if path.parent == ROOT / 'llm2clip/data/streams'}
    assert set().union(*(touched[path] for path in streams)) == {name for name, _ in CHECKS}
    assert not {path: names for path, names in touched.items() if names and path not in streams}


def test_a_short_epoch_is_an_error(open_dataset: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = StreamingDataset._each_sample_id

    def short(self: StreamingDataset, it: Any) -> Iterator[int]:
        yield from (sample_id for _, sample_id in zip(range(5), whole(self, it)))

    monkeypatch.setattr(StreamingDataset, '_each_sample_id', short)
    with pytest.raises(ShardError, match=f'the epoch ended after 5 of the {N} samples'):
        list(open_dataset(SafeDataset, VerifiedStream))


def test_a_sample_that_cannot_be_had_says_why(open_dataset: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the process that asks, and to the next one."""
    dataset = open_dataset(SafeDataset, VerifiedStream)
    monkeypatch.setattr(StreamingDataset, 'prepare_shard', lambda self, shard_id, blocking=True: None)
    for error in (RuntimeError, ShardError):
        with pytest.raises(error, match='Check if the shard file exists'):
            dataset.get_item(0)


def test_after_a_failure_the_next_epoch_does_not_wait(open_dataset: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(SafeDataset, VerifiedStream)

    def broken(self: Any, shard_id: int, blocking: bool = True) -> None:
        raise OSError('no network')

    monkeypatch.setattr(StreamingDataset, 'prepare_shard', broken)
    dataset._cache_filelock = type('Lock', (), {'is_locked': False})()
    for _ in range(2):
        with pytest.raises(RuntimeError, match='no network|Background thread failed'):
            list(dataset)


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)
