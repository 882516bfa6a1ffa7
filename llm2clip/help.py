# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Text of --help: the keys of a recipe, or the arguments of a part, with types, defaults and docstrings."""

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, Optional

import yaml
from omegaconf import MISSING

from llm2clip.config.loading import plain_type
from llm2clip.config.teacher import teacher_types
from llm2clip.errors import ConfigError, nearest
from llm2clip.registry import PARTS, argument_types, check

_WIDTH = 100
_RULES = ('YAML files merge left to right, key=value comes last. A key without a default is required. Keys '
          'that belong together are indented; written in one word they are joined by dots. <name> is a name '
          'that you choose, [] one entry of a list. --help KEY prints one of them, with the keys below it.')
_RANKS = 'On several GPUs, `composer` instead of `python` starts one process per GPU.'
REQUIRED = 'Required'
OPTIONAL = 'Optional'


def help_text(schema: type[Any], doc: str, args: Collection[str] = ()) -> str:
    """Return all keys of a recipe, or what `args` name: a key (``model.vision``) with the keys below it, or
    the arguments of a part (``source.webdataset``).

    Args:
        schema: One of the dataclasses of `llm2clip.config`.
        doc: Docstring of the recipe: description, a colon, and a command.
        args: Arguments of the command.

    Raises:
        ConfigError: There is no such key or part.
    """
    for arg in args:
        if not arg.startswith('-') and '=' not in arg and not arg.endswith(('.yaml', '.yml')):
            return _key_help(schema, arg)
    description, _, command = _one_line(doc).partition(': ')
    rules = f'{_RANKS} {_RULES}' if schema.uses_ranks else _RULES
    lines = [f'{description}.', '', f'  {command}', '', *textwrap.wrap(rules, _WIDTH)]
    for group, members in itertools.groupby(entries(schema), lambda entry: entry.group):
        lines += ['', f'{group}:', '']
        for entry in members:
            lines += _entry_lines(entry, entry.depth)
    for field in dataclasses.fields(schema):
        if field.name in PARTS:
            lines += _names_of_parts(field.name)
    return '\n'.join(lines)


def _key_help(schema: type[Any], key: str) -> str:
    """Return a key and the keys below it, or the part behind ``key.name``."""
    key = _without_placeholders(key)
    matching = []
    keys = []
    for entry in entries(schema):
        keys.append(_without_placeholders(entry.key))
        if f'{keys[-1]}.'.startswith(f'{key}.'):
            matching.append(entry)
    if matching:
        lines = []
        for entry in matching:
            lines += _entry_lines(entry, entry.depth - matching[0].depth)
        if key in PARTS:
            lines += _names_of_parts(key)
        return '\n'.join(lines)
    first, _, name = key.partition('.')
    if first not in PARTS or not name:
        raise ConfigError(f'there is no key {key!r}; {nearest(key, keys)}')
    part = check(first, name, {})
    types = argument_types(part)
    lines = [key]
    for argument in inspect.signature(part).parameters.values():
        if argument.name == 'params':  # of an optimizer, from the model
            continue
        line = f'  {argument.name}: {_type_name(types.get(argument.name, Any))}'
        if argument.default is not argument.empty:
            line += f' = {argument.default!r}'
        lines.append(line)
    return '\n'.join([*lines, '', inspect.getdoc(part) or ''])


def _without_placeholders(key: str) -> str:
    return key.replace('[]', '').replace('.<name>', '')


def _entry_lines(entry: 'Entry', depth: int) -> list[str]:
    indent = '  ' * (depth + 1)
    line = f'{indent}{entry.key}: {entry.kind}'
    if entry.default:
        line += f' = {entry.default}'
    if not entry.doc:
        return [line]
    indent += '    '
    return [line, textwrap.fill(entry.doc, _WIDTH, initial_indent=indent, subsequent_indent=indent)]


def _names_of_parts(key: str) -> list[str]:
    names = textwrap.wrap(', '.join(PARTS[key]), _WIDTH - 2)
    return ['', f'Names for {key} (--help {key}.NAME describes one), or module:class:',
            *(f'  {line}' for line in names)]


@functools.cache
def field_docs(schema: type) -> dict[str, str]:
    """Return field -> docstring of the fields that have one, including inherited fields.

    Python does not keep the strings below the fields of a class, so they are read from its source.
    """
    docs: dict[str, str] = {}
    bases: Any = filter(dataclasses.is_dataclass, reversed(schema.__mro__))
    for base in bases:
        definition: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for field, following in zip(definition.body, definition.body[1:]):
            match field, following:
                case ast.AnnAssign(), ast.Expr(value=ast.Constant(value=text)):
                    docs[ast.unparse(field.target)] = _one_line(str(text))
    return docs


class Entry(NamedTuple):
    """A key of a recipe."""

    depth: int
    key: str
    kind: str
    default: str
    """In YAML; empty if the key is required or contains other keys."""
    doc: str
    group: str
    """Heading of the keys of a recipe among which it stands."""


def entries(
    schema: type, prefix: str = '', shown: Optional[dict[type, str]] = None, depth: int = 0, group: str = ''
) -> Iterator[Entry]:
    """Yield each key of a dataclass and the keys below it, the required keys first.

    `shown` maps each dataclass whose keys were yielded to their place: they are then only referred to.
    """
    if shown is None:
        shown = {}
    docs = field_docs(schema)
    types = typing.get_type_hints(schema, include_extras=True)
    for field, own_group in _sorted_fields(schema):
        group = group if depth else own_group
        if field.name == 'type':  # each type of text encoder has its own entry
            continue
        key = f'{prefix}{field.name}'
        field_type = plain_type(types[field.name])
        path = key  # of the keys below it
        entry_type = field_type
        if typing.get_origin(field_type) in (list, dict):
            path += '[]' if typing.get_origin(field_type) is list else '.<name>'
            entry_type = typing.get_args(field_type)[-1]
        is_nested = dataclasses.is_dataclass(entry_type)
        teachers = teacher_types(entry_type)
        type_name = _type_name(field_type)
        if teachers:
            type_name = type_name.replace('any', 'str | mapping')
        doc = docs.get(field.name, '')
        if is_nested:
            doc = (doc or _class_doc(entry_type)) + _reference(entry_type, shown)
        yield Entry(depth, key, type_name, _default(field), doc, group)
        if is_nested and entry_type not in shown:
            shown[entry_type] = path
            yield from entries(entry_type, f'{path}.', shown, depth + 1, group)
        for teacher in teachers.values():
            doc = _class_doc(teacher) + _reference(teacher, shown)
            yield Entry(depth + 1, f'{path}.type', str(teacher.type), '', doc, group)
            if teacher not in shown:
                shown[teacher] = f'{path}, type {teacher.type}'
                yield from entries(teacher, f'{path}.', shown, depth + 2, group)


def _sorted_fields(schema: type) -> list[tuple[dataclasses.Field[Any], str]]:
    """Return the fields of a dataclass with their groups: the required ones, those that it defines itself,
    and those of each base class, under the first sentence of that class's docstring."""
    fields = {field.name: field for field in dataclasses.fields(schema)}
    groups = {name: REQUIRED for name, field in fields.items() if _is_required(field)}
    for base in schema.__mro__:
        heading = OPTIONAL
        if base is not schema:
            first_sentence = _class_doc(base).partition('. ')[0]
            heading = first_sentence.partition(': ')[0].removesuffix('.')
        for name in vars(base).get('__annotations__', {}):
            if name in fields:
                groups.setdefault(name, heading)
    return [(fields[name], group) for name, group in groups.items()]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a key, or one below it, has to be set."""
    default = _default_value(field)
    if dataclasses.is_dataclass(default):
        return any(map(_is_required, dataclasses.fields(default)))
    if isinstance(default, dict):
        return MISSING in default.values()
    return default in (MISSING, dataclasses.MISSING)


def _class_doc(schema: Any) -> str:
    """Return the first paragraph of a class's docstring in one line."""
    return _one_line((inspect.getdoc(schema) or '').split('\n\n')[0])


def _reference(schema: type, shown: Mapping[type, str]) -> str:
    """Return where the keys of a dataclass stand, if they were yielded before."""
    return f' Its keys are those of {shown[schema]}.' if schema in shown else ''


def _one_line(text: str) -> str:
    return ' '.join(text.split())


def _default(field: dataclasses.Field[Any]) -> str:
    """Return the default of a key in YAML; empty if the key is required or contains other keys."""
    default = _default_value(field)
    if dataclasses.is_dataclass(default) or default in (MISSING, dataclasses.MISSING):
        return ''
    text = yaml.safe_dump(default, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix('\n').removesuffix('\n...')


def _default_value(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _type_name(hint: Any) -> str:
    """Return a type as text: ``dict[str, float]``, ``bool | int``, or ``list[mapping]``."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is typing.Annotated:
        return _type_name(hint.__origin__)
    if origin is typing.Literal:
        return ' | '.join(args)
    if origin is typing.Union:
        return ' | '.join(map(_type_name, args))
    if origin in (list, dict):
        return f'{origin.__name__}[{", ".join(map(_type_name, args))}]'
    if dataclasses.is_dataclass(hint):
        return 'mapping'
    return getattr(hint, '__name__', str(hint)).replace('Any', 'any')
