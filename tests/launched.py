# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Recipes as a user launches them, with a rank or two."""

import atexit
import contextlib
import ctypes
import faulthandler
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import context, resource_tracker
from pathlib import Path
from typing import NoReturn, Optional

import torch
from composer.callbacks import CheckpointSaver
from composer.utils import checkpoint
from remotes import free_port

from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.runs import load_checkpoint_model

ROOT = Path(__file__).parents[1]

COMMON = ['global_train_batch_size=8', 'max_duration=6ba', 'progress_bar=false', 'save_interval=6ba', 'precision=fp32',
          'train_data.num_workers=1', 'train_data.num_canonical_nodes=4', 'run_name=test', 'device=cpu',
          'scheduler.name=constant']
Train = Callable[..., Path]  # stage, name of the run and arguments -> its folder, after a small training there
DEVICE = os.environ.get('DEVICE', 'gpu')  # where the tests of gpu/ run, as recipes name it
# SGD with a clipped gradient: weights differ as soon as a gradient or its norm does.
SGD = ['optimizer.name=sgd', 'algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 0.5}']


# A sharded LLM, its activations recomputed, a microbatch of 3 of the 4 samples that a rank has.
SHARDED = ['fsdp={state_dict_type: sharded, activation_checkpointing: true}', 'algorithms.grad_cache={}',
           'device_train_microbatch_size=3']


def stage1_arguments(images: Path, llm: Path) -> list[str]:
    return [*COMMON, f'text_encoder.pretrained={llm}', 'text_encoder.max_length=32', 'symmetric=true',
            f'train_data.streams.s.local={images}', 'lora.r=4', 'lora.lora_dropout=0.0', 'optimizer.lr=0.05',
            'train_data.pairs=[{query: [short, long], positive: [short, long]}]']


def stage2_arguments(images: Path, embeddings: Path) -> list[str]:
    streams = [f'{data}.streams.s.{key}={value}' for data in ('train_data', 'eval_data')
               for key, value in (('local', images), ('embeddings.tiny.local', embeddings))]
    return [*COMMON, *streams, 'model.vision={name: test_efficientnet, pretrained: false, image_size: 32}',
            'model.adapter.depth=1', 'model.embed_dim=16', 'optimizer.lr=0.05', 'eval_interval=3ba',
            'train_data.caption_weights={short: 0.5, long: 0.5}', 'eval_data.caption_weights={short: 1.0}',
            'eval_data.num_workers=0', 'global_eval_batch_size=8']


# A server that has imported what recipes import; it forks a run in place of starting an interpreter, which would take
# longer than the run itself.
_WARM = multiprocessing.get_context('forkserver')
_WARM.set_forkserver_preload(['llm2clip.training.stage1', 'llm2clip.training.stage2', 'llm2clip.teacher.extraction',
                              'llm2clip.evaluation.benchmarks', 'composer.algorithms', 'warm'])


_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _PRIVATE, _DIE_WITH_PARENT = 0x20000, (1 << 14) | (1 << 18), 1


def may_have_own_memory() -> bool:
    """Whether this user may give processes their own /dev/shm."""
    return subprocess.run(['unshare', '-m', 'true'], capture_output=True).returncode == 0


def have_own_memory() -> None:
    """Give this process, and those that it starts, an empty /dev/shm."""
    for code in (_LIBC.unshare(_NEW_MOUNTS), _LIBC.mount(b'none', b'/', None, _PRIVATE, None),
                 _LIBC.mount(b'tmpfs', b'/dev/shm', b'tmpfs', 0, None)):
        if code:
            raise OSError(ctypes.get_errno(), 'no shared memory of its own')


def alive(group: int) -> set[int]:
    """Processes of a group that have not ended."""
    found = set()
    for path in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, of, *_ = path.read_text().rsplit(')', 1)[1].split()
            if int(of) == group and state not in 'ZX':
                found.add(int(path.parent.name))
    return found


class Launched:
    """A script on one or several ranks, in a process group of its own, as Composer's launcher starts it.

    Args:
        command: Path of the script, and its arguments.
        log: Receives all output.
        ranks: Processes.
        env: Of all, beside the environment of the tests.
        first: Rank of the first process.
        world_size: Ranks of all nodes; unset, those of this one.
        port: Where ranks meet.
        own: A folder for temporary files; the processes have their own shared memory, as on another machine.
        grace: Seconds after which ranks are killed that do not end when another one has failed.
    """

    def __init__(self, command: Sequence[str], log: Path, ranks: int = 1, env: Optional[Mapping[str, str]] = None,
                 first: int = 0, world_size: Optional[int] = None, port: Optional[int] = None,
                 own: Optional[Path] = None, grace: float = 20.0) -> None:
        of_rank = [{**os.environ, 'OMP_NUM_THREADS': '1', 'WORLD_SIZE': str(world_size or ranks),
                    'RANK': str(first + k), 'LOCAL_RANK': str(k), 'LOCAL_WORLD_SIZE': str(ranks),
                    'NODE_RANK': str(first // ranks), 'MASTER_ADDR': '127.0.0.1',
                    'MASTER_PORT': str(port or free_port()), **(env or {})}
                   for k in range(ranks)]
        for one in of_rank:
            one['MASTER_PORT'] = of_rank[0]['MASTER_PORT']
            if own is not None:
                one['TMPDIR'] = str(own)
        before = os.environ.copy()
        # The server, started by the first run, reads these when it imports torch and tqdm.
        os.environ['OMP_NUM_THREADS'] = '1'
        os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT / 'tests'), os.environ.get('PYTHONPATH', '')])  # for warm
        os.environ.pop('TQDM_DELAY', None)  # of a recipe that a test has run in this process
        self._process = _WARM.Process(target=_lead, args=(list(map(str, command)), log, of_rank, own is not None,
                                                  grace))
        self._process.start()
        os.environ.clear()
        os.environ.update(before)
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._code: Optional[int] = None
        # Of a test that ran out of time: the tests would wait for it when they end.
        atexit.register(lambda: self.kill() if self.poll() is None else None)

    def kill(self) -> None:
        """Kill all processes at once, as the loss of a machine does, and wait until all have ended."""
        with contextlib.suppress(ProcessLookupError):  # it has ended
            while os.getpgid(self.pid) != self.pid:
                time.sleep(0.001)  # it has not come to having a group of its own
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        while alive(self.pid):  # the ranks, until the system has freed their memory
            time.sleep(0.01)

    def poll(self) -> Optional[int]:
        if self._code is None:
            self._code = self._process.exitcode
            if self._code is not None:
                self._process.close()  # its open files
        return self._code

    def wait(self, timeout: Optional[float] = None) -> int:
        if self._code is None:
            self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired('run', timeout or 0)
        return code


def _lead(command: list[str], log: Path, of_rank: list[dict[str, str]], own_memory: bool, grace: float) -> None:
    """Fork the ranks; when one fails, end the others, and all when the tests end."""
    _LIBC.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.setsid()
    if own_memory:
        have_own_memory()
    with log.open('ab') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    left = set()
    for env in of_rank:
        if (pid := os.fork()) == 0:
            _run_rank(command, env)
        left.add(pid)
    code = 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        failed = os.waitstatus_to_exitcode(status)
        if failed and not code:
            code = failed
            for other in left:
                os.kill(other, signal.SIGTERM)
            threading.Timer(grace, _kill_all, [left]).start()
    os._exit(code if code >= 0 else 128 - code)


def _kill_all(pids: set[int]) -> None:
    for pid in [*pids]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _run_rank(command: list[str], env: dict[str, str]) -> NoReturn:
    code = 1
    try:
        _LIBC.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        os.environ.clear()  # the server's, as it was when the server began
        os.environ.update(env)
        os.chdir(ROOT)
        tempfile.tempdir = None  # which the server may have looked up
        # Composer made it of the rank when the server imported it.
        checkpoint._TORCH_DISTRIBUTED_CHECKPOINTS_FILENAME = f'__{env["RANK"]}_0.distcp'
        # Composer waits this many seconds before it looks again whether a checkpoint is uploaded; 30 otherwise.
        CheckpointSaver._symlink_upload_wait_before_next_try_in_seconds = property(lambda _: 0.1, lambda *_: None)
        faulthandler.enable()
        # As in a process that begins: workers are forked, and what they share has a tracker of this rank's own.
        multiprocessing.set_start_method('fork', force=True)
        # Composer's uploaders would import Composer first, which takes longer than the run as well.
        context._concrete_contexts['spawn'] = context._concrete_contexts['fork']
        resource_tracker._resource_tracker.__init__()
        sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
        sys.path += filter(None, env.get('PYTHONPATH', '').split(os.pathsep))
        sys.stdout, sys.stderr = (os.fdopen(fd, 'w', buffering=1) for fd in (1, 2))
        runpy.run_path(command[0], run_name='__main__')
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    os._exit(code)


def run(recipe: str, folder: Path, args: list[str], ranks: int = 1, ok: bool = True, **env: str) -> str:
    log = folder.with_suffix('.log')
    return finish(Launched([f'recipes/{recipe}.py', *args, f'save_folder={folder}'], log, ranks, env), log, ok)


def finish(process: Launched, log: Path, ok: bool = True, seconds: float = 240.0) -> str:
    """Wait for a run, that many seconds at most; returns what it said."""
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # each process writes where it was
        time.sleep(2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    output = log.read_text()
    assert (code == 0) is ok and code != -signal.SIGKILL, output[-20_000:]
    return output


def wait_until(reached: Callable[[], bool], process: Launched, log: Path, seconds: float = 300.0) -> None:
    """Wait until a run has `reached` something, which must not end before."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.002)


def losses(folder: Path) -> dict[int, float]:
    return read_metrics(folder / 'metrics.jsonl').get('loss/train/total', {})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint_model(folder)


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def contents(folder: Path, but: str) -> dict[str, bytes]:
    """Path -> bytes of the files whose paths do not match `but`; of safetensors, the header is put in order."""
    found = {}
    for path in sorted(path for path in folder.rglob('*') if path.is_file()):
        data = path.read_bytes()
        if path.suffix == '.safetensors':
            end = 8 + int.from_bytes(data[:8], 'little')
            data = json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]
        found[path.relative_to(folder).as_posix()] = data
    return {name: data for name, data in found.items() if not re.search(but, name)}


def on_cpu(*args: str) -> list[str]:
    return [*args, 'device=cpu', 'precision=fp32']
