# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Evaluate trained models side by side: python recipes/evaluate.py yamls/quickstart/steps.yaml"""

from llm2clip.command import run_command
from llm2clip.config import EvaluateConfig
from llm2clip.errors import under


def main(config: EvaluateConfig) -> None:
    from llm2clip.device import get_device, set_up_process
    from llm2clip.evaluation.benchmarks import Evaluation, check_results
    from llm2clip.evaluation.evaluated_models import load_evaluated_model
    from llm2clip.ranks import initialize_gloo, is_first

    initialize_gloo()
    check_results(config)
    evaluation = Evaluation(config)
    device = get_device(config.device)
    set_up_process(device)
    for name, model in config.models.items():
        with under(f'models.{name}'):
            evaluated = load_evaluated_model(model, config.cache, device)
        evaluation.run(name, evaluated)
    evaluation.finish(device)
    if is_first():
        print(f'\nwrote results.json, results.md (also with 95 % intervals) and report.html to {config.out}')


if __name__ == '__main__':
    run_command(EvaluateConfig, main)
