# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Captions -> teacher embeddings: composer [-n N] recipes/extract_embeddings.py yamls/extract/….yaml [key=value …]"""

import sys

from composer.utils import dist, get_device

from llm2clip.config import ExtractConfig
from llm2clip.config_files import load_config, save_config
from llm2clip.extract import extract_sidecar, teacher_fingerprint
from llm2clip.models.teacher import load_teacher
from llm2clip.runs import timed


def main(config: ExtractConfig) -> None:
    device = get_device(config.device)
    dist.initialize_dist(device)
    teacher = teacher_fingerprint(config.teacher)
    encoder, tokenizer = load_teacher(config.teacher)
    encoder = device.module_to_device(encoder)
    for name, dataset in config.datasets.items():
        extract_sidecar(
            dataset, f'{config.out}/{name}', encoder, tokenizer, teacher, config.batch_tokens, config.precision)
    if dist.get_global_rank() == 0:
        save_config(config, config.out)


if __name__ == '__main__':
    config = load_config(ExtractConfig, sys.argv[1:])
    with timed(config.out):
        main(config)
