# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Repairs of mosaicml-streaming: the only modules that touch what is private in it.

`tests/data/test_streaming_members.py` fails when a version behaves otherwise than Streaming 0.13.
"""
