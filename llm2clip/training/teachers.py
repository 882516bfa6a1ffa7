# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The teacher of the embeddings datasets that a training reads, and that of a resumed run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Union

from composer import DataSpec, Evaluator

from llm2clip.config import AdapterConfig
from llm2clip.config.teacher import Teachers
from llm2clip.data.schema import TEACHER_FILE
from llm2clip.errors import ConfigError
from llm2clip.ranks import is_first
from llm2clip.teacher.fingerprint import TeacherRecord, teacher_of_embeddings
from llm2clip.teacher.sources import check_teachers


def teacher_of_data(
    teacher: Teachers, adapter: AdapterConfig, data: DataSpec, evaluators: Sequence[Evaluator]
) -> TeacherRecord:
    """Return the record of the teacher of all embeddings datasets, in training and in evaluation.

    Raises:
        ConfigError: They have different teachers, or another one than `teacher`, the configuration.
    """
    record = teacher_of_embeddings(data, adapter)
    check_teachers(teacher, record.teacher, 'the embeddings dataset of train_data')
    for evaluator in evaluators:
        eval_record = teacher_of_embeddings(evaluator.dataloader, adapter)
        eval_record.teacher.check(record.teacher, 'eval_data', 'train_data')
    return record


def check_teacher_of_run(record: TeacherRecord, run: Union[str, Path]) -> None:
    """Raise a ConfigError, on rank 0, if the run in a folder was begun with another teacher."""
    if not is_first() or not Path(run, TEACHER_FILE).is_file():
        return
    differing = TeacherRecord.read(run).difference(record)
    if differing is not None:
        raise ConfigError(f'the run in {run} was begun with another teacher: {differing}; choose another '
                          'save_folder')
