# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Export a trained model as a Hugging Face folder: python recipes/export_hf.py yamls/export/….yaml [key=value …]"""

from llm2clip.command import run_command
from llm2clip.config import ExportConfig
from llm2clip.config.loading import save_config


def main(config: ExportConfig) -> None:
    from llm2clip.export.hf import KIND, export_folder, run_teachers
    from llm2clip.export.vision import export_clip
    from llm2clip.io.folders import check_replaceable
    from llm2clip.models.llm2clip import check_truncate_dim, truncate_dims
    from llm2clip.training.runs import load_stage2, read_stage2, trained_clip_text, with_trained_teacher

    out = f'{config.out}/llm2clip'
    check_replaceable(out, KIND)
    run_config, record = read_stage2(config.run, config.weights, config.wise_ft_alpha)
    check_truncate_dim(config.truncate_dim, run_config.model, 'truncate_dim')
    run_config, record = with_trained_teacher(config.run, run_config, record, config.weights, config.wise_ft_alpha)
    teachers = run_teachers(config, run_config, record.teacher)
    clip_text = None if teachers else trained_clip_text(config.run, config.weights, config.wise_ft_alpha)
    model, _, _ = load_stage2(config.run, config.weights, config.wise_ft_alpha)
    model_config = truncate_dims(model, run_config.model, config.truncate_dim)
    if clip_text is not None:
        export_clip(model, model_config, run_config, clip_text, out)
    else:
        export_folder(model, model_config, record, teachers, out, run=run_config, wise_ft_alpha=config.wise_ft_alpha)
    save_config(config, config.out)
    print(f'wrote {out}')


if __name__ == '__main__':
    run_command(ExportConfig, main)
