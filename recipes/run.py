# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Run a pipeline, one recipe after another:
python recipes/run.py yamls/pipelines/custom_data.yaml images=photos captions=captions.csv"""

from typing import Optional

from llm2clip.command import run_command
from llm2clip.config import PipelineConfig
from llm2clip.pipeline import Step, load_steps, plan_steps, run_steps


def main(config: PipelineConfig) -> Optional[Step]:
    steps = load_steps(config)
    if config.print:
        for step in steps:
            print(step)
    elif config.plan:
        plan_steps(config, steps)
    else:
        return run_steps(config, steps)
    return None


if __name__ == '__main__':
    step = run_command(PipelineConfig, main)
    if step is not None:  # in the process that was forked for it
        step.run()
