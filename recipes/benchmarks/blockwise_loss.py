# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""CLIP's loss and gradients of a batch of 16,384 in blocks, against autograd through the whole logit matrix."""

import json
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F

from llm2clip.losses.contrastive import clip_loss
from recipes.benchmarks.measuring import DEVICE, peak_mb, run_alone, write_result

BATCH, DIM = 16384, 1280


def plain_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale.exp() * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


LOSSES = {'plain': plain_loss, 'blockwise': partial(clip_loss, block_size=1024)}


def measure(name: str) -> dict[str, float]:
    """Seconds per step, and the peak of what it takes beside the features, in MB."""
    torch.manual_seed(0)
    features = [F.normalize(torch.randn(BATCH, DIM, device=DEVICE), dim=-1).requires_grad_() for _ in range(2)]
    features.append(torch.full((1,), 3.0, device=DEVICE, requires_grad=True))

    def step() -> None:
        LOSSES[name](*features).backward()
        if DEVICE == 'cuda':
            torch.cuda.synchronize()

    LOSSES[name](*(feature[:64].detach().requires_grad_() for feature in features)).backward()
    peak, start = peak_mb(step), time.perf_counter()
    step()
    return {'seconds': time.perf_counter() - start, 'mb': peak}


def main() -> None:
    found = {name: run_alone('recipes.benchmarks.blockwise_loss', name) for name in LOSSES}
    for what, bound in (('seconds', 1.5), ('mb', 0.25)):
        write_result(f'blockwise_{what}', f'{what} of the blockwise CLIP loss, {BATCH:,} x {BATCH:,}',
                     'the whole logit matrix', found['blockwise'][what] / found['plain'][what], found, at_most=bound)


if __name__ == '__main__':
    print(json.dumps(measure(sys.argv[1]))) if sys.argv[1:] else main()
