# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Export the vision tower of stage 2 for transformers or timm: python recipes/export_vision.py run=… out=…"""

from llm2clip.command import run_command
from llm2clip.config import ExportVisionConfig


def main(config: ExportVisionConfig) -> None:
    from llm2clip.export.vision import KIND, export_vision
    from llm2clip.folders import check_replaceable
    from llm2clip.training.runs import load_stage2, read_stage2

    check_replaceable(config.out, KIND)
    read_stage2(config.run, config.weights, config.wise_ft_alpha)
    model, run_config, record = load_stage2(config.run, config.weights, config.wise_ft_alpha)
    name = export_vision(model, run_config.model, record, config.out, config.projection, run_config,
                         config.wise_ft_alpha)
    print(f'wrote a {name}: {config.out}')


if __name__ == '__main__':
    run_command(ExportVisionConfig, main)
