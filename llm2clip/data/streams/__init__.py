# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Fixes of mosaicml-streaming: the only modules that use its private members.

The tests in `tests/data/streams` fail if the installed version differs from 0.13 in what they use.
"""
