# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Content of `results.json`: scores of models on benchmarks, comparisons and averages."""

import json
from typing import Any, Generic, Optional, TypeVar, Union

from pydantic import BaseModel, ConfigDict

KINDS = ('retrieval', 'zeroshot', 'linear_probe')


class _Metrics(BaseModel):
    """Metrics in percent, and counts.  In `results.json`, the field `chance_at_10` is `chance@10`."""

    model_config = ConfigDict(alias_generator=lambda name: name.replace('_at_', '@'))

    def value(self, metric: str) -> Any:
        """Return a metric by its name in `results.json`; None if the benchmark or average lacks it."""
        return getattr(self, metric.replace('@', '_at_'))


class RetrievalScores(_Metrics):
    """Scores of a model on a retrieval benchmark.  `image_retrieval` finds images for a text."""

    n_images: int
    n_texts: int
    image_retrieval_recall_at_1: float
    text_retrieval_recall_at_1: float
    image_retrieval_recall_at_5: float
    text_retrieval_recall_at_5: float
    image_retrieval_recall_at_10: float
    text_retrieval_recall_at_10: float
    image_retrieval_mean_rank: float
    text_retrieval_mean_rank: float
    chance_at_10: float
    """Expected `image_retrieval_recall@10` of a random ranking."""
    intervals: dict[str, list[float]] = {}
    """Recall -> 95 % bootstrap interval."""
    n_truncated: int = 0
    """Number of texts that the model could not read to their end."""
    n_without_caption: int = 0
    """Number of images left out, since they have no caption."""
    precision: str = 'fp32'


class ClassificationScores(_Metrics):
    """Scores of a model on a zero-shot set or with a linear probe."""

    n_images: int
    n_classes: int
    zeroshot_top1: Optional[float] = None
    zeroshot_top5: Optional[float] = None
    linear_probe_top1: Optional[float] = None
    linear_probe_top5: Optional[float] = None
    mean_per_class: Optional[float] = None
    """Mean over the accuracies `per_class`."""
    mean_average_precision: Optional[float] = None
    """The only metric of sets with any number of classes per image."""
    intervals: dict[str, list[float]] = {}
    """Accuracy -> 95 % bootstrap interval."""
    per_class: dict[str, float] = {}
    """Class -> accuracy or average precision."""
    n_truncated: int = 0
    """Number of prompts that the model could not read to their end."""
    C: Optional[float] = None
    """Inverse regularisation strength of the logistic regression of a linear probe."""
    precision: str = 'fp32'


Scores = Union[RetrievalScores, ClassificationScores]
_Scores = TypeVar('_Scores', RetrievalScores, ClassificationScores)


class BenchmarkScores(BaseModel, Generic[_Scores]):
    """Scores of all models on a benchmark."""

    benchmark: str
    """Name of the set; empty for a retrieval set that is not measured as published."""
    models: dict[str, _Scores]


class Differences(BaseModel):
    """Differences of a model from the baseline."""

    difference: dict[str, float]
    """Metric -> percentage points."""
    intervals: dict[str, list[float]]
    """Metric -> 95 % interval of the paired bootstrap, for those that have one."""

    def value(self, metric: str) -> float:
        return self.difference[metric]


class ComparedBenchmark(BaseModel):
    """Differences from the baseline on a benchmark."""

    metrics: list[str]
    """Main metrics of the benchmark."""
    models: dict[str, Differences]


class Comparison(BaseModel):
    """Differences from a baseline on all benchmarks."""

    baseline: str
    benchmarks: dict[str, ComparedBenchmark]
    """Benchmark, such as `zeroshot.imagenet` -> differences."""

    def select(self, kind: str) -> dict[str, ComparedBenchmark]:
        """Return the benchmarks of a kind by their names."""
        prefix = f'{kind}.'
        return {benchmark.removeprefix(prefix): compared
                for benchmark, compared in self.benchmarks.items() if benchmark.startswith(prefix)}


class AverageScores(_Metrics):
    """Means of a model over retrieval benchmarks (recall@1 of both directions), or others (`mean`)."""

    mean: Optional[float] = None
    image_retrieval_recall_at_1: Optional[float] = None
    text_retrieval_recall_at_1: Optional[float] = None
    intervals: dict[str, list[float]]
    compared: Optional[Differences] = None
    """Differences from the means of the baseline."""


class Average(BaseModel):
    """Means of all models over some benchmarks."""

    benchmarks: dict[str, list[str]]
    """Benchmark, such as `zeroshot.imagenet` -> its metrics that are averaged."""
    models: dict[str, AverageScores]


class Results(BaseModel):
    """All that an evaluation has computed so far."""

    missing: list[str] = []
    """What an unfinished evaluation still lacks."""
    retrieval: dict[str, BenchmarkScores[RetrievalScores]] = {}
    zeroshot: dict[str, BenchmarkScores[ClassificationScores]] = {}
    linear_probe: dict[str, BenchmarkScores[ClassificationScores]] = {}
    cra: dict[str, float] = {}
    """Text encoder -> caption retrieval accuracy."""
    weights: dict[str, str] = {}
    """Model -> hash of its weights."""
    comparison: Optional[Comparison] = None
    averages: dict[str, Average] = {}
    cra_pairs: int = 0
    """Number of pairs of captions."""
    cra_precision: str = 'fp32'
    cra_name: Optional[str] = None
    """Name of the dataset of captions."""

    def benchmarks(self, kind: str) -> dict[str, BenchmarkScores[Any]]:
        """Return the benchmarks of a kind by their names."""
        return getattr(self, kind)


def rounded(scores: BaseModel) -> dict[str, Any]:
    """Return the fields that were set as JSON content, with floats rounded to three decimals."""
    content = scores.model_dump(by_alias=True, exclude_unset=True)
    return json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 3))
