# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Files of weights and vectors, read without running code."""

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Optional, Union

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from llm2clip.errors import FileError
from llm2clip.io.files import atomic_write, reading
from llm2clip.modeling.loaders import check_finite

# Metadata is one entry: safetensors writes several in random order, and files of equal
# teachers have to be equal.
_METADATA, _HASH = 'llm2clip', 'xxh64'


class Tensors(NamedTuple):
    """Content of a safetensors file."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def read_safetensors(path: Union[str, Path], expected: str = 'weights in safetensors') -> Tensors:
    """Read a safetensors file, and check its hash and that all values are finite.

    Raises:
        FileError: It is missing or damaged, or its values do not match the recorded hash.
        LoadError: A value is not finite.
    """
    with reading(path, expected), safe_open(path, framework='pt') as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
        metadata |= json.loads(metadata.pop(_METADATA, '{}'))
        content = Tensors(values, metadata)
    recorded_hash = content.metadata.get(_HASH)
    if recorded_hash is not None and recorded_hash != hash_tensors(values):
        raise FileError(f'is damaged (its values have another hash), expected {expected}', path)
    check_finite(values, path)
    return content


@contextmanager
def open_weights(folder: Union[str, Path]) -> Iterator[Callable[[str], torch.Tensor]]:
    """Yield a function name -> tensor, which reads the weights that transformers saved in a folder on demand.

    It raises a FileError if a file is damaged, or has no weight of that name.
    """
    expected = 'weights in safetensors'
    with ExitStack() as files:
        file_of: dict[str, Any] = {}
        for path in sorted(Path(folder).glob('model*.safetensors')):
            with reading(path, expected):
                file: Any = files.enter_context(safe_open(path, framework='pt'))
                file_of.update(dict.fromkeys(file.keys(), file))

        def read(name: str) -> torch.Tensor:
            with reading(f'{folder}: {name}', expected):
                return file_of[name].get_tensor(name)

        yield read


def write_safetensors(
    path: Union[str, Path], tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a safetensors file atomically, with a hash of its values in its metadata."""
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    with atomic_write(path) as partial:
        entries = dict(metadata) | {_HASH: hash_tensors(tensors)}
        save_file(tensors, partial, {_METADATA: json.dumps(entries)})


def published_state(model: Any) -> dict[str, torch.Tensor]:
    """Return a transformers model's weights by the names that versions 4 and 5 both read.

    In 4 and in published weights, CLIP's and SigLIP's towers are a submodule of their class; in 5, the class.
    """
    state = model.state_dict()
    tower = re.fullmatch('(?:clip|siglip2?|chinese_clip|mlcd)_(vision|text)_model', model.config.model_type)
    if tower is None:
        return state
    prefix = f'{tower[1]}_model.'
    if any(name.startswith(prefix) for name in state):
        return state
    return {prefix + name: value for name, value in state.items()}


def hash_tensors(tensors: Mapping[str, torch.Tensor], digest: Optional[xxhash.xxh64] = None) -> str:
    """Return the hex digest of the names and bytes of tensors, in any order."""
    digest = digest or xxhash.xxh64()
    for name, value in sorted(tensors.items()):
        digest.update(name)
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_pickle(path: Union[str, Path]) -> Any:
    """Return what `torch.save` wrote, if it is tensors in plain containers; refuse other pickled objects.

    Raises:
        FileError: The file is missing or damaged, or holds other objects.
    """
    expected = 'weights of torch.save'
    with reading(path, expected):
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            # torch's message is long, and advises to run the code.
            refused = re.search(r'GLOBAL (\S+)', str(error))
            reason = refused[1] if refused else 'no pickle of tensors'
            raise FileError(f'holds more than weights, which could run code: {reason}, expected {expected}',
                            path) from None
