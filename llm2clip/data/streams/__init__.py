# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Repairs of mosaicml-streaming: the only modules that touch what is private in it.

Each says which behaviour of Streaming 0.13 it relies on; `tests/data/test_streaming_members.py` fails when a version
behaves otherwise.
"""
