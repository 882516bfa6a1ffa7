# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What models have lost and won against a baseline, image by image, and averages over benchmarks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import torch

from llm2clip.config import EvaluateConfig
from llm2clip.metrics.bootstrap import Outcomes, percentile_interval

__all__ = ['Comparisons', 'Found', 'average', 'compare', 'forgotten_classes']

_PRECISION = 'mean_average_precision'
# What stands for a retrieval benchmark.
_RECALLS = ('image_retrieval_recall@1', 'text_retrieval_recall@1')


class Found(NamedTuple):
    """What one model found on one benchmark."""

    values: Mapping[str, Any]
    """Its numbers, in percent, and for a classification the accuracy ``per_class``."""
    outcomes: Sequence[Outcomes]
    """What it had right; no `Outcomes` have the mean average precision, which is no mean over images."""
    seed: int = 0
    """Of the resamples for averages: benchmarks of the same images have the same, and are drawn together."""
    by_length: Mapping[str, 'Found'] = {}
    """For retrieval, what it found with the texts of each length."""


def forgotten_classes(before: Mapping[str, float], after: Mapping[str, float], n: int = 5) -> dict[str, float]:
    """The classes that have lost most, the worst first -> points lost; at most `n`, and none that has lost nothing.

    Args:
        before: Class -> accuracy in percent, of the baseline.
        after: The same classes -> accuracy of another model.
        n: How many.
    """
    lost = {name: value - after[name] for name, value in before.items()}
    worst = sorted((name for name in lost if lost[name] > 0), key=lambda name: -lost[name])
    return {name: lost[name] for name in worst[:n]}


def compare(before: Found, after: Found, resamples: int = 1000) -> dict[str, Any]:
    """A model beside the baseline, on one benchmark.

    Args:
        before: What the baseline found.
        after: What the model found, on the same queries in the same order.
        resamples: Of the bootstrap; 0: no intervals.

    Returns:
        ``difference``: metric -> points won, and ``intervals``: metric -> 95 % interval of the difference over the same
        resamples of queries for both models.  For a classification also ``forgotten``, as `forgotten_classes` has it;
        where images have one class, ``lost`` and ``gained``, the numbers of images that the baseline alone and the
        model alone had right.  For retrieval ``by_length``: length of the texts -> difference and intervals.
    """
    intervals: dict[str, list[float]] = {}
    for old, new in zip(before.outcomes, after.outcomes, strict=True):
        if resamples:
            ends = 100 * percentile_interval(new.minus(old).resampled(resamples))
            intervals.update(zip(new.names, ends.tolist()))
    metrics = [name for outcomes in after.outcomes for name in outcomes.names] or [_PRECISION]
    difference = {name: after.values[name] - before.values[name] for name in metrics}
    result: dict[str, Any] = {'difference': difference, 'intervals': intervals}
    if 'per_class' in before.values:
        result['forgotten'] = forgotten_classes(before.values['per_class'], after.values['per_class'])
        if before.outcomes:
            was, now = (found.outcomes[0].hits[:, 0] for found in (before, after))
            result.update(lost=int((was & ~now).sum()), gained=int((now & ~was).sum()))
    if before.by_length:
        result['by_length'] = {length: compare(found, after.by_length[length], resamples)
                               for length, found in before.by_length.items()}
    return result


def average(
    found: Sequence[Found], metrics: Sequence[str], resamples: int = 1000, less: Optional[Sequence[Found]] = None
) -> tuple[float, Optional[list[float]]]:
    """The mean over benchmarks of one number of each, or of its differences, and a 95 % interval.

    The images of each benchmark are drawn by themselves; but for numbers of one kind on the same images, which are not
    independent, the same are drawn.

    Args:
        found: What a model found on each.
        metrics: Which of its numbers, for each.
        resamples: Of the bootstrap; 0: no interval.
        less: What the baseline found on each.

    Returns:
        The mean, in percent, and low and high; no interval where one of the numbers is a mean average precision.
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


class Comparisons:
    """The models of an evaluation beside its baseline, and its averages, as far as there are numbers for them.

    Models and benchmarks may come in any order.  What was right is kept in memory, a byte per query and metric.

    Args:
        config: Says what is compared and averaged.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self._found: dict[str, dict[str, Found]] = {}
        self._compared: dict[str, Any] = {}
        self._averages: dict[str, Any] = {}

    def add(self, benchmark: str, model: str, found: Found) -> dict[str, Any]:
        """Take what a model found on a benchmark.

        Args:
            benchmark: ``zeroshot.imagenet``, with the name that it has there.
            model: Its name.
            found: On that benchmark.

        Returns:
            What `results.json` has of them so far.  ``compare``, if a baseline is named: its name as ``baseline``, and
            ``benchmarks``: benchmark -> ``metrics``, those of its numbers that stand for it, and ``models``: model ->
            what `compare` returned.  ``averages``, if there are any: average -> ``benchmarks``: benchmark -> metrics,
            and ``models``: model -> ``mean``, or the recalls of retrieval, with their ``intervals``, and beside a
            baseline ``compared``, with ``difference`` and ``intervals`` of the same names.
        """
        baseline = self.config.compare
        averages = {name: benchmarks for name, benchmarks in self.config.averages.items() if benchmark in benchmarks}
        if baseline is None and not averages:
            return {}
        models = self._found.setdefault(benchmark, {})
        models[model] = found
        # With the numbers of the baseline, all others can be compared.
        changed = list(models) if model == baseline else [model]
        if baseline is not None and baseline in models:
            entry = self._compared.setdefault(benchmark, {'metrics': self._metrics(benchmark), 'models': {}})
            for name in changed:
                if name != baseline:
                    entry['models'][name] = compare(models[baseline], models[name], self.config.bootstrap)
        for name, benchmarks in averages.items():
            # Of the baseline itself, all that it is compared with; before it has all numbers, nothing is new.
            for one in changed if self._on_all(benchmarks, model) else ():
                if (of_one := self._on_all(benchmarks, one)) is not None:
                    entry = self._averages.setdefault(name, {
                        'benchmarks': {benchmark: self._metrics(benchmark, True) for benchmark in benchmarks},
                        'models': {}})
                    before = self._on_all(benchmarks, baseline) if one != baseline else None
                    entry['models'][one] = self._average(entry['benchmarks'], of_one, before)
        return {**({'compare': {'baseline': baseline, 'benchmarks': self._compared}} if baseline is not None else {}),
                **({'averages': self._averages} if self._averages else {})}

    def _metrics(self, benchmark: str, in_average: bool = False) -> list[str]:
        """The numbers that stand for a benchmark; in an average, a composition set has one."""
        kind, _, name = benchmark.partition('.')
        found = next(iter(self._found[benchmark].values()))
        if kind == 'retrieval':
            return [*_RECALLS]
        if kind == 'composition':
            chosen = self.config.composition[name].metric if in_average else None
            return [chosen] if chosen is not None else [outcomes.names[0] for outcomes in found.outcomes]
        if _PRECISION in found.values:
            return [_PRECISION]
        metric = getattr(self.config, kind)[name].metric
        return [f'{kind}_top1' if metric == 'top1' else metric]

    def _average(
        self, metrics: Mapping[str, Sequence[str]], found: Sequence[Found], before: Optional[Sequence[Found]]
    ) -> dict[str, Any]:
        """What `results.json` has of a model's average; `metrics` are those of each benchmark."""
        names = _RECALLS if next(iter(metrics)).startswith('retrieval.') else ('mean',)
        columns = dict(zip(names, zip(*metrics.values())))

        def averages(less: Optional[Sequence[Found]]) -> tuple[dict[str, float], dict[str, list[float]]]:
            pairs = {name: average(found, column, self.config.bootstrap, less) for name, column in columns.items()}
            return ({name: mean for name, (mean, _) in pairs.items()},
                    {name: interval for name, (_, interval) in pairs.items() if interval is not None})

        means, intervals = averages(None)
        result: dict[str, Any] = {**means, 'intervals': intervals}
        if before is not None:
            difference, intervals = averages(before)
            result['compared'] = {'difference': difference, 'intervals': intervals}
        return result

    def _on_all(self, benchmarks: Sequence[str], model: Optional[str]) -> Optional[list[Found]]:
        """What a model found on each benchmark, unless one is missing."""
        found = [self._found[benchmark][model] for benchmark in benchmarks
                 if model is not None and model in self._found.get(benchmark, {})]
        return found if len(found) == len(benchmarks) else None
