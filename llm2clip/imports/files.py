# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Weights from a file or a folder, read without running code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

import torch

from llm2clip.config import ConfigError
from llm2clip.files import FileError, read_json, reading
from llm2clip.remote_code.checks_llm2clip import check_finite
from llm2clip.weights import read_pickle, read_safetensors

__all__ = ['read_weights']

# Of a folder, the first that is there.
_NAMES = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')
# Where trainers put the weights beside their own state.
_WRAPPERS = ('model', 'module', 'state_dict')


def read_weights(path: Union[str, Path], key: str) -> dict[str, torch.Tensor]:
    """Parameter name -> tensor, floating ones in float32.

    Args:
        path: A `.safetensors` file or one of `torch.save`, or a folder as transformers writes it.
        key: Where the path stands in the configuration, for messages.

    Raises:
        ConfigError: There are none.
        FileError, LoadError: A file is damaged, holds more than data, or values that are not finite.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in _NAMES if (path / name).is_file()), None)
        if found is None:
            raise ConfigError(f'{key}: the folder {path} has no weights; expected one of {", ".join(_NAMES)}')
        path = found
    if not path.is_file():
        raise ConfigError(f'{key}: there is no file or folder {path}')
    state = _read_shards(path) if path.name.endswith('.index.json') else _read_file(path)
    check_finite(state, path)
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """The weights that an index names, each from its file beside the index."""
    with reading(index, 'weight_map, parameter name -> file'):
        weight_map = dict(read_json(index, dict)['weight_map'])
        shards = sorted({Path(shard).name for shard in weight_map.values()})
    state = {name: value for shard in shards for name, value in _read_file(index.parent / shard).items()}
    if absent := sorted(weight_map.keys() - state.keys()):
        raise FileError(f'{index}: names {absent[0]}, expected it in {weight_map[absent[0]]}')
    return state


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    content: Any = read_safetensors(path).tensors if path.suffix == '.safetensors' else read_pickle(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(
            isinstance(value, torch.Tensor) for value in content.values()):
        raise FileError(f'{path}: is no mapping of parameter names to tensors, expected weights')
    # DistributedDataParallel's.
    prefix = 'module.' if all(name.startswith('module.') for name in content) else ''
    return {name.removeprefix(prefix): value for name, value in content.items()}
