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
    """This rank's part of `clip_loss`, in two passes over the blocks: the sums of rows and columns, then the gradients.

    Args:
        image_features: ``(B, D)``, L2-normalised, of this rank.
        text_features: ``(B, D)``, L2-normalised, of this rank.
        logit_scale: As for `clip_loss`.
        label_smoothing: As for `clip_loss`.
        text_id: ``(B,)``; as for `clip_loss`.
        block_size: Rows of the logit matrix at once.
    """
    inputs = image_features.float(), all_gather(text_features.float()), logit_scale.float()
    ids = None if text_id is None else all_gather(text_id)
    with torch.no_grad():
        images, texts, scale = inputs[0], inputs[1], inputs[2].exp()
        b, n = len(images), len(texts)
        first = dist.get_global_rank() * b
        starts = range(0, b, block_size)

        def logits_of(start: int, stop: int) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
            logits = scale * images[start:stop] @ texts.T
            if ids is None:
                return logits, None
            hidden = same_text(ids[first + start:first + stop], ids, first + start)
            return logits.masked_fill_(hidden, -torch.inf), hidden

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
        gradients = (image_gradient.mul_(scale / (2 * b)), text_gradient.mul_(scale / (2 * b)),
                     scale_gradient.view_as(logit_scale))
        value = total.sum() / (2 * b)
    return _WithGradients.apply(value, gradients, *inputs)  # pyright: ignore[reportReturnType]


@in_float32
def blockwise_siglip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    text_id: Optional[torch.Tensor] = None,
    block_size: int = 1024,
) -> torch.Tensor:
    """This rank's part of `siglip_loss`, in one pass; arguments as there and for `blockwise_clip_loss`."""
    inputs = image_features.float(), all_gather(text_features.float()), logit_scale.float(), logit_bias.float()
    ids = None if text_id is None else all_gather(text_id)
    with torch.no_grad():
        images, texts, scale = inputs[0], inputs[1], inputs[2].exp()
        b = len(images)
        first = dist.get_global_rank() * b
        total, bias_gradient = images.new_zeros(()), images.new_zeros(())
        image_gradient, text_gradient = torch.empty_like(images), torch.zeros_like(texts)
        for start in range(0, b, block_size):
            stop = min(start + block_size, b)
            logits = scale * images[start:stop] @ texts.T + inputs[3]
            logits.diagonal(first + start).neg_()
            if ids is not None:
                logits.masked_fill_(same_text(ids[first + start:first + stop], ids, first + start), -torch.inf)
            total += torch.nn.functional.softplus(logits).sum()
            gradient = logits.sigmoid_()
            gradient.diagonal(first + start).neg_()
            image_gradient[start:stop] = gradient @ texts
            text_gradient.addmm_(gradient.T, images[start:stop])
            bias_gradient += gradient.sum()
        scale_gradient = scale * (images * image_gradient).sum() / b
        gradients = (image_gradient.mul_(scale / b), text_gradient.mul_(scale / b),
                     scale_gradient.view_as(logit_scale), (bias_gradient / b).view_as(logit_bias))
        value = total / b
    return _WithGradients.apply(value, gradients, *inputs)  # pyright: ignore[reportReturnType]


class _WithGradients(torch.autograd.Function):
    """A value whose gradients with respect to the inputs are known."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, value: torch.Tensor, gradients: tuple[torch.Tensor, ...], *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *(grad * gradient for gradient in ctx.saved_tensors)
