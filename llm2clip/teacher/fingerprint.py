# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Fingerprints of teachers, stored beside everything made from their vectors, to detect a mismatch."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Optional, Union

import xxhash
from composer.core import DataSpec

from llm2clip.config.loading import difference
from llm2clip.data.loader import streaming_dataset
from llm2clip.data.schema import TEACHER_FILE, embedding_dim
from llm2clip.errors import ConfigError
from llm2clip.io.files import read_json, reading, write_text
from llm2clip.modeling.loaders import rope_of_4, teacher_files

Kind = Literal['llm', 'sentence_transformers', 'clip_text', 'frozen_tower']
_CONCATENATED = 'concatenated'
# Field that only fingerprints of one kind have -> this kind.  Those of an LLM have none of these fields.
_KINDS: dict[str, Kind] = {
    'prompt': 'sentence_transformers', 'clip_text': 'clip_text', 'image_size': 'frozen_tower'}
# Fields of a configuration that saving and loading change, and that do not decide vectors.
_VOLATILE = {'_name_or_path', 'architectures', 'dtype', 'quantization_config', 'tie_word_embeddings',
             'torch_dtype', 'transformers_version', 'use_cache'}


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of one teacher, or of several teachers with concatenated vectors."""

    teachers: tuple[dict[str, Any], ...]
    """Per teacher: a hash of its ``weights``, in a teacher folder of all files, otherwise another hash of
    configuration and tokenizer; and the settings that decide how it turns a caption into a vector."""

    @classmethod
    def of(cls, weights: str, encoding: Mapping[str, Any]) -> 'Fingerprint':
        """Return the fingerprint of one teacher."""
        return cls(({'weights': weights} | dict(encoding),))

    @classmethod
    def concatenate(cls, fingerprints: Iterable['Fingerprint']) -> 'Fingerprint':
        """Return the fingerprint of all teachers in the given fingerprints, in order."""
        return cls(tuple(chain.from_iterable(fingerprint.teachers for fingerprint in fingerprints)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> 'Fingerprint':
        """Parse the output of `to_json`; some exception if the value is not a fingerprint."""
        teachers = value.get(_CONCATENATED, [value])
        if not teachers:
            raise ValueError('there is none')
        return cls(tuple(map(dict, teachers)))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with the fields of one teacher, or with a list of several teachers."""
        if len(self.teachers) == 1:
            return self.teachers[0]
        return {_CONCATENATED: list(self.teachers)}

    @property
    def kinds(self) -> list[Kind]:
        """Kind of each teacher, or of the frozen tower that embeds images."""
        kinds: list[Kind] = []
        for teacher in self.teachers:
            fields = _KINDS.keys() & teacher.keys()
            kinds.append(_KINDS[fields.pop()] if fields else 'llm')
        return kinds

    def __len__(self) -> int:
        return len(self.teachers)

    def __iter__(self) -> Iterator['Fingerprint']:
        """Iterate over the fingerprints of the single teachers."""
        return (Fingerprint((teacher,)) for teacher in self.teachers)

    def check(self, expected: 'Fingerprint', name: str, reference: str, ignored: Sequence[str] = ()) -> None:
        """Raise a ConfigError that names the first field in which this fingerprint differs from `expected`.

        The message calls the object with this fingerprint `name`, the other one `reference`.  Fields in
        `ignored` may differ.
        """
        def fields(fingerprint: Fingerprint) -> dict[str, Any]:
            return {f'teacher {i}': teacher | dict.fromkeys(ignored)
                    for i, teacher in enumerate(fingerprint.teachers, 1)}

        differing = difference(fields(self), fields(expected))
        if differing is not None:
            if len(self) == len(expected) == 1:
                differing = differing.removeprefix('teacher 1.')
            embedder = 'tower' if 'frozen_tower' in expected.kinds else 'teacher'
            raise ConfigError(f'{name} comes from another {embedder} than {reference}: {differing}')


@dataclass(frozen=True)
class TeacherRecord:
    """Content of ``teacher.json`` in an embeddings dataset or in a run of stage 2."""

    teacher: Fingerprint
    facts: dict[str, Any]
    """Other fields: ``llm_embed_dim``, the width of the vectors, in a run; ``dataset``, ``caption_keys`` and
    ``vectors`` in an embeddings dataset."""

    @classmethod
    def read(cls, folder: Union[str, Path]) -> 'TeacherRecord':
        """Read the record in a folder; a ConfigError if there is none, a FileError if it is damaged."""
        path = Path(folder, TEACHER_FILE)
        if not path.is_file():
            raise ConfigError(f'{folder} has no {TEACHER_FILE}, which says from which teacher it comes')
        facts = read_json(path, dict)
        with reading(path, 'the fingerprint of a teacher under the key teacher'):
            return cls(Fingerprint.from_json(facts.pop('teacher')), facts)

    @property
    def llm_embed_dim(self) -> int:
        return self.facts['llm_embed_dim']

    def write(self, folder: Union[str, Path]) -> None:
        """Write the record into a folder, which is created if necessary."""
        write_text(Path(folder, TEACHER_FILE), self.to_text())

    def to_text(self) -> str:
        return json.dumps(self._to_json(), indent=2) + '\n'

    def _to_json(self) -> dict[str, Any]:
        return {'teacher': self.teacher.to_json()} | self.facts

    def difference(self, expected: 'TeacherRecord') -> Optional[str]:
        """Describe the first field in which two records differ; None if they are equal."""
        return difference(self._to_json(), expected._to_json())


def teacher_of_embeddings(data: DataSpec) -> TeacherRecord:
    """Return the common teachers and the vector width of all embeddings datasets of a loader.

    Raises:
        ValueError: The datasets have different teachers, or hold CLIP text features or vectors of length 1.
    """
    dataset = streaming_dataset(data)
    return common_teacher([(stream, dataset.shards[dataset.shard_offset_per_stream[i]])
                           for i, stream in enumerate(dataset.streams)])


def common_teacher(streams: Sequence[tuple[Any, Any]]) -> TeacherRecord:
    """Implement `teacher_of_embeddings` for instances of PairedStream, each with one of its shards."""
    names: list[str] = []
    fingerprints: list[Fingerprint] = []
    dim = 0
    for stream, shard in streams:
        folders = [embeddings.local for embeddings in stream.text_embeddings]
        name = ', '.join(folders)
        records = [TeacherRecord.read(folder) for folder in folders]
        if any(record.facts.get('vectors', {}).get('normalized') for record in records):
            raise ConfigError(f'embeddings dataset {name} holds vectors of length 1, but those of new '
                              'captions are not scaled; remove it, and extract it again')
        fingerprint = Fingerprint.concatenate(record.teacher for record in records)
        names.append(name)
        fingerprints.append(fingerprint)
        if 'clip_text' in fingerprint.kinds:
            raise ValueError(f'embeddings dataset {name} holds the features of the text tower of a '
                             'CLIP, the targets of train_inheritance, and none of captions that it cannot '
                             'read to their end; expected the vectors of a teacher')
        fingerprint.check(fingerprints[0], f'embeddings dataset {name}', f'embeddings dataset {names[0]}')
        dim = sum(map(embedding_dim, shard.text_embeddings))
    return TeacherRecord(fingerprints[0], {'llm_embed_dim': dim})


def hash_files(folder: Union[str, Path], exclude: str = '') -> str:
    """Hash the weights, tokenizer, chat template and configurations in a folder,
    except the file `exclude`."""
    digest = xxhash.xxh64()
    for path in teacher_files(Path(folder)):
        if path.name != exclude:
            digest.update(path.relative_to(folder).as_posix())
            with path.open('rb') as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def hash_settings(config: Mapping[str, Any], tokenizer: Any = None) -> str:
    """Hash what decides a model's vectors beside its weights: configuration and, for texts, tokenizer."""
    fields = dict(config)
    rope_of_4(fields)  # so that transformers 4 and 5 give the same hash
    deciding = {name: value for name, value in fields.items() if name not in _VOLATILE and value is not None}
    if tokenizer is not None:
        backend = getattr(tokenizer, 'backend_tokenizer', None)
        rules = {'vocabulary': tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
        rules.update(padding=None, truncation=None)  # set by each call
        deciding['tokenizer'] = rules, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return xxhash.xxh64(json.dumps(deciding, sort_keys=True, default=str)).hexdigest()
