# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What the Composer models with an evaluation have in common."""

from typing import Any, Optional

from composer.models import ComposerModel
from torchmetrics import Metric


class ModelWithMetrics(ComposerModel):
    """Composer model that computes the metrics of its class in evaluations, from its forward pass."""

    metrics: dict[str, type[Metric]]
    """Evaluation metrics by name; each evaluator names the ones for its data."""

    def __init__(self) -> None:
        super().__init__()
        self.val_metrics = {name: metric() for name, metric in self.metrics.items()}

    def eval_forward(self, batch: Any, outputs: Optional[Any] = None) -> Any:
        return self(batch)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        return {} if is_train else dict(self.val_metrics)
