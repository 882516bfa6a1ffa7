# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Frozen teachers, captions -> vectors: what stage 1 trained, any LLM as it is, or a sentence-transformers model."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional, Protocol, Union

import torch
import xxhash
from composer.devices import Device
from huggingface_hub import snapshot_download
from tqdm import tqdm

from llm2clip.config import ConfigError, ExtractConfig, TeacherConfig, TextEncoderConfig
from llm2clip.files import FileError, read_json, reading, write_text
from llm2clip.ranks import agreed, in_turns, is_first, once_per_node, rows
from llm2clip.remote_code.checks_llm2clip import check_finite, check_no_code
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer, TextEncoder, Tokenized, encode_tokens
from llm2clip.teacher.blocks import Embedded, keep_block, load_block
from llm2clip.teacher.clip_text import ClipTextTeacher
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.teacher.folder import encoding, load_teacher, teacher_fingerprint
from llm2clip.teacher.hashes import hash_files
from llm2clip.teacher.text_encoder import load_text_encoder
from llm2clip.weights import hash_tensors

__all__ = [
    'CachedTeacher', 'CaptionTeacher', 'LLMTeacher', 'SentenceTransformerTeacher', 'build_caption_teacher',
]

# Texts of a file, embedded together: enough to sort by length, few enough to lose.
_BLOCK = 1024
# Classes that a sentence-transformers folder may name: modules, activations, and what export_sentence writes.
_TRUSTED_CLASSES = ('sentence_transformers.', 'torch.nn.', 'llm2clip.export.sentence_model.CaptionEncoder')


class CaptionTeacher(Protocol):
    """Turns captions into vectors, always the same ones."""

    fingerprint: Fingerprint
    """What decides the vectors: a hash of the weights, and how a caption is encoded."""

    @property
    def llm_embed_dim(self) -> int:
        """Width of the vectors."""
        ...

    def tokenize(self, texts: Sequence[str]) -> Any:
        """What `embed_tokens` takes, of captions none of which is empty; another thread may call it meanwhile."""
        ...

    def embed_tokens(self, tokens: Any, on_batch: Callable[[int], object] = ...) -> Embedded:
        """Vectors of captions; `on_batch` is told, as it goes on, how many more are done."""
        ...

    def embed(self, texts: Sequence[str], on_batch: Callable[[int], object] = ...) -> Embedded:
        """Both in one."""
        ...


class CachedTeacher:
    """Texts -> vectors, from files where they are known.

    Args:
        folder: Of the files; one below it holds those of one teacher.
        fingerprint: Of one teacher.
        precision: In which it computes.
        load: Loads the teacher, which happens only for texts that are not known.
    """

    def __init__(
        self, folder: Union[str, Path], fingerprint: Fingerprint, precision: str, load: Callable[[], CaptionTeacher]
    ) -> None:
        text = json.dumps({**fingerprint.to_json(), 'precision': precision}, indent=2, sort_keys=True) + '\n'
        self.folder = Path(folder, xxhash.xxh64(text).hexdigest())
        self._fingerprint_text = text
        self._load = load
        self._teacher: Optional[CaptionTeacher] = None

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        """``(N, D)`` in float32 on the CPU, and how many texts were longer than the teacher reads and lost their end.

        Every rank calls this.  They share the texts that are not known; all vectors come to the first, which alone
        reads and writes files, and the others have none.  Killed, it goes on after the blocks that are done.
        """
        blocks = [list(texts[start:start + _BLOCK]) for start in range(0, len(texts), _BLOCK)]
        found: dict[int, Embedded] = {}

        def unknown() -> list[int]:
            known = ((i, load_block(self.folder, block)) for i, block in enumerate(blocks))
            found.update((i, embedded) for i, embedded in known if embedded is not None)
            return [i for i in range(len(blocks)) if i not in found]

        todo = agreed(unknown)
        done = sum(len(blocks[i]) for i in found)
        with tqdm(total=len(texts), initial=done, desc='embed captions', unit=' captions',
                  disable=not is_first()) as progress:
            for i, embedded in zip(todo, in_turns([blocks[i] for i in todo], partial(map, self._embed))):
                self._keep(blocks[i], embedded)
                found[i] = embedded
                progress.update(len(blocks[i]))
        embedded = [found[i] for i in sorted(found)]
        return rows(block.vectors for block in embedded), sum(block.truncated for block in embedded)

    def _embed(self, texts: Sequence[str]) -> Embedded:
        self._teacher = self._teacher or self._load()
        return self._teacher.embed(texts)

    def _keep(self, texts: Sequence[str], embedded: Embedded) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / 'fingerprint.json', self._fingerprint_text)
        keep_block(self.folder, texts, embedded)


class LLMTeacher:
    """An LLM as text encoder.

    Args:
        encoder: In evaluation mode, on its device.
        tokenizer: The encoder's.
        fingerprint: Of both.
        batch_tokens: Tokens per forward pass.
        precision: ``fp32``, or ``amp_bf16`` for autocast.
    """

    def __init__(self, encoder: TextEncoder, tokenizer: CaptionTokenizer, fingerprint: Fingerprint,
                 batch_tokens: int = 4096, precision: str = 'fp32') -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.batch_tokens = batch_tokens
        self.precision = precision

    @classmethod
    def from_folder(
        cls, folder: Union[str, Path], fingerprint: Optional[Fingerprint] = None, **options: Any
    ) -> 'LLMTeacher':
        """What stage 1 left in `folder`; its fingerprint is computed unless it is given."""
        return cls(*load_teacher(folder), fingerprint or teacher_fingerprint(folder), **options)

    @property
    def llm_embed_dim(self) -> int:
        return self.encoder.llm_embed_dim

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        return self.tokenizer.tokenize(texts)

    def embed_tokens(
        self, tokens: Sequence[Tokenized], on_batch: Callable[[int], object] = lambda texts: None
    ) -> Embedded:
        vectors = encode_tokens(self.encoder, tokens, self.batch_tokens, self.precision, on_batch=on_batch)
        return Embedded(vectors.cpu(), sum(len(text.ids) for text in tokens), sum(text.cut > 0 for text in tokens))

    def embed(self, texts: Sequence[str], on_batch: Callable[[int], object] = lambda texts: None) -> Embedded:
        return self.embed_tokens(self.tokenize(texts), on_batch)


class SentenceTransformerTeacher:
    """A sentence-transformers model, which brings its own pooling and batches.

    Args:
        name: Folder or hub name.
        batch_size: Captions per forward pass.
        precision: ``fp32``, or ``amp_bf16`` for autocast.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ConfigError: sentence-transformers is not installed.
        FileError, LoadError: There is no such model, it needs code that is not trusted, or its weights are not finite.
    """

    def __init__(self, name: str, batch_size: int = 64, precision: str = 'fp32',
                 trust_remote_code: bool = False) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ConfigError("sentence_transformer: install sentence-transformers (pip install "
                              "'.[sentence-transformers]')") from None
        with reading(f'sentence_transformer: {name}', 'a sentence-transformers model'):
            folder = name if Path(name).is_dir() else snapshot_download(name)
            if not trust_remote_code:
                _refuse_foreign_classes(Path(folder))
            self.model = SentenceTransformer(folder, trust_remote_code=trust_remote_code).eval()
        check_finite(self.model.state_dict(), f'sentence_transformer: {name}')
        self.batch_size = batch_size
        self.precision = precision
        weights = once_per_node(lambda: hash_files(folder), f'files in {folder}')
        self.fingerprint = Fingerprint.of(weights, {'max_length': self.model.max_seq_length,
                                                    'prompt': self.model.default_prompt_name or ''})

    @property
    def llm_embed_dim(self) -> int:
        return int(self.model.get_sentence_embedding_dimension() or 0)

    def tokenize(self, texts: Sequence[str]) -> Sequence[str]:
        """The captions as they are: `encode` tokenises them, and a tokenizer does not work for two threads at once."""
        return texts

    def embed_tokens(self, tokens: Sequence[str], on_batch: Callable[[int], object] = lambda texts: None) -> Embedded:
        return self.embed(tokens, on_batch)

    def embed(self, texts: Sequence[str], on_batch: Callable[[int], object] = lambda texts: None) -> Embedded:
        lengths = [len(ids) for ids in self.model.tokenizer(list(texts), truncation=False, verbose=False)['input_ids']]
        limit = self.model.max_seq_length or max(lengths)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.precision == 'amp_bf16'):
            vectors = self.model.encode(list(texts), batch_size=self.batch_size, show_progress_bar=False,
                                        convert_to_tensor=True)
        on_batch(len(texts))
        return Embedded(vectors.float().cpu(), sum(min(length, limit) for length in lengths),
                        sum(length > limit for length in lengths))


def _refuse_foreign_classes(folder: Path) -> None:
    """sentence-transformers runs the classes that a local folder names, whether it is trusted or not."""
    for path in sorted(folder.rglob('*.json')):
        content = read_json(path)
        for values in content if isinstance(content, list) else [content]:
            if not isinstance(values, dict):
                continue
            types = values.get('types')
            named = [values.get(key) for key in ('type', 'activation_function', 'tokenizer_class')]
            for name in [*named, *(types.values() if isinstance(types, dict) else ())]:
                if '.' in str(name) and not str(name).startswith(_TRUSTED_CLASSES):
                    raise FileError(f'{path}: names the class {name}, expected one of sentence-transformers; '
                                    'trust_remote_code=true lets it run')
        if path.name == 'config.json' and isinstance(content, dict):
            check_no_code({**content, 'auto_map': None}, path)


def build_caption_teacher(
    config: TeacherConfig, device: Device, fingerprint: Optional[Fingerprint] = None
) -> CaptionTeacher:
    """The teacher that the configuration names, on its device.

    Args:
        config: Which teacher.
        device: Where it runs.
        fingerprint: Of the folder `config.teacher`, if it is known.  Otherwise one rank per node reads the weights for
            it, and every rank has to call this.

    Raises:
        ConfigError: It names none or several.
        ValueError: The nodes have different teachers.
    """
    clip_text = config.clip_text if isinstance(config, ExtractConfig) else None
    named = [key for key in ('teacher', 'text_encoder', 'sentence_transformer') if getattr(config, key) is not None]
    named += ['clip_text'] * (clip_text is not None)
    if len(named) != 1:
        too = ', clip_text' if isinstance(config, ExtractConfig) else ''
        raise ConfigError(f'expected one of teacher (a folder that stage 1 wrote), text_encoder (any LLM){too} and '
                          f'sentence_transformer; got {" and ".join(named) or "none"}')
    if clip_text is not None:
        teacher = ClipTextTeacher(clip_text, config.batch_tokens, config.precision)
        device.module_to_device(teacher.model)
        return teacher
    if config.sentence_transformer is not None:
        teacher = SentenceTransformerTeacher(config.sentence_transformer, precision=config.precision,
                                             trust_remote_code=config.trust_remote_code)
        device.module_to_device(teacher.model)
        return teacher
    options = {'batch_tokens': config.batch_tokens, 'precision': config.precision}
    if config.teacher is not None:
        folder = config.teacher
        fingerprint = fingerprint or once_per_node(lambda: teacher_fingerprint(folder), f'teacher {folder}')
        teacher = LLMTeacher.from_folder(folder, fingerprint, **options)
    else:
        assert config.text_encoder is not None
        encoder, tokenizer = load_text_encoder(config.text_encoder)
        llm = config.text_encoder
        fingerprint = once_per_node(lambda: _llm_fingerprint(encoder, tokenizer, llm), f'LLM {llm.pretrained}')
        teacher = LLMTeacher(encoder, tokenizer, fingerprint, **options)
    teacher.encoder = device.module_to_device(teacher.encoder)
    return teacher


def _llm_fingerprint(encoder: TextEncoder, tokenizer: CaptionTokenizer, config: TextEncoderConfig) -> Fingerprint:
    """Fingerprint of an LLM wherever it came from, adapters included."""
    digest = xxhash.xxh64(str((tokenizer.header, tokenizer.footer, dataclasses.asdict(config)['gguf_file'])))
    hash_tensors(encoder.state_dict(), digest)
    return Fingerprint.of(digest.hexdigest(), encoding(config))
