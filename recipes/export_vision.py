# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage-2 run -> its vision tower for plain transformers or timm: python recipes/export_vision.py run=… out=…"""

import sys

from llm2clip.config import ExportVisionConfig
from llm2clip.config_files import load_config
from llm2clip.export.vision import export_vision
from llm2clip.runs import load_stage2


def main(config: ExportVisionConfig) -> None:
    model, run_config, record = load_stage2(config.run, config.weights)
    name = export_vision(model, run_config.model, record, config.out, config.projection, run_config)
    print(f'wrote {config.out}, a {name}')


if __name__ == '__main__':
    main(load_config(ExportVisionConfig, sys.argv[1:]))
