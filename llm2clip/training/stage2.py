# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2: train the vision tower against a teacher, usually a frozen one (LLM2CLIP section 3.2)."""

from typing import Optional

from composer import Algorithm, Callback, DataSpec, Evaluator
from composer.core import State
from composer.loggers import Logger
from composer.utils import reproducibility

from llm2clip.config import Stage2Config
from llm2clip.data.classification_sets import zeroshot_set
from llm2clip.data.image_text_dataset import build_image_loader, reads_image_embeddings
from llm2clip.data.streams.safe_dataset import device_batch_size
from llm2clip.device import get_device
from llm2clip.errors import under
from llm2clip.models.adapter_folder import load_adapter
from llm2clip.models.frozen_tower import check_tower
from llm2clip.models.joint import JointLLM2CLIP
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.models.sharding import without_ddp
from llm2clip.models.towers import train_image_size
from llm2clip.ranks import broadcast_from_rank0, is_first
from llm2clip.teacher.fingerprint import TeacherRecord
from llm2clip.teacher.sources import check_teacher_of_run, teacher_of_data, teacher_source
from llm2clip.training.algorithms.batches import InitialImages, SelfDistillation, TextEncoderInLoop
from llm2clip.training.config_checks import check_metrics, evaluated_metrics
from llm2clip.training.runs import load_initial_weights
from llm2clip.training.text_encoders import TrainedText, text_folders
from llm2clip.training.trainer import Parts, initialize, run_training
from llm2clip.training.zeroshot import zeroshot_classes, zeroshot_evaluator


def train(config: Stage2Config) -> None:
    """Train or resume a run; a no-op for a complete run."""
    folders = text_folders(config.trainable_text, config.save_folder)
    initialize(config, folders)
    text = TrainedText.load(config) if config.reads_captions else None
    run_training(config, make_parts(config, text), folders)
    if text is not None and not broadcast_from_rank0(lambda: all(folder.is_dir() for folder in folders)):
        text.save(config.trainable_text.lora, config.save_folder)
    if is_first():
        text_results = ''.join(f' and the text encoder to {folder}' for folder in folders)
        print(f'wrote the model to {config.checkpoint_folder}{text_results}', flush=True)


def make_parts(config: Stage2Config, text: Optional[TrainedText] = None) -> Parts:
    """Open the data, and build the model and what changes its batches; call `initialize` before.

    `text` is the text encoder to train, if the configuration has one.
    """
    sets = {name: zeroshot_set(source, f'eval_zeroshot.{name}')
            for name, source in config.eval_zeroshot.items()}
    data, retrieval = make_loaders(config)
    evaluators = list(retrieval)
    batch_size = device_batch_size(config.global_eval_batch_size, 'global_eval_batch_size')
    for name, zeroshot in sets.items():
        evaluators.append(zeroshot_evaluator(zeroshot, name, config.model.vision.image_size, batch_size,
                                             config.train_data.num_workers))
    check_metrics(config, evaluated_metrics(evaluators))

    algorithms: list[Algorithm] = []
    teacher_in_loop = None
    if text is not None:
        record = text.record(config)
    elif config.text_encoder_in_loop.enabled:
        in_loop = config.text_encoder_in_loop
        teacher_in_loop = teacher_source(config.teacher).load(
            get_device(config.device), in_loop.batch_tokens, in_loop.precision, sharded=in_loop.sharded)
        record = TeacherRecord(teacher_in_loop.fingerprint, {'llm_embed_dim': teacher_in_loop.width})
        algorithms.append(TextEncoderInLoop(teacher_in_loop))
    else:
        record = teacher_of_data(config.teacher, data, retrieval)
    check_teacher_of_run(record, config.save_folder)
    if sets:
        algorithms.append(zeroshot_classes(config, sets, record, teacher_in_loop))

    reproducibility.seed_all(config.seed)
    model = make_initial_model(config, record, text)
    _check_image_embeddings(config, model, data, retrieval)
    if config.self_distillation.enabled:
        # Copied before a checkpoint is loaded, since the initial model is the target.
        device = get_device(config.device)
        initial = InitialImages(model.model).on(device, sharded=config.fsdp is not None)
        algorithms.append(SelfDistillation(initial, data.split_batch))
    callbacks: list[Callback] = []
    if config.fsdp is None and config.compile is None:
        callbacks.append(FuseBatchNorms())
    return Parts(model, data, evaluators, algorithms, callbacks, record)


def make_loaders(config: Stage2Config) -> tuple[DataSpec, list[Evaluator]]:
    """Build the training data, and the retrieval evaluator of any `eval_data`."""
    captions = not config.reads_vectors
    image_size = train_image_size(config.train_data, config.model.vision)
    with under('train_data'):
        data = build_image_loader(config.train_data, image_size, config.global_train_batch_size, config.seed,
                                  train=True, captions=captions)
    if config.eval_data is None:
        return data, []
    image_size = config.model.vision.image_size
    with under('eval_data'):
        eval_data = build_image_loader(config.eval_data, image_size, config.global_eval_batch_size,
                                       config.seed, train=False, captions=captions)
    metrics = [*ComposerLLM2CLIP.retrieval_metrics]
    return data, [Evaluator(label='eval', dataloader=eval_data, metric_names=metrics)]


def possible_metrics(config: Stage2Config) -> dict[str, list[str]]:
    """Map the label of each evaluation to all metrics that it may have, as the files of a set decide."""
    metrics: dict[str, list[str]] = {}
    if config.eval_data is not None:
        metrics['eval'] = [*ComposerLLM2CLIP.retrieval_metrics]
    for label in config.eval_zeroshot:
        metrics[label] = [*ComposerLLM2CLIP.zeroshot_metrics, *ComposerLLM2CLIP.multilabel_metrics]
    return metrics


def make_model(
    config: Stage2Config, llm_embed_dim: int, load_weights: bool = True, text: Optional[TrainedText] = None
) -> ComposerLLM2CLIP:
    """Build vision tower and adapter with the configured loss and, if given, the trainable text encoder."""
    model = LLM2CLIP(config.model, llm_embed_dim, load_weights)
    if text is None:
        return ComposerLLM2CLIP(model, config.loss, config.self_distillation)
    return JointLLM2CLIP(model, text.encoder, text.tokenize, config.loss, config.self_distillation)


def make_initial_model(
    config: Stage2Config, record: TeacherRecord, text: Optional[TrainedText] = None
) -> ComposerLLM2CLIP:
    """Build the model with the initial weights that the configuration names."""
    model = make_model(config, record.llm_embed_dim, load_weights=config.initial_weights is None, text=text)
    if config.initial_weights is not None:
        load_initial_weights(model.model, config.model, record.teacher, config.initial_weights)
    if config.initial_adapter is not None:
        with under('initial_adapter'):
            load_adapter(model.model.adapter, config.model.adapter, config.model.embed_dim, record.teacher,
                         config.initial_adapter)
    return model


def _check_image_embeddings(
    config: Stage2Config, model: ComposerLLM2CLIP, data: DataSpec, retrieval: list[Evaluator]
) -> None:
    """Raise a ConfigError if stored features of images are not those of the model's tower."""
    loaders = [('train_data', config.train_data, data)]
    if config.eval_data is not None:
        loaders.append(('eval_data', config.eval_data, retrieval[0].dataloader))
    for key, settings, loader in loaders:
        if reads_image_embeddings(settings):
            with under(key):
                check_tower(model.model.vision_encoder, loader)


class FuseBatchNorms(Callback):
    """Fuse the BatchNorms of a frozen tower, once the weights of a checkpoint are loaded."""

    def after_load(self, state: State, logger: Logger) -> None:
        without_ddp(state.model).model.vision_encoder.fuse_frozen_batch_norms()
