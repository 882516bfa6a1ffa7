# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What models have kept of what a tower knew, against what it has learned: two benchmarks, a point for each model."""

from collections.abc import Mapping
from typing import Any, Optional

from llm2clip.config import CurveConfig, EvaluatedModelConfig

__all__ = ['curve_lines', 'curve_points']

_NUMBERS = {'retrieval': ('image_retrieval_recall@1', 'text_retrieval_recall@1'), 'zeroshot': ('zeroshot_top1',),
            'linear_probe': ('linear_probe_top1',)}


def curve_points(
    config: CurveConfig, models: Mapping[str, EvaluatedModelConfig], results: Mapping[str, Any]
) -> dict[str, Any]:
    """The curve as `results.json` has it.

    Args:
        config: The two benchmarks.
        models: Those of the evaluation.
        results: Their numbers so far.

    Returns:
        ``old`` and ``new``, the names of the benchmarks, and ``models``: name -> ``old`` and ``new``, the number on
        each in percent, of all models that have both; of a run also ``line``, which its points have in common, and
        ``interpolate``.
    """
    points: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        old, new = (_number(benchmark, name, results) for benchmark in (config.old, config.new))
        if old is not None and new is not None:
            points[name] = {'old': old, 'new': new}
            if model.run is not None:
                line = model.run + (', best' if model.weights == 'best' else '')
                line += f', {model.dim} dimensions' if model.dim is not None else ''
                points[name].update(line=line, interpolate=model.interpolate)
    return {'old': config.old, 'new': config.new, 'models': points}


def _number(benchmark: str, model: str, results: Mapping[str, Any]) -> Optional[float]:
    """Top-1 accuracy, or the mean of the recalls at 1 of both directions."""
    kind, _, name = benchmark.partition('.')
    values = results[kind].get(name, {'models': {}})['models'].get(model)
    if values is None:
        return None
    numbers = [values[key] for key in _NUMBERS[kind]]
    return round(sum(numbers) / len(numbers), 3)


def curve_lines(curve: Mapping[str, Any]) -> dict[str, list[tuple[float, float, str]]]:
    """Name -> points with their labels: those of a run in the order of `interpolate`, other models by themselves.

    Args:
        curve: What `curve_points` returned.
    """
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for name, point in sorted(curve['models'].items(), key=lambda item: item[1].get('interpolate', 0)):
        label = f'{point["interpolate"]:g}' if 'interpolate' in point else ''
        lines.setdefault(point.get('line', name), []).append((point['old'], point['new'], label))
    return lines
