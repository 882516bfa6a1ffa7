# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Export the vision tower for transformers or timm:
python recipes/export_vision.py run=runs/quickstart/stage2 out=runs/vision"""

from llm2clip.command import run_command
from llm2clip.config import ExportVisionConfig


def main(config: ExportVisionConfig) -> None:
    from llm2clip.export.vision import KIND, export_vision
    from llm2clip.io.folders import check_replaceable
    from llm2clip.training.runs import Stage2Run

    check_replaceable(config.out, KIND)
    run = Stage2Run(config.run, config.weights, config.wise_ft_alpha)
    name = export_vision(run.load_model(), run.config.model, run.record, config.out, config.projection,
                         run.config, run.wise_ft_alpha)
    print(f'wrote {name}: {config.out}')


if __name__ == '__main__':
    run_command(ExportVisionConfig, main)
