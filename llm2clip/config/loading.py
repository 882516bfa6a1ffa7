# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""YAML files and overrides -> one typed configuration, or an error with the key; and the files of runs.

Null removes an entry of a mapping, such as a dataset, a model or a logger, that an earlier file added.
Numbers and booleans follow YAML 1.2.  Where a string is expected, the text of the file is kept unchanged.
"""

import importlib.util
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar, Union

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf._yaml import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from llm2clip.config.models import TextPlanConfig
from llm2clip.config.ranges import Component
from llm2clip.config.recipe import RecipeConfig
from llm2clip.config.teacher import teacher_types
from llm2clip.config.training import TrainConfig
from llm2clip.errors import ConfigError, FileError, nearest, under
from llm2clip.io.files import read_text, reading, write_text

R = TypeVar('R', bound=RecipeConfig)
C = TypeVar('C', bound=TrainConfig)
_ANY_TYPE = ConfigDict(arbitrary_types_allowed=True)
CPU_INFO = Path('/proc/cpuinfo')
_COMMAND_LINE = 'command line'
# Anything but host and port: a user, or a secret, even if it contains a slash.  SFTP needs the user name.  A
# query (`?sig=…`) signs the URL.
_SECRET = re.compile(r'://(?!((?<=sftp://)[^\s/?#:@]+@)?(\[[\w:.]*\]|[^\s/?#:@]*)(:\d*)?([\s/?#]|$))'
                     r'|://[^\s?#]*\?[^\s#]*=')
_STR, _MAP, _NULL, _MERGE = (f'tag:yaml.org,2002:{name}' for name in ('str', 'map', 'null', 'merge'))
# Section of a file -> schema of the recipe that alone reads it.
_SECTIONS = {
    'prepare_data': 'PrepareConfig', 'train_stage1': 'Stage1Config', 'extract_embeddings': 'ExtractConfig',
    'extract_image_embeddings': 'ExtractImagesConfig', 'train_inheritance': 'InheritanceConfig',
    'train_stage2': 'Stage2Config', 'evaluate': 'EvaluateConfig', 'export_hf': 'ExportConfig',
    'report': 'ReportConfig', 'import_official': 'ImportConfig',
}
# Pattern in a message of pydantic -> what replaces it.
_PYDANTIC_WORDS = {
    '^Value error, ': '', r'^\w+ should (be|have) (a valid )?': '', r' after validation, not \d+': '',
    r', unable to .*': '',
    '^Field required': 'a value', '^Unexpected keyword .*': 'none, since its type has no such key',
    '^list$': 'a list', r'^(a )?dictionary( or .*)?$': 'a mapping of keys to values',
    'greater than or equal to': 'at least', 'less than or equal to': 'at most',
}


class _Loader(get_yaml_loader()):
    """OmegaConf's loader, which refuses duplicate keys and endless aliases, with the scalars of YAML 1.2.  In
    YAML 1.1, `1:30` is 90, `010` is 8 and `no` is false."""

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
    """Return the folder of a Python package without importing it; raise a ConfigError if there is none."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f'the Python package {name} is not installed')
    return next(iter(spec.submodule_search_locations))


def computes_bfloat16() -> bool:
    """Whether this machine has a GPU, or a processor with bfloat16 instructions according to Linux.

    On other processors, PyTorch 2.7 multiplies bfloat16 matrices more slowly than float32 ones: 58 times on
    an AMD EPYC with AVX2, and also with AVX-512 alone (pytorch#146508).
    """
    import torch

    if torch.cuda.is_available():
        return True
    return not {'avx512_bf16', 'amx_tile', 'bf16'}.isdisjoint(CPU_INFO.read_text().split())


OmegaConf.register_resolver('package', package_folder, replace=True)
OmegaConf.register_resolver('if_bf16', lambda fast, slow: fast if computes_bfloat16() else slow, replace=True)


def load_config(schema: type[R], args: Sequence[str]) -> R:
    """Return a configuration: YAML files, merged from left to right, and then overrides ``key.sub=value``.

    ``${package:NAME}`` becomes the folder of an installed Python package.  ``${if_bf16:A,B}`` becomes A where
    bfloat16 is fast, and B elsewhere.  ``${NAME}`` becomes the value of another key, also of one that the
    schema lacks, if a file defines it at the top.  A mapping at the top of a file with the name of a recipe,
    such as ``train_stage2``, holds settings of that recipe, which override those beside it; others ignore it.

    Raises:
        ConfigError: A key is unknown (the message has the nearest valid name), missing, or of the wrong type,
            or the settings conflict.  The error has the key, and the file and line that it comes from.
        FileError: A file is missing or not YAML.
    """
    if not args:
        raise ConfigError('no configuration given: expected YAML files or key=value (--help lists the keys)')
    sources: list[tuple[str, yaml.Node]] = []
    for arg in sorted(args, key=lambda arg: '=' in arg):  # files come first
        if '=' in arg:
            sources.append((_COMMAND_LINE, _parse_override(arg)))
        else:
            sources.append(_read_file(arg))
    return _merge(schema, sources)


def _parse_override(text: str) -> yaml.Node:
    """Return ``key.sub=value`` as nested mappings."""
    key, value = text.split('=', 1)
    # A shell passes `key=''` as `key=`, which YAML would read as null, and `*.csv` as an alias.
    if not value or value[0] == '*':
        value = "'{}'".format(value.replace("'", "''"))
    tree = _parse(value, f'{key} ({_COMMAND_LINE})')
    # A name with a dot stands in brackets: `models[llama3.1_8b].run`.
    for name in reversed(re.split(r'\.(?![^\[]*\])|(?=\[)', key)):
        tree = yaml.MappingNode(_MAP, [(yaml.ScalarNode(_STR, name.strip('[]')), tree)])
    return tree


def _merge(schema: type[R], sources: Sequence[tuple[str, yaml.Node]]) -> R:
    """Return the checked configuration that named YAML trees give, of which a later one has precedence."""
    merger = _Merger()
    values: Any = _defaults(schema)
    try:
        text = ''.join(yaml.serialize(tree) for _, tree in sources)
        for merger.source, tree in sources:
            for part in _parts(schema, tree, merger.source):
                merger.add_names(schema, part, text)
                values = merger.merge(schema, values, part)
        # Not `OmegaConf.missing_keys`, which also names the keys that refer to a missing one.
        missing = sorted(key for key, value in leaves(values) if value == MISSING)
        files = ', '.join(dict.fromkeys(source for source, _ in sources))
        if missing:
            raise ConfigError(f'required but not set: {", ".join(missing)} (in {files})')
        try:
            values = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
        except OmegaConfBaseException as error:
            message = re.sub("^Interpolation key '(.*)' not found",
                             rf'refers to \1, which is not set in {files}', str(error).splitlines()[0])
            raise ConfigError(message, key=error.full_key or '') from None
        for key, value in leaves(values):
            if isinstance(value, str) and _SECRET.search(value):  # a run would write it into its files
                raise ConfigError('put no password or token into a URL; Streaming reads credentials from '
                                  'the environment or, for SFTP, the key file that COMPOSER_SFTP_KEY_FILE '
                                  'names', key=key)
        for name in merger.names:
            del values[name]
        config = check_values(schema, values)
        config.check()
        config.places = merger.places
        return config
    except ConfigError as error:
        error.place = merger.places.get(error.key, '')
        raise


def _parts(schema: type[RecipeConfig], tree: yaml.Node, source: str) -> list[yaml.Node]:
    """Return what a file sets for all recipes, and then its section for one of them."""
    if source == _COMMAND_LINE:
        return [tree]
    sections = {name.value: node for name, node in tree.value
                if name.value in _SECTIONS and isinstance(node, yaml.MappingNode)}
    tree.value = [(name, node) for name, node in tree.value if name.value not in sections]
    return [tree, *(node for name, node in sections.items() if _SECTIONS[name] == schema.__name__)]


def _defaults(schema: Any) -> Any:
    """Return the values of a dataclass in which nothing is set, as plain containers."""
    return OmegaConf.to_container(OmegaConf.structured(schema))


class _Merger:
    """Merges YAML trees, and records where each key is set."""

    def __init__(self) -> None:
        self.source = _COMMAND_LINE
        """Where the next tree comes from."""
        self.places: dict[str, str] = {}
        """Key -> source and line of the last tree that sets it."""
        self.names: set[str] = set()
        """Further keys at the top, which files define for interpolations."""

    def add_names(self, schema: Any, tree: yaml.Node, text: str) -> None:
        """Add the keys at the top of a file that the schema lacks and that `text` refers to (``${name}``)."""
        if self.source == _COMMAND_LINE:
            return
        keys = {field.name for field in fields(schema)}
        for node, _ in tree.value:
            if node.value not in keys and re.search(rf'\$\{{{re.escape(node.value)}[.[}}]', text):
                self.names.add(node.value)

    def merge(self, kind: Any, earlier: Any, node: yaml.Node, key: str = '') -> Any:
        """Return the value of a node of type `kind`, with the earlier values of a mapping."""
        if isinstance(node, yaml.MappingNode):
            return self._mapping(kind, _kept(kind, earlier, node), node, key)
        if isinstance(node, yaml.SequenceNode):
            items: list[Any] = []
            for i, item in enumerate(node.value):
                self._record(f'{key}[{i}]', item)
                items.append(self.merge(_entry_type(kind), None, item, f'{key}[{i}]'))
            return items
        if node.tag != _NULL and (kind is str or teacher_types(kind)):
            return node.value
        return _Loader('').construct_document(node)

    def _mapping(self, kind: Any, values: dict[str, Any], node: yaml.MappingNode, key: str) -> dict[str, Any]:
        # Field -> type of a dataclass, or of all text encoders that a field takes; else nothing.
        types: dict[str, Any] = {}
        for schema in (*teacher_types(kind).values(), kind):
            if is_dataclass(schema):
                hints = typing.get_type_hints(schema, include_extras=True)
                types.update({field.name: hints[field.name] for field in fields(schema)})
        _Loader('').flatten_mapping(node)
        for name_node, value_node in node.value:
            name = name_node.value
            value_key = f'{key}.{name}'.removeprefix('.')
            self._record(value_key, name_node)
            if types and name not in types and value_key not in self.names:
                raise ConfigError(f'unknown key; {nearest(name, {*types, *self.names})}', key=value_key)
            value_type = types.get(name, _entry_type(kind))
            is_null = value_node.tag == _NULL
            if is_null and _has_entries(value_type):
                values[name] = {}
            elif is_null and _has_entries(kind):
                values.pop(name, None)
            else:
                value_type = plain_type(value_type)
                values[name] = self.merge(value_type, values.get(name), value_node, value_key)
        return values

    def _record(self, key: str, node: yaml.Node) -> None:
        self.places[key] = self.source
        if self.source != _COMMAND_LINE:
            self.places[key] += f':{node.start_mark.line + 1}'


def _kept(kind: Any, earlier: Any, node: yaml.MappingNode) -> dict[str, Any]:
    """Return the earlier values that a mapping adds to: none if it describes another type of text encoder."""
    if not isinstance(earlier, dict):
        return _defaults(kind) if is_dataclass(kind) else {}
    if not teacher_types(kind) or 'type' not in earlier:
        return earlier
    for name, value in node.value:
        if name.value == 'type' and value.value != earlier['type']:
            return {}
    return earlier


def check_values(kind: Any, values: Any, strict: bool = False) -> Any:
    """Return values as a type reads them; raise a ConfigError for another type, or if they are out of range.

    Args:
        kind: A type, or one of the dataclasses of `llm2clip.config`.
        values: For a dataclass, nested mappings and lists.
        strict: Do not convert types, such as a string of digits to a number.
    """
    try:
        # A dataclass has its settings itself.
        adapter = TypeAdapter(kind, config=None if is_dataclass(kind) else _ANY_TYPE)
        return adapter.validate_python(values, strict=strict)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        key = _key(faults[0], values)
        value = repr(faults[0]['input'])
        if faults[0]['type'] == 'missing' and not key.endswith(']'):
            value = 'required but not set'
        expected = []  # a value of several possible types has an error for each
        for fault in faults:
            if _key(fault, values) == key:
                message = fault['msg']
                for pattern, replacement in _PYDANTIC_WORDS.items():
                    message = re.sub(pattern, replacement, message)
                expected.append(message)
        raise ConfigError(f'{value}, expected {" or ".join(expected)}', key=key) from None


def _key(fault: Mapping[str, Any], values: Any) -> str:
    """Return the key in `values` that an error of pydantic is about."""
    key = ''
    for part in fault['loc']:
        try:
            values = values[part]
        except (LookupError, TypeError):  # a missing key, or the name of one of several types
            if fault['type'] != 'missing' or part != fault['loc'][-1]:
                continue
        key += f'[{part}]' if isinstance(part, int) else f'.{part}'
    return key.removeprefix('.')


def read_config(schema: type[R], folder: Union[str, Path]) -> R:
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
    """Return the content of a YAML file of a run.  Raise a ConfigError if a value is an interpolation
    (``${…}``), which could read the environment, and a FileError if the file is missing or not YAML."""
    text = read_text(path, 'YAML')
    with reading(path, 'YAML'):
        values = yaml.load(text, _Loader)
    for key, value in leaves(values):
        if '${' in str(value):
            raise ConfigError(f'{value!r} in {path} asks for another value, expected none', key=key)
    return values


def save_config(config: Any, folder: Union[str, Path]) -> None:
    """Write the resolved configuration to `folder`/config.yaml."""
    write_text(Path(folder) / 'config.yaml', OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))


def _read_file(path: str) -> tuple[str, yaml.Node]:
    tree = _parse(read_text(path, 'a YAML file or key=value'), path)
    if tree.tag == _NULL:
        tree = yaml.MappingNode(_MAP, [])
    if not isinstance(tree, yaml.MappingNode):
        raise FileError('expected a mapping of keys to values at the top', path)
    return path, tree


def _parse(text: str, source: str) -> yaml.Node:
    with reading(source, 'YAML'):
        yaml.load(text, _Loader)  # to check keys and aliases; it flattens its nodes, so they are not used
        return yaml.compose(text, _Loader) or yaml.ScalarNode(_NULL, '')


def _entry_type(kind: Any) -> Any:
    """Return the type of the entries of a list or mapping; Any if the schema has none."""
    if typing.get_origin(kind) in (list, dict):
        return plain_type(typing.get_args(kind)[-1])
    return kind if teacher_types(kind) else Any


def _has_entries(kind: Any) -> bool:
    """Whether a type is a mapping of typed entries, not the arguments of a part, which may be null."""
    if typing.get_origin(kind) is Annotated:
        kind = kind.__origin__
    return typing.get_origin(kind) is dict and kind != Component


def leaves(node: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every leaf of nested mappings and lists."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, f'{key}.{name}'.removeprefix('.'))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from leaves(value, f'{key}[{i}]')
    else:
        yield key, node


def plain_type(hint: Any) -> Any:
    """Strip `Optional` and `Annotated` from a type, unless that defines how a text encoder is read."""
    args = typing.get_args(hint)
    is_annotated = typing.get_origin(hint) is Annotated and not teacher_types(hint)
    return plain_type(args[0]) if is_annotated or type(None) in args else hint


# Keys that may change on resume: duration, evaluation and logging, checkpoints, hardware and memory.
_MAY_CHANGE = {
    'max_duration',
    'eval_data', 'eval_zeroshot', 'global_eval_batch_size', 'eval_interval', 'eval_first', 'callbacks',
    'loggers', 'progress_bar', 'log_to_console', 'console_log_interval', 'log_gradient_norms', 'run_name',
    'save_folder', 'save_interval', 'save_num_checkpoints_to_keep', 'checkpoint_folder', 'autoresume',
    'teacher_folder', 'adapter_folder', 'lora_folder', 'cache_limit',
    'device', 'device_train_microbatch_size', 'device_train_microbatch_tokens', 'dist_timeout', 'compile',
    'fsdp', 'gradient_checkpointing',
    'block_size', 'grad_cache', 'num_workers', 'download_retry', 'download_timeout',
    *(field.name for field in fields(TextPlanConfig))}


def learned_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the part of a configuration that determines what is learned, as plain containers.

    A dataset is identified by its `remote`, because `local` is then a cache; without a remote, by `local`.
    """
    def learned(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        left_out = set(_MAY_CHANGE)
        if node.get('remote'):
            left_out.add('local')
        deciding: dict[str, Any] = {}
        for name, value in node.items():
            if name not in left_out:
                deciding[str(name)] = learned(value)
        return deciding

    return learned(OmegaConf.to_container(OmegaConf.structured(config)))


def check_settings(settings: Mapping[str, Any], config: TrainConfig, run: str) -> None:
    """Raise a ConfigError that names the first changed setting of a run, with both values.

    `settings` are the `learned_settings` that the run began with, and `run` names it.  An older version of
    this package may have written them: settings that they lack have their defaults.
    """
    with under(run):
        with_defaults = learned_settings(check_values(type(config), settings))
    # Merged, since `check_values` drops the settings that only another version has.
    began_with: Any = OmegaConf.to_container(OmegaConf.merge(with_defaults, dict(settings)))
    differing = difference(began_with, learned_settings(config))
    if differing is not None:
        raise ConfigError(f'{run} was trained with other settings than these: {differing}; a run keeps the '
                          'settings that decide what it learns, so choose another save_folder for new ones',
                          key='save_folder', is_absolute=True)


def settings_in_folder(config: C) -> Optional[C]:
    """Return the configuration in a run's `save_folder`, or None; raise the errors of `check_settings`."""
    if not Path(config.save_folder, 'config.yaml').is_file():
        return None
    run_config = read_config(type(config), config.save_folder)
    check_settings(learned_settings(run_config), config, f'the run in {config.save_folder}')
    return run_config


def difference(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> Optional[str]:
    """Return the first field in which two nested mappings differ, with both values; None if there is none."""
    for name in sorted({*actual, *expected}):
        value = actual.get(name)
        expected_value = expected.get(name)
        if isinstance(value, Mapping) and isinstance(expected_value, Mapping):
            inner = difference(value, expected_value)
            if inner is not None:
                return f'{name}.{inner}'
        elif value != expected_value:
            return f'{name} is {value!r}, expected {expected_value!r}'
    return None
