# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Write one HTML report of a whole pipeline: python recipes/report.py yamls/quickstart/steps.yaml"""

from llm2clip.command import run_command
from llm2clip.config import ReportConfig


def main(config: ReportConfig) -> None:
    from llm2clip.evaluation.report import write_report

    print(f'wrote {write_report(config)}')


if __name__ == '__main__':
    run_command(ReportConfig, main)
