# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Embed captions with a teacher: python recipes/extract_embeddings.py yamls/quickstart/steps.yaml"""

from llm2clip.command import run_command
from llm2clip.config import ExtractConfig


def main(config: ExtractConfig) -> None:
    if config.plan:
        from llm2clip.planning.planners import plan_run
        plan_run(config)
        return
    from functools import partial

    from llm2clip.teacher.extraction import run_extraction
    from llm2clip.teacher.sources import teacher_source

    load = partial(teacher_source(config.teacher).load, batch_tokens=config.batch_tokens,
                   precision=config.precision)
    run_extraction(config, load, 8 * config.batch_tokens, settings={'precision': config.precision})


if __name__ == '__main__':
    run_command(ExtractConfig, main)
