# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Work that one rank of a node does for all of them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Optional, TypeVar

import torch.distributed
from composer.utils import dist

__all__ = ['once_per_node']

T = TypeVar('T')

# Seconds after which ranks that wait hear that they still have to: far less than the time after which they give up.
_PATIENCE = 10.0


def once_per_node(compute: Callable[[], T], what: str) -> T:
    """The result of `compute`, which the first rank of each node calls; every rank calls this.

    Args:
        compute: Reads something that the nodes should have in common, but may have copies of.
        what: What that is, for messages.

    Raises:
        ValueError: The nodes have different results.
        Exception: What `compute` raised on a node, on all ranks.
    """
    if not torch.distributed.is_initialized() or dist.get_world_size() == 1:
        return compute()
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(compute) if dist.get_local_rank() == 0 else None
        # Not one collective at the end: it would time out on the other ranks if the work takes long.
        while None in (outcomes := [outcome for leads, outcome in dist.all_gather_object(
                (work is not None, _outcome(work))) if leads]):
            pass
    values, errors = zip(*outcomes)
    for error in filter(None, errors):
        raise error
    for node, value in enumerate(values):
        if value != values[0]:
            raise ValueError(f'the nodes do not have the same {what}: node {node} has {value}, node 0 has {values[0]}')
    return values[0]


def _outcome(work: Optional[Future[Any]]) -> Optional[tuple[Any, Optional[BaseException]]]:
    """Result and exception, None while there is neither."""
    if work is None or not wait([work], timeout=_PATIENCE).done:
        return None
    error = work.exception()
    return (None if error is not None else work.result()), error
