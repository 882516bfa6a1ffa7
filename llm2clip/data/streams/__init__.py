# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Fixes of mosaicml-streaming: the only modules that use its private members.

`test_streaming_members.py` or `test_failures.py` in `tests/data` fails if the installed version differs from
0.13.
"""
