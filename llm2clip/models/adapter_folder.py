# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Build the text adapter, and write and load it as a folder."""

import dataclasses
from pathlib import Path
from typing import Any, Union

import torch.nn as nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from llm2clip.config import AdapterConfig
from llm2clip.errors import ConfigError
from llm2clip.io.files import read_json, reading, write_json
from llm2clip.io.folders import atomic_folder
from llm2clip.io.tensors import read_safetensors, write_safetensors
from llm2clip.modeling.adapter import make_adapter
from llm2clip.modeling.loaders import check_keys
from llm2clip.ranks import dist, is_first
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord

KIND = 'adapter of the text side'
WEIGHTS_FILE = 'adapter.safetensors'
DESCRIPTION_FILE = 'adapter.json'


def build_adapter(config: AdapterConfig, llm_embed_dim: int, embed_dim: int) -> nn.Module:
    """Build an adapter with new weights, ``(…, llm_embed_dim)`` -> ``(…, embed_dim)``.

    Raises:
        ConfigError: The adapter is an identity, and the widths differ.
    """
    if config.name == 'identity' and llm_embed_dim != embed_dim:
        raise ConfigError(f"{embed_dim} is not the width of the teacher's vectors, {llm_embed_dim}, "
                          'as the identity adapter needs', key='model.embed_dim', is_absolute=True)
    return make_adapter(llm_embed_dim, embed_dim, **dataclasses.asdict(config))


def save_adapter(
    adapter: nn.Module, config: AdapterConfig, embed_dim: int, record: TeacherRecord, target: Fingerprint,
    folder: Union[str, Path],
) -> None:
    """Write an adapter, sharded or not, with the fingerprints of its teacher (input) and of its target
    (output).  Every rank calls this; rank 0 writes the folder atomically."""
    state: Any = get_model_state_dict(adapter,
                                      options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_first():
        description = {'adapter': dataclasses.asdict(config), 'embed_dim': embed_dim,
                       'teacher': record.teacher.to_json(), 'target': target.to_json()}
        with atomic_folder(folder, KIND) as out:
            write_safetensors(out / WEIGHTS_FILE, state)
            write_json(out / DESCRIPTION_FILE, description)
    dist.barrier()


def load_adapter(
    adapter: nn.Module, config: AdapterConfig, embed_dim: int, teacher: Fingerprint, folder: Union[str, Path]
) -> None:
    """Load the weights that `save_adapter` wrote into an adapter for the text embeddings of `teacher`.

    Raises:
        ConfigError: The folder holds no adapter, or one with another configuration or teacher.
        FileError, LoadError: A file of the adapter is damaged.
    """
    path = Path(folder, DESCRIPTION_FILE)
    if not path.is_file():
        raise ConfigError(f'{folder} holds no adapter: it has no {DESCRIPTION_FILE} (train_inheritance '
                          'writes it when it ends)')
    description = read_json(path, dict)
    with reading(path, 'the configuration of an adapter, its embed_dim, and the fingerprint of its teacher'):
        saved = description['adapter'] | {'embed_dim': int(description['embed_dim'])}
        learned_from = Fingerprint.from_json(description['teacher'])
    expected = dataclasses.asdict(config) | {'embed_dim': embed_dim}
    for name, value in expected.items():
        if saved.get(name) != value:
            key = 'model.embed_dim' if name == 'embed_dim' else f'model.adapter.{name}'
            raise ConfigError(f'{value!r}, but {saved.get(name)!r} in the adapter {folder}', key,
                              is_absolute=True)
    learned_from.check(teacher, f'the adapter in {folder}', 'training')
    weights = Path(folder, WEIGHTS_FILE)
    state = read_safetensors(weights, 'the weights of an adapter').tensors
    check_keys(state, adapter.state_dict(), weights)
    adapter.load_state_dict(state)
