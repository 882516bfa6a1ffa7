# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Work shared by the ranks, item by item or done by one of them.  An error on one rank is raised on all."""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Optional, TypeVar

import torch
import torch.distributed
from composer.utils import dist as dist  # for other modules too

S = TypeVar('S')
T = TypeVar('T')

# Seconds that ranks wait for one another.  Long, because rank 0 may compute metrics for hours, and gloo
# notices at once that a rank has ended.
_TIMEOUT_SECONDS = 30 * 24 * 3600.0
# Seconds between signs of life to waiting ranks, far below a training's `dist_timeout`.
_POLL_SECONDS = 10.0


class RankError(RuntimeError):
    """Another rank has ended."""


def is_first() -> bool:
    """Whether this is rank 0, which has the results of shared work and writes files."""
    return dist.get_global_rank() == 0


def initialize_gloo() -> None:
    """Connect several ranks by gloo, also on GPUs, because gloo notices at once that a rank has ended."""
    if dist.get_world_size() > 1:
        dist.initialize_dist('cpu', _TIMEOUT_SECONDS)


def raise_on_all_ranks(compute: Callable[[], T]) -> T:
    """Return the result of `compute` on this rank.  All ranks call this; an error on one is raised on all."""
    result = error = copy = None
    try:
        result = compute()
    except Exception as raised:
        error = raised
        try:  # some libraries' errors cannot be pickled
            copy = pickle.loads(pickle.dumps(error))
        except Exception:
            copy = RuntimeError(f'{type(error).__name__}: {error}')
    with _explain_lost_rank():
        errors = dist.all_gather_object(copy)
    first = error or next(filter(None, errors), None)
    if first is not None:
        raise first
    return result  # pyright: ignore[reportReturnType]


def broadcast_from_rank0(compute: Callable[[], T]) -> T:
    """Return the result of `compute`, called on rank 0, on all ranks; errors as for `raise_on_all_ranks`."""
    result = [raise_on_all_ranks(lambda: compute() if is_first() else None)]
    with _explain_lost_rank():
        dist.broadcast_object_list(result)
    return result[0]  # pyright: ignore[reportReturnType]


def once_per_node(compute: Callable[[], T], result_name: str) -> T:
    """Return the result of `compute`, which the first rank of each node calls; every rank calls this.

    Raises:
        ValueError: The nodes have different results; the message contains `result_name`.
        Exception: An error of `compute` on one node, on all ranks.
    """
    if not torch.distributed.is_initialized() or dist.get_world_size() == 1:
        return compute()
    outcomes: list[Any] = [None]
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(compute) if dist.get_local_rank() == 0 else None
        while None in outcomes:  # because one collective at the end would time out after long work
            outcome = None
            if work is not None and wait([work], timeout=_POLL_SECONDS).done:
                outcome = [work.exception() or work.result()]
            outcomes = dist.all_gather_object(outcome)[::dist.get_local_world_size()]
    first, = outcomes[0]
    for node, (value,) in enumerate(outcomes):
        if isinstance(value, BaseException):
            raise value
        if value != first:
            raise ValueError(f'the nodes do not have the same {result_name}: node {node} has {value}, node 0 '
                             f'has {first}')
    return first


def round_robin(items: Sequence[S], work: Callable[[Sequence[S]], Iterable[T]]) -> Iterator[T]:
    """Yield the results of all items, in order, on rank 0; the others yield nothing but have to iterate too.

    Rank r of N takes the items r, r + N, …, so that any number of ranks has the same batches.
    Errors are as for `raise_on_all_ranks`.

    Args:
        items: The same on every rank.
        work: Items -> iterator over their results, in order; each rank calls it once, with its share.
    """
    rank = dist.get_global_rank()
    num_ranks = dist.get_world_size()
    if num_ranks == 1:
        yield from work(items)
        return
    results = raise_on_all_ranks(lambda: iter(work(items[rank::num_ranks])))
    for start in range(0, len(items), num_ranks):
        num_items = min(num_ranks, len(items) - start)
        result = raise_on_all_ranks(lambda: next(results) if rank < num_items else None)  # noqa: B023
        gathered: Optional[list[Any]] = None
        if rank == 0:
            gathered = [None] * num_ranks
        with _explain_lost_rank():
            torch.distributed.gather_object(result, gathered)
        if gathered is not None:
            yield from gathered[:num_items]


def rows(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Concatenate matrices by rows; without any, as on ranks other than 0, return an empty matrix."""
    matrices = list(parts)
    return torch.cat(matrices) if matrices else torch.empty(0, 0)


@contextmanager
def _explain_lost_rank() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError('another rank has ended, which says why unless it was killed '
                        f'({str(error).splitlines()[0]})') from error
