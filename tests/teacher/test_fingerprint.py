# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Fingerprints of teachers: compared, concatenated, written and read."""

from pathlib import Path

import pytest

from llm2clip.config import ConfigError
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord

ONE = Fingerprint.of('a1', {'pooling': 'mean', 'instruction': ''})
OTHER = Fingerprint.of('b2', {'pooling': 'last', 'instruction': ''})
BOTH = Fingerprint.concatenate([ONE, OTHER])


def test_the_first_differing_field_is_named() -> None:
    ONE.check(Fingerprint.of('a1', {'pooling': 'mean', 'instruction': ''}), 'a', 'b')
    OTHER.check(ONE, 'a', 'b', but=['weights', 'pooling'])
    with pytest.raises(ValueError, match="a comes from another teacher than b: pooling is 'last', expected 'mean'"):
        OTHER.check(ONE, 'a', 'b')
    with pytest.raises(ValueError, match="teacher 1.pooling is 'last', expected 'mean'"):
        Fingerprint.concatenate([OTHER, ONE]).check(BOTH, 'a', 'b')
    with pytest.raises(ValueError, match='teacher 2 is None'):
        ONE.check(BOTH, 'a', 'b')


def test_a_record_comes_back_and_tells_others_apart(tmp_path: Path) -> None:
    assert ONE.to_json()['weights'] == 'a1' and len(BOTH) == 2 and list(BOTH) == [ONE, OTHER]
    for teacher in (ONE, BOTH):
        record = TeacherRecord(teacher, {'llm_embed_dim': 8})
        record.write(tmp_path)
        assert TeacherRecord.read(tmp_path) == record and record.llm_embed_dim == 8
    assert record.difference(TeacherRecord(BOTH, {'llm_embed_dim': 4})) == 'llm_embed_dim is 8, expected 4'
    with pytest.raises(ConfigError, match='has no teacher.json'):
        TeacherRecord.read(tmp_path / 'nowhere')
