# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The losses of a global batch whose logit matrix would not fit: it is computed in blocks of rows, and never kept.

A rank computes the rows of its own images, against the texts of all ranks.  Value and gradients are those of
`llm2clip.losses.contrastive`: the mean over ranks of what the functions here return is the loss of the global batch,
and the mean over ranks of the parameters' gradients, as DDP and FSDP compute it, is its gradient.
"""

from typing import Any, Optional

import torch
from composer.utils import dist

from llm2clip.losses.contrastive import all_gather, in_float32, same_text

__all__ = ['blockwise_clip_loss', 'blockwise_siglip_loss']


@in_float32
def blockwise_clip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    label_smoothing: float = 0.0,
    text_id: Optional[torch.Tensor] = None,
    block_size: int = 1024,
) -> torch.Tensor:
    """This rank's part of `clip_loss`.

    Args:
        image_features: ``(B, D)``, L2-normalised, of this rank.
        text_features: ``(B, D)``, L2-normalised, of this rank.
        logit_scale: As for `clip_loss`.
        label_smoothing: As for `clip_loss`.
        text_id: ``(B,)``; as for `clip_loss`.
        block_size: Rows of the logit matrix at once.
    """
    texts, ids = all_gather(text_features.float()), None if text_id is None else all_gather(text_id)
    return _ClipLoss.apply(  # pyright: ignore[reportReturnType]
        image_features.float(), texts, logit_scale.float(), label_smoothing, text_id, ids, block_size)


@in_float32
def blockwise_siglip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    text_id: Optional[torch.Tensor] = None,
    block_size: int = 1024,
) -> torch.Tensor:
    """This rank's part of `siglip_loss`; arguments as there and for `blockwise_clip_loss`."""
    texts, ids = all_gather(text_features.float()), None if text_id is None else all_gather(text_id)
    return _SigLIPLoss.apply(  # pyright: ignore[reportReturnType]
        image_features.float(), texts, logit_scale.float(), logit_bias.float(), text_id, ids, block_size)


class _ClipLoss(torch.autograd.Function):
    """Both passes over the blocks happen in `forward`: the sums of each row and column, then the gradients."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        images: torch.Tensor,
        texts: torch.Tensor,
        logit_scale: torch.Tensor,
        label_smoothing: float,
        text_id: Optional[torch.Tensor],
        text_ids: Optional[torch.Tensor],
        block_size: int,
    ) -> torch.Tensor:
        b, n = len(images), len(texts)
        first = dist.get_global_rank() * b
        scale = logit_scale.exp()
        starts = range(0, b, block_size)

        def ignored(start: int, stop: int) -> Optional[torch.Tensor]:
            if text_id is None or text_ids is None:
                return None
            return same_text(text_id[start:stop], text_ids, first + start)

        def logits_of(start: int, stop: int) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
            logits, hidden = scale * images[start:stop] @ texts.T, ignored(start, stop)
            return (logits if hidden is None else logits.masked_fill_(hidden, -torch.inf)), hidden

        row_sum = images.new_empty(b)
        column_sum = images.new_full((n,), -torch.inf)
        row_count, column_count = images.new_full((b,), n), images.new_zeros(n)
        for start in starts:
            stop = min(start + block_size, b)
            logits, hidden = logits_of(start, stop)
            row_sum[start:stop] = logits.logsumexp(1)
            column_sum = torch.logaddexp(column_sum, logits.logsumexp(0))
            column_count += stop - start
            if hidden is not None:
                row_count[start:stop] -= hidden.sum(1)
                column_count -= hidden.sum(0)
        # A column's sum goes over the rows of all ranks.
        column_sum = all_gather(column_sum).view(-1, n).logsumexp(0)
        column_count = all_gather(column_count).view(-1, n).sum(0)

        own = slice(first, first + b)
        right = scale * (images * texts[own]).sum(1)
        total = (row_sum + column_sum[own]).sum() - 2 * (1 - label_smoothing) * right.sum()
        image_gradient, text_gradient = torch.empty_like(images), torch.zeros_like(texts)
        for start in starts:
            stop = min(start + block_size, b)
            logits, hidden = logits_of(start, stop)
            # Gradient of the sum over both directions with respect to the logits.
            gradient = (logits - row_sum[start:stop, None]).exp_()
            if label_smoothing:
                weight = label_smoothing * (1 / row_count[start:stop, None] + 1 / column_count)
                weight = weight if hidden is None else weight.masked_fill_(hidden, 0)
                total = total - (weight * logits.masked_fill(logits == -torch.inf, 0)).sum()
                gradient -= weight
            gradient += logits.sub_(column_sum).exp_()
            gradient.diagonal(first + start).sub_(2 * (1 - label_smoothing))
            image_gradient[start:stop] = gradient @ texts
            text_gradient.addmm_(gradient.T, images[start:stop])
        # d logits / d logit_scale are the logits, and their sum with the gradient is that of images and image_gradient.
        scale_gradient = scale * (images * image_gradient).sum() / (2 * b)
        ctx.save_for_backward(image_gradient.mul_(scale / (2 * b)), text_gradient.mul_(scale / (2 * b)),
                              scale_gradient.view_as(logit_scale))
        return total.sum() / (2 * b)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *(grad * gradient for gradient in ctx.saved_tensors), None, None, None, None


class _SigLIPLoss(torch.autograd.Function):
    """Value and gradients in one pass over the blocks."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        images: torch.Tensor,
        texts: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor,
        text_id: Optional[torch.Tensor],
        text_ids: Optional[torch.Tensor],
        block_size: int,
    ) -> torch.Tensor:
        b = len(images)
        first = dist.get_global_rank() * b
        scale = logit_scale.exp()
        total, bias_gradient = images.new_zeros(()), images.new_zeros(())
        image_gradient, text_gradient = torch.empty_like(images), torch.zeros_like(texts)
        for start in range(0, b, block_size):
            stop = min(start + block_size, b)
            logits = scale * images[start:stop] @ texts.T + logit_bias
            logits.diagonal(first + start).neg_()
            if text_id is not None and text_ids is not None:
                logits.masked_fill_(same_text(text_id[start:stop], text_ids, first + start), -torch.inf)
            total += torch.nn.functional.softplus(logits).sum()
            gradient = logits.sigmoid_()
            gradient.diagonal(first + start).neg_()
            image_gradient[start:stop] = gradient @ texts
            text_gradient.addmm_(gradient.T, images[start:stop])
            bias_gradient += gradient.sum()
        scale_gradient = scale * (images * image_gradient).sum() / b
        ctx.save_for_backward(image_gradient.mul_(scale / b), text_gradient.mul_(scale / b),
                              scale_gradient.view_as(logit_scale), (bias_gradient / b).view_as(logit_bias))
        return total / b

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *(grad * gradient for gradient in ctx.saved_tensors), None, None, None
