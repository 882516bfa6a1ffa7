# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""YAML files and dotted overrides -> one typed configuration, or an error that names the key; and runs' own files.

Null removes an entry of a mapping, such as a dataset, a model or a logger, that an earlier file added.  Numbers and
booleans follow YAML 1.2.  Where a string is expected, the text of the file is kept unchanged.
"""

import difflib
import functools
import importlib.util
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar, Union

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf._yaml import get_yaml_loader
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from llm2clip.config.models import PlanConfig
from llm2clip.config.ranges import Component, ConfigError
from llm2clip.config.teacher import OneTeacher, teacher_types
from llm2clip.config.training import TrainConfig
from llm2clip.device import computes_bfloat16
from llm2clip.files import FileError, read_text, reading, write_text

T = TypeVar('T')
C = TypeVar('C', bound=TrainConfig)
_ANY_TYPE = ConfigDict(arbitrary_types_allowed=True)
_COMMAND_LINE = 'command line'
# Anything but host and port: a user, or a secret, even if it contains a slash.  SFTP needs the user name.  A query
# (`?sig=…`) signs the URL.
_SECRET = re.compile(r'://(?!((?<=sftp://)[^\s/?#:@]+@)?(\[[\w:.]*\]|[^\s/?#:@]*)(:\d*)?([\s/?#]|$))'
                     r'|://[^\s?#]*\?[^\s#]*=')
_STR, _MAP, _NULL, _MERGE = (f'tag:yaml.org,2002:{name}' for name in ('str', 'map', 'null', 'merge'))


class _Loader(get_yaml_loader()):
    """OmegaConf's loader, which refuses duplicate keys and endless aliases, with the scalars of YAML 1.2.  In YAML 1.1,
    `1:30` is 90, `010` is 8 and `no` is false."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != _MERGE:
                name.tag = _STR
        super().flatten_mapping(node)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    (_NULL, 'null|Null|NULL|~|', ['', *'nN~']),
    (_MERGE, '<<', ['<']),
    ('tag:yaml.org,2002:bool', 'true|True|TRUE|false|False|FALSE', [*'tTfF']),
    # A number with a leading zero is a string, which pydantic converts where a number is expected.
    ('tag:yaml.org,2002:int', '[-+]?(0|[1-9][0-9]*)', [*'-+0123456789']),
    ('tag:yaml.org,2002:float', r'[-+]?([0-9]+[eE][-+]?[0-9]+|([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?)'
     r'|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)', [*'-+.0123456789']),
):
    _Loader.add_implicit_resolver(_tag, re.compile(f'({_pattern})$'), _first)


def package_folder(name: str) -> str:
    """Return the folder of a Python package without importing it; raise a ConfigError if it is not installed."""
    # For a dotted name, `find_spec` would import the parent package.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f'${{package:{name}}}: the Python package {name} is not installed')
    return next(iter(spec.submodule_search_locations))


OmegaConf.register_resolver('package', package_folder, replace=True)
OmegaConf.register_resolver('if_bf16', lambda fast, slow: fast if computes_bfloat16() else slow, replace=True)


def load_config(schema: type[T], args: Sequence[str]) -> T:
    """Merge YAML files, left to right, and then ``key.sub=value`` into one of the dataclasses of `llm2clip.config`.

    ``${package:NAME}`` becomes the folder of an installed Python package.  ``${if_bf16:A,B}`` becomes A where bfloat16
    is fast, and B elsewhere.

    Raises:
        ConfigError: A file is missing or not a mapping; a key is unknown (with the nearest valid name), required and
            absent, or of the wrong type.  The message names the key and the file and line it comes from.
    """
    if not args:
        raise ConfigError('no configuration given: expected YAML files or key=value (--help lists the keys)')
    try:
        sources = [_read_file(arg) for arg in args if '=' not in arg]
        for text in (arg for arg in args if '=' in arg):
            key, value = text.split('=', 1)
            # A shell passes `key=''` as `key=`, which YAML would read as null.
            tree = _parse(value or "''", f'{key} ({_COMMAND_LINE})') or yaml.ScalarNode(_NULL, '')
            # A name with a dot stands in brackets: `models[llama3.1_8b].run`.
            for name in reversed(re.split(r'\.(?![^\[]*\])|(?=\[)', key)):
                name = name.strip('[]')
                tree = yaml.MappingNode(_MAP, [(yaml.ScalarNode(_STR, name), tree)])
            sources.append((_COMMAND_LINE, tree))
    except FileError as error:
        raise ConfigError(str(error)) from None
    return _merge(schema, sources)


def _merge(schema: type[T], sources: Sequence[tuple[str, yaml.Node]]) -> T:
    merged: Any = OmegaConf.structured(schema)
    origins: dict[str, str] = {}

    def where(key: str) -> str:
        return f'{key} ({origins[key]})' if key in origins else key

    for source, tree in sources:
        keys = []
        for path, kind, node, at in _nodes(schema, tree):
            keys.append(key := '.'.join(path).replace('.[', '['))
            origins[key] = source if source == _COMMAND_LINE else f'{source}:{at.start_mark.line + 1}'
            if node is None or teacher_types(kind) and not isinstance(node, yaml.ScalarNode):
                _forget_earlier(merged, path, kind, node)
            elif (expected := _misshapen(kind, node)) is not None:
                raise ConfigError(f'{where(key)}: {_value(node)!r}, expected {expected}')
            elif (kind is str or teacher_types(kind)) and isinstance(node, yaml.ScalarNode) and node.tag != _NULL:
                node.tag = _STR
        try:
            # It works in place, which is safe because neither argument is used again.
            merged = OmegaConf.unsafe_merge(merged, OmegaConf.create(_value(tree)))
        except OmegaConfBaseException as error:
            key, fault = error.full_key or '', _first_line(error)
            # For a key in a list of mappings, OmegaConf omits the path.
            key = next((path for path in keys if path == key or path.endswith(f'].{key}')), key)
            if isinstance(error, ConfigKeyError) and is_dataclass(error.object_type):
                names = [field.name for field in fields(error.object_type)]
                near = difflib.get_close_matches(str(error.key), names, n=1, cutoff=0.5)
                fault = f'unknown key; valid keys: {", ".join(names)}' if not near else \
                    f'unknown key; did you mean {key.removesuffix(str(error.key))}{near[0]}?'
            raise ConfigError(f'{where(key)}: {fault}') from None
        except TypeError as error:  # a list instead of a mapping, or the reverse, in a part's arguments
            raise ConfigError(f'{where(keys[-1])}: {error}') from None

    try:
        if missing := sorted(OmegaConf.missing_keys(merged)):
            files = ', '.join(dict.fromkeys(source for source, _ in sources))
            raise ConfigError(f'required but not set: {", ".join(missing)} (in {files})')
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f'{where(error.full_key or "")}: {_first_line(error)}') from None
    for key, value in leaves(values):
        if '\0' in str(value):
            raise ConfigError(f'{where(key)}: {value!r}, expected a text without NUL characters')
        # Every run writes its configuration into config.yaml, and values into messages.
        if isinstance(value, str) and _SECRET.search(value):
            raise ConfigError(f'{where(key)}: put no password or token into a URL; Streaming reads credentials '
                              'from the environment or, for SFTP, the key file that COMPOSER_SFTP_KEY_FILE names')
    config = check_values(schema, values, where=where)
    if (check_together := getattr(config, 'check', None)) is not None:
        check_together()
    return config


def _forget_earlier(merged: DictConfig, path: Sequence[str], kind: Any, node: Optional[yaml.Node]) -> None:
    """Remove an earlier value that a null entry or a teacher of another type replaces, instead of merging with it."""
    holder: Any = merged
    for name in path[:-1]:
        holder = holder.get(name) if isinstance(holder, DictConfig) else None
    if not isinstance(holder, DictConfig):
        return
    if node is None and _has_entries(kind):
        holder[path[-1]] = {}
    elif node is None:
        holder.pop(path[-1], None)
    else:
        container: Any = OmegaConf.to_container(holder)
        earlier, later = container.get(path[-1]), _value(node)
        if not (isinstance(earlier, dict) and isinstance(later, dict)
                and earlier.get('type') in (None, later.get('type', earlier.get('type')))):
            holder[path[-1]] = None


def check_values(
    kind: Any, values: Any, key: str = '', where: Callable[[str], str] = str, strict: bool = False
) -> Any:
    """Return values as a type reads them; raise a ConfigError if they have another type or are out of its range.

    Args:
        kind: A type, or one of the dataclasses of `llm2clip.config`.
        values: For a dataclass, nested mappings and lists.
        key: Their key in the configuration; empty for the whole configuration.
        where: Dotted key -> its name in messages.
        strict: Do not convert types, such as a string of digits to a number.
    """
    try:
        adapter = _adapter(kind) if is_dataclass(kind) else TypeAdapter(kind, config=_ANY_TYPE)
        return adapter.validate_python(values, strict=strict)
    except ValidationError as error:
        faults: dict[str, list[str]] = {}
        for fault in error.errors(include_url=False):
            # If the key of a mapping is invalid itself, pydantic appends `[key]` to the location.
            parts = [part for part in fault['loc'] if part != '[key]' and not str(part).startswith('type:')]
            at = key or ''.join(f'[{part}]' if isinstance(part, int) else f'.{part}' for part in parts)
            value = parts[-1] if '[key]' in fault['loc'] else fault['input']
            expected = str(fault['ctx']['error']) if fault['type'] == 'value_error' else fault['msg']  # pyright: ignore
            what = f'{where(at.removeprefix("."))}: {value!r}'
            if fault['type'] == 'missing' and isinstance(parts[-1], str):
                what, expected = f'{where(at.removeprefix("."))}: required but not set', 'a value'
            elif fault['type'] == 'unexpected_keyword_argument':  # for other dataclasses, OmegaConf refuses it
                names = [field.name for field in fields(teacher_types(OneTeacher)[str(fault['loc'][-2])])]
                what, expected = f'{where(at.removeprefix("."))}: unknown key', f'one of {", ".join(names)}'
            for ours, pattern in (('', r'^\w+ should (be|have) (a valid )?'), ('', r' after validation, not \d+'),
                                  ('one value more', r'^Field required'), ('', r', unable to .*'),
                                  ('at least', 'greater than or equal to'), ('at most', 'less than or equal to')):
                expected = re.sub(pattern, ours, expected)
            faults.setdefault(what, []).append(expected)
        raise ConfigError('; '.join(f'{what}, expected {" or ".join(expected)}'
                                    for what, expected in faults.items())) from None


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def read_config(schema: type[T], folder: Union[str, Path]) -> T:
    """Return the `config.yaml` that a run of `schema` wrote into its folder.

    Raises:
        ConfigError: There is none, or it is of another recipe, or an error of `read_resolved`.
        FileError: As for `read_resolved`.
    """
    path = Path(folder) / 'config.yaml'
    if not path.is_file():
        raise ConfigError(f'{folder} is not the folder of a run: it has no config.yaml')
    read_resolved(path)
    return _merge(schema, [_read_file(str(path))])


def read_resolved(path: Union[str, Path]) -> Any:
    """Return the content of a YAML file of a run.  Raise a ConfigError if a value is an interpolation (``${…}``), as of
    an environment variable, and a FileError if the file is missing or not YAML."""
    text = read_text(path, 'YAML')
    with reading(path, 'YAML'):
        for event in yaml.parse(text, _Loader):
            if isinstance(event, yaml.ScalarEvent) and '${' in event.value:
                raise ConfigError(f'{path}:{event.start_mark.line + 1}: {event.value!r} asks for another value, '
                                  'expected none in what a run wrote')
        return yaml.load(text, _Loader)


def save_config(config: Any, folder: Union[str, Path]) -> None:
    """Write the resolved configuration to `folder`/config.yaml."""
    write_text(Path(folder) / 'config.yaml', OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))


def _read_file(path: str) -> tuple[str, yaml.Node]:
    tree = _parse(read_text(path, 'a YAML file or key=value'), path)
    if tree is not None and not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f'{path}: expected a mapping of keys to values at the top')
    return path, tree or yaml.MappingNode(_MAP, [])


def _parse(text: str, where: str) -> Optional[yaml.Node]:
    with reading(where, 'YAML'):
        yaml.load(text, _Loader)  # to check keys and aliases; it flattens its nodes, so they are not used
        return yaml.compose(text, _Loader)


def _value(node: yaml.Node) -> Any:
    return _Loader('').construct_document(node)


def _nodes(
    kind: Any, tree: yaml.Node, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Optional[yaml.Node], yaml.Node]]:
    """Yield path, type (Any if the schema has none), node and key (or list entry) of everything below a node.

    A null mapping of typed entries, or a null entry of one, is removed from the tree and yielded with node None.
    """
    below: list[tuple[str, Any, Optional[yaml.Node], yaml.Node]] = []
    if isinstance(tree, yaml.SequenceNode):
        entry = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind if teacher_types(kind) else Any
        below = [(f'[{i}]', entry, item, item) for i, item in enumerate(tree.value)]
    elif isinstance(tree, yaml.MappingNode):
        of_types = teacher_types(kind).values() or ([kind] if is_dataclass(kind) else [])
        kinds = {name: hint for one in of_types for name, hint in typing.get_type_hints(one, None, None, True).items()}
        entry = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else Any
        for name, value in list(tree.value):
            inner = _bare(kinds.get(name.value, entry))
            if value.tag == _NULL and (_has_entries(kind) or _has_entries(inner)):
                tree.value.remove((name, value))
                value = None
            below.append((name.value, inner, value, name))
    for part, inner, node, at in below:
        inner = _bare(unwrap_optional(_bare(inner)))
        yield (*path, part), inner, node, at
        if node is not None:
            yield from _nodes(inner, node, (*path, part))


def _has_entries(kind: Any) -> bool:
    """Whether a type is a mapping of typed entries, not the arguments of a part, which may be null."""
    return typing.get_origin(kind) is dict and kind != Component


def _misshapen(kind: Any, node: yaml.Node) -> Optional[str]:
    """Return the expected shape if a mapping or list is expected but not given; OmegaConf may not name the key."""
    if node.tag == _NULL or node.value == MISSING or node.value[:2] == '${':
        return None
    if typing.get_origin(kind) is list:
        return None if isinstance(node, yaml.SequenceNode) else 'a list'
    is_mapping = is_dataclass(kind) or typing.get_origin(kind) is dict
    return 'a mapping of keys to values' if is_mapping and not isinstance(node, yaml.MappingNode) else None


def leaves(node: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every leaf of nested mappings and lists."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, f'{key}.{name}' if key else str(name))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from leaves(value, f'{key}[{i}]')
    else:
        yield key, node


def _bare(hint: Any) -> Any:
    """Strip `Annotated` from a type, unless it defines how a text encoder is read."""
    return hint.__origin__ if typing.get_origin(hint) is Annotated and not teacher_types(hint) else hint


def unwrap_optional(hint: Any) -> Any:
    """Return ``X`` for ``Optional[X]``, and any other type unchanged."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (Union, types.UnionType) and type(None) in args:
        return next(arg for arg in args if arg is not type(None))
    return hint


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, ConfigError) else error
    return str(cause).splitlines()[0]


# Keys that may change on resume: duration, evaluation and logging, checkpoints, hardware and memory.
_MAY_CHANGE = {
    'max_duration',
    'eval_data', 'eval_zeroshot', 'global_eval_batch_size', 'eval_interval', 'eval_first', 'callbacks', 'loggers',
    'progress_bar', 'log_to_console', 'console_log_interval', 'run_name',
    'save_folder', 'save_interval', 'save_num_checkpoints_to_keep', 'checkpoint_folder', 'autoresume', 'teacher_folder',
    'adapter_folder', 'lora_folder', 'cache_limit',
    'device', 'device_train_microbatch_size', 'dist_timeout', 'compile', 'fsdp', 'gradient_checkpointing', 'block_size',
    'grad_cache', 'num_workers', 'download_retry', 'download_timeout',
    *(field.name for field in fields(PlanConfig))}


def learned_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the part of a configuration that determines what is learned, as plain containers.

    A dataset is identified by its `remote`, because `local` is then a cache; without a remote, by `local`.
    """
    def learned(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        left_out = _MAY_CHANGE | ({'local'} if node.get('remote') else set())
        return {str(name): learned(value) for name, value in node.items() if name not in left_out}

    return learned(OmegaConf.to_container(OmegaConf.structured(config)))


def check_settings(found: Mapping[str, Any], config: TrainConfig, where: str) -> None:
    """Raise a ConfigError that names the first changed setting of a run, with both values.

    `found` are the `learned_settings` that the run began with, and `where` says where they were found.
    """
    if (differing := difference(found, learned_settings(config))) is not None:
        raise ConfigError(f'save_folder: {where} was trained with other settings than these: {differing}; a run keeps '
                          'the settings that decide what it learns, so choose another save_folder for new ones')


def settings_in_folder(config: C) -> Optional[C]:
    """Return the configuration in a run's `save_folder`, or None; raise the errors of `check_settings`."""
    if not Path(config.save_folder, 'config.yaml').is_file():
        return None
    there = read_config(type(config), config.save_folder)
    check_settings(learned_settings(there), config, f'the run in {config.save_folder}')
    return there


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Optional[str]:
    """Return the first field in which two nested mappings differ, with both values; None if they are equal."""
    for name in sorted({*found, *expected}):
        a, b = found.get(name), expected.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if (inner := difference(a, b)) is not None:
                return f'{name}.{inner}'
        elif a != b:
            return f'{name} is {a!r}, expected {b!r}'
    return None
