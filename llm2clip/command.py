# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Start and end of every recipe.

A recipe imports PyTorch and Composer, which takes many seconds, inside its `main`, so that a mistyped key is
reported at once.
"""

import atexit
import dataclasses
import logging
import multiprocessing
import os
import platform
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional, TypeVar

import wrapt

import llm2clip
from llm2clip.config import RecipeConfig
from llm2clip.config.loading import computes_bfloat16, leaves, load_config
from llm2clip.errors import ConfigError, FileError
from llm2clip.help import help_text
from llm2clip.io.files import is_out_of_shared_memory, printable, read_json, write_json
from llm2clip.io.folders import lock_output, locked
from llm2clip.registry import check_names

R = TypeVar('R', bound=RecipeConfig)
T = TypeVar('T')

SECONDS_FILE = 'seconds.json'
# Those that decide what a recipe computes.
_PACKAGES = ('mosaicml', 'mosaicml-streaming', 'torch', 'transformers')
# Message of Gloo.
_LOST_RANK = re.compile('gloo.*Connection (closed|reset) by peer')
_TRACEBACK = 'LLM2CLIP_TRACEBACK'
# Messages of PyTorch and concurrent.futures.
_KILLED_WORKER = re.compile(r'DataLoader worker \(pid.*(killed by signal|exited unexpectedly)|'
                            'process pool was terminated abruptly')
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OTHER_RANKS_WAIT = 5.0


def run_command(
    schema: type[R], main: Callable[[R], T], args: Optional[Sequence[str]] = None
) -> Optional[T]:
    """Read the configuration and return `main` of it, or print the help for ``--help``, or ``--version``.

    The elapsed time is added to seconds.json in the folder of the step.  An error in the user's input becomes
    one line, unless ``LLM2CLIP_TRACEBACK=1`` is in the environment.  Ctrl-C and SIGTERM end the command with
    exit status 130 and 143, after a line that says where it resumes.

    Args:
        schema: One of the dataclasses of `llm2clip.config`.
        main: The recipe; the docstring of its module describes it and, after a colon, shows the command.
        args: YAML files and overrides; unset, those of the command line.
    """
    if args is None:
        args = sys.argv[1:]
    with _errors_in_one_line():
        _set_up_process()
        if '-h' in args or '--help' in args:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader of a pipe may close it early
            print(help_text(schema, main.__globals__['__doc__'], args), flush=True)
            return None
        if '--version' in args:
            versions = [f'llm2clip {llm2clip.__version__}', f'Python {platform.python_version()}']
            versions += [f'{package} {version(package)}' for package in _PACKAGES]
            print(', '.join(versions), flush=True)
            return None
        config = load_config(schema, args)
        if not config.uses_ranks and _rank('WORLD_SIZE') > 1:
            raise ConfigError(f'composer started {_rank("WORLD_SIZE")} ranks, expected one process: start '
                              'this recipe with python')
        check_names(config)
        recipe = Path(main.__code__.co_filename).stem
        if _rank() == 0:
            destination = 'a plan' if config.plan else config.output_folder
            print(f'{recipe}: {shlex.join(args)} -> {destination}', file=sys.stderr, flush=True)
        if not config.plan:
            warn_of_slow_bfloat16(config)
            with lock_outputs(config, recipe), _Stoppable(config.resume_hint()), _timed(config):
                return main(config)
        if _rank() == 0:  # it plans for all
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            with _Stoppable():
                return main(config)
    return None


def _set_up_process() -> None:
    """Hide warnings that no configuration avoids and that ask the user for nothing, limit progress bars in
    log files, and allow as many open files as the system does, since Streaming keeps two open per epoch and
    checkpoint of a resumed run.
    """
    sys.stdout.reconfigure(errors='replace')  # pyright: ignore  # file names may contain undecodable bytes
    # For how long torch's threads spin before they sleep.  Without spinning, a step of stage 1 on two idle
    # cores takes 1.4 times as long; with the default, 300,000, it is far slower when others use a core.
    if 'OMP_WAIT_POLICY' not in os.environ:
        os.environ.setdefault('GOMP_SPINCOUNT', '5000')
    for message in (
        '.*is_gradient_checkpointing', 'Cannot split .* of length', 'FSDP2 Config/APIs are experimental',
        'FSDP2-wrapped module', 'Specifying the ProgressBarLogger via', 'The warmup duration is 0',
        'TypedStorage is deprecated',
    ):
        warnings.filterwarnings('ignore', message)
    # Of incomplete last batches, of a folder of uploaded files, and of image processors without torchvision.
    for name in ('streaming.base.batching.per_stream', 'streaming.base.storage.upload',
                 'transformers.models.auto.image_processing_auto'):
        logging.getLogger(name).setLevel(logging.ERROR)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    # In seconds; tqdm reads both when it is imported.  Without a delay, each file of weights draws a bar.
    os.environ.setdefault('TQDM_DELAY', '1')
    if not sys.stderr.isatty():
        os.environ.setdefault('TQDM_MININTERVAL', '10')


def _rank(variable: str = 'RANK') -> int:
    """Return a number in the launcher's environment, which is set before Composer is imported."""
    return int(os.environ.get(variable, 0))


def warn_of_slow_bfloat16(config: Any) -> None:
    """Warn on the first rank if a configuration uses bfloat16 on a CPU that is slow in it."""
    slow = [f'{key}={value}' for key, value in leaves(dataclasses.asdict(config))
            if value in ('bfloat16', 'amp_bf16')]
    if slow and _rank() == 0 and not computes_bfloat16():
        warnings.warn(
            f'{", ".join(slow)}: this processor has no instructions for bfloat16, and is slower in it than '
            'in float32, 50 times with AVX2 alone; write ${if_bf16:bfloat16,float32}, or '
            '${if_bf16:amp_bf16,fp32} for a precision, which takes what is fast', stacklevel=2)


@contextmanager
def _timed(config: RecipeConfig) -> Iterator[None]:
    """Add the duration of the block to seconds.json in the output folder, if the block accepted the
    configuration and the folder has files."""
    folder = Path(config.output_folder)
    is_recorded = config.records_duration and _rank() == 0
    start = time.monotonic()
    try:
        yield
    except ConfigError:
        is_recorded = False
        raise
    finally:
        if is_recorded and any(folder.glob('[!.]*')):
            path = folder / SECONDS_FILE
            try:
                write_json(path, {'seconds': round(recorded_seconds(path) + time.monotonic() - start, 1)})
            except (FileError, OSError) as error:
                warnings.warn(f'the duration of this step is not recorded: {error}', stacklevel=2)


def recorded_seconds(path: Path) -> float:
    """Return the duration of a step in seconds, from its SECONDS_FILE; 0 if there is none."""
    if not path.is_file():
        return 0.0
    return read_json(path, dict)['seconds']


@lru_cache
def source_commit() -> Optional[str]:
    """Return the commit of the clone that this package is in, with `-dirty` if a file of it has changed; None
    for an installed package."""
    root = Path(__file__).parents[1]
    command = ['git', '--no-optional-locks', f'--git-dir={root}/.git', f'--work-tree={root}', 'describe',
               '--always', '--dirty', '--abbrev=7', '--exclude=*']
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


def lock_outputs(config: RecipeConfig, recipe: str) -> ExitStack:
    """Lock the folders that a recipe writes until the stack is closed; the first rank does it for all.

    Raises:
        ConfigError: Another process writes there, or a folder has files of another recipe or of the user.
    """
    held = ExitStack()
    if _rank() > 0:
        return held
    for output in config.outputs():
        if output.is_replaced:  # so the lock file is beside it
            folder = Path(os.path.abspath(output.folder))
            lock = folder.with_name(f'.{folder.name}.lock')
            held.enter_context(locked(lock, folder))
            held.callback(lock.unlink)
        else:
            held.enter_context(lock_output(output.folder, output.recipe or recipe, output.names, output.part))
    return held


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
        sys.stdout.flush()
        raise SystemExit(f'error: {_message(error)}') from None


def _is_expected(error: Exception) -> bool:
    """Whether an error is meant for the user: of this project, the system, W&B, a remote or a worker."""
    from llm2clip.io.remotes import is_remote_error
    if (isinstance(error, OSError) or type(error).__module__.startswith(('llm2clip.', 'wandb.'))
            or is_remote_error(error) or is_out_of_shared_memory(error) or _KILLED_WORKER.search(str(error))
            or _LOST_RANK.search(str(error))):
        return True
    # `modeling` raises plain ValueErrors, because exports carry its modules along.
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    return isinstance(error, ValueError) and frame.f_globals.get('__name__', '').startswith('llm2clip.')


def _message(error: Exception) -> str:
    """Return an error and its notes as one line for the user."""
    message = str(error)
    if is_out_of_shared_memory(error):
        message = ('/dev/shm: full, expected room for the batches of the loader workers; in Docker, '
                   'raise --shm-size, or lower num_workers')
    elif _KILLED_WORKER.search(message):
        message = ('num_workers: a worker process was killed, most likely because the memory was full; lower '
                   'num_workers or provide more memory, and run the same command again')
    elif _LOST_RANK.search(message):
        message = 'another rank has ended, and its own error says why'
    elif isinstance(error, OSError) and error.filename and error.strerror:
        path = error.filename2 or error.filename  # the new name, of a rename or a link
        message = f'{path}: {error.strerror}'
    elif 'Original Traceback' in message:  # from a worker of a data loader
        message = message.rstrip().splitlines()[-1].split(': ', 1)[-1]
    message = printable('; '.join([message, *getattr(error, '__notes__', [])]))
    if isinstance(error, (ConfigError, FileError)):
        return message
    return f'{message} ({_TRACEBACK}=1 shows where)'


class Stopped(SystemExit):
    """Exit that SIGINT or SIGTERM has requested."""


class _Stoppable:
    """On SIGINT and SIGTERM, ends a block and its workers and prints how the command resumes.  No checkpoint
    is written, because ranks may be anywhere in a step."""

    def __init__(self, resume_hint: str = '') -> None:
        self.last_line = f'stopped; {resume_hint}' if resume_hint else 'stopped'
        self.process = os.getpid()
        self.handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self.signal = 0  # number of the signal; 0 if there was none

    def __enter__(self) -> None:
        self.install()
        # Importing it replaces the handlers, and workers that inherit Composer's end with an error.
        wrapt.register_post_import_hook(self.install, 'composer.core.engine')
        # Runs after Composer has closed everything, because Composer registers later.
        atexit.register(self.end_without_report)

    def __exit__(self, kind: Any, error: Optional[BaseException], trace: Any) -> None:
        if not self.signal:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        elif error is not None:
            # This also hides errors that libraries raise because their workers are gone.
            from tqdm import tqdm
            for bar in list(tqdm._instances):  # pyright: ignore[reportAttributeAccessIssue]
                bar.close()  # so that nothing is drawn below the last line
            if _rank() == 0:
                sys.stderr.write(f'\n{self.last_line}\n')  # at once, since other ranks write there, too
            raise Stopped(128 + self.signal) from None

    def install(self, *_: Any) -> None:
        for number in _SIGNALS:
            signal.signal(number, self.stop)

    def stop(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:  # a worker: its parent ends it, also on Ctrl-C, which both receive
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif not self.signal:
            self.signal = number
            signal.signal(signal.SIGCHLD, lambda *_: None)  # PyTorch would raise an error when a worker ends
            signal.signal(signal.SIGALRM, self.exit)
            sys.unraisablehook = self.exit_after_destructor
            for worker in multiprocessing.active_children():
                worker.kill()  # a worker that was just forked may miss any other signal
            self.exit()
        elif number == signal.SIGINT:  # second Ctrl-C: end at once
            os._exit(128 + number)
        # Ignore a second SIGTERM: the launcher sends one after a Ctrl-C,
        # which this process has received itself.

    def exit(self, *_: Any) -> None:
        raise Stopped(128 + self.signal)

    def exit_after_destructor(self, unraisable: Any) -> None:
        """Exit again soon if a `__del__` was running, which swallows the exit."""
        if isinstance(unraisable.exc_value, Stopped):
            signal.setitimer(signal.ITIMER_REAL, 0.01)

    def end_without_report(self) -> None:
        """Die of SIGTERM on all but a node's first rank; else the launcher prints the rank's whole output."""
        if self.signal and _rank('LOCAL_RANK') > 0:
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


# Composer spawns processes that upload checkpoints.  Each imports the recipe, and thereby this module, before
# it knows its parent, and would otherwise wait for work forever when the training is killed.
if sys.modules.get('__mp_main__') is not sys.modules['__main__']:
    threading.Thread(target=_end_with_parent, daemon=True).start()
