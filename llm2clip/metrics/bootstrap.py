# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How much a mean over a small evaluation set would vary with other samples of the same kind."""

from typing import NamedTuple, Optional

import torch

__all__ = ['Outcomes', 'percentile_interval', 'resampled_class_means', 'resampled_means']


class Outcomes(NamedTuple):
    """Whether a model was right, query by query: M metrics, each of which is a mean over Q queries."""

    names: tuple[str, ...]
    """Of the M metrics."""
    hits: torch.Tensor
    """``(Q, M)``, true or 1 where a query counts as right."""
    group: torch.Tensor
    """``(Q,)``, which group a query belongs to, numbered from 0; those of one group are drawn together."""
    classes: Optional[torch.Tensor] = None
    """``(Q,)``; where set, the metrics are means over the classes of the means in each, and queries are drawn within
    their class."""
    stratum: Optional[torch.Tensor] = None
    """``(Q,)``; where set, the metrics are means over the strata of the means in each, and groups are drawn with all
    their queries, of whatever stratum."""

    def minus(self, other: 'Outcomes') -> 'Outcomes':
        """Differences to what another model did with the same queries: a resample of them has the same queries of
        both."""
        return self._replace(hits=self.hits.double() - other.hits.double())

    def resampled(self, resamples: int = 1000, seed: int = 0) -> torch.Tensor:
        """``(resamples, M)``: the metrics, in shares, of queries that are drawn with replacement."""
        if self.classes is not None:
            return resampled_class_means(self.hits, self.classes, resamples, seed)
        return resampled_means(self.hits, self.group, resamples, seed, self.stratum)

    def intervals(self, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Metric -> its 95 % bootstrap interval, low and high, in percent."""
        ends = 100 * percentile_interval(self.resampled(resamples, seed))
        return {name: (low, high) for name, (low, high) in zip(self.names, ends.tolist())}


def resampled_means(
    values: torch.Tensor, group: torch.Tensor, resamples: int = 1000, seed: int = 0,
    stratum: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """``(resamples, M)``: means over queries that are drawn with replacement, a group at a time.

    Queries of one image are not independent, so an image is drawn with all of them.

    Args:
        values: ``(Q, M)``, M values per query.
        group: ``(Q,)``, which group a query belongs to, numbered from 0.
        resamples: How often to draw.
        seed: Of the drawing.
        stratum: ``(Q,)``, which class a query is of, numbered from 0; the mean is then that of the classes' means, of
            those classes that are drawn.  Unset: all are of one.
    """
    stratum = torch.zeros_like(group) if stratum is None else stratum
    groups, strata = int(group.max()) + 1, int(stratum.max()) + 1
    totals = torch.zeros(groups * strata, values.shape[1] + 1, dtype=torch.float64)
    totals.index_add_(0, group * strata + stratum,
                      torch.cat([values.double(), torch.ones(len(values), 1, dtype=torch.float64)], 1))
    totals = totals.view(groups, strata, -1)
    totals = totals[(totals[..., -1] > 0).any(1)]
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(resamples):
        drawn = torch.randint(len(totals), (len(totals),), generator=generator)
        sums = (torch.bincount(drawn, minlength=len(totals)).double() @ totals.flatten(1)).view(strata, -1)
        means.append((sums[:, :-1] / sums[:, -1:]).nanmean(0))
    return torch.stack(means)


def resampled_class_means(
    values: torch.Tensor, classes: torch.Tensor, resamples: int = 1000, seed: int = 0
) -> torch.Tensor:
    """``(resamples, M)``: means over the classes of the means in each, of queries that are drawn with replacement, as
    many of each class as there are, so that no class is ever missing.

    Args:
        values: ``(Q, M)``, M values per query.
        classes: ``(Q,)``; a class without queries does not count.
        resamples: How often to draw.
        seed: Of the drawing.
    """
    order = classes.argsort(stable=True)
    _, sizes = classes.unique(return_counts=True)
    size = sizes.repeat_interleave(sizes)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    weighted = values[order].double() / (size * len(sizes))[:, None]
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(resamples):
        share = torch.rand(len(order), generator=generator, dtype=torch.float64)
        means.append(weighted[first + (share * size).long()].sum(0))
    return torch.stack(means)


def percentile_interval(means: torch.Tensor, level: float = 0.95) -> torch.Tensor:
    """``(M, 2)``: low and high of the middle part of resampled means.

    Args:
        means: ``(resamples, M)``.
        level: Share of the means that the interval covers.
    """
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return torch.quantile(means, ends, dim=0).T
