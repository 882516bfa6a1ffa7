# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How much a mean over a small evaluation set would vary with other samples of the same kind."""

from typing import NamedTuple, Optional

import torch

__all__ = ['Outcomes', 'percentile_interval']


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
        """Differences to what another model did with the same queries, which are then drawn for both."""
        return self._replace(hits=self.hits.double() - other.hits.double())

    def resampled(self, resamples: int = 1000, seed: int = 0) -> torch.Tensor:
        """``(resamples, M)``: the metrics, in shares, of queries that are drawn with replacement."""
        generator = torch.Generator().manual_seed(seed)
        if self.classes is not None:
            return _class_means(self.hits, self.classes, resamples, generator)
        stratum = torch.zeros_like(self.group) if self.stratum is None else self.stratum
        return _group_means(self.hits, self.group, stratum, resamples, generator)

    def intervals(self, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Metric -> its 95 % bootstrap interval, low and high, in percent; nothing without resamples."""
        if not resamples:
            return {}
        ends = 100 * percentile_interval(self.resampled(resamples, seed))
        return {name: (low, high) for name, (low, high) in zip(self.names, ends.tolist())}


def _group_means(
    values: torch.Tensor, group: torch.Tensor, stratum: torch.Tensor, resamples: int, generator: torch.Generator
) -> torch.Tensor:
    """Means over the strata that are drawn; an image is drawn with all its queries, which are not independent."""
    groups, strata = int(group.max()) + 1, int(stratum.max()) + 1
    totals = torch.zeros(groups * strata, values.shape[1] + 1, dtype=torch.float64)
    totals.index_add_(0, group * strata + stratum,
                      torch.cat([values.double(), torch.ones(len(values), 1, dtype=torch.float64)], 1))
    totals = totals.view(groups, strata, -1)
    totals = totals[(totals[..., -1] > 0).any(1)]
    means = []
    for _ in range(resamples):
        drawn = torch.randint(len(totals), (len(totals),), generator=generator)
        sums = (torch.bincount(drawn, minlength=len(totals)).double() @ totals.flatten(1)).view(strata, -1)
        means.append((sums[:, :-1] / sums[:, -1:]).nanmean(0))
    return torch.stack(means)


def _class_means(
    values: torch.Tensor, classes: torch.Tensor, resamples: int, generator: torch.Generator
) -> torch.Tensor:
    """Means over the classes, of each of which as many queries are drawn as there are, so that none is ever missing."""
    order = classes.argsort(stable=True)
    _, sizes = classes.unique(return_counts=True)
    size = sizes.repeat_interleave(sizes)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    weighted = values[order].double() / (size * len(sizes))[:, None]
    means = []
    for _ in range(resamples):
        share = torch.rand(len(order), generator=generator, dtype=torch.float64)
        means.append(weighted[first + (share * size).long()].sum(0))
    return torch.stack(means)


def percentile_interval(means: torch.Tensor, level: float = 0.95) -> torch.Tensor:
    """``(M, 2)``: low and high of the middle share (`level`) of resampled means ``(resamples, M)``."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return torch.quantile(means, ends, dim=0).T
