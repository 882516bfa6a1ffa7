# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Numbers of trained models, side by side: python recipes/evaluate.py yamls/eval/….yaml [key=value …]"""

import sys

from composer.utils import get_device

from llm2clip.config import EvaluateConfig
from llm2clip.config_files import load_config
from llm2clip.evaluation.evaluate import Evaluation
from llm2clip.evaluation.models import load_evaluated_model
from llm2clip.runs import timed


def main(config: EvaluateConfig) -> None:
    evaluation, device = Evaluation(config), get_device(config.device)
    for name, model in config.models.items():
        evaluation.run(name, load_evaluated_model(model, config.cache, device, f'models.{name}'))
    evaluation.finish()
    print(f'wrote results.json, results.md and report.html to {config.out}')


if __name__ == '__main__':
    config = load_config(EvaluateConfig, sys.argv[1:])
    with timed(config.out):
        main(config)
