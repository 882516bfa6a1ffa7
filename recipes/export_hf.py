# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Export a trained model as a Hugging Face folder:
python recipes/export_hf.py yamls/quickstart/steps.yaml"""

from llm2clip.command import run_command
from llm2clip.config import ExportConfig
from llm2clip.config.loading import save_config


def main(config: ExportConfig) -> None:
    from llm2clip.export.hf import KIND, export_folder
    from llm2clip.export.vision import export_clip
    from llm2clip.io.folders import check_replaceable
    from llm2clip.models.llm2clip import check_truncate_dim, truncate_dims
    from llm2clip.training.runs import Stage2Run

    out = f'{config.out}/llm2clip'
    check_replaceable(out, KIND)
    run = Stage2Run(config.run, config.weights, config.wise_ft_alpha)
    check_truncate_dim(config.truncate_dim, run.config.model)
    teachers = run.teachers(config.teacher, config.trust_remote_code)
    clip_text = run.clip_text
    model = run.load_model()
    model_config = truncate_dims(model, run.config.model, config.truncate_dim)
    if clip_text is not None:
        export_clip(model, model_config, run.config, clip_text, out)
    else:
        export_folder(model, model_config, run.final_record, teachers, out, run=run.config,
                      wise_ft_alpha=run.wise_ft_alpha)
    save_config(config, config.out)
    print(f'wrote {out}')


if __name__ == '__main__':
    run_command(ExportConfig, main)
