# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Bootstrap intervals for means over small evaluation sets."""

from typing import NamedTuple, Optional

import torch


class Outcomes(NamedTuple):
    """Outcomes of a model per query, for M metrics that are means over Q queries."""

    names: tuple[str, ...]
    """Names of the M metrics."""
    hits: torch.Tensor
    """``(Q, M)``, true or 1 where a query counts as right."""
    group: torch.Tensor
    """``(Q,)``, group of each query, numbered from 0; the queries of a group are resampled together."""
    n_groups: int
    """Number of groups, of which some may have no query."""
    classes: Optional[torch.Tensor] = None
    """``(Q,)``, class of each query.  If set, the metrics are means over per-class means, and queries are
    resampled within their class."""

    def minus(self, other: 'Outcomes') -> 'Outcomes':
        """Return the differences from another model on the same queries, for a paired bootstrap."""
        return self._replace(hits=self.hits.double() - other.hits.double())

    def resampled(self, resamples: int = 1000, seed: int = 0) -> torch.Tensor:
        """Return the metrics of queries drawn with replacement, ``(resamples, M)``, as fractions of 1.

        A resample of groups without a query is NaN.  Of n queries of a class, n - 1 are drawn, so that the
        variance of small classes is not underestimated (the bootstrap of Rao and Wu, 1988).
        """
        generator = torch.Generator().manual_seed(seed)
        means = []
        if self.classes is None:
            ones = torch.ones(len(self.hits), 1, dtype=torch.float64)
            totals = torch.zeros(self.n_groups, self.hits.shape[1] + 1, dtype=torch.float64)
            totals.index_add_(0, self.group, torch.cat([self.hits.double(), ones], 1))
            for _ in range(resamples):
                drawn = torch.randint(len(totals), (len(totals),), generator=generator)
                sums = torch.bincount(drawn, minlength=len(totals)).double() @ totals
                means.append(sums[:-1] / sums[-1])
        else:
            hits = self.hits[self.classes.argsort(stable=True)].double()
            _, sizes = self.classes.unique(return_counts=True)
            num_drawn = (sizes - 1).clamp(min=1)
            # Class of each draw: its first row, its size, and the weight of a row in the mean over classes.
            first = (sizes.cumsum(0) - sizes).repeat_interleave(num_drawn)
            size = sizes.repeat_interleave(num_drawn)
            weight = (num_drawn * len(sizes)).double().reciprocal().repeat_interleave(num_drawn)
            for _ in range(resamples):
                share = torch.rand(len(first), generator=generator, dtype=torch.float64)
                means.append(weight @ hits[first + (share * size).long()])
        return torch.stack(means)

    def intervals(self, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Return metric -> 95 % bootstrap interval (low, high) in percent; empty without resamples."""
        if not resamples:
            return {}
        ends = 100 * percentile_interval(self.resampled(resamples, seed))
        return {name: (low, high) for name, (low, high) in zip(self.names, ends.tolist())}


def percentile_interval(means: torch.Tensor, level: float = 0.95) -> torch.Tensor:
    """Return the central interval (low, high) ``(M, 2)`` that contains the fraction `level` of `means`
    ``(resamples, M)``; NaN does not count."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return torch.nanquantile(means, ends, dim=0).T
