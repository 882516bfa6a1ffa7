# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage-2 run and teacher -> Hugging Face folder: python recipes/export_hf.py yamls/export/….yaml [key=value …]"""

import sys

from llm2clip.config import ExportConfig
from llm2clip.config_files import load_config, save_config
from llm2clip.data.image_embeddings import check_same_teacher
from llm2clip.export.hf import export_folder
from llm2clip.models.caption_teacher import teacher_fingerprint
from llm2clip.runs import load_stage2, timed


def main(config: ExportConfig) -> None:
    model, run_config, record = load_stage2(config.run, config.weights)
    check_same_teacher(teacher_fingerprint(config.teacher), record['teacher'], config.teacher, 'the run')
    export_folder(model, run_config.model, record, config.teacher, f'{config.out}/llm2clip')
    save_config(config, config.out)
    print(f'wrote {config.out}/llm2clip')


if __name__ == '__main__':
    config = load_config(ExportConfig, sys.argv[1:])
    with timed(config.out):
        main(config)
