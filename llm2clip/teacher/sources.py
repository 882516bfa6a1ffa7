# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Frozen teachers before they are loaded: what stage 1 wrote, any LLM as it is, or a sentence-transformers model.

Whoever needs a teacher asks `named_teacher` for the one that a configuration names, and then the `TeacherSource`, of
whichever kind it is: extraction, stage 2 with sidecars and online, evaluation, export, and exported models.
"""

import dataclasses
import shutil
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import xxhash
from composer.devices import Device
from composer.utils import dist
from huggingface_hub import snapshot_download
from torch.distributed.device_mesh import init_device_mesh

from llm2clip.config import ConfigError, ExtractConfig, NamedTeacherConfig, TeacherConfig, TextEncoderConfig
from llm2clip.device import open_device
from llm2clip.files import read_json, reading
from llm2clip.ranks import once_per_node
from llm2clip.remote_code.checks_llm2clip import TEACHER_SUFFIXES
from llm2clip.remote_code.sentence_transformer_llm2clip import load_sentence_transformer
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer, TextEncoder
from llm2clip.teacher.caption_teacher import CaptionTeacher, LLMTeacher, SentenceTransformerTeacher
from llm2clip.teacher.clip_text import ClipTextTeacher
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.teacher.folder import (
    encoding,
    hash_files,
    load_teacher,
    save_teacher,
    teacher_config,
    teacher_fingerprint,
)
from llm2clip.teacher.text_encoder import load_text_encoder, shard_encoder
from llm2clip.weights import hash_tensors

__all__ = [
    'FrozenLLM', 'SentenceTransformerModel', 'TeacherFolder', 'TeacherSource', 'build_caption_teacher',
    'caption_teacher_fingerprint', 'load_caption_teacher', 'named_teacher', 'teacher_in',
]

_Encoder = tuple[TextEncoder, CaptionTokenizer]
_PROMPTS_FILE = 'config_sentence_transformers.json'
# Of a model on the Hub, the weights for other libraries.
_FOREIGN_WEIGHTS = ['onnx/*', 'openvino/*', '*.onnx', '*.onnx_data', '*.h5', '*.msgpack', '*.ot', '*.gguf']


class TeacherSource(ABC):
    """A teacher that is not loaded.

    Attributes:
        name: Where it lies, for messages.
    """

    name: str

    @abstractmethod
    def _encoding(self) -> dict[str, Any]:
        """How it turns captions into vectors; a ConfigError if there is no such teacher."""

    def check_encoding(self, expected: Optional[Fingerprint], reference: str) -> None:
        """Find out what is wrong without reading weights.

        Args:
            expected: Of the teacher that it should be, if that is known.
            reference: Whose teacher that is, for messages.

        Raises:
            ConfigError: There is no such teacher.
            ValueError: It turns captions into vectors otherwise.
        """
        found = Fingerprint.of('', self._encoding())
        if expected is not None:
            found.check(expected, self.name, reference, but=('weights',))

    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """What decides its vectors; the weights are read, unless `hash_files` knows them."""

    def check(self, expected: Fingerprint, reference: str) -> None:
        """`check_encoding`, then the weights, which are read."""
        self.check_encoding(expected, reference)
        self.fingerprint().check(expected, self.name, reference)

    @abstractmethod
    def load(
        self, device: Device, batch_tokens: int = 4096, precision: str = 'fp32',
        fingerprint: Optional[Fingerprint] = None, sharded: bool = False,
    ) -> CaptionTeacher:
        """The teacher, on its device.

        Args:
            device: Where it runs.
            batch_tokens: Tokens per forward pass.
            precision: ``fp32``, or ``amp_bf16`` for autocast.
            fingerprint: Its own, if that is known.  Otherwise one rank per node reads the weights for it, and every
                rank has to call this.
            sharded: Spread it over the ranks, which read it one after the other: a host holds it in full only once.

        Raises:
            ConfigError: It cannot be sharded.
            FileError, LoadError: It is damaged, or needs code that is not trusted.
            ValueError: The nodes have different teachers.
        """

    @abstractmethod
    def save(self, folder: Path, expected: Fingerprint) -> Fingerprint:
        """Write it as a folder from which an exported model loads it; returns the fingerprint that it has there.

        Raises:
            ValueError: It is not the expected teacher.
        """


class _LLM(TeacherSource):
    """An LLM that becomes a `TextEncoder`."""

    @abstractmethod
    def _read(self, sharded: bool) -> _Encoder:
        """On the CPU, in evaluation mode; to be sharded, all weights must be of one type."""

    def load(
        self, device: Device, batch_tokens: int = 4096, precision: str = 'fp32',
        fingerprint: Optional[Fingerprint] = None, sharded: bool = False,
    ) -> LLMTeacher:
        fingerprint = fingerprint or once_per_node(self.fingerprint, f'teacher {self.name}')
        turn, turns = (dist.get_local_rank(), dist.get_local_world_size()) if sharded else (0, 0)
        for _ in range(turn):  # the ranks of this host before this one
            dist.barrier()
        encoder, tokenizer = self._read(sharded)
        if sharded:
            mesh = init_device_mesh('cpu' if device.name == 'cpu' else 'cuda', (dist.get_world_size(),))
            shard_encoder(encoder, mesh)
        for _ in range(turns - turn):
            dist.barrier()
        teacher = LLMTeacher(encoder, tokenizer, fingerprint, batch_tokens, precision, sharded)
        if not sharded:
            device.module_to_device(encoder)
        return teacher


class TeacherFolder(_LLM):
    """What stage 1 wrote."""

    def __init__(self, folder: Union[str, Path]) -> None:
        self.name = str(folder)

    def _encoding(self) -> dict[str, Any]:
        return encoding(teacher_config(self.name))

    def fingerprint(self) -> Fingerprint:
        return teacher_fingerprint(self.name)

    def save(self, folder: Path, expected: Fingerprint) -> Fingerprint:
        shutil.copytree(self.name, folder)
        found = teacher_fingerprint(folder)
        found.check(expected, self.name, 'the model')
        return found

    def _read(self, sharded: bool) -> _Encoder:
        return load_teacher(self.name, 'float32' if sharded else None)


class FrozenLLM(_LLM):
    """Any LLM, wherever it comes from, with its adapters."""

    def __init__(self, config: TextEncoderConfig) -> None:
        self.name = config.pretrained
        self._config = config

    def _encoding(self) -> dict[str, Any]:
        return encoding(self._config)

    def fingerprint(self) -> Fingerprint:
        return self._fingerprint_of(*self._read())

    def save(self, folder: Path, expected: Fingerprint) -> Fingerprint:
        """As stage 1 saves its teacher, whose fingerprint is that of the new files."""
        encoder, tokenizer = self._read()
        self._fingerprint_of(encoder, tokenizer).check(expected, self.name, 'the model')
        save_teacher(encoder, tokenizer, None, folder)
        del encoder
        self._fingerprint_of(*load_teacher(folder)).check(expected, str(folder), self.name)
        return teacher_fingerprint(folder)

    def _read(self, sharded: bool = False) -> _Encoder:
        return load_text_encoder(self._config)

    def _fingerprint_of(self, encoder: TextEncoder, tokenizer: CaptionTokenizer) -> Fingerprint:
        digest = xxhash.xxh64(str((tokenizer.header, tokenizer.footer, self._config.gguf_file)))
        hash_tensors(encoder.state_dict(), digest)
        return Fingerprint.of(digest.hexdigest(), self._encoding())


class SentenceTransformerModel(TeacherSource):
    """A sentence-transformers model.

    Args:
        name: Folder or hub name.
        prompt_name: Name of the model's prompt that is put before every caption; unset, its default.
        prompt: In place of `prompt_name`, the prompt's text.
        trust_remote_code: Run code that comes with the model.
    """

    def __init__(self, name: Union[str, Path], prompt_name: Optional[str] = None, prompt: Optional[str] = None,
                 trust_remote_code: bool = False) -> None:
        self.name = str(name)
        self._prompt_name, self._prompt, self._trust_remote_code = prompt_name, prompt, trust_remote_code

    def fingerprint(self) -> Fingerprint:
        return Fingerprint.of(hash_files(self._folder), self._encoding())

    def load(
        self, device: Device, batch_tokens: int = 4096, precision: str = 'fp32',
        fingerprint: Optional[Fingerprint] = None, sharded: bool = False,
    ) -> SentenceTransformerTeacher:
        if sharded:
            raise ConfigError(f'online.sharded: {self.name} is a sentence-transformers model, and only an LLM (teacher '
                              'or text_encoder) can be spread over the ranks')
        fingerprint = fingerprint or once_per_node(self.fingerprint, f'sentence_transformer {self.name}')
        model = load_sentence_transformer(self._folder, self._trust_remote_code)
        return SentenceTransformerTeacher(device.module_to_device(model), fingerprint, self._encoding()['prompt'],
                                          batch_tokens, precision)

    def save(self, folder: Path, expected: Fingerprint) -> Fingerprint:
        """A copy of what decides its vectors, and of the code that comes with it."""
        shutil.copytree(self._folder, folder, ignore=lambda where, names: [
            name for name in names
            if not Path(where, name).is_dir() and Path(name).suffix not in (*TEACHER_SUFFIXES, '.py')])
        found = Fingerprint.of(hash_files(folder), self._encoding())
        found.check(expected, self.name, 'the model')
        return found

    @cached_property
    def _folder(self) -> Path:
        if Path(self.name).is_dir():
            return Path(self.name)
        with reading(f'sentence_transformer: {self.name}', 'a sentence-transformers model, a folder or on the Hub'):
            return Path(snapshot_download(self.name, ignore_patterns=_FOREIGN_WEIGHTS))

    def _encoding(self) -> dict[str, Any]:
        """The prompt, by the model's own file of prompts."""
        if self._prompt is not None:
            return {'prompt': self._prompt}
        path = self._folder / _PROMPTS_FILE
        about = read_json(path, dict) if path.is_file() else {}
        with reading(path, 'the prompts of a sentence-transformers model'):
            # These two are there in any case.
            prompts = {'query': '', 'document': '', **about.get('prompts', {})}
            name = self._prompt_name or about.get('default_prompt_name')
        if name is not None and name not in prompts:
            raise ConfigError(f'prompt_name: {name!r}, expected one of those of {self.name}: {", ".join(prompts)}')
        return {'prompt': '' if name is None else prompts[name]}


def named_teacher(config: NamedTeacherConfig, trust_remote_code: Optional[bool] = None) -> Optional[TeacherSource]:
    """The teacher that a configuration names; None if it names none.

    Args:
        config: The configuration.
        trust_remote_code: Whether code that comes with the teacher is run.  Unset: as the configuration says, which is
            for one that the user gave, and not for one that came with a run.

    Raises:
        ConfigError: It names several.
    """
    if trust_remote_code is not None:
        llm = config.text_encoder and dataclasses.replace(config.text_encoder, trust_remote_code=trust_remote_code)
        config = dataclasses.replace(config, trust_remote_code=trust_remote_code, text_encoder=llm)
    match config.named_by():
        case 'teacher':
            return TeacherFolder(config.teacher or '')
        case 'text_encoder' if config.text_encoder is not None:
            return FrozenLLM(config.text_encoder)
        case 'sentence_transformer':
            return SentenceTransformerModel(config.sentence_transformer or '', config.prompt_name, config.prompt,
                                            config.trust_remote_code)
    return None


def teacher_in(
    folder: Union[str, Path], learned_from: Optional[Fingerprint], trust_remote_code: bool = False
) -> TeacherSource:
    """The teacher in a folder, as the fingerprint of the teacher that a model learned from says what it is.

    Args:
        folder: Of the teacher; of a sentence-transformers model, a hub name as well.
        learned_from: The fingerprint; if it is not known, stage 1 wrote the folder.
        trust_remote_code: Run code that comes with a sentence-transformers model.
    """
    if learned_from is None or not learned_from.of_sentence_transformers:
        return TeacherFolder(folder)
    prompt = str(learned_from.teachers[0]['prompt'])
    return SentenceTransformerModel(folder, prompt=prompt, trust_remote_code=trust_remote_code)


def build_caption_teacher(config: TeacherConfig, device: Device) -> CaptionTeacher:
    """The teacher that a configuration names, or the CLIP whose text features are targets, on its device.

    Every rank calls this.

    Raises:
        ConfigError: It names none or several.
        ValueError: The nodes have different teachers.
    """
    config.named_by(required=True)
    source = named_teacher(config)
    if source is not None:
        return source.load(device, config.batch_tokens, config.precision)
    teacher = _clip_text(config)
    device.module_to_device(teacher.module)
    return teacher


def load_caption_teacher(config: ExtractConfig, device: str) -> CaptionTeacher:
    """`build_caption_teacher`, on ``gpu`` or ``cpu``, for a process that has done nothing else before."""
    return build_caption_teacher(config, open_device(device, config.precision))


def caption_teacher_fingerprint(config: TeacherConfig) -> Fingerprint:
    """That of the teacher that `build_caption_teacher` would build; an LLM that is no teacher folder, or a CLIP, is
    loaded on the CPU for it."""
    config.named_by(required=True)
    source = named_teacher(config)
    return source.fingerprint() if source is not None else _clip_text(config).fingerprint


def _clip_text(config: TeacherConfig) -> Any:
    assert isinstance(config, ExtractConfig) and config.clip_text is not None
    return ClipTextTeacher(config.clip_text, config.batch_tokens, config.precision)
