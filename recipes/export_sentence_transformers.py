# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Export a teacher for sentence-transformers:
python recipes/export_sentence_transformers.py teacher=runs/quickstart/stage1/teacher out=runs/teacher"""

from llm2clip.command import run_command
from llm2clip.config import ExportTeacherConfig
from llm2clip.config.loading import save_config


def main(config: ExportTeacherConfig) -> None:
    from llm2clip.export.sentence_model import export_sentence_transformers

    export_sentence_transformers(config.teacher, config.out, config.prompts)
    save_config(config, config.out)
    print(f'wrote {config.out}')


if __name__ == '__main__':
    run_command(ExportTeacherConfig, main)
