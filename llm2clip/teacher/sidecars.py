# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Whose vectors the sidecars of a stage-2 dataset hold."""

from collections.abc import Sequence

from composer.core import DataSpec
from streaming import Stream
from streaming.base.format.base.reader import Reader

from llm2clip.data.loader import streaming_dataset
from llm2clip.data.schema import embedding_dim
from llm2clip.data.streams.paired_stream import PairedReader, PairedStream, columns_of
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord

__all__ = ['common_teacher', 'sidecar_teacher']


def sidecar_teacher(data: DataSpec) -> TeacherRecord:
    """The teacher, or teachers, that all sidecars of a loader's dataset come from, and the width of their vectors.

    Raises:
        ValueError: The sidecars of two streams come from different teachers.
    """
    dataset = streaming_dataset(data)
    return common_teacher([(stream, dataset.shards[dataset.shard_offset_per_stream[i]])
                           for i, stream in enumerate(dataset.streams)])


def common_teacher(streams: Sequence[tuple[Stream, Reader]]) -> TeacherRecord:
    """`sidecar_teacher` of paired streams, each with one of its shards."""
    found: list[tuple[str, Fingerprint]] = []
    dim = 0
    for stream, shard in streams:
        assert isinstance(stream, PairedStream) and isinstance(shard, PairedReader)
        folders = [sidecar.local for sidecar in stream.sidecars]
        found.append((', '.join(folders),
                      Fingerprint.concatenate(TeacherRecord.read(folder).teacher for folder in folders)))
        dim = sum(embedding_dim(columns_of(reader)) for reader in shard.sidecars)
    for where, teacher in found:
        if any('clip_text' in one for one in teacher.teachers):
            raise ValueError(f"sidecar {where} holds the features of CLIP's own text tower, the targets of "
                             'train_inheritance, and none of captions that it cannot read to their end; expected the '
                             'vectors of a teacher')
    (first, expected), *others = found
    for where, teacher in others:
        teacher.check(expected, f'sidecar {where}', f'sidecar {first}')
    return TeacherRecord(expected, {'llm_embed_dim': dim})
