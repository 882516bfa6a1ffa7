# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Captions -> teacher embeddings: composer [-n N] recipes/extract_embeddings.py yamls/extract/….yaml [key=value …]"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llm2clip.command import run_command
from llm2clip.config import ExtractConfig
from llm2clip.config.files import save_config

if TYPE_CHECKING:
    from llm2clip.teacher.sidecar_files import Sidecar


def main(config: ExtractConfig) -> None:
    if config.plan:
        from llm2clip.planning.plan import plan_extraction, plan_run
        plan_run(config, plan_extraction)
        return
    from llm2clip.folders import OutputFolder
    from llm2clip.ranks import is_first
    from llm2clip.teacher.sidecar_files import Sidecar

    sidecars = []
    for name, dataset in config.datasets.items():
        remote = None if config.out_remote is None else os.path.join(config.out_remote, name)
        sidecars.append(Sidecar(dataset, OutputFolder(f'{config.out}/{name}', remote), config.storage,
                                config.normalize, {'precision': config.precision}))
    extract = _extract_on_ray if config.engine == 'ray' else _extract_on_ranks
    for name, done in extract(config, sidecars):
        if is_first():
            counts = ', '.join(f'{n} {what}' for what, n in done.items())
            print(f'{name}: {counts.replace("_", " ")}')
    if is_first():
        save_config(config, config.out)
        print(f'wrote {config.out}', flush=True)


def _extract_on_ranks(config: ExtractConfig, sidecars: list['Sidecar']) -> Iterator[tuple[str, dict[str, int]]]:
    from composer.utils import dist

    from llm2clip.device import open_device
    from llm2clip.teacher.extraction import extract_on_ranks
    from llm2clip.teacher.sources import build_caption_teacher

    device = open_device(config.device, config.precision)
    dist.initialize_dist(device, config.dist_timeout)
    teacher = build_caption_teacher(config, device)
    for sidecar in sidecars:
        yield sidecar.name, extract_on_ranks(sidecar, teacher, 8 * config.batch_tokens)


def _extract_on_ray(config: ExtractConfig, sidecars: list['Sidecar']) -> Iterator[tuple[str, dict[str, int]]]:
    from functools import partial

    from llm2clip.engine import RayEngine
    from llm2clip.teacher.extraction import extract_by
    from llm2clip.teacher.sources import caption_teacher_fingerprint, load_caption_teacher

    engine = RayEngine(config.worker_cpus, None if config.device is None else config.device == 'gpu')
    load = partial(load_caption_teacher, config, 'gpu' if engine.gpu else 'cpu')
    fingerprint = caption_teacher_fingerprint(config)
    yield from extract_by(engine, sidecars, load, fingerprint, 8 * config.batch_tokens).items()


if __name__ == '__main__':
    run_command(ExtractConfig, main)
