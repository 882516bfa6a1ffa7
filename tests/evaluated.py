# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What `evaluate` finds of a run, and a model whose features are given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composer.devices import DeviceCPU

from llm2clip.config import EvaluatedModelConfig, ZeroshotConfig
from llm2clip.data.classification_sets import zeroshot_set
from llm2clip.evaluation.classifiers import class_features, zeroshot_metrics
from llm2clip.evaluation.evaluated_models import EvaluatedModel, load_evaluated_model
from llm2clip.evaluation.image_features import encode_batches


def load(cache: Path, **options: Any) -> EvaluatedModel:
    return load_evaluated_model(EvaluatedModelConfig(**options), cache, DeviceCPU())


def evaluated(run: Path, source: dict[str, Any], templates: Any = None) -> dict[str, float]:
    """The metrics of a zero-shot set that a training has, too, without rounding."""
    model = load(run / 'cache', run=str(run))
    one = zeroshot_set(ZeroshotConfig(source, templates), 'z')
    prompts, _ = model.text_features(one.prompts)
    images = torch.cat([batch.features for batch in encode_batches(
        model, one.dataset.read_image, one.dataset.image_ids, range(len(one.dataset.image_ids)), 5, 0)])
    found, _ = zeroshot_metrics(images, torch.tensor(one.dataset.labels), class_features(prompts, one.dataset.classes),
                                one.dataset.classes, resamples=0)
    return {name: found.value(name) for name in ('zeroshot_top1', 'mean_per_class', 'mean_average_precision')
            if found.value(name) is not None}


class Given:
    """A model whose images and texts have given features; names of images are their numbers."""

    device = torch.device('cpu')
    model = torch.nn.Linear(1, 1)
    precision = 'fp32'

    def __init__(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        self.images, self.texts = images, texts

    def text_features(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        return self.texts[:len(texts)], 0

    @staticmethod
    def preprocess(data: bytes, name: str) -> torch.Tensor:
        return torch.tensor([int(name)])

    def image_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[pixel_values[:, 0]], self.images[pixel_values[:, 0]]
