# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""YAML files and dotted overrides become one typed configuration, or an error that names the key.

Every recipe is called ``recipe.py A.yaml [B.yaml …] [key.sub=value …]``: files merge left to right, overrides last.
A dataset, set or model that is set to null is one that earlier files have and this run does without.
"""

import dataclasses
import difflib
import functools
import importlib.util
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from llm2clip.bfloat16 import computes_bfloat16
from llm2clip.config import ConfigError
from llm2clip.files import FileError, read_text, write_text

__all__ = ['check_values', 'load_config', 'package_folder', 'read_config', 'save_config', 'unwrap_optional']

T = TypeVar('T')
_ANY_TYPE = ConfigDict(arbitrary_types_allowed=True)


def package_folder(name: str) -> str:
    """The folder of an installed Python package, which is not imported.

    Raises:
        ConfigError: It is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f'${{package:{name}}}: the Python package {name} is not installed')
    return next(iter(spec.submodule_search_locations))


def _if_bf16(there: Any, otherwise: Any) -> Any:
    return there if computes_bfloat16() else otherwise


OmegaConf.register_resolver('package', package_folder, replace=True)
OmegaConf.register_resolver('if_bf16', _if_bf16, replace=True)


def load_config(schema: type[T], args: Sequence[str]) -> T:
    """Merge YAML files and dotted overrides into `schema`.

    Args:
        schema: One of the dataclasses of `llm2clip.config`.
        args: Paths of YAML files, merged left to right, and ``key.sub=value`` overrides, applied last.

    Returns:
        An instance of `schema` with every interpolation resolved.  ``${package:NAME}`` stands for the folder of an
        installed Python package, ``${if_bf16:A,B}`` for A where bfloat16 is fast and for B elsewhere.

    Raises:
        ConfigError: A file is missing or not a mapping; a key is unknown (with the nearest valid name), required and
            absent, or of the wrong type.  The message names the key and the file and line it comes from.
    """
    files = [arg for arg in args if '=' not in arg]
    overrides = [arg for arg in args if '=' in arg]
    if not files and not overrides:
        raise ConfigError('no configuration given: expected YAML files or key=value (--help lists the keys)')

    merged = OmegaConf.structured(schema)
    origins: dict[str, str] = {}
    for source, node, lines in [*map(_read_file, files), *map(_read_override, overrides)]:
        for key in lines:
            origins[key] = f'{source}:{lines[key]}' if lines[key] else source
        for key, value, expected in _misshapen(schema, OmegaConf.to_container(node), ''):
            raise ConfigError(f'{_where(key, origins)}: {value!r}, expected {expected}')
        for *path, name in _taken_away(schema, OmegaConf.to_container(node)):
            for mapping in (node, merged):
                holder: Any = mapping
                for key in path:
                    holder = None if holder is None else holder.get(key)
                if holder is not None:
                    holder.pop(name, None)
        try:
            merged = OmegaConf.unsafe_merge(merged, node)  # in place: neither is used again
        except OmegaConfBaseException as error:
            key = error.full_key or ''
            # Of a key in a list of mappings, OmegaConf leaves the path out.
            key = next((path for path in lines if path == key or path.endswith(f'].{key}')), key)
            fault = _unknown(key, error) if isinstance(error, ConfigKeyError) else _first_line(error)
            raise ConfigError(f'{_where(key, origins)}: {fault}') from None
        except TypeError as error:  # a list in place of a mapping, or the other way round, in a part's arguments
            raise ConfigError(f'{_where(list(lines)[-1], origins)}: {error}') from None

    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f'required but not set: {", ".join(missing)} (in {", ".join(args)})')
        values = OmegaConf.to_container(merged, resolve=True)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f'{_where(error.full_key or "", origins)}: {_first_line(error)}') from None
    _check_secrets(values, '', origins)
    check_values(schema, values, where=lambda key: _where(key, origins))
    check_together = getattr(config, 'check', None)
    if check_together is not None:
        check_together()
    return config  # type: ignore[return-value]


def check_values(
    kind: Any, values: Any, key: str = '', where: Callable[[str], str] = str, strict: bool = False
) -> None:
    """Compare values with a type, and with the ranges that stand beside it.

    Args:
        kind: One of the dataclasses of `llm2clip.config`, or any other type.
        values: Those of a dataclass as nested mappings and lists.
        key: Where they stand in the configuration; empty for the whole.
        where: Dotted key -> what a message calls it.
        strict: A text in digits is no number.

    Raises:
        ConfigError: One is out of its range; names the key, the value and the range.
    """
    try:
        adapter = _adapter(kind) if is_dataclass(kind) else TypeAdapter(kind, config=_ANY_TYPE)
        adapter.validate_python(values, strict=strict)
    except ValidationError as error:
        faults: dict[str, list[str]] = {}
        for fault in error.errors(include_url=False):
            what, expected = _describe(fault, key, where)
            faults.setdefault(what, []).append(expected)
        raise ConfigError('; '.join(f'{what}, expected {" or ".join(expected)}'
                                    for what, expected in faults.items())) from None


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _describe(error: Any, key: str, where: Callable[[str], str]) -> tuple[str, str]:
    """What pydantic says about one value, with our names for it: key and value, and what was expected."""
    parts = [part for part in error['loc'] if part != '[key]']
    key = key or ''.join(f'[{part}]' if isinstance(part, int) else f'.{part}' for part in parts).removeprefix('.')
    value = parts[-1] if len(parts) < len(error['loc']) else error['input']
    expected = str(error['ctx']['error']) if error['type'] == 'value_error' else _expected(error['msg'])
    return f'{where(key)}: {value!r}', expected


def _expected(message: str) -> str:
    """What pydantic wants, out of its whole sentence."""
    for ours, pattern in (('', r'^\w+ should (be|have) (a valid )?'), ('', r' after validation, not \d+'),
                          ('one value more', r'^Field required'), ('', r', unable to .*'),
                          ('at least', 'greater than or equal to'), ('at most', 'less than or equal to')):
        message = re.sub(pattern, ours, message)
    return message


def read_config(schema: type[T], folder: Union[str, Path]) -> T:
    """The `config.yaml` that a run of `schema` left in its folder.

    Raises:
        ConfigError: There is none, it is of another recipe, or asks for values from outside, as from the environment.
    """
    path = Path(folder) / 'config.yaml'
    if not path.is_file():
        raise ConfigError(f'{folder} is not the folder of a run: it has no config.yaml')
    if (resolver := re.search(r'\$\{[^}\n]*:[^}\n]*\}?', read_text(path, 'the configuration of a run'))) is not None:
        raise ConfigError(f'{path}: {resolver[0]} asks for a value from outside, expected none in what a run wrote')
    return load_config(schema, [str(path)])


def save_config(config: Any, folder: Union[str, Path]) -> None:
    """Write the resolved configuration to `folder`/config.yaml."""
    path = Path(folder) / 'config.yaml'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def _read_file(path: str) -> tuple[str, Any, dict[str, int]]:
    try:
        text = read_text(path, 'a YAML file or key=value')
    except FileError as error:
        raise ConfigError(str(error)) from None
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        node = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f'{path}: not valid YAML: {" ".join(str(error).split())}') from None
    if tree is None:
        return path, OmegaConf.create({}), {}
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f'{path}: expected a mapping of keys to values at the top')
    return path, node, dict(_lines(tree, ''))


def _read_override(text: str) -> tuple[str, Any, dict[str, int]]:
    key, value = text.split('=', 1)
    try:
        # A shell hands `key=''` on as `key=`, which OmegaConf would read as null.
        node = OmegaConf.from_dotlist([text if value else f"{key}=''"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f'override {text}: {error}') from None
    parts = key.split('.')
    return 'command line', node, {'.'.join(parts[:n + 1]): 0 for n in range(len(parts))}


def _lines(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    """Dotted key -> line, for every key below a node."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            key = f'{prefix}{key_node.value}'
            yield key, key_node.start_mark.line + 1
            yield from _lines(value, f'{key}.')
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _lines(item, f'{prefix[:-1]}[{i}].')


def _misshapen(kind: Any, value: Any, key: str) -> Iterator[tuple[str, Any, str]]:
    """Key, value and what was expected, wherever there is no mapping or list although the type is one.

    Of some of them, OmegaConf does not name the key.
    """
    kind = unwrap_optional(kind)
    if value is None or isinstance(value, str) and (value == MISSING or value.startswith('${')):
        return
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            yield key, value, 'a list'
            return
        below = [(f'[{i}]', typing.get_args(kind)[0], item) for i, item in enumerate(value)]
    elif is_dataclass(kind) or typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            yield key, value, 'a mapping of keys to values'
            return
        kinds = typing.get_type_hints(kind) if is_dataclass(kind) else dict.fromkeys(value, typing.get_args(kind)[1])
        below = [(f'.{name}', kinds[name], item) for name, item in value.items() if name in kinds]
    else:
        return
    for name, kind_below, item in below:
        yield from _misshapen(kind_below, item, f'{key}{name}'.removeprefix('.'))


def _taken_away(kind: Any, value: Any) -> Iterator[tuple[str, ...]]:
    """Path of each entry that is null, in mappings whose entries have a type: the run does without it."""
    kind = unwrap_optional(kind)
    if not isinstance(value, dict):
        return
    kinds: dict[str, Any] = {}
    if is_dataclass(kind):
        kinds = typing.get_type_hints(kind)
    elif typing.get_origin(kind) is dict and is_dataclass(entry := typing.get_args(kind)[1]):
        yield from ((name,) for name, item in value.items() if item is None)
        kinds = dict.fromkeys(value, entry)
    for name, item in value.items():
        yield from ((name, *path) for path in _taken_away(kinds.get(name), item))


def _unknown(key: str, error: ConfigKeyError) -> str:
    """What may have been meant by a key that OmegaConf does not find in a dataclass."""
    assert dataclasses.is_dataclass(error.object_type)
    prefix, name = key.removesuffix(str(error.key)), str(error.key)
    names = [field.name for field in dataclasses.fields(error.object_type)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f'unknown key; did you mean {prefix}{near[0]}?' if near else f'unknown key; valid keys: {", ".join(names)}'


def _check_secrets(node: Any, key: str, origins: dict[str, str]) -> None:
    """Raise for a URL with a password, which every run would write into its config.yaml and its messages."""
    if isinstance(node, dict):
        for name, value in node.items():
            _check_secrets(value, f'{key}.{name}' if key else str(name), origins)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            _check_secrets(value, f'{key}[{i}]', origins)
    elif isinstance(node, str) and re.match(r'\w+://[^/@]*:[^/@]*@', node):
        raise ConfigError(f'{_where(key, origins)}: put no password into a URL; Streaming reads credentials from the '
                          'environment or, for SFTP, the key file that COMPOSER_SFTP_KEY_FILE names')


def unwrap_optional(hint: Any) -> Any:
    """``X`` of ``Optional[X]``; any other type as it is."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (Union, types.UnionType) and type(None) in args:
        return next(arg for arg in args if arg is not type(None))
    return hint


def _where(key: str, origins: dict[str, str]) -> str:
    return f'{key} ({origins[key]})' if key in origins else key


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, ConfigError) else error
    return str(cause).splitlines()[0]
