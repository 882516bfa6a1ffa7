# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Files of weights and vectors, read without running code; every value that is read is finite."""

import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
from safetensors import safe_open

from llm2clip.files import FileError, reading
from llm2clip.remote_code.checks_llm2clip import check_finite

__all__ = ['Tensors', 'read_pickle', 'read_safetensors']


class Tensors(NamedTuple):
    """A safetensors file."""

    tensors: dict[str, torch.Tensor]
    about: dict[str, str]
    """Its metadata."""


def read_safetensors(path: Union[str, Path], expected: str = 'weights in safetensors') -> Tensors:
    """A safetensors file, whole and finite.

    Args:
        path: The file.
        expected: What it should hold, for messages.

    Raises:
        FileError: It is missing or damaged.
        LoadError: A value is not finite.
    """
    with reading(path, expected), safe_open(path, framework='pt') as file:
        found = Tensors({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118
    check_finite(found.tensors, path)
    return found


def read_pickle(path: Union[str, Path], expected: str = 'weights of torch.save') -> Any:
    """What `torch.save` wrote, if it is tensors in plain containers; other pickled objects are refused, unread.

    Raises:
        FileError: The file is missing or damaged, or holds other objects.
    """
    with reading(path, expected):
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            # What was refused, out of torch's long message.
            refused = re.search(r'GLOBAL (\S+)', str(error)) or re.search(r'WeightsUnpickler error: (.+)', str(error))
            raise FileError(f'{path}: holds more than weights, which could run code: '
                            f'{refused[1] if refused else "no pickle of tensors"}, expected {expected}') from None
