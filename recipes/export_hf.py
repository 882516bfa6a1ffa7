# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage-2 run and teacher -> Hugging Face folder: python recipes/export_hf.py yamls/export/….yaml [key=value …]"""

from llm2clip.command import run_command
from llm2clip.config import ConfigError, ExportConfig
from llm2clip.config_files import save_config


def main(config: ExportConfig) -> None:
    from llm2clip.data.image_embeddings import check_same_teacher
    from llm2clip.export.hf import export_folder
    from llm2clip.export.model_card import read_results
    from llm2clip.models.caption_teacher import teacher_fingerprint
    from llm2clip.runs import load_stage2

    if bool(config.teacher) == bool(config.teachers):
        raise ConfigError('expected one of teacher (a folder that stage 1 wrote) and teachers (several of them)')
    folders = config.teachers or [config.teacher or '']
    results = read_results(config.results, config.run, config.weights) if config.results else None
    model, run_config, record = load_stage2(config.run, config.weights)
    fingerprints = record['teacher'].get('concatenated', [record['teacher']])
    for folder, fingerprint in zip(folders, fingerprints):
        check_same_teacher(teacher_fingerprint(folder), fingerprint, folder, 'the run')
    export_folder(model, run_config.model, record, folders, f'{config.out}/llm2clip', remote_code=config.remote_code,
                  run=run_config, results=results)
    save_config(config, config.out)
    print(f'wrote {config.out}/llm2clip')


if __name__ == '__main__':
    run_command(ExportConfig, main)
