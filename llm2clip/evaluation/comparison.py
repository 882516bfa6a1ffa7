# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Paired differences between models and a baseline, and averages over benchmarks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import torch

from llm2clip.config import EvaluateConfig
from llm2clip.evaluation.scores import (
    Average,
    AverageScores,
    ComparedBenchmark,
    Comparison,
    Differences,
    Scores,
)
from llm2clip.metrics.bootstrap import Outcomes, percentile_interval

_MEAN_AP = 'mean_average_precision'
# Main metrics of a retrieval benchmark.
_RECALLS = ['image_retrieval_recall@1', 'text_retrieval_recall@1']


class BenchmarkResult(NamedTuple):
    """Result of one model on one benchmark."""

    scores: Scores
    outcomes: Sequence[Outcomes]
    """Outcomes per query; empty for mean average precision, which is not a mean over images."""
    seed: int = 0
    """Seed of the resamples for averages; benchmarks with the same images have the same seed."""

    def outcomes_of(self, metric: str) -> Outcomes:
        """Return the outcomes for one metric, which is not mean average precision."""
        outcomes = next(outcomes for outcomes in self.outcomes if metric in outcomes.names)
        column = outcomes.names.index(metric)
        return outcomes._replace(names=(metric,), hits=outcomes.hits[:, [column]])


# Benchmark, such as `zeroshot.imagenet` -> model -> result.
_Results = Mapping[str, Mapping[str, BenchmarkResult]]


def compare_with_baseline(config: EvaluateConfig, baseline: str, results: _Results) -> Comparison:
    """Return the differences of all models from the baseline on each benchmark.

    `results` maps a benchmark, such as ``zeroshot.imagenet``, to model -> result.
    """
    benchmarks = {}
    for benchmark, models in results.items():
        differences = {}
        for name, model in models.items():
            if name != baseline:
                differences[name] = compare(models[baseline], model, config.bootstrap)
        metrics = _main_metrics(config, benchmark, models[baseline])
        benchmarks[benchmark] = ComparedBenchmark(metrics=metrics, models=differences)
    return Comparison(baseline=baseline, benchmarks=benchmarks)


def average_models(config: EvaluateConfig, results: _Results) -> dict[str, Average]:
    """Return the averages of a configuration.

    `results` is as for `compare_with_baseline`; every model has a result on every benchmark.
    """
    averages = {}
    for average_name, benchmarks in config.averages.items():
        metrics = {}
        for benchmark in benchmarks:
            first = next(iter(results[benchmark].values()))
            metrics[benchmark] = _main_metrics(config, benchmark, first)
        names = _RECALLS if benchmarks[0].startswith('retrieval.') else ['mean']
        columns: dict[str, Sequence[str]] = dict(zip(names, zip(*metrics.values())))
        entries = {}
        for name in config.models:
            model_results = [results[benchmark][name] for benchmark in benchmarks]
            means, intervals = _averages(model_results, columns, config.bootstrap)
            entry: dict[str, Any] = means | {'intervals': intervals}
            if config.baseline is not None and name != config.baseline:
                baseline_results = [results[benchmark][config.baseline] for benchmark in benchmarks]
                difference, intervals = _averages(model_results, columns, config.bootstrap, baseline_results)
                entry['compared'] = Differences(difference=difference, intervals=intervals)
            entries[name] = AverageScores.model_validate(entry)
        averages[average_name] = Average(benchmarks=metrics, models=entries)
    return averages


def compare(before: BenchmarkResult, after: BenchmarkResult, resamples: int = 1000) -> Differences:
    """Compare a model (`after`) with the baseline on the same queries of one benchmark, in the same order.

    There are no intervals without resamples and for mean average precision.
    """
    metrics: list[str] = []
    intervals = {}
    for old, new in zip(before.outcomes, after.outcomes, strict=True):
        metrics += new.names
        intervals |= new.minus(old).intervals(resamples)
    if not metrics:
        metrics = [_MEAN_AP]
    difference = {metric: after.scores.value(metric) - before.scores.value(metric) for metric in metrics}
    return Differences(difference=difference, intervals=intervals)


def average(
    results: Sequence[BenchmarkResult], metrics: Sequence[str], resamples: int = 1000,
    baseline: Optional[Sequence[BenchmarkResult]] = None,
) -> tuple[float, Optional[list[float]]]:
    """Return a mean of one metric per benchmark, or of its differences from a baseline, and a 95 % interval.

    `results` are those of a model on each benchmark, `metrics` has the metric of each, and `baseline` the
    results of the baseline.  Images are resampled within each benchmark, together for the same images.  Mean,
    low and high are in percent.  The interval is None without resamples or with mean average precision.
    """
    has_interval = resamples > 0 and _MEAN_AP not in metrics
    total = 0.0
    draws = torch.zeros(resamples, 1, dtype=torch.float64)
    for i, metric in enumerate(metrics):
        value = results[i].scores.value(metric)
        if baseline is not None:
            value -= baseline[i].scores.value(metric)
        total += value
        if has_interval:
            outcomes = results[i].outcomes_of(metric)
            if baseline is not None:
                outcomes = outcomes.minus(baseline[i].outcomes_of(metric))
            draws += outcomes.resampled(resamples, results[i].seed)
    mean = total / len(metrics)
    if not has_interval:
        return mean, None
    return mean, (100 * percentile_interval(draws / len(metrics)))[0].tolist()


def _averages(
    results: Sequence[BenchmarkResult], columns: Mapping[str, Sequence[str]], resamples: int,
    baseline: Optional[Sequence[BenchmarkResult]] = None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Column -> `average` of its metrics, and column -> interval for the averages that have one."""
    means = {}
    intervals = {}
    for name, metrics in columns.items():
        means[name], interval = average(results, metrics, resamples, baseline)
        if interval is not None:
            intervals[name] = interval
    return means, intervals


def _main_metrics(config: EvaluateConfig, benchmark: str, result: BenchmarkResult) -> list[str]:
    """Metrics of a benchmark that are averaged and compared."""
    kind, name = benchmark.split('.', 1)
    if kind == 'retrieval':
        return _RECALLS
    if _MEAN_AP in result.scores.model_fields_set:
        return [_MEAN_AP]
    metric = getattr(config, kind)[name].metric
    return [f'{kind}_top1' if metric == 'top1' else metric]
