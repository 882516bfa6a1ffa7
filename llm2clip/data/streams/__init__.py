# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Fixes of mosaicml-streaming: the only modules that use its private members.

`tests/data/test_streaming_members.py` or `test_failures.py` fails if the installed version behaves differently from Streaming 0.13.
"""
