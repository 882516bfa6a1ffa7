# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Export the vision tower for transformers, timm or ONNX Runtime:
python recipes/export_vision.py run=runs/quickstart/stage2 out=runs/vision"""

from typing import Any

from llm2clip.command import run_command
from llm2clip.config import ExportVisionConfig


def main(config: ExportVisionConfig) -> None:
    if config.format == 'onnx':
        from llm2clip.export.onnx_models import KIND
        from llm2clip.export.onnx_models import export_onnx as export
    else:
        from llm2clip.export.vision import KIND
        from llm2clip.export.vision import export_vision as export
    from llm2clip.io.folders import check_replaceable
    from llm2clip.training.runs import Stage2Run

    check_replaceable(config.out, KIND)
    run = Stage2Run(config.run, config.weights, config.wise_ft_alpha)
    record = run.record
    more: dict[str, Any] = {}
    if config.teacher is not None:
        record = run.final_record
        more['teachers'] = run.teachers(config.teacher)
    name = export(run.load_model(), run.config.model, record, config.out, config.projection, run.config,
                  run.wise_ft_alpha, **more)
    print(f'wrote {name}: {config.out}')


if __name__ == '__main__':
    run_command(ExportVisionConfig, main)
