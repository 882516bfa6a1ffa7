# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Folders of runs: settings, trained models and their teachers, interpolation with initial weights."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Optional, Union

import torch
from composer import Timestamp
from composer.utils import dist

from llm2clip.config import Stage2Config, TrainConfig, VisionConfig
from llm2clip.config.loading import read_config, read_resolved, save_config, settings_in_folder
from llm2clip.conversion.official_weights import load_initial_weights
from llm2clip.data.schema import TEACHER_FILE
from llm2clip.errors import ConfigError, FileError, under
from llm2clip.export.hf import is_exported
from llm2clip.io.files import reading
from llm2clip.io.folders import check_replaceable
from llm2clip.io.tensors import read_safetensors
from llm2clip.modeling.checks import check_keys
from llm2clip.models.adapter_folder import load_adapter
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.vision_encoder import check_tower_names
from llm2clip.models.vision_lora import merge_lora
from llm2clip.ranks import broadcast_from_rank0, once_per_node
from llm2clip.teacher.fingerprint import TeacherRecord
from llm2clip.teacher.llm import teacher_fingerprint
from llm2clip.training.checkpoints import read_latest

BEST_FILE = 'best.safetensors'
# Folders of the trained text encoders inside the run's folder.
TEACHER_FOLDER, CLIP_TEXT_FOLDER = 'teacher', 'clip_text'


def check_teacher(record: TeacherRecord, run: Union[str, Path]) -> None:
    """Raise a ConfigError if the run in a folder was begun with another teacher."""
    if not Path(run, TEACHER_FILE).is_file():
        return
    differing = TeacherRecord.read(run).difference(record)
    if differing is not None:
        raise ConfigError(f'the run in {run} was begun with another teacher: {differing}; choose another save_folder')


def load_checkpoint_model(run: Union[str, Path]) -> dict[str, torch.Tensor]:
    """Read the model's weights from the latest checkpoint (`read_latest`) in a run's `checkpoint_folder`; one
    inside the run's folder may have been moved with it."""
    path = Path(run, 'config.yaml')
    with reading(path, 'checkpoint_folder, where the checkpoints are'):
        config = read_resolved(path)
        folder = str(config['checkpoint_folder'])
        if folder == f'{config["save_folder"]}/checkpoints':
            folder = f'{run}/checkpoints'
    return read_latest(folder)


def read_stage2(
    run: Union[str, Path], weights: str = 'latest', wise_ft_alpha: float = 1.0
) -> tuple[Stage2Config, TeacherRecord]:
    """Read configuration and teacher of a stage-2 run, not its weights; arguments as for `load_stage2`.

    Raises:
        ConfigError: The folder holds no stage-2 run, or it lacks the requested weights.
        FileError: The file of the teacher is damaged.
    """
    if weights not in ('latest', 'best'):
        raise ConfigError(f'weights: {weights!r} is neither latest nor best')
    config = read_config(Stage2Config, run)
    record = TeacherRecord.read(run)
    width = record.facts.get('llm_embed_dim')
    if not isinstance(width, int):
        raise FileError(f'{run}/{TEACHER_FILE}: llm_embed_dim is {width!r}, expected the width of the vectors')
    if weights == 'best' and not Path(run, BEST_FILE).is_file():
        raise ConfigError(f'weights: the run in {run} kept no best ones; add `callbacks: {{save_best: {{}}}}` to a run')
    if wise_ft_alpha != 1:
        with _beginning_of(run):
            _check_initial(config.model.vision, config.initial_weights)
    return config, record


@contextmanager
def _beginning_of(run: Union[str, Path]) -> Iterator[None]:
    """Explain in an error why the initial weights of a run are read."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f'wise_ft_alpha: needs the weights that the run in {run} began with, as its '
                          f'config.yaml names them; {error}') from error


def load_stage2(
    run: Union[str, Path], weights: str = 'latest', wise_ft_alpha: float = 1.0
) -> tuple[LLM2CLIP, Stage2Config, TeacherRecord]:
    """Load the model, in evaluation mode, with the configuration and teacher of a stage-2 run; LoRA is merged.

    Args:
        run: Folder of the run.
        weights: ``latest`` for the latest checkpoint, or ``best`` for the weights that `SaveBest` wrote.
        wise_ft_alpha: Share of these weights, from 0 to 1, in the interpolation with the run's initial
            weights (`initial_state`).  1: no interpolation.

    Raises:
        ConfigError: The folder holds no stage-2 run, or it lacks the requested weights.
        FileError, LoadError: The weights are damaged, not finite, or of another model.
    """
    config, record = read_stage2(run, weights, wise_ft_alpha)
    state = load_checkpoint_model(run) if weights == 'latest' else read_safetensors(Path(run, BEST_FILE)).tensors
    state = {name.removeprefix('model.'): value for name, value in state.items() if name.startswith('model.')}
    model = LLM2CLIP(config.model, record.llm_embed_dim, load_weights=False)
    check_tower_names(model.vision_encoder, state, 'vision_encoder.')
    check_keys(state, model.state_dict(), f'the {weights} weights of {run}')
    if config.model.vision.lora is not None:
        model.load_state_dict(state)
        merge_lora(model.vision_encoder.trunk)
        state = model.state_dict()
        config = dataclasses.replace(config, model=config.model.merged)
        model = LLM2CLIP(config.model, record.llm_embed_dim, load_weights=False)
    if wise_ft_alpha != 1:
        with _beginning_of(run):
            state = interpolated(initial_state(config, record), state, wise_ft_alpha)
    model.load_state_dict(state)
    return model.eval(), config, record


def with_trained_teacher(
    run: Union[str, Path], config: Stage2Config, record: TeacherRecord, weights: str = 'latest',
    wise_ft_alpha: float = 1.0,
) -> tuple[Stage2Config, TeacherRecord]:
    """Replace the teacher in the results of `read_stage2` by the teacher that the run has trained, if any; a
    ConfigError if the run has not ended, or other weights than its final ones are requested."""
    if config.trainable_text.lora is None:
        return config, record
    folder = _trained(run, TEACHER_FOLDER, weights, wise_ft_alpha)
    trained = once_per_node(lambda: teacher_fingerprint(folder), f'teacher {folder}')
    return dataclasses.replace(config, teacher=str(folder)), dataclasses.replace(record, teacher=trained)


def trained_clip_text(run: Union[str, Path], weights: str = 'latest', wise_ft_alpha: float = 1.0) -> Path:
    """Return the folder of a run's trained CLIP text tower; arguments as for `with_trained_teacher`."""
    return _trained(run, CLIP_TEXT_FOLDER, weights, wise_ft_alpha)


def _trained(run: Union[str, Path], name: str, weights: str, wise_ft_alpha: float) -> Path:
    reason = f'but the run in {run} has trained its text encoder, too, and keeps it as it ended'
    if weights != 'latest':
        raise ConfigError(f'weights: {weights}, {reason}; expected latest')
    if wise_ft_alpha != 1:
        raise ConfigError(f'wise_ft_alpha: {wise_ft_alpha:g}, {reason}; expected 1')
    folder = Path(run, name)
    if not folder.is_dir():
        raise ConfigError(f'{folder}: there is none yet; the run trains its text encoder, and writes it when it ends')
    return folder


def interpolated(
    initial: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """Return ``(1 - share) * initial + share * trained``, exact at both ends (WiSE-FT, arXiv 2109.01903).

    Integers, and weights without an initial value, keep their trained values.  BatchNorm statistics are
    averaged like weights, which changes nothing if they were frozen.
    """
    result = dict(trained)
    for name, value in trained.items():
        if name in initial and value.is_floating_point():
            result[name] = torch.lerp(initial[name].to(value), value, share)
    return result


def _check_initial(vision: VisionConfig, initial_weights: Optional[str]) -> None:
    """Raise a ConfigError if the tower's initial weights were random or are missing; reads no weights."""
    if initial_weights is not None:
        if not is_exported(initial_weights):
            raise ConfigError(f'initial_weights: {initial_weights} is no exported folder: it has no config.json of one')
    elif vision.checkpoint is not None:
        if not Path(vision.checkpoint).is_file():
            raise ConfigError(f'model.vision.checkpoint: there is no file {vision.checkpoint}')
    elif not vision.pretrained:
        raise ConfigError('the tower began with random weights, since model.vision.pretrained is false')


def initial_state(config: Stage2Config, record: TeacherRecord) -> dict[str, torch.Tensor]:
    """Return the initial weights of a run, by name, without weights that were initialised at random.

    The vision tower's pretrained weights are always included.  The projection is included if it is the
    tower's own, and the adapter if it is the `initial_adapter`.  With `initial_weights`, all weights are
    included, the temperature too, except an adapter of another teacher.  Errors are those of a new run.
    """
    _check_initial(config.model.vision, config.initial_weights)
    model = LLM2CLIP(config.model.merged, record.llm_embed_dim, load_weights=config.initial_weights is None)
    if config.initial_weights is None:
        parts = ['vision_encoder']
        if config.model.visual_projection == 'pretrained':
            parts.append('visual_projection')
        if config.initial_adapter is not None:
            with under('initial_adapter'):
                load_adapter(model.adapter, config.model.adapter, config.model.embed_dim, record.teacher,
                             config.initial_adapter)
            parts.append('adapter')
        return {name: value for name, value in model.state_dict().items() if name.split('.')[0] in parts}
    same_teacher = load_initial_weights(model, config.model, record.teacher, config.initial_weights)
    return {name: value for name, value in model.state_dict().items()
            if same_teacher or not name.startswith('adapter.')}


def is_complete(config: TrainConfig, result: Path) -> bool:
    """Return whether a run has ended at the configured `max_duration`, with its result; every rank calls
    this.  `result` is a file that exists only after the end of a run.

    Raises:
        ConfigError: The run has ended, but with other settings, or the result belongs to another run.
    """
    def compute() -> bool:
        if not result.is_file():
            return False
        saved_config = settings_in_folder(config)
        if saved_config is None:
            raise ConfigError(f'{result.parent} is there already, but not of a run in {config.save_folder}, '
                              'which has no config.yaml; choose another folder for the result')
        return saved_config.max_duration == config.max_duration

    complete = broadcast_from_rank0(compute)
    if complete and dist.get_global_rank() == 0:
        print(f'{result.parent} is complete')
    return complete


def write_settings(config: TrainConfig, reached: Timestamp, results: Mapping[Path, str]) -> None:
    """Write the resolved configuration into the folder of a new or resumed run; every rank calls this.

    The folder of a run that has `reached` its end is unchanged.  If an ended run is extended, its `results`
    (folder -> kind, see `check_replaceable`) are removed.

    Raises:
        ConfigError: The run has ended with other settings, or is to be extended but has no checkpoint.
    """
    def write() -> None:
        if reached >= config.max_duration:
            saved_config = settings_in_folder(config)
            if saved_config is not None and reached >= saved_config.max_duration:
                return
        else:
            if reached.batch == 0 and any(folder.is_dir() and any(folder.iterdir()) for folder in results):
                raise ConfigError(f'save_folder: the run in {config.save_folder} has ended, and there is no '
                                  'checkpoint to resume from; choose another save_folder')
            for folder, kind in results.items():
                check_replaceable(folder, kind)
                shutil.rmtree(folder, ignore_errors=True)
        save_config(config, config.save_folder)  # last, since `is_complete` must not see it beside old results

    broadcast_from_rank0(write)
