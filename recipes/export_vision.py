# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Export the vision tower for transformers, timm or ONNX Runtime: python recipes/export_vision.py run=… out=…"""

from typing import Any

from llm2clip.command import run_command
from llm2clip.config import ExportConfig, ExportVisionConfig


def main(config: ExportVisionConfig) -> None:
    if config.format == 'onnx':
        from llm2clip.export.onnx_models import KIND
        from llm2clip.export.onnx_models import export_onnx as export
    else:
        from llm2clip.export.vision import KIND
        from llm2clip.export.vision import export_vision as export
    from llm2clip.export.hf import run_teachers
    from llm2clip.io.folders import check_replaceable
    from llm2clip.training.runs import load_stage2, read_stage2, with_trained_teacher

    check_replaceable(config.out, KIND)
    run_config, record = read_stage2(config.run, config.weights, config.wise_ft_alpha)
    more: dict[str, Any] = {}
    if config.teacher is not None:
        _, record = with_trained_teacher(config.run, run_config, record, config.weights, config.wise_ft_alpha)
        more['teachers'] = run_teachers(ExportConfig(config.run, teacher=config.teacher), run_config, record.teacher)
    model, _, _ = load_stage2(config.run, config.weights, config.wise_ft_alpha)
    name = export(model, run_config.model, record, config.out, config.projection, run_config, config.wise_ft_alpha,
                  **more)
    print(f'wrote {name}: {config.out}')


if __name__ == '__main__':
    run_command(ExportVisionConfig, main)
