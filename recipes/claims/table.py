# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The claims as a table and a picture."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from suite import Claim, Suite  # noqa: E402

Results = Mapping[str, Sequence[Mapping[str, Any]]]
METRIC = 'R@10, mean of both directions, %'


def score(retrieval: Mapping[str, Any], sets: Sequence[str]) -> float:
    """Recall@10, the mean of both directions and of the sets."""
    return statistics.mean(
        next(iter(retrieval[name]['models'].values()))[f'{way}_retrieval_recall@10']
        for name in sets for way in ('image', 'text'))


def chance(retrieval: Mapping[str, Any], sets: Sequence[str]) -> float:
    return statistics.mean(next(iter(retrieval[name]['models'].values()))['chance@10'] for name in sets)


def verdict(first: Sequence[float], second: Sequence[float]) -> str:
    """Whether the first is better in every seed, in none, or that depends on the seed."""
    better = sum(a > b for a, b in zip(first, second))
    return 'yes' if better == len(first) else 'no' if better == 0 else f'in {better} of {len(first)} seeds'


def summarize(claim: Claim, sets: Sequence[str], results: Results) -> list[dict[str, Any]]:
    """One row per variant."""
    scores = {variant: [score(seed, sets) for seed in results[variant]] for variant in claim.variants}
    base = scores[claim.variants[0]]
    return [{
        'variant': variant, 'scores': values, 'mean': statistics.mean(values), 'spread': statistics.stdev(values),
        'worse than the first': verdict(base, values) if variant != claim.variants[0] else '',
        'chance': chance(results[variant][0], sets),
        'by set': {name: statistics.mean(score(seed, [name]) for seed in results[variant]) for name in sets},
    } for variant, values in scores.items()]


def write_table(suite: Suite, results: Results) -> str:
    """Write `claims.json`, `claims.md` and `claims.png`; returns the Markdown.

    Args:
        suite: The claims, and the folder for the files.
        results: Variant -> for each seed, what an evaluation found, by evaluation set.
    """
    rows = {claim.statement: {test: summarize(claim, suite.tests[test], results) for test in claim.tests}
            for claim in suite.claims}
    lines = [f'{METRIC}: mean ± standard deviation over {len(next(iter(results.values())))} seeds', '']
    for number, claim in enumerate(suite.claims, 1):
        lines += [f'### {number}. {claim.statement}', '', f'Paper: {claim.paper}', '']
        for test, variants in rows[claim.statement].items():
            lines += [f'| {test} (chance {variants[0]["chance"]:.1f}) | R@10 | worse than the first | by set |',
                      '|---|---|---|---|']
            lines += [f'| {row["variant"]} | {row["mean"]:.1f} ± {row["spread"]:.1f} | {row["worse than the first"]} | '
                      f'{", ".join(f"{name} {value:.1f}" for name, value in row["by set"].items())} |'
                      for row in variants]
            lines.append('')
    text = '\n'.join(lines)
    found = [{'statement': claim.statement, 'paper': claim.paper, 'tests': rows[claim.statement]}
             for claim in suite.claims]
    Path(suite.folder, 'claims.json').write_text(json.dumps(found, indent=2) + '\n')
    Path(suite.folder, 'claims.md').write_text(text)
    _draw(suite, rows)
    if suite.plane is not None:
        _draw_plane(suite, suite.plane, rows[suite.claims[0].statement])
    return text


def _draw(suite: Suite, rows: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> None:
    """One row per claim, one column per test."""
    heights = [len(claim.variants) + 1.2 for claim in suite.claims]
    columns = max(len(claim.tests) for claim in suite.claims)
    figure = plt.figure(figsize=(12, 0.55 * sum(heights)), layout='constrained')
    parts: Any = figure.subfigures(len(suite.claims), 1, squeeze=False, height_ratios=heights)
    for number, (part, claim) in enumerate(zip(parts[:, 0], suite.claims), 1):
        part.suptitle(f'{number}. {claim.statement}.  Paper: {claim.paper}', x=0.01, ha='left', fontsize=9)
        axes = part.subplots(1, columns, sharey=True, squeeze=False)[0]
        for axis in axes[len(claim.tests):]:
            axis.set_visible(False)
        for axis, (test, variants) in zip(axes, rows[claim.statement].items()):
            for i, row in enumerate(variants):
                axis.barh(-i, row['mean'], height=0.6, color='#4c78a8' if i == 0 else '#bbbbbb')
                axis.plot(row['scores'], [-i] * len(row['scores']), 'k.', markersize=6)
            axis.axvline(variants[0]['chance'], color='#c33', linestyle=':', linewidth=1)
            axis.set_yticks([-i for i in range(len(variants))], [row['variant'] for row in variants])
            axis.set_xlim(left=0)
            axis.set_title(test, fontsize=9)
            axis.grid(axis='x', alpha=0.3)
    figure.supxlabel(f'{METRIC}; dots are seeds, the red line is chance', fontsize=9)
    figure.savefig(Path(suite.folder, 'claims.png'), dpi=130)
    plt.close(figure)


def _draw_plane(suite: Suite, plane: tuple[str, str], rows: Mapping[str, list[dict[str, Any]]]) -> None:
    """Each variant between two tests, with a small dot for each seed."""
    figure, axis = plt.subplots(figsize=(7, 6), layout='constrained')
    across, up = (rows[test] for test in plane)
    for i, (x, y) in enumerate(zip(across, up)):
        axis.plot(x['scores'], y['scores'], '.', color=f'C{i}', markersize=5, alpha=0.6)
        axis.plot(x['mean'], y['mean'], 'o', color=f'C{i}', markersize=9, label=x['variant'])
    axis.legend(fontsize=9)
    axis.set(xlabel=f'{plane[0]}: {METRIC}', ylabel=f'{plane[1]}: {METRIC}')
    axis.grid(alpha=0.3)
    axis.margins(0.15)
    figure.savefig(Path(suite.folder, 'plane.png'), dpi=130)
    plt.close(figure)
