# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A dataset either delivers every sample or stops promptly and says why.  Each case has a time limit."""

import gc
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import pytest
from disks import flip
from filelock import FileLock
from launched import Launched, alive, finish, wait_until
from parts import make_samples, write_dataset, write_text_embeddings
from recipes_in_process import as_if_a_process_ended
from refusals import refused_at
from streaming import StreamingDataset
from streaming.base import dataset as dataset_module
from streaming.base.batching import generate_work
from streaming.base.format.base.reader import FileInfo
from streaming.base.sampling import get_sampling
from streaming.base.storage import CloudDownloader
from streaming.base.storage.download import LocalDownloader
from streaming.base.util import clean_stale_shared_memory
from streaming.base.world import World
from torch.utils.data import DataLoader

from llm2clip.config import DatasetConfig, ImageDataConfig, ImageStreamConfig
from llm2clip.data.image_text_dataset import build_image_loader
from llm2clip.data.schema import file_damage
from llm2clip.data.streams import safe_dataset, verified_stream
from llm2clip.data.streams.safe_dataset import SafeDataset, ShardFinder
from llm2clip.data.streams.verified_stream import ShardError, VerifiedStream
from llm2clip.io.remotes import OutputFolder

IMAGE_SIZE = 32
SECONDS = 60
SHARD = Path('images/part-all/shard.00003.mds')

pytestmark = [pytest.mark.long, pytest.mark.usefixtures('no_leftovers'), pytest.mark.timeout(SECONDS)]


@pytest.fixture(scope='module')
def originals(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 samples in many shards, and their embeddings dataset."""
    folder = tmp_path_factory.mktemp('originals')
    write_dataset(make_samples(64), folder, size_limit='2kb')
    write_text_embeddings(folder / 'train', folder / 'embeddings', teacher_folder)
    return folder


@pytest.fixture(autouse=True)
def _copies(originals: Path, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of them that a test may damage; a download is tried again at once."""
    shutil.copytree(originals / 'train', 'images')
    shutil.copytree(originals / 'embeddings', 'embeddings')
    monkeypatch.setattr('llm2clip.io.remotes.time', SimpleNamespace(sleep=lambda seconds: None))


def _config(cache: str = 'cache', remote: str = '.', workers: int = 0, **options: Any) -> ImageDataConfig:
    embeddings = DatasetConfig(f'{cache}/embeddings', f'{remote}/embeddings')
    stream = ImageStreamConfig(f'{cache}/images', f'{remote}/images', embeddings={'tiny': embeddings})
    options = {'caption_weights': {'short': 1.0}, 'download_retry': 2, **options}
    return ImageDataConfig(streams={'s': stream}, num_workers=workers, num_canonical_nodes=4, **options)


def _local(folder: str = 'images') -> ImageDataConfig:
    """A dataset on this machine, without embeddings."""
    return ImageDataConfig(streams={'s': ImageStreamConfig(folder)}, num_workers=0, num_canonical_nodes=4)


def _loader(config: ImageDataConfig, batch: int = 8, captions: bool = False) -> DataLoader:
    return build_image_loader(config, IMAGE_SIZE, batch, 5, train=True, captions=captions).dataloader


def _check_whole(loader: DataLoader) -> None:
    """Fail unless an epoch has every sample once."""
    assert sorted(int(i) for batch in loader for i in batch['index']) == list(range(64))


def _forget(loader: DataLoader) -> None:
    """End the use of a cache in this process, as the end of the process does."""
    for lock in loader.dataset._cache_locks:
        lock.release()


def _fill_cache() -> None:
    list(loader := _loader(_config()))
    _forget(loader)


def _used(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob('*.mds'))


def test_a_corrupt_and_a_missing_shard_stop_the_run() -> None:
    flip(SHARD)
    loader = _loader(_config())
    with pytest.raises(ShardError, match=r'images.*shard\.00003\.mds is damaged: xxh64 .*, expected .*tried 2 times'):
        list(loader)
    assert not list(Path('cache').rglob('*shard.00003.mds.*')), 'a damaged download was left'
    flip(SHARD)
    Path('embeddings/shard.00002.mds').unlink()
    with pytest.raises(Exception, match=r'embeddings/shard\.00002\.mds does not exist'):
        list(_loader(_config('other', workers=2)))


def test_downloads_of_killed_processes_are_removed() -> None:
    ended, zombie = subprocess.Popen(['true']), subprocess.Popen(['true'])
    ended.wait()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    cache = Path('cache/images')
    for process in (ended.pid, zombie.pid, os.getppid()):
        (cache / f'.part-all_shard.00003.mds.{process}.part').mkdir(parents=True)
        (cache / f'index.json.{process}.now').touch()
    _check_whole(_loader(_config()))
    assert {path.name for path in cache.glob('*.*.*')} == {
        f'.part-all_shard.00003.mds.{os.getppid()}.part', f'index.json.{os.getppid()}.now'}


def test_nobody_waits_for_a_shard_that_failed_elsewhere() -> None:
    flip(SHARD)
    dataset: Any = _loader(_config()).dataset
    dataset.prepare_shard(3, blocking=False)
    assert isinstance(dataset._failure, ShardError)
    dataset._failure = None  # as in another process
    flip(SHARD)
    dataset.prepare_shard(3)
    assert ('cache' / SHARD).is_file()


def test_a_file_that_arrives_cut_once_is_downloaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = CloudDownloader.download, set()

    def download_badly(self: CloudDownloader, source: str, target: str, timeout: float) -> None:
        whole(self, source, target, timeout)
        if source not in cut:
            cut.add(source)
            Path(target).write_bytes(Path(target).read_bytes()[:-9])

    monkeypatch.setattr(CloudDownloader, 'download', download_badly)
    _check_whole(_loader(_config()))
    assert len(cut) > 10 and {'./images/index.json', './embeddings/index.json'} < cut


def test_damaged_and_missing_local_files() -> None:
    config = _local()
    config.streams['s'].embeddings['tiny'] = DatasetConfig('embeddings')
    path = Path('embeddings/shard.00001.mds')
    whole, size = path.read_bytes(), path.stat().st_size
    flip(path)
    loader = _loader(config)
    for read in (lambda: list(loader), lambda: [loader.dataset[i] for i in range(64)]):
        with pytest.raises(ShardError, match=r'embeddings/shard\.00001\.mds is damaged: xxh64'):
            read()
    path.write_bytes(whole[:-1])
    with pytest.raises(ShardError, match=rf'shard\.00001\.mds is damaged: {size - 1} bytes, expected {size}'):
        _loader(config)
    path.unlink()
    with pytest.raises(ShardError, match=r'embeddings/shard\.00001\.mds is missing'):
        _loader(config)


def test_damaged_cache_files_are_downloaded_again() -> None:
    _fill_cache()
    cached = sorted(Path('cache').rglob('*.mds'))
    flip(cached[0])
    cached[5].write_bytes(cached[5].read_bytes()[:100])
    cached[9].unlink()
    loader = _loader(_config())
    _check_whole(loader)
    indices = (path.stat().st_size for path in Path('cache').rglob('index.json'))
    assert loader.dataset.cache_usage == _used('cache') + sum(indices)


def test_a_shard_evicted_during_its_check_is_downloaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process makes room between a worker's look into the cache and its check of what was there."""
    _fill_cache()
    evicted: list[Path] = []

    def evict(path: Path, expected: FileInfo) -> Optional[str]:
        if not path.parent.name.endswith('.part'):
            evicted.append(path)
            path.unlink()
        return file_damage(path, expected)

    monkeypatch.setattr(verified_stream, 'file_damage', evict)
    _check_whole(_loader(_config()))
    assert len(evicted) > 1


def test_a_download_without_a_file_or_an_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CloudDownloader, 'download', lambda *args: None)  # Streaming's for gs:// ignores most errors
    with pytest.raises(OSError, match='index.json cannot be downloaded: OSError: the download ended without a file'):
        OutputFolder('out', 'images').fetch('index.json')
    monkeypatch.setattr(CloudDownloader, 'download', lambda *args: time.sleep(SECONDS))
    with pytest.raises(ShardError, match='index.json cannot be downloaded: TimeoutError: no end after 0 s'):
        _loader(_config(download_timeout=0.3, download_retry=1))


def test_a_dataset_at_the_root_of_a_repository_opens_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, filename: str, repo_type: str, local_dir: str) -> None:
        target = Path(local_dir, filename)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path('images', filename), target)

    monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
    for downloaded in (True, False):
        stream = VerifiedStream(local='cache', remote='hf://datasets/org/name')
        shard = stream.open(download_retry=1)[0]
        assert bool(stream.prepare_shard(shard)) is downloaded
    files = [str(path) for path in Path('cache').rglob('*')]
    assert sorted(files) == ['cache/index.json', 'cache/part-all', 'cache/part-all/shard.00000.mds']


def test_a_dataset_that_was_written_anew_is_noticed() -> None:
    _fill_cache()
    index = json.loads(Path('images/index.json').read_text())
    index['shards'].pop()
    Path('images/index.json').write_text(json.dumps(index))
    with pytest.raises(ShardError, match='images/index.json is not the index that .*cache/images was filled with'):
        _loader(_config())


def test_a_small_cache_limit_works_and_a_tiny_one_is_refused() -> None:
    largest = max(path.stat().st_size for path in Path('images').rglob('*.mds'))
    for limit, message in ((2 * largest, 'cache usage'), (5 * largest, 'Cache limit .* is too low')):
        with pytest.raises(ValueError, match=message):
            _loader(_config(cache_limit=str(limit)))
    _check_whole(_loader(_config('b', workers=2, cache_limit=str(12 * largest))))
    assert _used('b') < 12 * largest
    # An embeddings dataset without a remote would be deleted as well.
    local = _config(cache_limit='1gb')
    local.streams['s'].embeddings['tiny'] = DatasetConfig('embeddings')
    with refused_at('cache_limit'):
        _loader(local)


def test_a_cache_with_another_teacher_stays_within_its_limit() -> None:
    _fill_cache()
    limit = _used('cache') * 2 // 3
    for _ in range(2):  # at first more than the limit is there
        shutil.rmtree('cache/embeddings')
        loader = _loader(_config(cache_limit=str(limit)))
        _check_whole(loader)
        # This thread and the one that downloads ahead may each have found space for a shard.
        in_flight = max(shard.get_max_size() for shard in loader.dataset.shards)
        assert _used('cache') <= loader.dataset.cache_usage <= limit + in_flight
        _forget(loader)


def test_a_state_of_other_data_is_refused() -> None:
    def dataset(name: str, samples: int = 16, prefix: str = 's') -> SafeDataset:
        write_dataset(make_samples(samples, prefix=prefix), Path(name), size_limit='2kb')
        return _loader(_local(f'{name}/train'), captions=True).dataset

    before, more, other = dataset('before'), dataset('more', samples=40), dataset('other', prefix='x')
    state = json.loads(json.dumps(before.state_dict(8, True)))
    before.load_state_dict(state)
    for changed in (more, other):
        with refused_at('train_data'):
            changed.load_state_dict(state)


# One of two ranks, as it were: in the second epoch its workers wait for those of the other one.
WAITING = """
import os, sys, time
sys.path[:0] = ['tests', 'tests/data/streams']
from test_safe_dataset import _config, _loader
from llm2clip.data.streams.safe_dataset import SafeDataset

def wait_in_the_second_epoch(dataset, epoch, sample_in_epoch, work=SafeDataset._get_work):
    if epoch:
        os.write(1, f'{os.getppid()}\\n'.encode())  # whole, where two workers write at once
        time.sleep(600)
    return work(dataset, epoch, sample_in_epoch)

SafeDataset._get_work = wait_in_the_second_epoch
os.chdir(sys.argv[1])
loader = _loader(_config(workers=2))
list(loader)
next(iter(loader))
"""


@pytest.mark.timeout(300)
def test_only_the_cache_of_a_run_that_ended_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers whose rank was killed end by themselves, also where they wait for others."""
    script, log = tmp_path / 'waiting.py', tmp_path / 'log'
    script.write_text(WAITING)
    process = Launched([str(script), str(tmp_path)], log)
    wait_until(lambda: log.is_file() and log.read_text().count('\n') == 2, process, log)
    with monkeypatch.context() as patch:
        patch.setattr('llm2clip.data.streams.safe_dataset._LOCK_SECONDS', 0.5)
        with pytest.raises(ShardError, match='cache/embeddings is the cache of another run that is still alive'):
            _loader(_config())
    os.kill(int(log.read_text().split()[0]), signal.SIGKILL)
    assert process.wait(SECONDS) == 128 + signal.SIGKILL
    deadline = time.monotonic() + SECONDS
    while alive(process.pid):
        assert time.monotonic() < deadline, alive(process.pid)
        time.sleep(0.1)
    _check_whole(_loader(_config()))


@pytest.mark.parametrize('fate', ['killed', 'alive', 'another program'])
def test_only_shared_memory_of_killed_runs_is_removed(fate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without remotes, whose folders no lock protects."""
    # In place of /dev/shm, for which other tests' runs are strangers.
    memory = Path('memory')
    memory.mkdir()
    monkeypatch.setattr(safe_dataset, '_SHARED_MEMORY', memory)
    lock = FileLock(memory / '000007_llm2clip')
    for name in ('locals', 'epoch_data', *(['llm2clip'] if fate != 'another program' else [])):
        (memory / f'000007_{name}').touch()
    if fate == 'alive':
        lock.acquire()
    for path in memory.iterdir():
        os.utime(path, (0, 0))
    safe_dataset._remove_stale_memory()
    assert bool([*memory.iterdir()]) is (fate != 'killed')
    lock.release()


def test_a_released_dataset_gives_its_number_back_and_then_its_marker() -> None:
    """Python may keep its object for longer."""
    datasets = []
    for _ in range(2):
        with as_if_a_process_ended():
            datasets.append(_loader(_local(), captions=True).dataset)
    number = datasets[0]._shm_prefix_int
    marker = Path(f'/dev/shm/{number:06}_llm2clip')
    assert datasets[1]._shm_prefix_int == number and marker.is_file()
    assert isinstance(datasets[0].spanner, ShardFinder)  # not Streaming's
    for index in (-1, 64):
        with pytest.raises(IndexError):
            datasets[0].spanner[index]
    datasets.clear()
    gc.collect()
    assert not marker.exists()


# A run that chooses its number in shared memory slowly, and ends when another one has chosen, too.
STARTING = """
import os, sys, time
sys.path[:0] = ['tests', 'tests/data/streams']
from streaming.base.shared import prefix
from test_safe_dataset import _loader, _local
choose = prefix._check_and_find_retrying

def choose_slowly(*args, **options):
    number = choose(*args, **options)
    time.sleep(0.1)  # until it is taken
    return number

prefix._check_and_find_retrying = choose_slowly
_, folder, mine = sys.argv
os.chdir(folder)
dataset = _loader(_local(), captions=True).dataset
with open(f'numbers/{mine}', 'w') as file:
    file.write(f'{dataset._shm_prefix_int}')
deadline = time.monotonic() + 30
while len(os.listdir('numbers')) < 2 and time.monotonic() < deadline:
    time.sleep(0.1)
"""


def test_two_runs_that_start_at_once_number_their_shared_memory_apart(tmp_path: Path) -> None:
    script, numbers = tmp_path / 'starting.py', tmp_path / 'numbers'
    script.write_text(STARTING)
    numbers.mkdir()
    logs = [tmp_path / 'log0', tmp_path / 'log1']
    runs = [Launched([str(script), str(tmp_path), log.name], log) for log in logs]
    for run, log in zip(runs, logs):
        finish(run, log)
    first, second = (path.read_text() for path in numbers.iterdir())
    assert first != second


def test_a_downloader_is_not_shared_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that was opened before a fork cannot be used by both sides."""
    users: list[int] = []
    monkeypatch.setattr(LocalDownloader, '__init__', lambda self: setattr(self, 'made_in', os.getpid()))
    original = CloudDownloader.download

    def download(self: Any, *args: Any) -> None:
        if self.made_in != os.getpid():
            raise RuntimeError('made in another process')
        users.append(os.getpid())
        original(self, *args)

    monkeypatch.setattr(CloudDownloader, 'download', download)
    _check_whole(_loader(_config(workers=2)))
    assert users


# Settings of the data.
EPOCHS: dict[str, dict[str, Any]] = {
    'padded': {},
    'proportions': {'a.proportion': 1.0, 'b.proportion': 2.0},
    'repeats': {'b.repeat': 1.5},
    'epoch_size': {'epoch_size': 45},
    'five captions': {'captions_per_image': 5},
}


def _two_streams(sizes: dict[str, int], canonical_nodes: int, options: dict[str, Any]) -> ImageDataConfig:
    """Datasets with names and sizes; `options` are keys of the data, or of one of the streams behind its name."""
    for name, size in sizes.items():
        write_dataset(make_samples(size, prefix=name), Path(name), size_limit='8kb')
    streams = {name: ImageStreamConfig(f'{name}/train') for name in sizes}
    config = ImageDataConfig(streams=streams, num_workers=0, num_canonical_nodes=canonical_nodes)
    for key, value in options.items():
        stream, _, field = key.rpartition('.')
        setattr(streams[stream] if stream else config, field, value)
    return config


@pytest.mark.parametrize('options', EPOCHS.values(), ids=EPOCHS)
def test_any_checkpoint_continues_as_an_undisturbed_run(options: dict[str, Any]) -> None:
    """After each batch, also the last one, and at the beginning of the next epoch; twice in a row."""
    config = _two_streams({'a': 37, 'b': 30}, 16, options)

    def loader() -> DataLoader:
        clean_stale_shared_memory()
        return _loader(config, captions=True)

    def read(loader: DataLoader) -> list[Any]:
        """What identifies the samples of an epoch: their seeds, captions, and pixels."""
        return [(batch['sample_id'], batch['caption'], batch['sample_seed'].tolist(), batch['pixel_values'].sum())
                for batch in loader]

    with as_if_a_process_ended():
        whole = loader()
        epochs = [read(whole) for _ in range(2)]
        num_batches = len(whole)
        del whole
    assert len(epochs[0]) == num_batches > 4 and epochs[0] != epochs[1]
    for done in (1, num_batches - 2, num_batches - 1, num_batches):
        with as_if_a_process_ended():  # which closes the files of three datasets
            first = loader()
            batches = iter(first)
            for _ in range(done):
                next(batches)
            state = first.dataset.state_dict(8 * done, True)
            del first, batches
            second = loader()
            second.dataset.load_state_dict(state)
            assert read(second) == epochs[0][done:]
            if done < num_batches:  # otherwise the next checkpoint is that of the next epoch
                state = second.dataset.state_dict(0, True)
                del second
                second = loader()
                second.dataset.load_state_dict(state)
            assert read(second) == epochs[1]
            del second


@pytest.mark.parametrize('method', ['random', 'per_stream'])
@pytest.mark.parametrize(('epoch_size', 'repeat'), [(None, None), (45, None), (None, 2.5)])
def test_the_order_of_an_epoch_is_that_of_streaming(
    method: str, epoch_size: Optional[int], repeat: Optional[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _two_streams({'a': 37, 'b': 30}, 4, {'epoch_size': epoch_size})
    streams = {name: VerifiedStream(local=stream.local, repeat=repeat) for name, stream in config.streams.items()}
    world = World(1, 1, 2, 0)
    with as_if_a_process_ended():
        dataset = SafeDataset(streams, config, 4, 5, train=True, batching_method=method)
        dataset.shuffle_block_size = 64
        ours = [generate_work(method, dataset, world, epoch, 0) for epoch in range(3)]
        monkeypatch.setattr(dataset_module, 'get_sampling', get_sampling)
        monkeypatch.setattr(SafeDataset, 'resample_streams', StreamingDataset.resample_streams)
        for epoch in range(3):
            np.testing.assert_array_equal(ours[epoch], generate_work(method, dataset, world, epoch, 0))
        del dataset


@pytest.mark.parametrize(('options', 'key'), [
    ({'num_canonical_nodes': 32}, 'num_canonical_nodes'), ({'b.repeat': 0.05}, 'streams.b')])
def test_settings_of_an_epoch_that_do_not_go_together_are_refused(options: dict[str, Any], key: str) -> None:
    with as_if_a_process_ended(), refused_at(key):
        _loader(_two_streams({'a': 10, 'b': 10}, 4, options), 4, captions=True)
