# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a command sets for its device, and what runs do on processors with and without instructions for bfloat16."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.devices import DeviceCPU

from llm2clip.command import warn_of_slow_bfloat16
from llm2clip.config import ExtractConfig, Stage1Config
from llm2clip.config.loading import computes_bfloat16, load_config, read_config, save_config
from llm2clip.device import exact_float32, get_device, set_up_process
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.teacher.llm import load_teacher
from llm2clip.teacher.sources import TeacherFolder


def test_tf32_is_off_where_float32_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    backends: Any = torch.backends.cuda.matmul, torch.backends.cudnn

    def make_device(name: str) -> Any:
        for backend in backends:
            backend.allow_tf32 = True  # as Composer does
        return SimpleNamespace(name='gpu')

    monkeypatch.setattr('composer.utils.get_device', make_device)
    try:
        for precision, allowed in (('amp_bf16', True), ('fp32', False), (None, True)):
            set_up_process(make_device('gpu'), precision)
            for _ in range(2):
                with exact_float32('cpu'):
                    assert not torch.backends.cuda.matmul.allow_tf32
                assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]
                get_device('gpu')
    finally:
        set_up_process(make_device('gpu'), 'fp32')


def test_a_gpu_that_is_not_there_is_refused_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match='^device: gpu'):
        get_device('gpu')


STAGE1 = ['yamls/stage1/smollm2_135m_cpu.yaml', 'train_data.streams.captions.local=d', 'eval_data=null']


@pytest.mark.parametrize(('gpu', 'instructions', 'expected'), [
    (True, 'avx2', True), (False, 'avx512f avx512_bf16', True), (False, 'avx2 avx512f', False),  # x86
    (False, 'fp asimd bf16', True), (False, 'fp asimd', False)])  # ARM
def test_a_gpu_or_instructions_of_the_processor_compute_bfloat16(
    gpu: bool, instructions: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'cpuinfo').write_text(f'processor : 0\nflags : {instructions}\n')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr('llm2clip.config.loading.CPU_INFO', tmp_path / 'cpuinfo')
    assert computes_bfloat16() is expected


@pytest.mark.parametrize(('fast', 'dtype', 'precision'), [(True, 'bfloat16', 'amp_bf16'), (False, 'float32', 'fp32')])
def test_a_yaml_takes_what_is_fast_and_the_run_says_which(
    fast: bool, dtype: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('llm2clip.config.loading.computes_bfloat16', lambda: fast)
    monkeypatch.setattr('llm2clip.command.computes_bfloat16', lambda: fast)
    config = load_config(Stage1Config, STAGE1)
    assert config.text_encoder.dtype == dtype
    assert load_config(ExtractConfig, ['yamls/quickstart/steps.yaml']).precision == precision
    with warnings.catch_warnings(action='error'):
        warn_of_slow_bfloat16(config)
    if not fast:
        slow = load_config(Stage1Config, [*STAGE1, 'text_encoder.dtype=bfloat16', 'precision=amp_bf16'])
        with pytest.warns(UserWarning, match='^precision=amp_bf16, text_encoder.dtype=bfloat16: this processor has no'):
            warn_of_slow_bfloat16(slow)
    save_config(config, tmp_path)
    monkeypatch.setattr('llm2clip.config.loading.computes_bfloat16', lambda: not fast)
    assert read_config(Stage1Config, tmp_path) == config


def test_slow_bfloat16_is_widened(lora_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, tokenizer = load_teacher(lora_teacher)
    expected = encode_texts(encoder, tokenizer, ['a red square'])
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr('llm2clip.teacher.sources.computes_bfloat16', lambda fast=fast: fast)
        teacher = TeacherFolder(lora_teacher).load(DeviceCPU())
        assert teacher.module.llm.get_input_embeddings().weight.dtype == dtype
        for (name, weight), other in zip(encoder.named_parameters(), teacher.module.parameters(), strict=True):
            assert torch.equal(weight.float(), other.float()), name
        vectors = teacher.embed(['a red square']).vectors
        assert (1 - torch.nn.functional.cosine_similarity(vectors, expected)).item() < 1e-3
        assert torch.equal(vectors, expected) == fast
