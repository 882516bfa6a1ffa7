# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A training step of stage 1 with the texts of a microbatch packed in a row, against the same texts padded."""

from typing import Any

from bench_result import write_result
from grad_cache import make, median_seconds, plain_step

from llm2clip.data.loader import split_packed

PAIRS = 32


def packed_step(model: Any, batch: dict[str, Any]) -> None:
    packed, = split_packed(batch, PAIRS)
    plain_step(model, packed)


def main() -> None:
    model, batch = make(PAIRS)
    seconds = median_seconds({'packed': packed_step, 'padded': plain_step}, model, batch)
    masks = [batch[f'{side}_attention_mask'] for side in ('query', 'positive')]
    padding = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    ratio, bound = seconds['packed'] / seconds['padded'], 0.75
    write_result('packing', f'seconds of a step, {PAIRS} pairs of texts packed', 'the same texts padded', ratio, bound,
                 ratio <= bound, {**seconds, 'padding': padding})


if __name__ == '__main__':
    main()
