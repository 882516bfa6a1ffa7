# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Work that is shared by the ranks, item by item, and whose results come together on the first rank, in order.

Each rank takes every so-many-th item, so that a list of batches makes the same batches for any number of ranks.  What
goes wrong on one rank is raised on all of them.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional, TypeVar

import torch
from composer.utils import dist

__all__ = ['RankError', 'agreed', 'in_turns', 'is_first', 'meet', 'rows', 'together']

S = TypeVar('S')
T = TypeVar('T')

# Seconds for which ranks wait for one another.  The first may compute numbers from features for hours, and the end of a
# rank is noticed at once, without a limit.
_PATIENCE = 30 * 24 * 3600.0


class RankError(RuntimeError):
    """Another rank has ended."""


def is_first() -> bool:
    """Whether this is the rank that has the results of shared work, and writes files."""
    return dist.get_global_rank() == 0


def meet() -> None:
    """Connect the ranks that a launcher started, if there are several.

    They exchange objects on the CPU, by gloo also where models are on GPUs: it notices at once that a rank has ended.
    """
    if dist.get_world_size() > 1:
        dist.initialize_dist('cpu', _PATIENCE)


def together(compute: Callable[[], T]) -> T:
    """What `compute` returns on this rank; every rank calls this.

    Raises:
        Exception: What `compute` raised on a rank, on all of them.
    """
    if dist.get_world_size() == 1:
        return compute()
    result, error = None, None
    try:
        result = compute()
    except Exception as raised:
        error = raised
    with _others_there():
        errors = dist.all_gather_object(_portable(error))
    first = error or next(filter(None, errors), None)
    if first is not None:
        raise first
    return result  # pyright: ignore[reportReturnType]


def agreed(compute: Callable[[], T]) -> T:
    """What `compute` returns on the first rank, the only one that calls it, on all of them; errors as of `together`."""
    result = [together(lambda: compute() if is_first() else None)]
    with _others_there():
        dist.broadcast_object_list(result)
    return result[0]  # pyright: ignore[reportReturnType]


def in_turns(items: Sequence[S], work: Callable[[Sequence[S]], Iterable[T]]) -> Iterator[T]:
    """Results of all items, in order, on the first rank; on the others none, but they have to ask for them as well.

    Args:
        items: The same on every rank.
        work: Items -> their results, in order, each made when it is asked for; a rank calls it once, with its share.

    Raises:
        Exception: What `work` raised on a rank, on all of them.
    """
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    if ranks == 1:
        yield from work(items)
        return
    mine = together(lambda: iter(work(items[rank::ranks])))
    for start in range(0, len(items), ranks):
        there = min(ranks, len(items) - start)
        result = together(lambda: next(mine) if rank < there else None)  # noqa: B023
        gathered: Optional[list[Any]] = [None] * ranks if rank == 0 else None
        with _others_there():
            torch.distributed.gather_object(result, gathered)
        if gathered is not None:
            yield from gathered[:there]


def rows(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Matrices, one below the other; where there are none, as on other ranks than the first, one without rows."""
    there = list(parts)
    return torch.cat(there) if there else torch.empty(0, 0)


def _portable(error: Optional[Exception]) -> Optional[Exception]:
    """An error that other ranks can read: not all that libraries raise survives a copy."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f'{type(error).__name__}: {error}')


@contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError('another rank has ended, which says why unless it was killed '
                        f'({str(error).splitlines()[0]})') from error
