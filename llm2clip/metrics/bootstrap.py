# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How much a mean over a small evaluation set would vary with other samples of the same kind."""

from typing import Optional

import torch

__all__ = ['bootstrap_interval']


def bootstrap_interval(
    values: torch.Tensor, group: torch.Tensor, resamples: int = 1000, seed: int = 0, level: float = 0.95,
    stratum: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Percentile bootstrap intervals of means over queries, drawn with replacement a group at a time.

    Queries of one image are not independent, so an image is drawn with all of them.

    Args:
        values: ``(Q, M)``, M values per query.
        group: ``(Q,)``, which group a query belongs to, numbered from 0.
        resamples: How often to draw.
        seed: Of the drawing.
        level: Share of the means that the interval covers.
        stratum: ``(Q,)``, which class a query is of, numbered from 0; the mean is then that of the classes' means, of
            those classes that are drawn.  Unset: all are of one.

    Returns:
        ``(M, 2)``, low and high.
    """
    stratum = torch.zeros_like(group) if stratum is None else stratum
    groups, strata = int(group.max()) + 1, int(stratum.max()) + 1
    totals = torch.zeros(groups * strata, values.shape[1] + 1, dtype=torch.float64)
    totals.index_add_(0, group * strata + stratum,
                      torch.cat([values.double(), values.new_ones(len(values), 1).double()], 1))
    totals = totals.view(groups, strata, -1)
    totals = totals[(totals[..., -1] > 0).any(1)]
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(resamples):
        drawn = torch.randint(len(totals), (len(totals),), generator=generator)
        sums = (torch.bincount(drawn, minlength=len(totals)).double() @ totals.flatten(1)).view(strata, -1)
        means.append((sums[:, :-1] / sums[:, -1:]).nanmean(0))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return torch.quantile(torch.stack(means), ends, dim=0).T
