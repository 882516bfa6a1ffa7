# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Captions -> teacher embeddings: composer [-n N] recipes/extract_embeddings.py yamls/extract/….yaml [key=value …]"""

import os

from llm2clip.command import run_command
from llm2clip.config import ExtractConfig
from llm2clip.config.files import save_config


def main(config: ExtractConfig) -> None:
    if config.plan:
        from llm2clip.planning.plan import plan_extraction, plan_run
        plan_run(config, plan_extraction)
        return
    from composer.utils import dist

    from llm2clip.device import open_device
    from llm2clip.folders import OutputFolder
    from llm2clip.teacher.extraction import extract_sidecar
    from llm2clip.teacher.sources import build_caption_teacher

    device = open_device(config.device, config.precision)
    dist.initialize_dist(device, config.dist_timeout)
    teacher = build_caption_teacher(config, device)
    for name, dataset in config.datasets.items():
        remote = None if config.out_remote is None else os.path.join(config.out_remote, name)
        done = extract_sidecar(dataset, OutputFolder(f'{config.out}/{name}', remote), teacher, config.storage,
                               config.normalize, {'precision': config.precision}, 8 * config.batch_tokens)
        if dist.get_global_rank() == 0:
            counts = ', '.join(f'{n} {what}' for what, n in done.items())
            print(f'{name}: {counts.replace("_", " ")}')
    if dist.get_global_rank() == 0:
        save_config(config, config.out)
        print(f'wrote {config.out}', flush=True)


if __name__ == '__main__':
    run_command(ExtractConfig, main)
