# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2, put together: the vision tower is trained against a teacher, mostly a frozen one (LLM2CLIP section 3.2)."""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

import torch
from composer import Algorithm, DataSpec, Evaluator, Trainer
from composer.utils import dist, reproducibility

from llm2clip.config import ConfigError, Stage2Config
from llm2clip.data.image_embeddings import build_image_loader
from llm2clip.data.loader import device_batch_size
from llm2clip.device import open_device
from llm2clip.evaluation.zeroshot import (
    ZeroshotSet,
    deal_prompts,
    own_prompts,
    prompt_texts,
    zeroshot_evaluator,
    zeroshot_set,
)
from llm2clip.float32 import exact_float32
from llm2clip.folders import check_replaceable
from llm2clip.imports.initial import load_initial_weights
from llm2clip.models.adapter import load_adapter
from llm2clip.models.llm2clip import (
    LLM2CLIP,
    MULTILABEL_METRICS,
    RETRIEVAL_METRICS,
    ZEROSHOT_METRICS,
    ComposerLLM2CLIP,
)
from llm2clip.models.towers import takes_any_size, tower_preprocessing
from llm2clip.ranks import agreed, once_per_node
from llm2clip.stages.text_encoders import (
    TrainedTexts,
    begun_with_clip,
    join,
    load_texts,
    save_texts,
    text_folders,
)
from llm2clip.teacher.caption_teacher import CachedTeacher, CaptionTeacher
from llm2clip.teacher.fingerprint import TeacherRecord
from llm2clip.teacher.sidecars import sidecar_teacher
from llm2clip.teacher.sources import named_teacher
from llm2clip.training.algorithms.online_teacher import OnlineTeacher
from llm2clip.training.algorithms.self_distillation import InitialImages, SelfDistillation
from llm2clip.training.algorithms.zeroshot_classes import Prompts, ZeroshotClasses
from llm2clip.training.completed import write_settings
from llm2clip.training.runs import record_teacher
from llm2clip.training.trainer import begin, build_optimizer, build_trainer, check_metrics, fit

__all__ = ['make_loaders', 'make_model', 'make_trainer', 'possible_metrics', 'train', 'train_image_size']


def train_image_size(config: Stage2Config) -> int:
    """Side of the training images in pixels.

    Raises:
        ConfigError: It is not the tower's, and the tower takes no other.
    """
    size, vision = config.train_data.image_size, config.model.vision
    if size not in (None, vision.image_size) and not takes_any_size(vision):
        raise ConfigError(f'train_data.image_size: {vision.name} takes images of model.vision.image_size, '
                          f'{vision.image_size}, only, not of {size}')
    return size or vision.image_size


def make_loaders(config: Stage2Config) -> tuple[DataSpec, list[Evaluator]]:
    """The training data, and what is measured while training."""
    contents = {'online': not config.reads_vectors, 'captions': config.reads_captions}
    data = build_image_loader(config.train_data, train_image_size(config), config.global_train_batch_size, config.seed,
                              True, 'train_data', **contents)
    if config.eval_data is None:
        return data, []
    image_size = tower_preprocessing(config.model.vision).image_size
    eval_data = build_image_loader(config.eval_data, image_size, config.global_eval_batch_size, config.seed, False,
                                   'eval_data', **contents)
    return data, [Evaluator(label='eval', dataloader=eval_data, metric_names=[*RETRIEVAL_METRICS])]


def possible_metrics(config: Stage2Config) -> dict[str, list[str]]:
    """Label of each evaluator -> metrics that it may have; which ones a zero-shot set has, its files say."""
    evaluated = {} if config.eval_data is None else {'eval': [*RETRIEVAL_METRICS]}
    return {**evaluated, **{name: [*ZEROSHOT_METRICS, *MULTILABEL_METRICS] for name in config.eval_zeroshot}}


def make_model(
    config: Stage2Config, llm_embed_dim: int, load_weights: bool = True, texts: Optional[TrainedTexts] = None
) -> ComposerLLM2CLIP:
    """Vision tower and adapter under the loss of the configuration.

    Args:
        config: The run's.
        llm_embed_dim: Width of the teacher's vectors.
        load_weights: Load the tower's pretrained weights.
        texts: The text encoders that are trained, too.
    """
    model = LLM2CLIP(config.model, llm_embed_dim, load_weights)
    loss = config.loss, train_image_size(config), config.self_distillation
    return ComposerLLM2CLIP(model, *loss) if texts is None else join(config, model, texts, *loss)


def make_trainer(config: Stage2Config) -> Trainer:
    """Everything that a run needs, checked; `begin` comes before.

    Raises:
        ConfigError: The configuration or the data is not what was expected.
        ValueError: The sidecars come from another teacher than the one that is named.
    """
    return _make_trainer(config, _load_texts(config))


def _load_texts(config: Stage2Config) -> Optional[TrainedTexts]:
    """The text encoders that the run trains, if it trains any; `begin` comes first."""
    begin(config)
    if not config.reads_captions:
        return None
    reproducibility.seed_all(config.seed)
    return load_texts(config)


def _make_trainer(config: Stage2Config, texts: Optional[TrainedTexts]) -> Trainer:
    sets = {name: zeroshot_set(one, f'eval_zeroshot.{name}') for name, one in config.eval_zeroshot.items()}
    data, retrieval = make_loaders(config)
    evaluators = [*retrieval, *_zeroshot_evaluators(config, sets)]
    _check_metrics(config, evaluators)
    record, online = _find_teacher(config, data, retrieval, texts)
    algorithms: list[Algorithm] = [] if online is None else [OnlineTeacher(online, keep=config.reads_captions)]
    if dist.get_global_rank() == 0:
        record_teacher(record, config.save_folder)
    if sets:
        algorithms.append(ZeroshotClasses(_prompts(config, sets, record, online)))
    reproducibility.seed_all(config.seed)
    if _begins_at_random(config) and dist.get_global_rank() == 0:
        print('model.vision.pretrained is false: the vision tower begins with random weights', flush=True)
    model = make_model(config, record.llm_embed_dim, config.initial_weights is None, texts)
    if config.initial_weights is not None:
        load_initial_weights(model.model, config.model, record.teacher, config.initial_weights)
    if config.initial_adapter is not None:
        load_adapter(model.model.adapter, config.model.adapter, config.model.embed_dim, record.teacher,
                     config.initial_adapter, 'initial_adapter')
    if config.self_distillation.enabled:
        algorithms.append(_self_distillation(config, model.model, data))
    return build_trainer(config, model, build_optimizer(config, model), data, evaluators, algorithms)


def train(config: Stage2Config) -> None:
    """Train, or go on where a run was stopped; a complete run is left as it is.

    Raises:
        ConfigError: The configuration or the data is not what was expected, or a complete run had other settings.
        ValueError: The sidecars come from another teacher than the one that is named.
    """
    folders = text_folders(config)
    for folder, kind in folders.items():
        check_replaceable(folder, kind)
    texts = _load_texts(config)
    trainer = _make_trainer(config, texts)
    write_settings(config, trainer.state.timestamp, folders)
    fit(trainer, config)
    if texts is not None and not agreed(lambda: all(folder.is_dir() for folder in folders)):
        save_texts(config, texts, trainer)
    trainer.close()
    if dist.get_global_rank() == 0:
        also = ''.join(f' and the text encoder to {folder}' for folder in folders)
        print(f'wrote the model to {config.checkpoint_folder}{also}', flush=True)


def _check_metrics(config: Stage2Config, evaluators: Sequence[Evaluator]) -> None:
    check_metrics(config, {evaluator.label: evaluator.metric_names or [] for evaluator in evaluators})


def _zeroshot_evaluators(config: Stage2Config, sets: Mapping[str, ZeroshotSet]) -> list[Evaluator]:
    """Each set's, whose images are seen as in any evaluation."""
    image_size = tower_preprocessing(config.model.vision).image_size
    batch_size = device_batch_size(config.global_eval_batch_size, 'global_eval_batch_size')
    return [zeroshot_evaluator(one, name, f'eval_zeroshot.{name}', image_size, batch_size,
                               config.train_data.num_workers) for name, one in sets.items()]


def _prompts(
    config: Stage2Config, sets: Mapping[str, ZeroshotSet], record: TeacherRecord, online: Optional[CaptionTeacher]
) -> dict[str, Prompts]:
    """As texts, where a text encoder learns to read them, and as vectors, where a frozen LLM does."""
    learns = config.trained_text.lora is not None or config.without_llm
    embedded = {} if learns else _embed_prompts(config, sets, record, online)
    return prompt_texts(sets, embedded) if config.reads_captions else embedded


def _embed_prompts(
    config: Stage2Config, sets: Mapping[str, ZeroshotSet], record: TeacherRecord, online: Optional[CaptionTeacher]
) -> dict[str, Prompts]:
    """By the teacher in the loop, or one that is let go afterwards; a run that is resumed has the vectors on disk,
    unless the teacher is sharded."""
    device = open_device(config.device, config.precision)
    source = named_teacher(config)
    assert source is not None

    def load() -> CaptionTeacher:
        return online or source.load(device, fingerprint=record.teacher)

    with exact_float32('cuda' if device.name == 'gpu' else device.name):
        if online is not None and config.online.sharded:
            return own_prompts(sets, lambda texts: online.embed(texts).vectors)
        cached = CachedTeacher(Path(config.save_folder, 'text_embeddings'), record.teacher,
                               'fp32' if online is None else config.online.precision, load)
        prompts = deal_prompts(sets, cached, record.llm_embed_dim, device)
    del cached
    gc.collect()  # of the LLM, which the model's weights and activations need the room of
    torch.cuda.empty_cache()
    return prompts


def _begins_at_random(config: Stage2Config) -> bool:
    vision = config.model.vision
    return vision.checkpoint is None and not vision.pretrained and config.initial_weights is None


def _self_distillation(config: Stage2Config, model: LLM2CLIP, data: DataSpec) -> SelfDistillation:
    """With a copy of the model as it begins, before a checkpoint is loaded."""
    if _begins_at_random(config):
        raise ConfigError('self_distillation.enabled: the tower begins with random weights, which are nothing to keep; '
                          'expected initial_weights, or model.vision.pretrained not to be false')
    initial = InitialImages(model).on(open_device(config.device, config.precision), config.fsdp is not None)
    return SelfDistillation(initial, data.split_batch)


def _find_teacher(
    config: Stage2Config, data: DataSpec, evaluators: Sequence[Evaluator], texts: Optional[TrainedTexts]
) -> tuple[TeacherRecord, Optional[CaptionTeacher]]:
    """The teacher of the sidecars, the one that is trained, as it begins, or a frozen one in the loop, which is loaded.
    """
    if texts is not None and config.without_llm:
        return begun_with_clip(config, texts), None
    source = named_teacher(config)
    if texts is not None and texts.llm is not None:
        assert source is not None
        fingerprint = once_per_node(source.fingerprint, f'teacher {source.name}')
        return TeacherRecord(fingerprint, {'llm_embed_dim': texts.llm[0].llm_embed_dim}), None
    if config.online.enabled:
        assert source is not None
        device, online = open_device(config.device, config.precision), config.online
        teacher = source.load(device, online.batch_tokens, online.precision, sharded=online.sharded)
        return TeacherRecord(teacher.fingerprint, {'llm_embed_dim': teacher.llm_embed_dim}), teacher
    record = sidecar_teacher(data)
    if source is not None:
        fingerprint = once_per_node(source.fingerprint, f'teacher {source.name}')
        record.teacher.check(fingerprint, 'the sidecar of train_data', source.name)
    for evaluator in evaluators:
        sidecar_teacher(evaluator.dataloader).teacher.check(record.teacher, 'eval_data', 'train_data')
    return record, None
