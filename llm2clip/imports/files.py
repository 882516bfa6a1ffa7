# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Weights from a file or a folder, read without running code."""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llm2clip.config import ConfigError

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
        ConfigError: There are no weights, or the file holds more than data.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in _NAMES if (path / name).is_file()), None)
        if found is None:
            raise ConfigError(f'{key}: the folder {path} has no weights; expected one of {", ".join(_NAMES)}')
        path = found
    if not path.is_file():
        raise ConfigError(f'{key}: there is no file or folder {path}')
    if path.name.endswith('.index.json'):
        shards = sorted(set(json.loads(path.read_text())['weight_map'].values()))
        state = {name: value for shard in shards for name, value in read_weights(path.parent / shard, key).items()}
    else:
        state = _read_file(path, key)
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _read_file(path: Path, key: str) -> dict[str, torch.Tensor]:
    try:
        content: Any = load_file(path) if path.suffix == '.safetensors' else torch.load(
            path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        # What was refused, out of torch's long message.
        refused = re.search(r'GLOBAL (\S+)', str(error)) or re.search(r'WeightsUnpickler error: (.+)', str(error))
        raise ConfigError(f'{key}: {path} holds more than weights, which could run code: '
                          f'{refused[1] if refused else "no pickle of tensors"}') from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ConfigError(f'{key}: {path} cannot be read: {error}') from None
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(
            isinstance(value, torch.Tensor) for value in content.values()):
        raise ConfigError(f'{key}: {path} is no mapping of parameter names to tensors')
    # DistributedDataParallel's.
    prefix = 'module.' if all(name.startswith('module.') for name in content) else ''
    return {name.removeprefix(prefix): value for name, value in content.items()}
