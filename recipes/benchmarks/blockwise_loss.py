# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""CLIP's loss and gradients of a batch of 16,384 in blocks, against autograd through the whole logit matrix."""

import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from bench_result import write_result

from llm2clip.losses.contrastive import clip_loss

BATCH, DIM, ROUNDS = 16384, 1280, 3
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def plain_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale.exp() * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


LOSSES = {'plain': plain_loss, 'blockwise': partial(clip_loss, block_size=1024)}


def step(name: str, features: list[torch.Tensor]) -> float:
    for feature in features:
        feature.grad = None
    start = time.perf_counter()
    LOSSES[name](*features).backward()
    if DEVICE == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str) -> tuple[float, float]:
    """Seconds per step, and the peak of what it takes beside the features, in MB."""
    torch.manual_seed(0)
    features = [F.normalize(torch.randn(BATCH, DIM, device=DEVICE), dim=-1).requires_grad_() for _ in range(2)]
    features.append(torch.full((1,), 3.0, device=DEVICE, requires_grad=True))
    step(name, [feature[:64].detach().requires_grad_() for feature in features])
    if DEVICE == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    times = [step(name, features) for _ in range(ROUNDS)]
    peak = (torch.cuda.max_memory_allocated() / 2**20 if DEVICE == 'cuda'
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    return statistics.median(times), peak - before


def main() -> None:
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    for name in LOSSES:
        output = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True).stdout
        seconds[name], memory[name] = json.loads(output.splitlines()[-1])
    facts = {'seconds': seconds, 'extra_mb': memory}
    for what, values, bound in (('time', seconds, 1.5), ('memory', memory, 0.25)):
        ratio = values['blockwise'] / values['plain']
        write_result(f'blockwise_{what}', f'{what} of the blockwise CLIP loss, {BATCH:,} x {BATCH:,}',
                     'the whole logit matrix', ratio, bound, ratio <= bound, facts)


if __name__ == '__main__':
    if sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
