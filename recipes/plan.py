# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Plan several steps and sum up their hours, price and disk: python recipes/plan.py yamls/plan/paper.yaml"""

from llm2clip.command import run_command
from llm2clip.config import PipelineConfig


def main(config: PipelineConfig) -> None:
    from llm2clip.planning.pipeline import plan_pipeline
    plan_pipeline(config)


if __name__ == '__main__':
    run_command(PipelineConfig, main)
