# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Benchmark CLIP's blockwise loss of a large batch against autograd through the whole logit matrix."""

import json
import sys
from functools import partial

import torch
import torch.nn.functional as F

from llm2clip.losses.contrastive import clip_loss
from recipes.benchmarks.measuring import DEVICE, peak_mb, run_alone, seconds_in_turns, write_result

BATCH, DIM = 16384, 1280


def whole_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale.exp() * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


LOSSES = {'whole': whole_loss, 'blocks': partial(clip_loss, block_size=1024)}


def measure(name: str) -> dict[str, float]:
    """Return the seconds of a loss and its gradients, and their peak memory in MiB beyond the features."""
    torch.manual_seed(0)
    features = [F.normalize(torch.randn(BATCH, DIM, device=DEVICE), dim=-1).requires_grad_() for _ in '12']
    features.append(torch.full((1,), 3.0, device=DEVICE, requires_grad=True))

    def step() -> None:
        LOSSES[name](*features).backward()

    LOSSES[name](*(feature[:64].detach().requires_grad_() for feature in features)).backward()
    peak = peak_mb(step)
    return {'seconds': seconds_in_turns({name: step}, 1)[name], 'mb': peak}


def main() -> None:
    measured = {name: run_alone('recipes.benchmarks.blockwise_loss', name) for name in LOSSES}
    for unit, bound in (('seconds', 1.5), ('mb', 0.25)):
        write_result(f'blockwise_{unit}', f'{unit} of the CLIP loss in blocks, {BATCH:,} pairs',
                     'the whole logit matrix', measured['blocks'][unit] / measured['whole'][unit], measured,
                     at_most=bound)


if __name__ == '__main__':
    if sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
