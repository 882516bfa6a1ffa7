# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The folder of a run: what one that is resumed takes over, models with configuration and teacher, and weights between
a run's first and last."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Optional, Union

import torch
from composer import Timestamp
from composer.utils import dist

from llm2clip.config import ConfigError, Stage2Config, TrainConfig, VisionConfig
from llm2clip.config.files import read_config, read_resolved, save_config, settings_in_folder
from llm2clip.data.schema import TEACHER_FILE
from llm2clip.export.hf import is_exported
from llm2clip.files import FileError, reading
from llm2clip.folders import check_replaceable
from llm2clip.imports.weights import load_initial_weights
from llm2clip.models.adapter import load_adapter
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.vision_encoder import check_tower_names
from llm2clip.ranks import broadcast_from_rank0, once_per_node
from llm2clip.remote_code.checks_llm2clip import check_keys
from llm2clip.teacher.fingerprint import TeacherRecord
from llm2clip.teacher.llm import teacher_fingerprint
from llm2clip.training.checkpoints import read_latest
from llm2clip.weights import read_safetensors

__all__ = ['BEST_FILE', 'CLIP_TEXT_FOLDER', 'TEACHER_FOLDER', 'is_complete', 'load_stage2', 'read_stage2',
           'record_teacher', 'trained_clip_text', 'with_trained_teacher', 'write_settings']

BEST_FILE = 'best.safetensors'
# What a run leaves that has trained its text encoder.
TEACHER_FOLDER, CLIP_TEXT_FOLDER = 'teacher', 'clip_text'


def record_teacher(record: TeacherRecord, run: Union[str, Path]) -> None:
    """Keep with a stage-2 run which teacher it learns from.

    Raises:
        ConfigError: The run was begun with another teacher.
    """
    if not Path(run, TEACHER_FILE).is_file():
        record.write(run)
    elif (differing := TeacherRecord.read(run).difference(record)) is not None:
        raise ConfigError(f'the run in {run} was begun with another teacher: {differing}; choose another save_folder')


def load_checkpoint_model(run: Union[str, Path]) -> dict[str, torch.Tensor]:
    """The model's weights in a run's latest checkpoint (`read_latest`), which is in the run's own folder, that may have
    been moved, or where its `checkpoint_folder` says."""
    if (own := Path(run, 'checkpoints')).is_dir():
        return read_latest(str(own))
    with reading(path := Path(run, 'config.yaml'), 'checkpoint_folder, where the checkpoints are'):
        folder = str(read_resolved(path)['checkpoint_folder'])
    return read_latest(folder)


def read_stage2(
    run: Union[str, Path], weights: str = 'latest', wise_ft_alpha: float = 1.0
) -> tuple[Stage2Config, TeacherRecord]:
    """Configuration and teacher of a stage-2 run, without its weights; arguments as for `load_stage2`.

    Raises:
        ConfigError: The folder holds no stage-2 run, or not the weights that are asked for.
    """
    if weights not in ('latest', 'best'):
        raise ConfigError(f'weights: {weights!r} is neither latest nor best')
    config = read_config(Stage2Config, run)
    record = TeacherRecord.read(run)
    if not isinstance(width := record.about.get('llm_embed_dim'), int):
        raise FileError(f'{run}/{TEACHER_FILE}: llm_embed_dim is {width!r}, expected the width of the vectors')
    if weights == 'best' and not Path(run, BEST_FILE).is_file():
        raise ConfigError(f'weights: the run in {run} kept no best ones; add `callbacks: {{save_best: {{}}}}` to a run')
    if wise_ft_alpha != 1:
        with _beginning_of(run):
            _check_initial(config.model.vision, config.initial_weights)
    return config, record


@contextmanager
def _beginning_of(run: Union[str, Path]) -> Iterator[None]:
    """Say of an error why the weights that a run began with are read."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f'wise_ft_alpha: needs the weights that the run in {run} began with, as its config.yaml '
                          f'names them; {error}') from error


def load_stage2(
    run: Union[str, Path], weights: str = 'latest', wise_ft_alpha: float = 1.0
) -> tuple[LLM2CLIP, Stage2Config, TeacherRecord]:
    """Model, configuration and teacher of a stage-2 run, in evaluation mode.

    Args:
        run: Its folder.
        weights: ``latest``, those of the latest checkpoint, or ``best``, those that `SaveBest` kept.
        wise_ft_alpha: Share of them, from 0 to 1; the rest are those that the run began with, where these meant
            something (`initial_state`).

    Raises:
        ConfigError: The folder holds no stage-2 run, or there are no such weights.
        FileError, LoadError: They are damaged, not finite, or of another model.
    """
    config, record = read_stage2(run, weights, wise_ft_alpha)
    state = load_checkpoint_model(run) if weights == 'latest' else read_safetensors(Path(run, BEST_FILE)).tensors
    state = {name.removeprefix('model.'): value for name, value in state.items() if name.startswith('model.')}
    model = LLM2CLIP(config.model, record.llm_embed_dim, load_weights=False)
    check_tower_names(model.vision_encoder, state, 'vision_encoder.')
    check_keys(state, model.state_dict(), f'the {weights} weights of {run}')
    if wise_ft_alpha != 1:
        with _beginning_of(run):
            state = interpolated(initial_state(config, record), state, wise_ft_alpha)
    model.load_state_dict(state)
    return model.eval(), config, record


def with_trained_teacher(
    run: Union[str, Path], config: Stage2Config, record: TeacherRecord, weights: str = 'latest',
    wise_ft_alpha: float = 1.0,
) -> tuple[Stage2Config, TeacherRecord]:
    """What `read_stage2` returns, with the teacher that the run has trained in place of the one that it began with.

    Raises:
        ConfigError: The run has not ended, or other weights are asked for than it ended with.
    """
    if config.trainable_text.lora is None:
        return config, record
    folder = _trained(run, TEACHER_FOLDER, weights, wise_ft_alpha)
    trained = once_per_node(lambda: teacher_fingerprint(folder), f'teacher {folder}')
    return dataclasses.replace(config, teacher=str(folder)), dataclasses.replace(record, teacher=trained)


def trained_clip_text(run: Union[str, Path], weights: str = 'latest', wise_ft_alpha: float = 1.0) -> Path:
    """Folder of the text tower of CLIP that a run has trained; arguments and errors as of `with_own_teacher`."""
    return _trained(run, CLIP_TEXT_FOLDER, weights, wise_ft_alpha)


def _trained(run: Union[str, Path], name: str, weights: str, wise_ft_alpha: float) -> Path:
    if weights != 'latest' or wise_ft_alpha != 1:
        key, value = ('weights', weights) if weights != 'latest' else ('wise_ft_alpha', f'{wise_ft_alpha:g}')
        raise ConfigError(f'{key}: {value}, but the run in {run} has trained its text encoder, too, and keeps it as it '
                          f'ended; expected {"latest" if key == "weights" else 1}')
    folder = Path(run, name)
    if not folder.is_dir():
        raise ConfigError(f'{folder}: there is none yet; the run trains its text encoder, and writes it when it ends')
    return folder


def interpolated(
    initial: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """``(1 - share) * initial + share * trained``, which is exact at both ends (WiSE-FT, arXiv 2109.01903, section 3).

    What has no initial weight stays as it was trained, and so do integers.  The statistics of BatchNorms are averaged
    as weights are, which changes nothing where they were frozen.
    """
    return {name: torch.lerp(initial[name].to(value), value, share)
            if name in initial and value.is_floating_point() else value for name, value in trained.items()}


def _check_initial(vision: VisionConfig, initial_weights: Optional[str]) -> None:
    """Raise a ConfigError, without reading a weight, if the tower began with random ones, or theirs are not there."""
    if initial_weights is not None:
        if not is_exported(initial_weights):
            raise ConfigError(f'initial_weights: {initial_weights} is no exported folder: it has no config.json of one')
    elif vision.checkpoint is not None:
        if not Path(vision.checkpoint).is_file():
            raise ConfigError(f'model.vision.checkpoint: there is no file {vision.checkpoint}')
    elif not vision.pretrained:
        raise ConfigError('the tower began with random weights, since model.vision.pretrained is false')


def initial_state(config: Stage2Config, record: TeacherRecord) -> dict[str, torch.Tensor]:
    """What a run began with: name -> weight, of all weights that meant something before the training.

    These are the vision tower's, as their file has them.  Projection and adapter begin at random, unless the first is
    the tower's own and the second that of `initial_adapter`.  With `initial_weights`, they and the temperature have
    initial weights too, except an adapter whose teacher was another.  Errors are those of a run that begins.
    """
    _check_initial(config.model.vision, config.initial_weights)
    model = LLM2CLIP(config.model, record.llm_embed_dim, load_weights=config.initial_weights is None)
    if config.initial_weights is None:
        known = ['vision_encoder']
        if config.model.visual_projection == 'pretrained':
            known.append('visual_projection')
        if config.initial_adapter is not None:
            load_adapter(model.adapter, config.model.adapter, config.model.embed_dim, record.teacher,
                         config.initial_adapter, 'initial_adapter')
            known.append('adapter')
        return {name: value for name, value in model.state_dict().items() if name.split('.')[0] in known}
    same_teacher = load_initial_weights(model, config.model, record.teacher, config.initial_weights)
    return {name: value for name, value in model.state_dict().items()
            if same_teacher or not name.startswith('adapter.')}


def is_complete(config: TrainConfig, result: Path) -> bool:
    """Whether a run has ended, as long as it is asked for, and left its result, a file that is there only then; every
    rank calls this.

    Raises:
        ConfigError: It has ended, but was trained with other settings, or the result is that of another run.
    """
    def compute() -> bool:
        if not result.is_file():
            return False
        there = settings_in_folder(config)
        if there is None:
            raise ConfigError(f'{result.parent} is there already, but not of a run in {config.save_folder}, which has '
                              'no config.yaml; choose another folder for the result')
        return there.max_duration == config.max_duration

    complete = broadcast_from_rank0(compute)
    if complete and dist.get_global_rank() == 0:
        print(f'{result.parent} is complete')
    return complete


def write_settings(config: TrainConfig, reached: Timestamp, results: Mapping[Path, str]) -> None:
    """Put the resolved configuration into the folder of a run that begins or goes on; every rank calls this.

    The folder of a run that has `reached` its end is left as it is.  Of one that goes on, `results`, folder -> what it
    is (`check_replaceable`), are removed, which it wrote if it ended before.

    Raises:
        ConfigError: It has ended, but was trained with other settings, or is to be longer and left no checkpoint.
    """
    def write() -> None:
        if reached >= config.max_duration:
            there = settings_in_folder(config)
            if there is not None and reached >= there.max_duration:
                return
        else:
            if reached.batch == 0 and any(folder.is_dir() and any(folder.iterdir()) for folder in results):
                raise ConfigError(f'save_folder: the run in {config.save_folder} has ended, and there is no checkpoint '
                                  'to go on from; choose another save_folder')
            for folder, kind in results.items():
                check_replaceable(folder, kind)
                shutil.rmtree(folder, ignore_errors=True)
        save_config(config, config.save_folder)  # last, or `is_complete` would take the results for those of this one

    broadcast_from_rank0(write)
