# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Convert official weights and teachers: python recipes/import_official.py yamls/parts/tower/clip_b16.yaml"""

from typing import Any

from llm2clip.command import run_command
from llm2clip.config import ImportConfig
from llm2clip.config.loading import save_config
from llm2clip.config.teacher import teacher_type
from llm2clip.errors import ConfigError


def main(config: ImportConfig) -> None:
    from llm2clip.export.hf import KIND, export_folder
    from llm2clip.io.folders import check_replaceable
    from llm2clip.modeling.loaders import load_config
    from llm2clip.official.llm2vec import import_teacher
    from llm2clip.official.official_weights import import_checkpoint
    from llm2clip.teacher.fingerprint import TeacherRecord
    from llm2clip.teacher.llm import teacher_config, teacher_fingerprint

    check_replaceable(f'{config.out}/llm2clip', KIND)
    imported = None
    vision: Any = config.vision  # required with `checkpoint`
    if config.checkpoint is not None:
        imported = import_checkpoint(config.checkpoint, vision)
    teacher = config.teacher
    if teacher_type(teacher) == 'llm':
        import_teacher(teacher, config.template, f'{config.out}/teacher')
        teacher = f'{config.out}/teacher'
        print(f'wrote {teacher}')
    if imported is not None:
        width = load_config(teacher_config(teacher).pretrained).hidden_size
        if width != imported.llm_embed_dim:
            raise ConfigError(f'the vectors of {teacher} have {width} dimensions, the adapter of the '
                              f'official weights takes {imported.llm_embed_dim}', key='teacher')
        record = TeacherRecord(teacher_fingerprint(teacher), {'llm_embed_dim': imported.llm_embed_dim})
        export_folder(imported.model, imported.config, record, [teacher], f'{config.out}/llm2clip')
        print(f'wrote {config.out}/llm2clip')
    save_config(config, config.out)


if __name__ == '__main__':
    run_command(ImportConfig, main)
