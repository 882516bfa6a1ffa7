# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Evaluation sets, read from the files in which they are published.

Each loader's docstring says where its set comes from and how to lay it out.  Whatever is missing or wrong in the files
is found when a set is opened, not in the middle of an evaluation.
"""
