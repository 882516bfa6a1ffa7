# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Steps of a pipeline, each a recipe with its arguments: checked, planned, and run in their own processes."""

import dataclasses
import os
import runpy
import shlex
import signal
import sys
import time
import typing
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Optional

import xxhash

from llm2clip.command import SECONDS_FILE
from llm2clip.config import PipelineConfig, PlanConfig, RecipeConfig
from llm2clip.config.loading import leaves, load_config
from llm2clip.errors import ConfigError, FileError, nearest
from llm2clip.io.files import write_text
from llm2clip.registry import check_names

_ROOT = Path(__file__).parents[1]
# What recipes import.  A process that is forked afterwards has them at once.
_MODULES = ('composer.algorithms', 'llm2clip.evaluation.benchmarks', 'llm2clip.evaluation.evaluated_models',
            'llm2clip.export.hf', 'llm2clip.training.stage1', 'llm2clip.training.stage2')


class Step(NamedTuple):
    """A recipe with its arguments."""

    name: str
    recipe: str  # path
    args: Sequence[str]
    config: RecipeConfig
    ranks: int

    def __str__(self) -> str:
        """Return the command that runs the recipe alone."""
        launcher = ['python']
        if self.ranks > 1:
            launcher = ['composer', '-n', str(self.ranks)]
        return shlex.join([*launcher, self.recipe, *self.args])

    def run(self) -> None:
        """Do in this process what the command does."""
        if self.ranks > 1:
            launcher = [sys.executable, '-m', 'composer.cli', '-n', str(self.ranks)]
            os.execv(sys.executable, [*launcher, self.recipe, *self.args])
        sys.argv[:] = [self.recipe, *self.args]
        runpy.run_path(self.recipe, run_name='__main__')

    @property
    def record(self) -> Path:
        """File with the `state` in which a recipe that would repeat its work has ended."""
        return Path(self.config.output_folder, '.finished')

    def state(self) -> tuple[str, str]:
        """Return hashes of what the step depends on, and of its output folder: of the settings and the files
        that they name or whose folder they name, by content for JSON and YAML, else by size and time."""
        inputs = xxhash.xxh3_128()
        outputs = xxhash.xxh3_128()
        for key, value in leaves(dataclasses.asdict(self.config)):
            inputs.update(f'{key}={value}\n')
            if not isinstance(value, str) or not os.path.exists(value):
                continue
            for path in [Path(value), *sorted(Path(value).rglob('[!.]*'))]:
                if not path.is_file() or path.name == SECONDS_FILE:
                    continue
                stat = path.stat()
                version = stat.st_mtime_ns
                if path.suffix in ('.json', '.yaml'):  # steps that have nothing to do may write them again
                    version = xxhash.xxh3_64_intdigest(path.read_bytes())
                digest = outputs if path.is_relative_to(self.config.output_folder) else inputs
                digest.update(f'{path} {stat.st_size} {version}\n')
        return inputs.hexdigest(), outputs.hexdigest()


def load_steps(config: PipelineConfig) -> list[Step]:
    """Return the steps to run, after the configurations of all steps were checked.

    Raises:
        ConfigError: There is no such recipe, or its configuration is invalid.  The key is that of the step.
    """
    steps: list[Step] = []
    modules = [f'modules={config.modules}'] if config.modules else []
    for name, (recipe, *args) in config.steps.items():
        try:
            steps.append(_load_step(name, recipe, [*modules, *args], config.ranks))
        except (ConfigError, FileError) as error:
            key = f'steps.{name}'
            step_error = ConfigError(str(error), key=key)
            step_error.place = config.places.get(key, '')
            raise step_error from None
    names = [*config.steps]
    first = names.index(config.start or names[0])
    wanted = config.only or names[first:]
    return [step for step in steps if step.name in wanted]


def _load_step(name: str, recipe: str, args: Sequence[str], ranks: int) -> Step:
    recipes = {path.stem: path for path in (_ROOT / 'recipes').glob('*.py') if path.stem != 'run'}
    if recipe not in recipes:
        raise ConfigError(f'unknown recipe {recipe!r}; {nearest(recipe, recipes)}')
    path = os.path.relpath(recipes[recipe])
    args = [_in_repository(arg) for arg in args if arg]
    main = runpy.run_path(path)['main']
    config = load_config(typing.get_type_hints(main)['config'], args)
    check_names(config)
    if not config.uses_ranks:
        ranks = 1
    return Step(name, path, args, config, ranks)


def _in_repository(word: str) -> str:
    """Return an argument, or the path of the repository's file if there is none in the working directory."""
    path = _ROOT / word
    if '=' not in word and not os.path.exists(word) and path.is_file():
        return os.path.relpath(path)
    return word


def plan_steps(config: PipelineConfig, steps: Sequence[Step]) -> None:
    """Print the plan of each training and extraction, and then the sum of those that could be planned.

    Raises:
        SystemExit: With status 1 if something will stop a step.
    """
    from llm2clip.modeling.loaders import LoadError
    from llm2clip.planning.dry_run import fake_ranks
    from llm2clip.planning.plan import Plan, sum_of
    from llm2clip.planning.planners import make_plan

    shared: dict[str, Any] = {'plan_ranks': config.plan_ranks or config.ranks}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name.startswith('plan_') and value != field.default:
            shared[field.name] = value
    plans: dict[str, Plan] = {}
    will_fail = False
    with fake_ranks(shared['plan_ranks']):
        for step in steps:
            if not isinstance(step.config, PlanConfig):
                continue
            keys = {key: value for key, value in shared.items() if hasattr(step.config, key)}
            try:
                plan = make_plan(dataclasses.replace(step.config, **keys))
            except (ConfigError, LoadError) as error:  # such as a tower that is not there
                print(f'{step.name}\nnot planned: {error}\n', flush=True)
                continue
            print(f'{step.name}\n{plan}\n', flush=True)
            will_fail |= bool(plan.errors)
            if plan.cost.flops:
                plans[step.name] = plan
    if plans:
        print(sum_of(plans))
    if will_fail:
        raise SystemExit(1)


def run_steps(config: PipelineConfig, steps: Sequence[Step]) -> Optional[Step]:
    """Run each step in a forked process; stop at the first that fails.  A recipe that would repeat its work
    is skipped if neither its settings nor any file has changed since it ended.

    Returns:
        In a process that was forked, the step that it has to run.  None when all have ended.

    Raises:
        SystemExit: With the status of a step that has failed.
    """
    if any(step.ranks == 1 for step in steps):
        for module in _MODULES:
            import_module(module)
    for i, step in enumerate(steps):
        title = f'[{i + 1}/{len(steps)}] {step.name}'
        print(f'{title}: {step}', file=sys.stderr, flush=True)
        sys.stdout.flush()
        before = ('', '')
        if step.config.repeats:
            before = step.state()
            if step.record.is_file() and step.record.read_text().split() == [*before]:
                print(f'{title}: {step.config.output_folder} is complete', file=sys.stderr, flush=True)
                continue
        start = time.monotonic()
        status = _fork(step)
        if status is None:
            return step
        seconds = f'{time.monotonic() - start:.0f} s'
        if status:
            print(f'{title} failed after {seconds}; this resumes: {shlex.join(["python", *sys.argv])}',
                  file=sys.stderr, flush=True)
            raise SystemExit(status)
        if step.config.repeats:
            write_text(step.record, f'{before[0]} {step.state()[1]}')
        print(f'{title} took {seconds}, {len(steps) - i - 1} steps remain', file=sys.stderr, flush=True)
    if config.end:
        print(config.end)
    return None


def _fork(step: Step) -> Optional[int]:
    """Return the exit status of a step, or None in the process that is forked for it.  A signal that ends
    this process ends the step first."""
    pid = 0
    try:
        pid = os.fork()
        if pid == 0:
            return None
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except SystemExit:
        if pid:
            # Composer's launcher ends its ranks at SIGINT alone; a recipe ignores SIGTERM after a Ctrl-C.
            os.kill(pid, signal.SIGINT if step.ranks > 1 else signal.SIGTERM)
            os.waitpid(pid, 0)
        raise
    if status < 0:
        return 128 - status
    return status
