# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The losses of whole logit matrices, differentiated by autograd, for comparison with those of some rows."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llm2clip.losses.contrastive import clip_loss, ignored_candidates, info_nce, siglip_loss

CASES = ('clip', 'clip, equal texts', 'siglip', 'siglip, equal texts', 'clip, 3 texts', 'clip, 3 texts, equal texts',
         'siglip, 3 texts', 'siglip, 3 texts, equal texts', 'clip, prefixes', 'clip, prefixes, 3 texts, equal texts',
         'siglip, prefixes', 'siglip, prefixes, 3 texts, equal texts', 'info_nce', 'info_nce, symmetric',
         'info_nce, ignored', 'info_nce, symmetric, ignored')
N = 11
DIMS = [2, 3, 5]
"""Of the prefixes; features have five dimensions."""
LEAVES = ('left features', 'right features', 'logit scale', 'logit bias')


def unit(n: int, d: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str, **tolerances: float) -> None:
    """Like torch's, with the name of the value in the error."""
    torch.testing.assert_close(found, expected, msg=lambda message: f'{name}: {message}', **tolerances)


def sample(case: str = '', n: int = N) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Features of both sides, logit scale and bias, and text ids of which some are equal."""
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])[:n]
    right = unit(n, 5, 1)
    if '3 texts' in case:
        right = unit(3 * n, 5, 1).view(n, 3, 5)
        ids = torch.stack([ids, ids + 10, ids.roll(2)], 1)
    leaves = [unit(n, 5, 0), right, torch.tensor([2.0]), torch.tensor([-3.0])]
    return [leaf.float().requires_grad_() for leaf in leaves], ids


def _negatives(positive: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two hard negatives per sample, of which some are absent, and their ids."""
    negative = torch.cat([positive.roll(1, 1), 2 * positive.roll(2, 1)])
    return negative, torch.cat([ids % 3, ids])


def whole_matrix(case: str, leaves: list[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    left, right, scale, bias = leaves
    if 'prefixes' in case:
        return torch.stack([whole_matrix(
            case.replace(', prefixes', ''),
            [*(side[..., :dim] / side[..., :dim].square().sum(-1, keepdim=True).sqrt() for side in (left, right)),
             scale, bias], ids) for dim in DIMS]).mean()
    n, columns = len(left), right.flatten(0, -2)
    own = torch.eye(n, dtype=torch.bool).repeat_interleave(len(columns) // n, 1)
    hidden = torch.zeros_like(own)
    if 'equal' in case:
        of_image = ids.view(n, -1)
        hidden = (of_image[:, :, None] == ids.flatten()).any(1) & ~own
    if case.startswith('siglip'):
        losses = -F.logsigmoid((2 * own.float() - 1) * (scale.exp() * left @ columns.T + bias))
        return losses.masked_fill(hidden, 0).sum() / len(columns)
    rows = torch.arange(n)
    if case.startswith('clip'):
        logits, texts = (scale.exp() * left @ columns.T).masked_fill(hidden, -torch.inf), len(columns) // n
        losses = []
        for k in range(texts):  # from images to their k-th texts, where their other texts are left out, and back
            others = own & (torch.arange(len(columns)) % texts != k)
            losses += [F.cross_entropy(logits.masked_fill(others, -torch.inf), rows * texts + k),
                       F.cross_entropy(logits[:, k::texts].T, rows)]
        return torch.stack(losses).mean()
    negative, negative_id = _negatives(right, ids)
    logits = scale.exp() * F.normalize(left, dim=-1) @ F.normalize(torch.cat([right, negative]), dim=-1).T
    if 'ignored' in case:
        logits = logits.masked_fill(ignored_candidates(ids, ids % 4 + 20, negative_id), -torch.inf)
    loss = F.cross_entropy(logits, rows)
    return (loss + F.cross_entropy(logits[:, :n].T, rows)) / 2 if 'symmetric' in case else loss


def own_rows(
    case: str, leaves: list[torch.Tensor], ids: torch.Tensor, block_size: Optional[int] = None
) -> torch.Tensor:
    left, right, scale, bias = leaves
    text_id, dims = ids if 'equal' in case else None, DIMS if 'prefixes' in case else []
    if case.startswith('siglip'):
        return siglip_loss(left, right, scale, bias, text_id, block_size, dims)
    if case.startswith('clip'):
        return clip_loss(left, right, scale, text_id, block_size, dims)
    negative, negative_id = _negatives(right, ids)
    ignored = ignored_candidates(ids, ids % 4 + 20, negative_id) if 'ignored' in case else None
    return info_nce(left, right, negative, scale.exp(), 'symmetric' in case, ignored)


class MatmulPrecisions(TorchDispatchMode):
    """Allows TF32, and notes what each matrix product was allowed, and the type of its first factor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, torch.dtype]] = []

    def __enter__(self) -> 'MatmulPrecisions':
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision('high')
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        left = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.before)
        assert left == 'high'

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm):
            self.found.append((torch.get_float32_matmul_precision(), args[-1].dtype))
        return func(*args, **(kwargs or {}))
