# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The members of mosaicml-streaming that `llm2clip.data.streams` overrides.

That they do what they should is tested in `test_safe_dataset.py`, and `test_style.py` knows the private ones.
"""

import inspect

import pytest

from llm2clip.data.streams.paired_stream import PairedReader, PairedStream
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.data.streams.verified_stream import VerifiedStream


@pytest.mark.parametrize('repaired', [SafeDataset, VerifiedStream, PairedStream, PairedReader])
def test_overridden_members_exist_and_take_the_same(repaired: type) -> None:
    ours = [base for base in repaired.__mro__ if base.__module__.startswith('llm2clip')]
    upstream = next(base for base in repaired.__mro__ if base.__module__.startswith('streaming'))
    for name in {name for base in ours for name in vars(base)} & set(dir(upstream)):
        if inspect.isfunction(function := getattr(upstream, name)) and name != '__init__':
            assert list(inspect.signature(getattr(repaired, name)).parameters) == \
                list(inspect.signature(function).parameters), name
