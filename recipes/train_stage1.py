# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Fine-tune an LLM as a text encoder: python recipes/train_stage1.py yamls/quickstart/steps.yaml"""

from llm2clip.command import run_command
from llm2clip.config import Stage1Config


def main(config: Stage1Config) -> None:
    if config.plan:
        from llm2clip.planning.planners import plan_run
        plan_run(config)
    else:
        from llm2clip.training import stage1
        stage1.train(config)


if __name__ == '__main__':
    run_command(Stage1Config, main)
