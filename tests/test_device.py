# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a command sets for its device."""

import resource
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llm2clip.device
from llm2clip.device import open_device
from llm2clip.float32 import exact_float32


def test_tf32_is_off_where_float32_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name='gpu')
    monkeypatch.setattr(llm2clip.device, 'get_device', lambda name: gpu)
    backends: Any = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for precision, allowed in (('amp_bf16', True), ('fp32', False), (None, True)):
            open_device('gpu', precision)
            assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]
        with exact_float32('cpu'):
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value


def test_memory_is_used_again_on_a_cpu() -> None:
    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(64 << 20, dtype=torch.uint8).add_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    open_device('cpu')
    new_pages()
    assert new_pages() < 1_000  # of 16,384
