# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Numbers of a trained model: python recipes/evaluate.py yamls/eval/….yaml [key=value …]"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from composer.utils import get_device

from llm2clip.config import EvaluateConfig
from llm2clip.config_files import load_config, save_config
from llm2clip.evaluate import evaluate_cra, retrieval_features
from llm2clip.runs import load_stage2, timed


def main(config: EvaluateConfig) -> None:
    model, _, record = load_stage2(config.run, config.weights)
    model = get_device(config.device).module_to_device(model)
    results: dict[str, Any] = {'stage1': {}, 'stage2': {}}
    for name, features in retrieval_features(
            model, config.retrieval, record['teacher'], config.batch_size, config.num_workers):
        results['stage2'][name] = features.recall()
        torch.save(vars(features), Path(config.out, f'features_{name}.pt'))
        print(f'{name}: {results["stage2"][name]}', flush=True)
    if config.cra is not None:
        results['stage1'] = evaluate_cra(config.cra)
    save_config(config, config.out)
    path = Path(config.out, 'results.json')
    path.with_suffix('.tmp').write_text(json.dumps(results, indent=2) + '\n')
    path.with_suffix('.tmp').replace(path)


if __name__ == '__main__':
    config = load_config(EvaluateConfig, sys.argv[1:])
    Path(config.out).mkdir(parents=True, exist_ok=True)
    with timed(config.out):
        main(config)
