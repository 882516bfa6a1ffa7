# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Everything that a pipeline wrote -> one HTML file: python recipes/report.py yamls/report/….yaml [key=value …]"""

import json
import sys
from pathlib import Path

import torch

from llm2clip.config import EvaluateConfig, ReportConfig
from llm2clip.config_files import load_config, read_config
from llm2clip.evaluate import Features, read_gallery
from llm2clip.report import collect_seconds, render_report


def main(config: ReportConfig) -> None:
    benchmark = read_config(EvaluateConfig, config.results).retrieval[config.gallery]
    results = json.loads(Path(config.results, 'results.json').read_text())
    results['seconds'] = collect_seconds(config.steps)
    features = Features(**torch.load(Path(config.results, f'features_{config.gallery}.pt'), weights_only=True))
    page = render_report(config.title, results, read_gallery(features, benchmark), config.steps)
    out = Path(config.out)
    (out / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
    (out / 'report.html.tmp').write_text(page, encoding='utf-8')
    (out / 'report.html.tmp').replace(out / 'report.html')
    print(f'wrote {out / "report.html"} and {out / "results.json"}')


if __name__ == '__main__':
    main(load_config(ReportConfig, sys.argv[1:]))
