# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The command line of the search, as it is typed."""

import json
from collections.abc import Sequence

__all__ = ['literal_queries']


def literal_queries(args: Sequence[str]) -> list[str]:
    """A recipe's arguments, with ``query=…`` as it is typed: YAML would cut ``dog #1`` and read ``no`` as false.

    What begins with a bracket or a quote is left to YAML.
    """
    return [_literal(arg.removeprefix('query=')) if arg.startswith('query=') else arg for arg in args]


def _literal(value: str) -> str:
    return f'query={value}' if value.startswith(('[', '"', "'")) else f'query={json.dumps(value)}'
