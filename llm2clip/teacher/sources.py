# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Text encoders that the key `teacher` names: LLMs, sentence-transformers models, CLIP text towers; and the
teacher of the embeddings that a training reads, and that of a resumed run."""

import dataclasses
import shutil
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import xxhash
from composer import DataSpec, Evaluator
from huggingface_hub import snapshot_download
from torch.distributed.device_mesh import init_device_mesh

from llm2clip.config import (
    ClipTextTeacherConfig,
    LLMTeacherConfig,
    SentenceTransformersTeacherConfig,
)
from llm2clip.config.loading import computes_bfloat16
from llm2clip.config.teacher import Teachers
from llm2clip.data.schema import TEACHER_FILE
from llm2clip.device import Device
from llm2clip.errors import ConfigError
from llm2clip.io.files import read_json, reading
from llm2clip.io.tensors import hash_tensors
from llm2clip.modeling.loaders import teacher_files
from llm2clip.modeling.sentence_transformer import encode_sentences, load_sentence_transformer
from llm2clip.modeling.text_encoder import CaptionTokenizer, TextEncoder, Tokenized, encode_tokens
from llm2clip.ranks import dist, is_first, once_per_node
from llm2clip.teacher.caption_teacher import CaptionTeacher, TeacherSource
from llm2clip.teacher.clip_text import ClipText
from llm2clip.teacher.embedder import Embedded, OnBatch
from llm2clip.teacher.fingerprint import (
    Fingerprint,
    TeacherRecord,
    hash_files,
    hash_settings,
    teacher_of_embeddings,
)
from llm2clip.teacher.llm import (
    encoding,
    load_teacher,
    load_text_encoder,
    save_teacher,
    shard_encoder,
    teacher_config,
    teacher_fingerprint,
)

_PROMPTS_FILE = 'config_sentence_transformers.json'
# Weights for other libraries, which are not downloaded from the Hub.
_FOREIGN_WEIGHTS = ['onnx/*', 'openvino/*', '*.onnx', '*.onnx_data', '*.h5', '*.msgpack', '*.ot', '*.gguf']


class LLMTeacher(CaptionTeacher):
    """LLM as a text encoder; weights are cast to float32 on machines where bfloat16 is slow.

    If `sharded`, all ranks must call `embed_prepared` together, each with at least one caption.
    """

    def __init__(self, encoder: TextEncoder, tokenizer: CaptionTokenizer, fingerprint: Fingerprint,
                 batch_tokens: int = 4096, precision: str = 'fp32', sharded: bool = False) -> None:
        super().__init__(encoder, encoder.llm_embed_dim, fingerprint, batch_tokens, precision)
        self.tokenizer = tokenizer
        self.sharded = sharded
        # The cast from bfloat16 to float32 is exact.
        if encoder.config.dtype == 'bfloat16' and not sharded and not computes_bfloat16():
            encoder.llm.float()

    def prepare(self, items: Sequence[str]) -> list[Tokenized]:
        return self.tokenizer.tokenize(items)

    def embed_prepared(self, inputs: Sequence[Tokenized], on_batch: OnBatch) -> Embedded:
        vectors = encode_tokens(self.module, inputs, self.batch_tokens, self.precision, self.sharded,
                                on_batch)
        tokens = sum(len(text.ids) for text in inputs)
        truncated = sum(text.cut > 0 for text in inputs)
        return Embedded(vectors, tokens, truncated)


class _LLM(TeacherSource):
    """Source of an LLM that becomes a `TextEncoder`."""

    @abstractmethod
    def _read(self, sharded: bool = False) -> tuple[TextEncoder, CaptionTokenizer]:
        """Load a frozen encoder and its tokenizer on the CPU; if `sharded`, all weights in one dtype."""

    def _load(self, device: Device, fingerprint: Fingerprint, batch_tokens: int, precision: str, sharded: bool
              ) -> LLMTeacher:
        if not sharded:
            encoder, tokenizer = self._read()
            teacher = LLMTeacher(encoder, tokenizer, fingerprint, batch_tokens, precision)
            device.module_to_device(encoder)
            return teacher
        for _ in range(dist.get_local_rank()):  # wait for the lower ranks of this host
            dist.barrier()
        encoder, tokenizer = self._read(sharded=True)
        mesh = init_device_mesh('cpu' if device.name == 'cpu' else 'cuda', (dist.get_world_size(),))
        shard_encoder(encoder, mesh)
        for _ in range(dist.get_local_world_size() - dist.get_local_rank()):
            dist.barrier()
        return LLMTeacher(encoder, tokenizer, fingerprint, batch_tokens, precision, sharded=True)


class TeacherFolder(_LLM):
    """Teacher folder that stage 1 or an import wrote."""

    def __init__(self, folder: Union[str, Path]) -> None:
        self.name = str(folder)

    def encoding(self) -> dict[str, Any]:
        return encoding(teacher_config(self.name))

    def fingerprint(self) -> Fingerprint:
        return teacher_fingerprint(self.name)

    def save(self, folder: Path, expected: Fingerprint) -> Fingerprint:
        shutil.copytree(self.name, folder)
        saved = teacher_fingerprint(folder)
        saved.check(expected, self.name, 'the model')
        return saved

    def _read(self, sharded: bool = False) -> tuple[TextEncoder, CaptionTokenizer]:
        return load_teacher(self.name, in_float32=sharded)


class FrozenLLM(_LLM):
    """Any LLM, in a folder or on the Hub, with its adapters."""

    def __init__(self, config: LLMTeacherConfig) -> None:
        self.name, self._config = config.pretrained, config

    def encoding(self) -> dict[str, Any]:
        return encoding(self._config)

    def fingerprint(self) -> Fingerprint:
        return self._fingerprint_of(*self._read())

    def save(self, folder: Path, expected: Fingerprint) -> Fingerprint:
        """Save in the format of stage 1; return the fingerprint of the new files, which is not `expected`."""
        encoder, tokenizer = self._read()
        self._fingerprint_of(encoder, tokenizer).check(expected, self.name, 'the model')
        save_teacher(encoder, tokenizer, None, folder)
        del encoder
        # The saved tokenizer adds tokens by itself, and the configuration says that attention sees both ways.
        self._fingerprint_of(*load_teacher(folder)).check(
            expected, str(folder), self.name, ignored=['config_and_tokenizer'])
        return teacher_fingerprint(folder)

    def _read(self, sharded: bool = False) -> tuple[TextEncoder, CaptionTokenizer]:
        return load_text_encoder(self._config)

    def _fingerprint_of(self, encoder: TextEncoder, tokenizer: CaptionTokenizer) -> Fingerprint:
        digest = xxhash.xxh64(str((tokenizer.header, tokenizer.footer, self._config.gguf_file)))
        hash_tensors(encoder.state_dict(), digest)
        settings = hash_settings(encoder.llm.config.to_diff_dict(), tokenizer.tokenizer)
        return Fingerprint.of(digest.hexdigest(), {'config_and_tokenizer': settings} | self.encoding())


class _SentenceTransformerTeacher(CaptionTeacher):
    """SentenceTransformer with its own tokenizer and pooling; `prompt` is put before every caption.

    `batch_tokens` counts padding.
    """

    def __init__(self, model: Any, fingerprint: Fingerprint, prompt: str, batch_tokens: int, precision: str
                 ) -> None:
        # Custom modules of a model need not report the width.
        width = len(model.encode('a', show_progress_bar=False))
        super().__init__(model, width, fingerprint, batch_tokens, precision)
        self.prompt = prompt

    def prepare(self, items: Sequence[str]) -> Sequence[str]:
        """Return the captions unchanged: `encode` tokenises them, and tokenizers are not thread-safe."""
        return items

    def embed_prepared(self, inputs: Sequence[str], on_batch: OnBatch) -> Embedded:
        return Embedded(*encode_sentences(
            self.module, inputs, self.prompt, self.batch_tokens, self.precision, on_batch))


class SentenceTransformerModel(TeacherSource):
    """Sentence-transformers model in a folder or on the Hub."""

    def __init__(self, config: SentenceTransformersTeacherConfig) -> None:
        self.name, self._config = config.name, config

    def fingerprint(self) -> Fingerprint:
        return Fingerprint.of(hash_files(self._folder), self.encoding())

    def _load(self, device: Device, fingerprint: Fingerprint, batch_tokens: int, precision: str, sharded: bool
              ) -> _SentenceTransformerTeacher:
        if sharded:
            raise ConfigError(f'{self.name} is a sentence-transformers model, and only an LLM can be spread '
                              'over the ranks', 'text_encoder_in_loop.sharded')
        model = load_sentence_transformer(self._folder, self._config.trust_remote_code)
        device.module_to_device(model)
        return _SentenceTransformerTeacher(model, fingerprint, self.encoding()['prompt'], batch_tokens,
                                           precision)

    def save(self, folder: Path, expected: Fingerprint) -> Fingerprint:
        """Copy the files that decide the vectors, and the code that comes with the model."""
        for path in (*teacher_files(self._folder), *self._folder.rglob('*.py')):
            target = folder / path.relative_to(self._folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        saved = Fingerprint.of(hash_files(folder), self.encoding())
        saved.check(expected, self.name, 'the model')
        return saved

    @cached_property
    def _folder(self) -> Path:
        if Path(self.name).is_dir():
            return Path(self.name)
        with reading(f'teacher.name: {self.name}', 'a sentence-transformers model, a folder or on the Hub'):
            return Path(snapshot_download(self.name, ignore_patterns=_FOREIGN_WEIGHTS))

    def encoding(self) -> dict[str, Any]:
        """Return the prompt; by default it comes from the model's own prompt file."""
        if self._config.prompt is not None:
            return {'prompt': self._config.prompt}
        path = self._folder / _PROMPTS_FILE
        settings = {}
        if path.is_file():
            settings = read_json(path, dict)
        with reading(path, 'the prompts of a sentence-transformers model'):
            # sentence-transformers adds these two to every model.
            prompts = {'query': '', 'document': ''} | settings.get('prompts', {})
            name = self._config.prompt_name or settings.get('default_prompt_name')
        if name is None:
            return {'prompt': ''}
        if name not in prompts:
            raise ConfigError(f'{name!r}, expected one of those of {self.name}: {", ".join(prompts)}',
                              'teacher.prompt_name', is_absolute=True)
        return {'prompt': prompts[name]}


def teacher_source(config: Any, trust_remote_code: Optional[bool] = None, cut: bool = False) -> TeacherSource:
    """Return the source of the text encoder that a configuration names.

    Args:
        config: Folder, or one of the dataclasses of `llm2clip.config.teacher`.
        trust_remote_code: Whether to run code that comes with the model.  Unset, `config` decides; leave it
            unset only if the user wrote `config`, not if it came with a run.
        cut: See `ClipText`; all other text encoders truncate captions.
    """
    if trust_remote_code is not None and hasattr(config, 'trust_remote_code'):
        config = dataclasses.replace(config, trust_remote_code=trust_remote_code)
    match config:
        case LLMTeacherConfig():
            return FrozenLLM(config)
        case SentenceTransformersTeacherConfig():
            return SentenceTransformerModel(config)
        case ClipTextTeacherConfig():
            return ClipText(config.name, cut)
    return TeacherFolder(config)


def teacher_sources(configs: Any, trust_remote_code: Optional[bool] = None) -> list[TeacherSource]:
    """Return the sources of the text encoders that a configuration names: none, one, or several in order."""
    if configs is None:
        return []
    if not isinstance(configs, list):
        configs = [configs]
    return [teacher_source(config, trust_remote_code) for config in configs]


def teacher_in(
    folder: Union[str, Path], learned_from: Fingerprint, trust_remote_code: bool = False
) -> TeacherSource:
    """Return the source of the teacher in an exported model's folder, with the fingerprint `learned_from`."""
    if learned_from.kinds == ['llm']:
        return TeacherFolder(folder)
    prompt = str(learned_from.teachers[0]['prompt'])
    return SentenceTransformerModel(
        SentenceTransformersTeacherConfig(str(folder), prompt=prompt, trust_remote_code=trust_remote_code))


def check_teachers(configs: Any, fingerprint: Fingerprint, name: str) -> None:
    """Check that vectors come from the teachers that a configuration names, if any; all ranks call this.

    Raises:
        ValueError: The vectors' `fingerprint` differs; the message has `name` and the first differing field.
    """
    sources = teacher_sources(configs)
    if sources:
        expected = Fingerprint.concatenate(
            once_per_node(source.fingerprint, f'teacher {source.name}') for source in sources)
        fingerprint.check(expected, name, ' and '.join(source.name for source in sources))


def teacher_of_data(
    teacher: Teachers, data: DataSpec, evaluators: Sequence[Evaluator]
) -> TeacherRecord:
    """Return the record of the teacher of all embeddings datasets, in training and in evaluation.

    Raises:
        ConfigError: They have different teachers, or another one than `teacher`, the configuration.
    """
    record = teacher_of_embeddings(data)
    check_teachers(teacher, record.teacher, 'the embeddings dataset of train_data')
    for evaluator in evaluators:
        eval_record = teacher_of_embeddings(evaluator.dataloader)
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
