# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Train a vision tower with a teacher: python recipes/train_stage2.py yamls/quickstart/steps.yaml"""

from llm2clip.command import run_command
from llm2clip.config import Stage2Config


def main(config: Stage2Config) -> None:
    if config.plan:
        from llm2clip.planning.planners import plan_run
        plan_run(config)
    else:
        from llm2clip.training import stage2
        stage2.train(config)


if __name__ == '__main__':
    run_command(Stage2Config, main)
