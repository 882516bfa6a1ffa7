# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What stage 1 leaves behind: the teacher as a Hugging Face folder, and its hash."""

import dataclasses
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional, Union

import torch
import xxhash
from composer.utils import dist
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from llm2clip.config import ConfigError, LoraConfig, TextEncoderConfig
from llm2clip.config.files import check_values
from llm2clip.config.ranges import WeightType
from llm2clip.files import FileError, read_json, write_json
from llm2clip.folders import atomic_folder
from llm2clip.remote_code.checks_llm2clip import TEACHER_SUFFIXES, load_config, read_encoding
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer, TextEncoder
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.teacher.llm import (
    apply_lora_apart,
    build_text_encoder,
    cast_weights,
    load_caption_tokenizer,
    load_llm,
    load_text_encoder,
    save_adapter,
    save_lora,
)

__all__ = [
    'LORA_KIND', 'ENCODER_FILE', 'KIND', 'encoding', 'hash_files', 'load_teacher', 'save_teacher', 'teacher_config',
    'teacher_fingerprint', 'teacher_width',
]

CACHE_VARIABLE = 'LLM2CLIP_CACHE'
ENCODER_FILE = 'text_encoder.json'
LORA_FILE = 'lora.safetensors'
# What changed so short a time ago may change again without another time stamp: a second on some network disks.
_SETTLED_NS = 2_000_000_000
KIND, LORA_KIND = 'teacher of captions', 'LoRA adapter'


def save_teacher(
    encoder: TextEncoder, tokenizer: CaptionTokenizer, lora: Optional[LoraConfig], folder: Union[str, Path],
    lora_folder: Union[str, Path, None] = None,
) -> None:
    """Write an encoder, which may be sharded, as a Hugging Face folder plus how it turns captions into vectors.

    LoRA is merged in float32, and the weights are saved in it: a narrower type would round away a part of LoRA.  The
    LoRA weights lie beside them, so that `load_teacher` can hold the LLM in a narrower type all the same.  Every rank
    calls this; rank 0 writes.  A folder appears under its name only when it is complete.

    Args:
        encoder: The encoder.
        tokenizer: The encoder's.
        lora: As the encoder was built with.
        folder: Where to.
        lora_folder: Where the LoRA weights alone go, as peft loads them into the LLM with the `adapters` merged.
    """
    state = get_model_state_dict(encoder, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_global_rank() == 0:
        # peft cannot merge shards: an unsharded model takes over the gathered weights, without a second copy of them.
        whole = build_text_encoder(encoder.config, lora, on_meta=True)
        whole.load_state_dict(state, assign=True)
        llm = whole.llm
        if isinstance(llm, PeftModel) and lora_folder is not None:
            with atomic_folder(lora_folder, LORA_KIND) as out:
                save_adapter(llm, encoder.config.pretrained, out)
        with atomic_folder(folder, KIND) as out:
            if isinstance(llm, PeftModel):
                assert lora is not None
                save_lora(llm, lora, out / LORA_FILE)
                cast_weights(llm, torch.float32)
                # Not in place: on a CPU the gathered weights are still those of the encoder.
                llm = llm.merge_and_unload(safe_merge=True)
            llm.save_pretrained(out, safe_serialization=True)
            tokenizer.tokenizer.save_pretrained(out)
            write_json(out / ENCODER_FILE, encoding(encoder.config))
    dist.barrier()


def encoding(config: TextEncoderConfig) -> dict[str, Any]:
    """How an encoder turns captions into vectors, without where its weights lie."""
    unsaid = ['pretrained', 'gguf_file', 'adapters', 'attn_implementation', 'trust_remote_code', 'type']
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in unsaid}


def teacher_config(folder: Union[str, Path]) -> TextEncoderConfig:
    """How the teacher in `folder` was trained to encode.

    Raises:
        ConfigError: `save_teacher` did not write the folder, or a value is out of range.
        LoadError: Its file is damaged, or says more or less than how captions are encoded.
    """
    path = Path(folder) / ENCODER_FILE
    if not path.is_file():
        raise ConfigError(f'{folder} is not a teacher: it has no {ENCODER_FILE} (stage 1 writes it when it ends)')
    config = TextEncoderConfig(pretrained=str(folder), **read_encoding(path))
    check_values(TextEncoderConfig, dataclasses.asdict(config), where=lambda key: f'{path}: {key}')
    return config


def teacher_fingerprint(folder: Union[str, Path]) -> Fingerprint:
    """What decides the vectors of the teacher in `folder`; its weights are read, unless `hash_files` knows them."""
    return Fingerprint.of(hash_files(folder, exclude_ids=ENCODER_FILE), encoding(teacher_config(folder)))


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


def teacher_width(folder: Union[str, Path]) -> int:
    """Size of the vectors of the teacher in `folder`, without its weights."""
    return load_config(teacher_config(folder).pretrained).hidden_size


def load_teacher(folder: Union[str, Path], dtype: Optional[WeightType] = None) -> tuple[TextEncoder, CaptionTokenizer]:
    """The frozen encoder that `save_teacher` wrote, with weights of `dtype`, or unset, of the type of the training.

    In a narrower type than float32, LoRA is applied apart from the weights, as in training.
    """
    config = teacher_config(folder)
    config.dtype = dtype or config.dtype
    lora = Path(folder, LORA_FILE)
    if config.dtype == 'float32' or not lora.is_file():
        return load_text_encoder(config)
    llm = apply_lora_apart(load_llm(config), folder, lora)
    return TextEncoder(llm, config).eval().requires_grad_(False), load_caption_tokenizer(config)
