# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Align the adapter with CLIP:
python recipes/train_inheritance.py yamls/inheritance/paper.yaml yamls/stage2/data/cc3m.yaml
yamls/stage2/teacher/llama3.1_8b.yaml yamls/inheritance/target/clip_l14_336.yaml"""

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
