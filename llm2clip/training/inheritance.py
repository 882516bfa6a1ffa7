# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Inheritance, between the stages: train the adapter to reproduce the space of CLIP's own text tower
(ProCLIP, arXiv 2510.18795)."""

from pathlib import Path
from typing import Any

from composer import DataSpec, Evaluator
from composer.utils import reproducibility

from llm2clip.config import InheritanceConfig
from llm2clip.data.inheritance_dataset import build_target_loader
from llm2clip.data.loader import streaming_dataset
from llm2clip.data.schema import embedding_dim
from llm2clip.errors import under
from llm2clip.models.adapter_folder import KIND, WEIGHTS_FILE, build_adapter, save_adapter
from llm2clip.models.inherited_adapter import ComposerInheritance
from llm2clip.ranks import is_first
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord
from llm2clip.teacher.sources import check_teacher_of_run, teacher_of_data
from llm2clip.training.config_checks import check_metrics, evaluated_metrics
from llm2clip.training.run_folder import is_complete
from llm2clip.training.trainer import Parts, initialize, run_training


def train(config: InheritanceConfig) -> None:
    """Train or resume a run, and write the adapter; a no-op for a run that has reached `max_duration`."""
    results = {Path(config.adapter_folder): KIND}
    initialize(config, results)
    if is_complete(config, Path(config.adapter_folder, WEIGHTS_FILE)):
        return
    with under('train_data'):
        data = build_target_loader(config.train_data, config.global_train_batch_size, config.seed, train=True)
    evaluators = []
    if config.eval_data is not None:
        with under('eval_data'):
            loader = build_target_loader(config.eval_data, config.global_eval_batch_size, config.seed,
                                         train=False)
        evaluators.append(Evaluator(label='eval', metric_names=[*ComposerInheritance.metrics],
                                    dataloader=loader))
    check_metrics(config, evaluated_metrics(evaluators))
    record = teacher_of_data(config.teacher, data, evaluators)
    target, embed_dim = _find_target(data)
    for evaluator in evaluators:
        _find_target(evaluator.dataloader)[0].check(target, 'the target of eval_data', 'that of train_data')
    check_teacher_of_run(record, config.save_folder)
    reproducibility.seed_all(config.seed)
    model = make_model(config, record.llm_embed_dim, embed_dim)
    run_training(config, Parts(model, data, evaluators, teacher=record), results)
    save_adapter(model.model.adapter, config.adapter, embed_dim, record, target, config.adapter_folder)
    if is_first():
        print(f'wrote the adapter to {config.adapter_folder}', flush=True)


def make_model(config: InheritanceConfig, llm_embed_dim: int, embed_dim: int) -> ComposerInheritance:
    """Build a new adapter, `llm_embed_dim` (teacher) -> `embed_dim` (CLIP), with the configured loss."""
    adapter = build_adapter(config.adapter, llm_embed_dim, embed_dim)
    return ComposerInheritance(adapter, config.instance, config.structure, config.block_size)


def _find_target(data: DataSpec) -> tuple[Fingerprint, int]:
    """Return the fingerprint of the tower of the targets, equal for all streams, and their width."""
    dataset = streaming_dataset(data)
    first, *others = dataset.streams
    target = TeacherRecord.read(first.local).teacher
    for stream in others:
        TeacherRecord.read(stream.local).teacher.check(target, f'embeddings dataset {stream.local}',
                                                       f'embeddings dataset {first.local}')
    shard: Any = dataset.shards[0]  # a PairedReader
    return target, embedding_dim(shard.images)
