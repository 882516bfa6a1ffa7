# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Start and end of every recipe.

A recipe imports PyTorch and Composer, which takes many seconds, inside its `main`, so that a mistyped key is reported
at once.
"""

import atexit
import dataclasses
import logging
import multiprocessing
import os
import re
import resource
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Optional, TypeVar

import wrapt
from tqdm import tqdm

from llm2clip.config import (
    ConfigError,
    EmbedConfig,
    EvaluateConfig,
    ExportTeacherConfig,
    ExportVisionConfig,
    ImageFolderConfig,
    PlanConfig,
    PrepareConfig,
    ReportConfig,
    TrainConfig,
)
from llm2clip.config.files import leaves, load_config, settings_in_folder
from llm2clip.device import computes_bfloat16
from llm2clip.files import FileError, is_out_of_shared_memory, printable, read_json, write_json
from llm2clip.folders import lock_output, locked
from llm2clip.help import help_text
from llm2clip.registry import check_names

T = TypeVar('T')

SECONDS_FILE = 'seconds.json'
_TRACEBACK = 'LLM2CLIP_TRACEBACK'
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OTHER_RANKS_WAIT = 5.0
_OPEN_FILES = 1024  # the lowest limit on most systems, with which the tests run


def run_command(schema: type[T], main: Callable[[T], None], args: Optional[Sequence[str]] = None) -> None:
    """Read the configuration and call `main` with it, or print the help for ``--help``.

    The elapsed time is added to seconds.json in the folder of the step.  An error in the user's input becomes one line,
    unless ``LLM2CLIP_TRACEBACK=1`` is in the environment.  Ctrl-C and SIGTERM end the command with exit status 130 and
    143, after a line that says where it resumes.

    Args:
        schema: One of the dataclasses of `llm2clip.config`.
        main: The recipe; the docstring of its module describes it and, after a colon, shows the command.
        args: YAML files and overrides; unset, those of the command line.
    """
    sys.stdout.reconfigure(errors='replace')  # pyright: ignore  # file names may contain undecodable bytes
    # Threads that spin while they wait make a CPU that others use too several times slower.  torch is not imported yet.
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
    _quiet_libraries()
    with _errors_in_one_line():
        args = sys.argv[1:] if args is None else args
        if {'-h', '--help'}.intersection(args):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader of a pipe may close it early
            print(help_text(schema, main.__globals__['__doc__'], args), flush=True)
            return
        # Streaming keeps two files open per epoch and checkpoint of a resumed run.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if most != resource.RLIM_INFINITY and most < _OPEN_FILES:
            raise ConfigError(f'a process may open {most} files here, expected {_OPEN_FILES}: raise ulimit -n, or in '
                              'Docker --ulimit nofile')
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        for arg in args:
            if '=' in arg and arg != arg.encode(errors='replace').decode():
                raise ConfigError(f'{arg!r}: expected text in UTF-8')
        config = load_config(schema, args)
        several = issubclass(schema, (TrainConfig, EmbedConfig, EvaluateConfig))
        if not several and 'RANK' in os.environ and (ranks := _rank('WORLD_SIZE')) > 1:
            raise ConfigError(f'composer started {ranks} ranks, expected one process: start this recipe with python')
        check_names(config)
        plan = isinstance(config, PlanConfig) and config.plan
        if plan and _rank() > 0:
            return  # the first rank plans for all
        recipe = Path(main.__code__.co_filename).stem
        if _rank() == 0:
            to = 'a plan' if plan else step_folder(config) or getattr(config, 'out', 'this terminal')
            print(f'{recipe}: {shlex.join(args)} -> {to}', file=sys.stderr, flush=True)
        if isinstance(config, TrainConfig) and not plan and config.autoresume and any(
                Path(config.checkpoint_folder).glob('ep*-ba*')):
            settings_in_folder(config)  # checks them before the checkpoint is read
        if not plan and _rank() == 0:
            warn_of_slow_bfloat16(config)
        alone = lock_outputs(config, recipe) if _rank() == 0 and not plan else nullcontext()
        with alone, _stoppable(lambda: resume_hint(config)), _timed(None if plan else step_folder(config)):
            main(config)


def _quiet_libraries() -> None:
    """Hide warnings of libraries that no configuration avoids, and that ask the user for nothing."""
    for known in ('.*is_gradient_checkpointing', 'Cannot split .* of length', 'FSDP2 Config/APIs are experimental',
                  'FSDP2-wrapped module', 'Specifying the ProgressBarLogger via', 'The warmup duration is 0',
                  'TypedStorage is deprecated'):
        warnings.filterwarnings('ignore', known)
    # Of incomplete last batches, of a folder that holds what is uploaded, and of image processors without torchvision.
    for name in ('streaming.base.batching.per_stream', 'streaming.base.storage.upload',
                 'transformers.models.auto.image_processing_auto'):
        logging.getLogger(name).setLevel(logging.ERROR)


def _rank(kind: str = 'RANK') -> int:
    """Return a number in the launcher's environment, which is set before Composer is imported."""
    return int(os.environ.get(kind, 0))


def warn_of_slow_bfloat16(config: Any) -> None:
    """Warn if a configuration uses bfloat16 on a CPU that is slow in it."""
    slow = [f'{key}={value}' for key, value in leaves(dataclasses.asdict(config))
            if key.endswith(('dtype', 'precision')) and value in ('bfloat16', 'amp_bf16')]
    if slow and not computes_bfloat16():
        warnings.warn(
            f'{", ".join(slow)}: this processor has no instructions for bfloat16, and is slower in it than in '
            'float32, 50 times with AVX2 alone; write ${if_bf16:bfloat16,float32}, or ${if_bf16:amp_bf16,fp32} for a '
            'precision, which takes what is fast', stacklevel=2)


@contextmanager
def _timed(folder: Optional[str]) -> Iterator[None]:
    """Add the duration of the block to `folder`/seconds.json, unless the configuration was refused or no file is
    there."""
    start = time.monotonic()
    try:
        yield
    except ConfigError:
        folder = None
        raise
    finally:
        if folder and _rank() == 0 and os.path.isdir(folder) and any(name[0] != '.' for name in os.listdir(folder)):
            path = Path(folder, SECONDS_FILE)
            try:
                write_json(path, {'seconds': round(recorded_seconds(path) + time.monotonic() - start, 1)})
            except FileError as error:  # a missing duration must not fail the step
                print(error, file=sys.stderr)


def step_folder(config: Any) -> Optional[str]:
    """Return the folder in which a step records its duration; None if it records none."""
    if isinstance(config, (ExportVisionConfig, ExportTeacherConfig, ReportConfig, ImageFolderConfig)):
        return None
    return config.save_folder if isinstance(config, TrainConfig) else config.out


def recorded_seconds(path: Path) -> float:
    """Return the duration of a step in seconds, from its SECONDS_FILE; 0 if that is missing or damaged."""
    try:
        return float(read_json(path, dict)['seconds'])
    except (FileError, LookupError, TypeError, ValueError):
        return 0.0


def lock_outputs(config: Any, recipe: str) -> ExitStack:
    """Lock the folders that a recipe writes until the stack is closed.  Raise a ConfigError if another process writes
    there, or one contains files of another recipe or of the user."""
    held = ExitStack()
    if isinstance(config, (ExportVisionConfig, ExportTeacherConfig)):
        # These replace the whole folder if its manifest allows it, so the lock file is beside it.
        out = Path(os.path.abspath(config.out))
        lock = out.with_name(f'.{out.name}.lock')
        held.enter_context(locked(lock, out))
        held.callback(lock.unlink)
        return held
    folders = [config.index if isinstance(config, ImageFolderConfig) else step_folder(config) or config.out]
    recipe = 'search' if isinstance(config, ImageFolderConfig) else recipe  # `demo` uses the same index
    if isinstance(config, TrainConfig) and '://' not in config.checkpoint_folder:
        checkpoints = Path(os.path.abspath(config.checkpoint_folder))
        folders += [] if checkpoints.is_relative_to(os.path.abspath(config.save_folder)) else [checkpoints]
    names = ['report.html', 'results.json'] if isinstance(config, ReportConfig) else None
    for folder in folders:
        held.enter_context(lock_output(folder, recipe, names, getattr(config, 'shard_index', 0)))
    return held


def resume_hint(config: Any) -> str:
    """Return how the same command resumes after a stop; empty if it starts again."""
    if getattr(config, 'plan', False):
        return ''
    if isinstance(config, (PrepareConfig, EmbedConfig, EvaluateConfig, ImageFolderConfig)):
        return 'the same command resumes with what is missing'
    if not isinstance(config, TrainConfig) or not config.autoresume:
        return ''
    if '://' in config.checkpoint_folder:
        return f'the same command resumes from the newest checkpoint in {config.checkpoint_folder}'
    try:  # Composer updates this link when a checkpoint is complete
        batch = re.findall(r'-ba(\d+)', os.readlink(Path(config.checkpoint_folder, 'latest-rank0.pt')))[-1]
    except (OSError, IndexError):
        return 'there is no checkpoint yet, the same command begins from the beginning'
    return f'the same command resumes from batch {int(batch)}'


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Exit with one line, the message and its notes, for errors that are expected."""
    try:
        yield
    except KeyboardInterrupt:  # before the handlers are installed
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if os.environ.get(_TRACEBACK) or not _is_expected(error):
            raise
        if _rank('LOCAL_RANK') > 0:
            # Rank 0 of this node most likely reports the same error, and the launcher then ends this process.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_OTHER_RANKS_WAIT)
        text = str(error)
        if is_out_of_shared_memory(error):
            text = ('/dev/shm: full, expected room for the batches of the loader workers; in Docker, raise --shm-size, '
                    'or lower num_workers')
        elif isinstance(error, OSError) and error.filename and error.strerror:
            text = f'{error.filename}: {error.strerror}'
        elif 'Original Traceback' in text:  # from a worker of a data loader
            text = text.rstrip().splitlines()[-1].split(': ', 1)[-1]
        if type(error).__module__.startswith('wandb.'):
            text += '; W&B reads its key from WANDB_API_KEY, and WANDB_MODE=offline needs none'
        hint = '' if isinstance(error, ConfigError) else f' ({_TRACEBACK}=1 shows where)'
        sys.stdout.flush()
        raise SystemExit(f'error: {printable("; ".join([text, *getattr(error, "__notes__", [])]))}{hint}') from None


def _is_expected(error: Exception) -> bool:
    """Whether an error is meant for the user: one raised by this project, the system, W&B or an object store."""
    from llm2clip.remotes import is_remote_error
    if isinstance(error, OSError) or type(error).__module__.startswith(('llm2clip.', 'wandb.')):
        return True
    if is_remote_error(error) or is_out_of_shared_memory(error):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    return isinstance(error, ValueError) and frames[-1][0].f_globals.get('__name__', '').startswith('llm2clip.')


_signal = 0
"""Number of the signal that requested the end; 0 if none did."""


@contextmanager
def _stoppable(resumes: Callable[[], str]) -> Iterator[None]:
    """On SIGINT and SIGTERM, end the block and its workers and print how the command resumes.  No checkpoint is
    written, because ranks may be anywhere in a step."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    main = os.getpid()

    def stop(number: int, frame: Any) -> None:
        global _signal
        if os.getpid() != main:  # a worker: its parent ends it, also on Ctrl-C, which the terminal sends to both
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif not _signal:
            _signal = number
            signal.signal(signal.SIGCHLD, lambda *_: None)  # PyTorch would raise an error when a loader worker ends
            for worker in multiprocessing.active_children():
                worker.kill()  # a worker that was just forked may miss any other signal
            raise SystemExit(128 + number)
        elif number == signal.SIGINT:  # second Ctrl-C: end at once
            os._exit(128 + number)
        # Ignore a second SIGTERM: the launcher sends one after a Ctrl-C, which this process has received itself.

    def install(*_: Any) -> None:
        for number in _SIGNALS:
            signal.signal(number, stop)

    install()
    # Importing it replaces the handlers, and workers that inherit Composer's end with an error.
    wrapt.register_post_import_hook(install, 'composer.core.engine')
    try:
        yield
    except BaseException:
        if not _signal:
            raise
        # This also hides errors that libraries raise because their workers are gone.
        for bar in list(tqdm._instances):  # pyright: ignore[reportAttributeAccessIssue]
            bar.close()  # so that nothing is drawn below the last line
        if _rank() == 0:
            last = '; '.join(filter(None, ['stopped', resumes()]))
            sys.stderr.write(f'\n{last}\n')  # at once, since other ranks write there, too
        raise SystemExit(128 + _signal) from None
    finally:
        if not _signal:
            for number, handler in before.items():
                signal.signal(number, handler)


@atexit.register
def _end_without_report() -> None:
    """Die of SIGTERM on all but a node's first rank; otherwise Composer's launcher prints the rank's whole output.

    Registered before Composer is imported, this runs after Composer has closed everything.
    """
    if _signal and _rank('LOCAL_RANK') > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def _end_with_parent() -> None:
    """End this process when the one that started it ends, even if that was killed."""
    parent = None
    while parent is None:
        time.sleep(0.1)
        parent = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


# Composer spawns processes that upload checkpoints.  Each imports the recipe, and thereby this module, before it knows
# its parent, and would otherwise wait for work forever when the training is killed.
if '__mp_main__' in sys.modules:
    threading.Thread(target=_end_with_parent, daemon=True).start()
