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
    """Seed of the resamples for averages; equal for benchmarks with the same images, to resample them together."""


def comparisons(config: EvaluateConfig, found: Mapping[str, Mapping[str, BenchmarkResult]]) -> dict[str, Any]:
    """Compare the models of an evaluation with its baseline, and average their results.

    Args:
        config: Defines the baseline and the averages.
        found: Benchmark, such as ``zeroshot.imagenet`` -> model -> results.

    Returns:
        Entries for `results.json`.  ``comparison`` is present with a baseline and has the result of `compare` per
        benchmark and model.  ``averages`` is present if at least one model has all benchmarks of an average.
    """
    result: dict[str, Any] = {}
    baseline, resamples = config.baseline, config.bootstrap
    if baseline is not None:
        result['comparison'] = {'baseline': baseline, 'benchmarks': {
            benchmark: {'metrics': _metrics(config, benchmark, models[baseline]), 'models': {
                name: compare(models[baseline], one, resamples) for name, one in models.items() if name != baseline}}
            for benchmark, models in found.items() if baseline in models}}
    for average_name, benchmarks in config.averages.items():
        models = {name: [found[benchmark][name] for benchmark in benchmarks] for name in config.models
                  if all(name in found.get(benchmark, {}) for benchmark in benchmarks)}
        if not models:
            continue
        before = models.get(baseline) if baseline is not None else None
        metrics = {benchmark: _metrics(config, benchmark, next(iter(found[benchmark].values())))
                   for benchmark in benchmarks}
        names = _RECALLS if benchmarks[0].startswith('retrieval.') else ('mean',)
        columns: dict[str, Sequence[str]] = dict(zip(names, zip(*metrics.values())))
        entry = result.setdefault('averages', {})[average_name] = {'benchmarks': metrics, 'models': {}}
        for name, of_model in models.items():
            means, intervals = _averages(of_model, columns, resamples)
            entry['models'][name] = {**means, 'intervals': intervals}
            if before is not None and name != baseline:
                difference, intervals = _averages(of_model, columns, resamples, before)
                entry['models'][name]['compared'] = {'difference': difference, 'intervals': intervals}
    return result


def compare(before: BenchmarkResult, after: BenchmarkResult, resamples: int = 1000) -> dict[str, dict[str, Any]]:
    """Compare a model (`after`) with the baseline on the same queries of one benchmark, in the same order.

    Returns:
        ``difference``: metric -> gain in percentage points.  ``intervals``: metric -> 95 % interval of the paired
        bootstrap; empty without resamples and for mean average precision.
    """
    intervals: dict[str, Sequence[float]] = {}
    for old, new in zip(before.outcomes, after.outcomes, strict=True):
        intervals.update(new.minus(old).intervals(resamples))
    metrics = [name for outcomes in after.outcomes for name in outcomes.names] or [_MEAN_AP]
    return {'difference': {name: after.values[name] - before.values[name] for name in metrics}, 'intervals': intervals}


def average(
    found: Sequence[BenchmarkResult], metrics: Sequence[str], resamples: int = 1000,
    less: Optional[Sequence[BenchmarkResult]] = None,
) -> tuple[float, Optional[list[float]]]:
    """Average one metric per benchmark, or its differences from a baseline, and return the mean and a 95 % interval.

    `found` has the results of a model on each benchmark, `metrics` the metric of each, and `less` the results of the
    baseline.  Images are resampled within each benchmark; benchmarks with the same images are resampled together.

    Mean, low and high are in percent.  The interval is None without resamples or with mean average precision.
    """
    numbers = [one.values[metric] for one, metric in zip(found, metrics)]
    if less is not None:
        numbers = [number - one.values[metric] for number, one, metric in zip(numbers, less, metrics)]
    mean, draws = sum(numbers) / len(numbers), torch.zeros(resamples, dtype=torch.float64)
    for i, metric in enumerate(metrics):
        where = next((j for j, outcomes in enumerate(found[i].outcomes) if metric in outcomes.names), None)
        if where is None or not resamples:
            return mean, None
        outcomes = found[i].outcomes[where]
        if less is not None:
            outcomes = outcomes.minus(less[i].outcomes[where])
        column = outcomes.names.index(metric)
        draws += outcomes._replace(hits=outcomes.hits[:, [column]]).resampled(resamples, found[i].seed)[:, 0]
    return mean, (100 * percentile_interval(draws[:, None] / len(metrics)))[0].tolist()


def _averages(
    found: Sequence[BenchmarkResult], columns: Mapping[str, Sequence[str]], resamples: int,
    less: Optional[Sequence[BenchmarkResult]] = None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Column -> `average` of its metrics, and column -> interval for the averages that have one."""
    pairs = {name: average(found, metrics, resamples, less) for name, metrics in columns.items()}
    return ({name: mean for name, (mean, _) in pairs.items()},
            {name: interval for name, (_, interval) in pairs.items() if interval is not None})


def _metrics(config: EvaluateConfig, benchmark: str, found: BenchmarkResult) -> list[str]:
    """Main metrics of a benchmark."""
    kind, _, name = benchmark.partition('.')
    if kind == 'retrieval':
        return [*_RECALLS]
    if _MEAN_AP in found.values:
        return [_MEAN_AP]
    metric = getattr(config, kind)[name].metric
    return [f'{kind}_top1' if metric == 'top1' else metric]
