# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Align the adapter with CLIP:
python recipes/train_inheritance.py yamls/inheritance/paper.yaml yamls/parts/tower/clip_l14_336.yaml
yamls/parts/data/cc3m.yaml yamls/parts/teacher/llama3.1_8b.yaml"""

from llm2clip.command import run_command
from llm2clip.config import InheritanceConfig


def main(config: InheritanceConfig) -> None:
    if config.plan:
        from llm2clip.planning.planners import plan_run
        plan_run(config)
    else:
        from llm2clip.training import inheritance
        inheritance.train(config)


if __name__ == '__main__':
    run_command(InheritanceConfig, main)
