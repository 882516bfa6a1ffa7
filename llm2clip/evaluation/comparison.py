# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Paired differences between models and a baseline, and averages over benchmarks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import torch

from llm2clip.config import EvaluateConfig
from llm2clip.metrics.bootstrap import Outcomes, percentile_interval

_MEAN_AP = 'mean_average_precision'
# Main metrics of a retrieval benchmark.
_RECALLS = ('image_retrieval_recall@1', 'text_retrieval_recall@1')


class BenchmarkResult(NamedTuple):
    """Results of one model on one benchmark."""

    values: Mapping[str, Any]
    """Metrics in percent, and counts."""
    outcomes: Sequence[Outcomes]
    """Outcomes per query; empty for mean average precision, which is not a mean over images."""
    seed: int = 0
    """Seed of the resamples for averages; benchmarks with the same images are resampled with the same seed."""


def comparisons(
    config: EvaluateConfig, results: Mapping[str, Mapping[str, BenchmarkResult]]
) -> dict[str, Any]:
    """Compare the models with the baseline of an evaluation, and average their results, for `results.json`.

    `results` maps a benchmark, such as ``zeroshot.imagenet``, to model -> results.  ``comparison`` is present
    with a baseline and has the result of `compare` per benchmark and model.  ``averages`` is present if at
    least one model has all benchmarks of an average.
    """
    entries: dict[str, Any] = {}
    baseline = config.baseline
    if baseline is not None:
        compared = {}
        for benchmark, models in results.items():
            if baseline in models:
                compared[benchmark] = {
                    'metrics': _metrics(config, benchmark, models[baseline]),
                    'models': {name: compare(models[baseline], model, config.bootstrap)
                               for name, model in models.items() if name != baseline}}
        entries['comparison'] = {'baseline': baseline, 'benchmarks': compared}
    for average_name, benchmarks in config.averages.items():
        sets = [results.get(benchmark, {}) for benchmark in benchmarks]
        complete = {name: [models[name] for models in sets] for name in config.models
                    if all(name in models for models in sets)}
        if complete:
            entries.setdefault('averages', {})[average_name] = _average_entry(config, benchmarks, complete)
    return entries


def _average_entry(
    config: EvaluateConfig, benchmarks: Sequence[str], models: Mapping[str, Sequence[BenchmarkResult]]
) -> dict[str, Any]:
    """Metrics of the benchmarks, and the means of models that have a result on each of them."""
    first = next(iter(models.values()))
    metrics = {benchmark: _metrics(config, benchmark, result) for benchmark, result in zip(benchmarks, first)}
    names = _RECALLS if benchmarks[0].startswith('retrieval.') else ('mean',)
    columns: dict[str, Sequence[str]] = dict(zip(names, zip(*metrics.values())))
    baseline = config.baseline
    entries: dict[str, Any] = {}
    for name, results in models.items():
        means, intervals = _averages(results, columns, config.bootstrap)
        entries[name] = means | {'intervals': intervals}
        if baseline is not None and baseline in models and name != baseline:
            difference, intervals = _averages(results, columns, config.bootstrap, models[baseline])
            entries[name]['compared'] = {'difference': difference, 'intervals': intervals}
    return {'benchmarks': metrics, 'models': entries}


def compare(
    before: BenchmarkResult, after: BenchmarkResult, resamples: int = 1000
) -> dict[str, dict[str, Any]]:
    """Compare a model (`after`) with the baseline on the same queries of one benchmark, in the same order.

    ``difference`` maps each metric to its gain in percentage points, ``intervals`` to the 95 % interval of the
    paired bootstrap; it is empty without resamples and for mean average precision.
    """
    metrics: list[str] = []
    intervals: dict[str, Sequence[float]] = {}
    for old, new in zip(before.outcomes, after.outcomes, strict=True):
        metrics += new.names
        intervals.update(new.minus(old).intervals(resamples))
    difference = {name: after.values[name] - before.values[name] for name in metrics or [_MEAN_AP]}
    return {'difference': difference, 'intervals': intervals}


def average(
    results: Sequence[BenchmarkResult], metrics: Sequence[str], resamples: int = 1000,
    baseline: Optional[Sequence[BenchmarkResult]] = None,
) -> tuple[float, Optional[list[float]]]:
    """Return the mean of one metric per benchmark, or of its differences from a baseline, and a 95 % interval.

    `results` are those of a model on each benchmark, `metrics` has the metric of each, and `baseline` the
    results of the baseline.  Images are resampled within each benchmark, together for the same images.  Mean,
    low and high are in percent.  The interval is None without resamples or with mean average precision.
    """
    numbers = [result.values[metric] for result, metric in zip(results, metrics)]
    if baseline is not None:
        numbers = [number - result.values[metric] for number, result, metric in zip(numbers, baseline, metrics)]
    mean = sum(numbers) / len(numbers)
    draws = torch.zeros(resamples, dtype=torch.float64)
    for i, metric in enumerate(metrics):
        position = next((j for j, outcomes in enumerate(results[i].outcomes) if metric in outcomes.names), None)
        if position is None or not resamples:
            return mean, None
        outcomes = results[i].outcomes[position]
        if baseline is not None:
            outcomes = outcomes.minus(baseline[i].outcomes[position])
        column = outcomes.names.index(metric)
        draws += outcomes._replace(hits=outcomes.hits[:, [column]]).resampled(resamples, results[i].seed)[:, 0]
    return mean, (100 * percentile_interval(draws[:, None] / len(metrics)))[0].tolist()


def _averages(
    results: Sequence[BenchmarkResult], columns: Mapping[str, Sequence[str]], resamples: int,
    baseline: Optional[Sequence[BenchmarkResult]] = None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Column -> `average` of its metrics, and column -> interval for the averages that have one."""
    means, intervals = {}, {}
    for name, metrics in columns.items():
        means[name], interval = average(results, metrics, resamples, baseline)
        if interval is not None:
            intervals[name] = interval
    return means, intervals


def _metrics(config: EvaluateConfig, benchmark: str, result: BenchmarkResult) -> list[str]:
    """Main metrics of a benchmark."""
    kind, _, name = benchmark.partition('.')
    if kind == 'retrieval':
        return [*_RECALLS]
    if _MEAN_AP in result.values:
        return [_MEAN_AP]
    metric = getattr(config, kind)[name].metric
    return [f'{kind}_top1' if metric == 'top1' else metric]
