# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Text of --help: the keys of a recipe, or the arguments of a part, with types, defaults and docstrings."""

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, Optional

import yaml
from omegaconf import MISSING

from llm2clip.config.files import unwrap_optional
from llm2clip.config.teacher import teacher_types
from llm2clip.registry import PARTS, argument_types, check

_WIDTH = 100


def help_text(schema: type, doc: str, args: Collection[str] = ()) -> str:
    """Return all keys of a recipe, or the arguments of the part that one of `args` names (``source.webdataset``).

    Args:
        schema: One of the dataclasses of `llm2clip.config`.
        doc: Docstring of the recipe: description, a colon, and the command.
        args: Arguments of the command.
    """
    for key, _, name in (arg.replace('.name=', '.').partition('.') for arg in args):
        if key in PARTS and name:
            part = check(key, name, {})
            types = argument_types(part)
            arguments = [f'  {one.name}: {_type_name(types.get(one.name, Any))}'
                         + (f' = {one.default!r}' if one.default is not one.empty else '')
                         for one in inspect.signature(part).parameters.values()]
            return '\n'.join([f'{key}.{name}', *arguments, '', inspect.getdoc(part) or ''])
    what, _, call = ' '.join(doc.split()).partition(': ')
    about = ('YAML files merge left to right, key=value comes last. A key without a default is required. Keys that '
             'belong together are indented; written in one word they are joined by dots. <name> is a name that you '
             'choose, [] one entry of a list.')
    lines = [f'{what}.', '', f'  {call}', '', *textwrap.wrap(about, _WIDTH), '']
    for entry in entries(schema):
        indent = '  ' * (entry.depth + 1)
        lines.append(f'{indent}{entry.key}: {entry.kind}' + (f' = {entry.default}' if entry.default else ''))
        if entry.doc:
            lines.append(textwrap.fill(entry.doc, _WIDTH, initial_indent=f'{indent}    ',
                                       subsequent_indent=f'{indent}    '))
    for key, names in PARTS.items():
        if key in schema.__dataclass_fields__:
            lines += ['', f'Names for {key} (--help {key}.NAME describes one), or module:class:',
                      f'  {", ".join(names)}']
    return '\n'.join(lines)


@functools.cache
def field_docs(schema: type) -> dict[str, str]:
    """Return field -> docstring of the fields that have one, including inherited fields.

    Python does not keep the strings below the fields of a class, so they are read from its source.
    """
    docs: dict[str, str] = {}
    for base in (base for base in reversed(schema.__mro__) if dataclasses.is_dataclass(base)):
        definition: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for field, after in zip(definition.body, definition.body[1:]):
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Constant):
                docs[ast.unparse(field.target)] = ' '.join(str(text.value).split())
    return docs


class Entry(NamedTuple):
    """A key of a recipe."""

    depth: int
    key: str
    kind: str
    default: str
    """In YAML; empty if the key is required or contains other keys."""
    doc: str


def entries(schema: type, prefix: str = '', shown: Optional[dict[type, str]] = None, depth: int = 0) -> Iterator[Entry]:
    """Yield each key of a dataclass and the keys below it; a dataclass that was shown before is only referred to."""
    shown = {} if shown is None else shown
    hints, docs = typing.get_type_hints(schema), field_docs(schema)
    annotated = typing.get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        key, hint = f'{prefix}{field.name}', unwrap_optional(hints[field.name])
        if field.name == 'type':  # each type of text encoder has its own entry
            continue
        entry = annotated[field.name]
        teachers = teacher_types(typing.get_args(entry)[-1] if typing.get_origin(hint) is dict else entry)
        kind = typing.get_origin(hint)
        part = typing.get_args(hint)[-1] if kind in (list, dict) else hint
        nested = typing.cast(type, part) if dataclasses.is_dataclass(part) else None
        path = key + ('[]' if kind is list else '.<name>' if kind is dict else '')  # prefix of its fields
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        text = ''
        if not dataclasses.is_dataclass(default) and default not in (MISSING, dataclasses.MISSING):
            text = yaml.safe_dump(default, default_flow_style=True, sort_keys=False, width=10_000)
            text = text.removesuffix('\n').removesuffix('\n...')
        about = (inspect.getdoc(nested) or '').split('\n\n')[0] if nested is not None else ''
        doc = docs.get(field.name) or ' '.join(about.split())
        if nested in shown:
            doc += f' Its keys are those of {shown[nested]}.'
        name = _type_name(hint).replace('any', 'str | mapping') if teachers else _type_name(hint)
        yield Entry(depth, key, name, text, doc)
        if nested is not None and nested not in shown:
            shown[nested] = path
            yield from entries(nested, f'{path}.', shown, depth + 1)
        for teacher in teachers.values():
            doc = ' '.join((inspect.getdoc(teacher) or '').split())
            doc += f' Its keys are those of {shown[teacher]}.' if teacher in shown else ''
            yield Entry(depth + 1, f'{path}.type', str(teacher.type), '', doc)
            if teacher not in shown:
                shown[teacher] = f'{path}, type {teacher.type}'
                yield from entries(teacher, f'{path}.', shown, depth + 2)


def _type_name(hint: Any) -> str:
    """Return a type as text: ``dict[str, float]``, ``bool | int``, or ``list[mapping]`` of entries that follow."""
    if typing.get_origin(hint) is typing.Annotated:
        return _type_name(hint.__origin__)
    if typing.get_origin(hint) is typing.Literal:
        return ' | '.join(typing.get_args(hint))
    if typing.get_origin(hint) is typing.Union:
        return ' | '.join(map(_type_name, typing.get_args(hint)))
    if typing.get_origin(hint) in (list, dict):
        return f'{typing.get_origin(hint).__name__}[{", ".join(map(_type_name, typing.get_args(hint)))}]'
    return 'mapping' if dataclasses.is_dataclass(hint) else getattr(hint, '__name__', str(hint)).replace('Any', 'any')

