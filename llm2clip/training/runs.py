# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Folders of runs: settings, trained models and their teachers, interpolation with initial weights."""

import dataclasses
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import torch

from llm2clip.config import ModelConfig, Stage2Config
from llm2clip.config.loading import difference, read_config, read_resolved
from llm2clip.config.ranges import RunWeights
from llm2clip.errors import ConfigError, refuse, under
from llm2clip.export.hf import LLM2CLIPConfig, LLM2CLIPModel, is_exported, portable
from llm2clip.io.files import reading
from llm2clip.io.tensors import read_safetensors
from llm2clip.modeling.loaders import check_keys
from llm2clip.models.adapter_folder import load_adapter
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.vision_lora import load_without_lora, merge_lora
from llm2clip.ranks import once_per_node
from llm2clip.teacher.caption_teacher import TeacherSource
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord
from llm2clip.teacher.llm import teacher_fingerprint
from llm2clip.teacher.sources import teacher_sources
from llm2clip.training.checkpoints import read_latest

BEST_FILE = 'best.safetensors'
# Folders of the trained text encoders inside the run's folder.
TEACHER_FOLDER, CLIP_TEXT_FOLDER = 'teacher', 'clip_text'
# Configuration keys of transformers that do not change the features of a tower.
_IRRELEVANT = ('transformers_version', 'dtype', 'torch_dtype', 'architectures', 'projection_dim', 'dropout',
               'attention_dropout', 'initializer_factor', 'initializer_range')


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


class Stage2Run:
    """Stage-2 run and the choice of its weights.

    `config` is its configuration, and `record` that of the teacher that it began with.  Weights are read by
    `load_model` only.

    Args:
        folder: Folder of the run.
        weights: ``latest`` for the latest checkpoint, or ``best`` for the weights that `SaveBest` wrote.
        wise_ft_alpha: Share of these weights, from 0 to 1, in the interpolation with the run's initial
            weights (`initial_state`).  1: no interpolation.

    Raises:
        ConfigError: The folder holds no stage-2 run, or it lacks the requested weights.
        FileError: The file of the teacher is damaged.
    """

    def __init__(
        self, folder: Union[str, Path], weights: RunWeights = 'latest', wise_ft_alpha: float = 1.0
    ) -> None:
        self.folder = Path(folder)
        self.weights = weights
        self.wise_ft_alpha = wise_ft_alpha
        with under('run'):
            self.config = read_config(Stage2Config, folder)
            self.record = TeacherRecord.read(folder)
        refuse([
            ('weights', weights == 'best' and not Path(folder, BEST_FILE).is_file(),
             f'the run in {folder} kept no best ones; add `callbacks: {{save_best: {{}}}}` to a run'),
            ('wise_ft_alpha', wise_ft_alpha != 1 and self.config.begins_at_random,
             f'{wise_ft_alpha:g}, expected 1, since the tower of the run in {folder} began with random '
             'weights'),
        ])

    def load_model(self) -> LLM2CLIP:
        """Load the model in evaluation mode; LoRA is merged.

        Raises:
            ConfigError: The initial weights cannot be read.
            FileError, LoadError: The weights are damaged, not finite, or of another model.
        """
        if self.weights == 'latest':
            state = load_checkpoint_model(self.folder)
        else:
            state = read_safetensors(self.folder / BEST_FILE).tensors
        state = {name.removeprefix('model.'): value
                 for name, value in state.items() if name.startswith('model.')}
        config = self.config.model
        model = LLM2CLIP(config, self.record.llm_embed_dim, load_weights=False)
        check_keys(state, model.state_dict(), f'the {self.weights} weights of {self.folder}')
        if config.vision.lora is not None:
            model.load_state_dict(state)
            merge_lora(model.vision_encoder.trunk)
            state = model.state_dict()
            model = LLM2CLIP(config.merged, self.record.llm_embed_dim, load_weights=False)
        if self.wise_ft_alpha != 1:
            try:
                state = interpolated(self.initial_state(), state, self.wise_ft_alpha)
            except ValueError as error:
                raise ConfigError(f'needs the weights that the run in {self.folder} began with, as its '
                                  f'config.yaml names them; {error}', key='wise_ft_alpha') from error
        model.load_state_dict(state)
        return model.eval()

    def initial_state(self) -> dict[str, torch.Tensor]:
        """Return the initial weights of the run, by name, without weights that were initialised at random.

        The vision tower's pretrained weights are always included.  The projection is included if it is the
        tower's own, and the adapter if it is the `initial_adapter`.  With `initial_weights`, all weights are
        included, the temperature too, except an adapter of another teacher.  Errors are those of a new run.
        """
        config = self.config
        teacher = self.record.teacher
        model = LLM2CLIP(config.model.merged, self.record.llm_embed_dim,
                         load_weights=config.initial_weights is None)
        if config.initial_weights is not None:
            same_teacher = load_initial_weights(model, config.model.merged, teacher, config.initial_weights)
            parts = {name.split('.')[0] for name in model.state_dict()}
            if not same_teacher:
                parts.discard('adapter')
        else:
            parts = {'vision_encoder'}
            if config.model.visual_projection == 'pretrained':
                parts.add('visual_projection')
            if config.initial_adapter is not None:
                with under('initial_adapter'):
                    load_adapter(model.adapter, config.model.adapter, config.model.embed_dim, teacher,
                                 config.initial_adapter)
                parts.add('adapter')
        return {name: value for name, value in model.state_dict().items() if name.split('.')[0] in parts}

    @property
    def teacher(self) -> Any:
        """Configuration of the teacher: the folder of the one that the run has trained, or what it names."""
        if self.config.trainable_text.lora is None:
            return self.config.teacher
        return str(self._trained_encoder(TEACHER_FOLDER))

    @cached_property
    def final_record(self) -> TeacherRecord:
        """Record of the teacher at the end of the run, which may have trained it; every rank calls this."""
        if self.config.trainable_text.lora is None:
            return self.record
        folder = self._trained_encoder(TEACHER_FOLDER)
        trained = once_per_node(lambda: teacher_fingerprint(folder), f'teacher {folder}')
        return dataclasses.replace(self.record, teacher=trained)

    @property
    def clip_text(self) -> Optional[Path]:
        """Folder of CLIP's text tower that the run has trained; None if it has a teacher instead."""
        if self.config.trainable_text.clip is None:
            return None
        return self._trained_encoder(CLIP_TEXT_FOLDER)

    def _trained_encoder(self, name: str) -> Path:
        """Return the folder of the text encoder that the run has trained.

        A ConfigError if the run has not ended, or other weights than its final ones are requested.
        """
        reason = f'but the run in {self.folder} has trained its text encoder, too, and keeps it as it ended'
        folder = self.folder / name
        refuse([
            ('weights', self.weights != 'latest', f'{self.weights}, {reason}; expected latest'),
            ('wise_ft_alpha', self.wise_ft_alpha != 1, f'{self.wise_ft_alpha:g}, {reason}; expected 1'),
            ('', not folder.is_dir(),
             f'{folder}: there is none yet; the run trains its text encoder, and writes it when it ends'),
        ])
        return folder

    def teachers(self, teacher: Any = None, trust_remote_code: bool = False) -> list[TeacherSource]:
        """Return the checked teachers of the run; none if it has trained CLIP's own text tower.

        `teacher`, a configuration, takes precedence over what the run names.

        Raises:
            ConfigError: Too few or too many teachers are named, or one does not exist.
            ValueError: A teacher is not the one of training.
        """
        if self.config.trainable_text.clip is not None:
            if teacher is not None:
                raise ConfigError(f"expected none, the run in {self.folder} trained CLIP's text tower",
                                  key='teacher')
            return []
        expected = self.final_record.teacher
        sources = teacher_sources(teacher) or teacher_sources(self.teacher, trust_remote_code)
        if len(sources) != len(expected):
            raise ConfigError(f'{len(sources)} named here or in the config.yaml of {self.folder}, expected '
                              f'{len(expected)}, in the order of training', key='teacher')
        for source, fingerprint in zip(sources, expected):
            source.check_encoding(fingerprint, 'the run')  # before its weights are hashed
            source.fingerprint().check(fingerprint, source.name, 'the run')
        return sources


def load_initial_weights(
    model: LLM2CLIP, config: ModelConfig, teacher: Fingerprint, folder: Union[str, Path]
) -> bool:
    """Load the weights of an exported folder, or the latest ones of a stage-2 run, into a model of the same
    configuration.

    Returns:
        Whether `teacher`, the fingerprint of the teacher in training, is that of the loaded model.  If not,
        a warning says so, since the adapter must learn again.

    Raises:
        ConfigError: There is neither, or its configuration differs.
        FileError, LoadError: Its weights are damaged, or do not fit this model.
    """
    check_initial_weights(model, config, folder)
    if is_exported(folder):
        exported = LLM2CLIPModel.from_pretrained(folder, dtype=torch.float32)
        weights = exported.model.state_dict()
        trained = exported.config.teachers()
        with reading(Path(folder, 'config.json'), 'the fingerprint of a teacher under the key learned_from'):
            learned_from = exported.config.learned_from
            if learned_from and teacher == Fingerprint.from_json(learned_from):
                trained = teacher
    else:
        run = Stage2Run(folder)
        weights = run.load_model().state_dict()
        trained = run.final_record.teacher
    load_without_lora(model, weights, f'initial_weights: {folder}')
    try:
        teacher.check(trained, 'training', f'the model in {folder}')
    except ValueError as error:
        warnings.warn(f'initial_weights: {error}', stacklevel=2)
        return False
    return True


def check_initial_weights(model: LLM2CLIP, config: ModelConfig, folder: Union[str, Path]) -> None:
    """Check that an exported folder or a run has the configuration of `model`; weights are not read.

    Raises:
        ConfigError: There is neither, or a key differs.
        FileError: The configuration of the export is damaged.
    """
    if is_exported(folder):
        exported = LLM2CLIPConfig.from_pretrained(folder)
        exported.teachers()
        theirs = dataclasses.asdict(exported.model_config())
    elif Path(folder, 'config.yaml').is_file():
        with under('initial_weights'), torch.device('meta'):
            run = Stage2Run(folder)
            run_config = run.config.model.merged
            run_model = LLM2CLIP(run_config, run.record.llm_embed_dim, load_weights=False)
        theirs = portable(run_model, run_config)
    else:
        raise ConfigError(f'{folder} is neither an exported folder nor that of a stage-2 run',
                          'initial_weights')
    differing = difference(_described_weights(theirs), _described_weights(portable(model, config)))
    if differing is not None:
        raise ConfigError(f'the model in {folder} is another one: model.{differing}', 'initial_weights')


def _described_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a `portable` configuration that changes the meaning of a model's weights."""
    described = {key: config[key] for key in ('embed_dim', 'heads', 'visual_projection', 'adapter')}
    described['logit_bias'] = config['logit_bias'] is not None
    vision = config['vision']
    described['vision'] = _described_tower(vision)
    described['vision'] |= {key: vision[key] for key in ('image_size', 'mean', 'std')}
    beside = {f'[{i}]': _described_tower(tower) for i, tower in enumerate(vision['beside'])}
    described['vision']['beside'] = beside
    return described


def _described_tower(tower: Mapping[str, Any]) -> dict[str, Any]:
    architecture = {key: value for key, value in tower['architecture'].items() if key not in _IRRELEVANT}
    described = {'feature_levels': tower['feature_levels'], 'architecture': architecture}
    if not architecture:
        # A timm name determines the architecture; the tag after the point names the initial weights.
        described['name'] = tower['name'].split('.')[0]
    return described


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
