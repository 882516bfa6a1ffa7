# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Embed captions with a teacher: composer [-n N] recipes/extract_embeddings.py yamls/extract/….yaml [key=value …]"""

import os

from llm2clip.command import run_command
from llm2clip.config import ExtractConfig
from llm2clip.config.files import save_config


def main(config: ExtractConfig) -> None:
    if config.plan:
        from llm2clip.planning.plan import plan_run
        plan_run(config)
        return
    from functools import partial

    from composer.utils import dist

    from llm2clip.device import open_device
    from llm2clip.engine import RayEngine
    from llm2clip.ranks import is_first
    from llm2clip.remotes import OutputFolder
    from llm2clip.teacher.extraction import EmbeddingsDataset, extract_by, extract_text_embeddings
    from llm2clip.teacher.sources import load_caption_teacher, teacher_source

    source, text_embeddings = teacher_source(config.teacher), []
    for name, dataset in config.datasets.items():
        remote = None if config.out_remote is None else os.path.join(config.out_remote, name)
        text_embeddings.append(EmbeddingsDataset(dataset, OutputFolder(f'{config.out}/{name}', remote), config.storage,
                                config.normalize, {'precision': config.precision}, config.prompts,
                                config.caption_parts, config.seed))
    part_tokens = 8 * config.batch_tokens
    if config.engine == 'ray':
        engine = RayEngine(config.worker_cpus, None if config.device is None else config.device == 'gpu')
        load = partial(load_caption_teacher, config, 'gpu' if engine.gpu else 'cpu')
        done = extract_by(engine, text_embeddings, load, source.fingerprint(), part_tokens)
    else:
        device = open_device(config.device, config.precision)
        dist.initialize_dist(device, config.dist_timeout)
        teacher = source.load(device, config.batch_tokens, config.precision)
        done = {embeddings.name: extract_text_embeddings(embeddings, teacher,
                                                         part_tokens) for embeddings in text_embeddings}
    if is_first():
        for name, counts in done.items():
            print(f'{name}: {", ".join(f"{n} {what}" for what, n in counts.items()).replace("_", " ")}')
        save_config(config, config.out)
        print(f'wrote {config.out}', flush=True)


if __name__ == '__main__':
    run_command(ExtractConfig, main)
