# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Everything that a pipeline wrote -> one HTML file: python recipes/report.py yamls/report/….yaml [key=value …]"""

from pathlib import Path

from llm2clip.command import run_command
from llm2clip.config import ReportConfig


def main(config: ReportConfig) -> None:
    from llm2clip.evaluation.page import write_page
    from llm2clip.evaluation.report import check_steps, collect_seconds, read_evaluation, report_page, summarize
    from llm2clip.files import write_json

    results, galleries = read_evaluation(config.results, config.galleries)
    check_steps(config.steps)
    out = Path(config.out)
    write_page(out / 'report.html', report_page(config.title, results, galleries, config.steps))
    write_json(out / 'results.json', summarize(results, collect_seconds(config.steps)))
    print(f'wrote {out / "report.html"} and {out / "results.json"}')


if __name__ == '__main__':
    run_command(ReportConfig, main)
