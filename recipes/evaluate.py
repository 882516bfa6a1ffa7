# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Numbers of trained models, side by side: python recipes/evaluate.py yamls/eval/….yaml [key=value …]"""

import json
import sys
from pathlib import Path
from typing import Any

from composer.utils import get_device

from llm2clip.config import EvaluateConfig
from llm2clip.config_files import load_config, save_config
from llm2clip.evaluation.evaluate import evaluate
from llm2clip.evaluation.tables import markdown, result_tables
from llm2clip.folders import write_text
from llm2clip.report import render_report
from llm2clip.runs import timed


def main(config: EvaluateConfig) -> None:
    out = Path(config.out)

    def save(results: dict[str, Any], galleries: dict[str, Any]) -> None:
        write_text(out / 'results.json', json.dumps(results, indent=2) + '\n')
        write_text(out / 'results.md', markdown(result_tables(results)))
        write_text(out / 'gallery.json', json.dumps(galleries))
        write_text(out / 'report.html', render_report(config.title, results, galleries))

    save_config(config, out)
    evaluate(config, get_device(config.device), save)
    print(f'wrote {out / "results.json"}, {out / "results.md"} and {out / "report.html"}')


if __name__ == '__main__':
    config = load_config(EvaluateConfig, sys.argv[1:])
    Path(config.out).mkdir(parents=True, exist_ok=True)
    with timed(config.out):
        main(config)
