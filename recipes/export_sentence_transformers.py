# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Teacher -> sentence-transformers folder: python recipes/export_sentence_transformers.py teacher=… out=…"""

import sys

from llm2clip.config import ExportTeacherConfig
from llm2clip.config_files import load_config, save_config
from llm2clip.export.sentence_transformers import export_sentence_transformers
from llm2clip.folders import describe_folder
from llm2clip.runs import timed


def main(config: ExportTeacherConfig) -> None:
    export_sentence_transformers(config.teacher, config.out, config.prompts)
    save_config(config, config.out)
    print(f'wrote {describe_folder(config.out)}')


if __name__ == '__main__':
    config = load_config(ExportTeacherConfig, sys.argv[1:])
    with timed(config.out):
        main(config)
