# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Evaluation sets, read from their published files.

The docstring of each loader gives the source and the file layout of its set.  Opening a set checks its files,
so that an evaluation does not fail halfway.
"""
