# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints are written while training goes on, and are what Composer's own saver writes."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import composer.callbacks
import pytest
import torch
from composer import Callback, State, Trainer
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import checkpoint, dist, get_device
from composer.utils.parallelism import FSDP2Config
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from llm2clip.training.callbacks.checkpoint_saver import CheckpointError, CheckpointSaver, host_copy
from llm2clip.training.trainer import fit

PATIENCE = 20.0
KINDS = pytest.mark.parametrize('sharded', [False, True], ids=['full', 'sharded'])


class _Model(ComposerModel):

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.linear(batch)

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return outputs.square().mean()


class _AtBatchEnd(Callback):

    def __init__(self, call: Callable[[State], None]) -> None:
        self.call = call

    def batch_end(self, state: State, logger: Logger) -> None:
        self.call(state)


def _trainer(
    folder: Path, sharded: bool, steps: int, save: str, keep: int = -1, own: bool = True,
    at_batch_end: Callable[[State], None] = lambda state: None
) -> Trainer:
    torch.manual_seed(0)
    model = _Model()
    options: dict[str, Any] = {'save_folder': str(folder), 'save_interval': save}
    saver = [CheckpointSaver(str(folder), save, keep)] if own else []
    return Trainer(
        model=model, train_dataloader=[*torch.randn(12, 4, 4)], max_duration=f'{steps}ba', seed=0,
        device_train_microbatch_size=4,
        optimizers=torch.optim.AdamW(model.parameters(), 0.1), device='cpu', precision='fp32', progress_bar=False,
        callbacks=[_AtBatchEnd(at_batch_end), *saver], run_name='test', **({} if own else options),
        parallelism_config={'fsdp': FSDP2Config(state_dict_type='sharded')} if sharded else None)


def _name(batch: int, sharded: bool) -> str:
    return f'ep0-ba{batch}' + ('' if sharded else '-rank0.pt')


def _read(path: Path) -> dict[str, Any]:
    """All that is in a checkpoint."""
    if path.is_file():
        return torch.load(path, weights_only=False)
    content: dict[str, Any] = {}
    _load_state_dict(content, storage_reader=FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return content


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], None]:
    """Have something called with the path of each checkpoint that is about to be written."""
    def during(call: Callable[[Path], None]) -> None:
        write_file, write_shards = checkpoint._write_checkpoint_file, FileSystemWriter.write_data

        def file(content: dict[str, Any], name: str) -> None:
            call(Path(name))
            write_file(content, name)

        def shards(self: FileSystemWriter, *args: Any) -> Any:
            call(Path(self.path))
            return write_shards(self, *args)

        monkeypatch.setattr(checkpoint, '_write_checkpoint_file', file)
        monkeypatch.setattr(FileSystemWriter, 'write_data', shards)

    return during


def _plain(content: Any) -> Any:
    """Tensors and arrays as lists; without times, which differ."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()
                if 'wct' not in str(key) and str(key) != 'composer_version'}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    return content.tolist() if hasattr(content, 'tolist') else content


@KINDS
def test_it_writes_what_composer_s_own_saver_writes(sharded: bool, tmp_path: Path) -> None:
    folders = [tmp_path / 'own', tmp_path / 'composer']
    for folder in folders:
        _trainer(folder, sharded, 3, '1ba', own=folder.name == 'own').fit()
    files = [sorted(path.relative_to(folder) for path in folder.rglob('*')) for folder in folders]
    assert files[0] == files[1] and os.readlink(folders[0] / 'latest-rank0.pt') == _name(3, sharded)
    for batch in (1, 2, 3):
        found, expected = (_plain(_read(folder / _name(batch, sharded))) for folder in folders)
        for content in (found, expected):
            assert not content['state']['callbacks'].pop('_AtBatchEnd', None)
            saved = content['state']['callbacks']['CheckpointSaver']['all_saved_checkpoints_to_timestamp']
            for one in saved:
                one[0] = Path(one[0]).relative_to(tmp_path).parts[1:]
        assert found == expected


@KINDS
@pytest.mark.parametrize('own', [True, False], ids=['own', 'composer'])
def test_training_goes_on_and_the_weights_are_those_of_the_step(
    sharded: bool, own: bool, tmp_path: Path, writing: Callable[[Callable[[Path], None]], None]
) -> None:
    """The write of step 2 begins and waits for the end of step 3, for which Composer's own saver would wait for ever:
    if it does not any more, this project's is not needed."""
    step_3, held_up, weights = threading.Event(), [], {}
    writing(lambda path: held_up.append(not step_3.wait(PATIENCE if own else 0.2)))

    def at_batch_end(state: State) -> None:
        batch = state.timestamp.batch.value
        weight: Any = state.model.get_parameter('linear.weight').detach().clone()
        weights[batch] = weight.full_tensor() if sharded else weight
        if batch == 3:
            assert (tmp_path / 'latest-rank0.pt').exists() is not own  # what is not written is not linked to
            step_3.set()

    _trainer(tmp_path, sharded, 4, '2ba', own=own, at_batch_end=at_batch_end).fit()
    assert held_up == [not own, False]
    for batch in (2, 4):
        found = _read(tmp_path / _name(batch, sharded))['state']
        assert torch.equal(found['model']['linear.weight'], weights[batch])
        assert found['timestamp']['Timestamp']['batch'] == batch
    assert not torch.equal(weights[2], weights[3])


@KINDS
def test_one_at_a_time_and_always_a_whole_one(
    sharded: bool, tmp_path: Path, writing: Callable[[Callable[[Path], None]], None]
) -> None:
    at_work, seen = threading.Lock(), []

    def write(path: Path) -> None:
        assert at_work.acquire(blocking=False)
        time.sleep(0.05)
        # With one to keep, the one before stays until this one is complete.
        seen.append(sorted(other.name for other in tmp_path.glob('ep*') if other != path))
        if seen[1:]:
            assert _read(tmp_path / 'latest-rank0.pt')['state']['timestamp']['Timestamp']['batch'] == len(seen) - 1
        at_work.release()

    writing(write)
    _trainer(tmp_path, sharded, 4, '1ba', keep=1).fit()
    assert seen == [[], *([_name(batch, sharded)] for batch in (1, 2, 3))]
    assert sorted(path.name for path in tmp_path.iterdir()) == [_name(4, sharded), 'latest-rank0.pt']


@KINDS
@pytest.mark.parametrize('batch', [2, 4])
def test_what_cannot_be_written_stops_the_run(
    batch: int, sharded: bool, tmp_path: Path, writing: Callable[[Callable[[Path], None]], None]
) -> None:
    """At the next step, and the last one before training ends well."""
    reached = 0

    def at_batch_end(state: State) -> None:
        nonlocal reached
        reached = state.timestamp.batch.value
        if reached == batch + 1:
            trainer._checkpoint_saver.wait(PATIENCE)  # pyright: ignore

    def write(path: Path) -> None:
        if f'ba{batch}' in path.name:
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                raise RuntimeError('unexpected pos 704 vs 598')  # as torch does then

    writing(write)
    trainer = _trainer(tmp_path, sharded, 4, '2ba', at_batch_end=at_batch_end)
    message = f'{_name(batch, sharded)}: the checkpoint could not be written: .*No space left'
    with pytest.raises(CheckpointError, match=message):
        fit(trainer)
    assert reached == min(batch + 1, 4)
    link = tmp_path / 'latest-rank0.pt'
    assert os.readlink(link) == _name(2, sharded) if batch == 4 else not link.exists()


@KINDS
def test_a_run_that_is_stopped_completes_what_it_has_begun(
    sharded: bool, tmp_path: Path, writing: Callable[[Callable[[Path], None]], None]
) -> None:
    stopped = threading.Event()

    def write(path: Path) -> None:
        stopped.wait(PATIENCE)
        time.sleep(0.1)

    def at_batch_end(state: State) -> None:
        if state.timestamp.batch == 3:
            stopped.set()
            raise SystemExit(130)

    writing(write)
    with pytest.raises(SystemExit):
        fit(_trainer(tmp_path, sharded, 4, '2ba', at_batch_end=at_batch_end))
    assert _read(tmp_path / 'latest-rank0.pt')['state']['timestamp']['Timestamp']['batch'] == 2


def test_a_host_copy_shares_nothing() -> None:
    dist.initialize_dist(get_device('cpu'))
    mesh = init_device_mesh('cpu', (1,))
    shard = distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Shard(0)])
    content = {'a': [torch.ones(3)[1:], (shard, 'text', None)], 'b': {'c': [1, {2}]}}
    copied = host_copy(content)
    content['a'][0].zero_()
    shard.to_local().zero_()
    content['b']['c'][1].add(3)
    content['b']['c'].append(4)
    assert copied['a'][0].tolist() == [1, 1] and copied['b'] == {'c': [1, {2}]}
    assert copied['a'][1][1:] == ('text', None) and copied['a'][1][0].placements == shard.placements
    assert copied['a'][1][0].full_tensor().tolist() == [[0, 1], [2, 3], [4, 5]]


def test_composer_s_saver_is_the_one_that_is_extended() -> None:
    """Its name is that in the checkpoints of Composer's, which are read as well."""
    assert CheckpointSaver.__qualname__ == composer.callbacks.CheckpointSaver.__qualname__
