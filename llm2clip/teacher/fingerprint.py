# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What decides a teacher's vectors, kept wherever they are used, so that no others are taken for them."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import xxhash
from composer.core import DataSpec
from streaming import Stream
from streaming.base.format.base.reader import Reader

from llm2clip.config import ConfigError
from llm2clip.config.files import difference
from llm2clip.data.loader import streaming_dataset
from llm2clip.data.schema import TEACHER_FILE, embedding_dim
from llm2clip.data.streams.paired_stream import PairedReader, PairedStream
from llm2clip.files import FileError, read_json, reading, write_json, write_text
from llm2clip.remote_code.checks_llm2clip import TEACHER_SUFFIXES

__all__ = ['Fingerprint', 'TeacherRecord', 'common_teacher', 'hash_files', 'teacher_of_embeddings']

CACHE_VARIABLE = 'LLM2CLIP_CACHE'
# What changed so short a time ago may change again without another time stamp: a second on some network disks.
_SETTLED_NS = 2_000_000_000
_SEVERAL = 'concatenated'


@dataclass(frozen=True)
class Fingerprint:
    """Of one teacher, or of several whose vectors stand one after the other."""

    teachers: tuple[dict[str, Any], ...]
    """Of each, ``weights``, a hash of them, and how it turns a caption into a vector."""

    @classmethod
    def of(cls, weights: str, encoding: Mapping[str, Any]) -> 'Fingerprint':
        """Of one teacher."""
        return cls(({'weights': weights, **encoding},))

    @classmethod
    def concatenate(cls, fingerprints: Iterable['Fingerprint']) -> 'Fingerprint':
        """Of the teachers of all, in order."""
        return cls(tuple(teacher for fingerprint in fingerprints for teacher in fingerprint.teachers))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> 'Fingerprint':
        """What `to_json` gave.

        Raises:
            ValueError: It is something else.
        """
        teachers = value.get(_SEVERAL, [value]) if isinstance(value, Mapping) else None
        if not isinstance(teachers, list) or not teachers or not all(isinstance(one, Mapping) for one in teachers):
            raise ValueError(f'{str(value)[:60]!r} is no fingerprint of a teacher')
        return cls(tuple(map(dict, teachers)))

    def to_json(self) -> dict[str, Any]:
        """For files; one teacher's fields, or those of several in a list."""
        return self.teachers[0] if len(self.teachers) == 1 else {_SEVERAL: list(self.teachers)}

    @property
    def of_sentence_transformers(self) -> bool:
        """Whether a teacher is a sentence-transformers model, whose prompt then stands here."""
        return any('prompt' in one for one in self.teachers)

    def __len__(self) -> int:
        return len(self.teachers)

    def __iter__(self) -> Iterator['Fingerprint']:
        """Each teacher's."""
        return (Fingerprint((teacher,)) for teacher in self.teachers)

    def check(self, expected: 'Fingerprint', what: str, reference: str, but: Iterable[str] = ()) -> None:
        """Raise a ValueError that names the first field in which `what` is another teacher than `reference`.

        Args:
            expected: The reference's.
            what: Whose fingerprint this is, for the message.
            reference: Whose the other is.
            but: Fields that are left out.
        """
        found, others = ([{name: value for name, value in one.items() if name not in but} for one in side.teachers]
                         for side in (self, expected))
        differing = difference(found[0], others[0]) if len(found) == len(others) == 1 else difference(
            {f'teacher {i}': one for i, one in enumerate(found, 1)},
            {f'teacher {i}': one for i, one in enumerate(others, 1)})
        if differing is not None:
            raise ValueError(f'{what} comes from another teacher than {reference}: {differing}')


@dataclass(frozen=True)
class TeacherRecord:
    """What `teacher.json` says in an embeddings dataset, or in a run of stage 2."""

    teacher: Fingerprint
    about: dict[str, Any]
    """In a run ``llm_embed_dim``, the vectors' width; in an embeddings dataset ``dataset``, ``caption_keys``,
    ``vectors``."""

    @classmethod
    def read(cls, folder: Union[str, Path]) -> 'TeacherRecord':
        """The record of a folder.

        Raises:
            ConfigError: There is none.
            FileError: It is damaged.
        """
        path = Path(folder, TEACHER_FILE)
        if not path.is_file():
            raise ConfigError(f'{folder} has no {TEACHER_FILE}, which says from which teacher it comes')
        about = read_json(path, dict)
        with reading(path, 'the fingerprint of a teacher under the key teacher'):
            return cls(Fingerprint.from_json(about.pop('teacher')), about)

    @property
    def llm_embed_dim(self) -> int:
        return self.about['llm_embed_dim']

    def write(self, folder: Union[str, Path]) -> None:
        """Into a folder that has none yet."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(folder, TEACHER_FILE), self.to_text())

    def to_text(self) -> str:
        return json.dumps({'teacher': self.teacher.to_json(), **self.about}, indent=2) + '\n'

    def difference(self, expected: 'TeacherRecord') -> Optional[str]:
        """The first field in which two records differ."""
        return difference({'teacher': self.teacher.to_json(), **self.about},
                          {'teacher': expected.teacher.to_json(), **expected.about})


def teacher_of_embeddings(data: DataSpec) -> TeacherRecord:
    """The teacher, or teachers, that all embeddings datasets of a loader's dataset come from, and the width of their
    vectors; a ValueError if there are different ones."""
    dataset = streaming_dataset(data)
    return common_teacher([(stream, dataset.shards[dataset.shard_offset_per_stream[i]])
                           for i, stream in enumerate(dataset.streams)])


def common_teacher(streams: Sequence[tuple[Stream, Reader]]) -> TeacherRecord:
    """`teacher_of_embeddings` of paired streams, each with one of its shards."""
    found: list[tuple[str, Fingerprint]] = []
    dim = 0
    for stream, shard in streams:
        assert isinstance(stream, PairedStream) and isinstance(shard, PairedReader)
        folders = [embeddings.local for embeddings in stream.text_embeddings]
        found.append((', '.join(folders),
                      Fingerprint.concatenate(TeacherRecord.read(folder).teacher for folder in folders)))
        dim = sum(map(embedding_dim, shard.text_embeddings))
    for where, teacher in found:
        if any('clip_text' in one for one in teacher.teachers):
            raise ValueError(f"embeddings dataset {where} holds the features of CLIP's own text tower, the targets of "
                             'train_inheritance, and none of captions that it cannot read to their end; expected the '
                             'vectors of a teacher')
    (first, expected), *others = found
    for where, teacher in others:
        teacher.check(expected, f'embeddings dataset {where}', f'embeddings dataset {first}')
    return TeacherRecord(expected, {'llm_embed_dim': dim})


def hash_files(folder: Union[str, Path], exclude_ids: str = '') -> str:
    """Hash of the weights, tokenizer, chat template and configurations in a folder, but the file named `exclude_ids`.

    A large LLM takes minutes to read from a network's disk.  So the hash is kept in ``$LLM2CLIP_CACHE``, by default
    ``~/.cache/llm2clip``, with the name, size, inode and times of every file, and taken from there while all of these
    are what they were.  What is damaged there or cannot be written counts as not there.

    Raises:
        OSError: A file cannot be read.
    """
    folder = Path(folder).absolute()
    paths = sorted(path for path in folder.rglob('*') if path.suffix in TEACHER_SUFFIXES and path.name != exclude_ids)
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    root = Path(os.environ.get(CACHE_VARIABLE) or os.path.join(cache, 'llm2clip'))
    name = xxhash.xxh64(os.fsencode(folder) + b'\0' + os.fsencode(exclude_ids)).hexdigest()
    seen, kept = _states(paths), root / 'hashes' / f'{name}.json'
    with suppress(FileError):
        known = read_json(kept, dict) if root.is_absolute() else {}
        if known.get('files') == seen and isinstance(known.get('hash'), str) and len(known['hash']) == 16:
            return known['hash']
    digest = xxhash.xxh64()
    for path in paths:
        digest.update(path.relative_to(folder).as_posix())
        with path.open('rb') as file:
            while block := file.read(1 << 24):
                digest.update(block)
    result = digest.hexdigest()
    newest = max((times for _, _, _, *both in seen for times in both), default=0)
    if root.is_absolute() and seen == _states(paths) and newest < time.time_ns() - _SETTLED_NS:
        with suppress(OSError, FileError):
            write_json(kept, {'files': seen, 'hash': result})
    return result


def _states(paths: Sequence[Path]) -> list[list[Any]]:
    """What changes when a file does: path, size, inode, time of the content and time of the inode, in nanoseconds."""
    states = [path.stat() for path in paths]
    return [[os.fsencode(path).hex(), state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]
            for path, state in zip(paths, states)]
