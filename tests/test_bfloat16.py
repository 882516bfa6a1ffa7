# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What runs do on processors that have instructions for bfloat16, and on those that have none."""

import warnings
from pathlib import Path

import pytest
import torch
from composer.devices import DeviceCPU
from parts import write_dataset

import llm2clip.bfloat16
import llm2clip.config.files
import llm2clip.teacher.llm
import llm2clip.teacher.sources
from llm2clip.bfloat16 import computes_bfloat16, warn_of_slow_bfloat16
from llm2clip.config import CRAConfig, ExtractConfig, LLMTeacherConfig, LoraConfig, Stage1Config, TextEncoderConfig
from llm2clip.config.files import load_config, read_config, save_config
from llm2clip.data.convert.samples import Sample
from llm2clip.evaluation.cra import evaluate_cra
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer, TextEncoder, encode_texts
from llm2clip.teacher.folder import save_teacher
from llm2clip.teacher.llm import build_text_encoder, load_caption_tokenizer
from llm2clip.teacher.sources import TeacherFolder

STAGE1 = ['yamls/stage1/laptop.yaml', 'train_data.streams.captions.local=d', 'eval_data=null']


@pytest.mark.parametrize(('gpu', 'instructions', 'expected'), [
    (True, 'avx2', True), (False, 'avx512f avx512_bf16', True), (False, 'amx_tile', True),  # x86
    (False, 'avx2 avx512f', False), (False, 'fp asimd bf16', True), (False, 'fp asimd', False)])  # the last two: ARM
def test_a_gpu_or_instructions_of_the_processor_compute_bfloat16(
    gpu: bool, instructions: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'cpuinfo').write_text(f'processor : 0\nflags : {instructions}\n')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr(llm2clip.bfloat16, 'CPU_INFO', tmp_path / 'cpuinfo')
    assert computes_bfloat16() is expected
    monkeypatch.setattr(llm2clip.bfloat16, 'CPU_INFO', tmp_path / 'nowhere')  # as where there is no Linux
    assert computes_bfloat16() is gpu


@pytest.mark.parametrize(('fast', 'dtype', 'precision'), [(True, 'bfloat16', 'amp_bf16'), (False, 'float32', 'fp32')])
def test_a_yaml_takes_what_is_fast_and_the_run_says_which(
    fast: bool, dtype: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm2clip.config.files, 'computes_bfloat16', lambda: fast)
    monkeypatch.setattr(llm2clip.bfloat16, 'computes_bfloat16', lambda: fast)
    config = load_config(Stage1Config, STAGE1)
    assert config.text_encoder.dtype == dtype
    assert load_config(ExtractConfig, ['yamls/extract/quickstart.yaml']).precision == precision
    with warnings.catch_warnings(action='error'):
        warn_of_slow_bfloat16(config)
    save_config(config, tmp_path)
    monkeypatch.setattr(llm2clip.config.files, 'computes_bfloat16', lambda: not fast)
    assert read_config(Stage1Config, tmp_path) == config


def test_who_asks_for_what_is_slow_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(Stage1Config, [*STAGE1, 'text_encoder.dtype=bfloat16', 'precision=amp_bf16'])
    monkeypatch.setattr(llm2clip.bfloat16, 'computes_bfloat16', lambda: False)
    with pytest.warns(UserWarning, match='^precision=amp_bf16, text_encoder.dtype=bfloat16: this processor has no'):
        warn_of_slow_bfloat16(config)


def test_a_teacher_of_bfloat16_is_widened_where_that_is_faster(
    llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TextEncoderConfig(str(llm_folder), dtype='bfloat16')
    encoder, tokenizer = build_text_encoder(config, LoraConfig(r=4)), load_caption_tokenizer(config)
    torch.nn.init.normal_(next(p for name, p in encoder.named_parameters() if 'lora_B' in name), std=0.1)
    save_teacher(encoder, tokenizer, LoraConfig(r=4), tmp_path / 'teacher')
    expected = encode_texts(encoder.eval(), tokenizer, ['a red square'])
    for fast in (True, False):
        monkeypatch.setattr(llm2clip.teacher.llm, 'computes_bfloat16', lambda fast=fast: fast)
        teacher = TeacherFolder(tmp_path / 'teacher').load(DeviceCPU())
        assert teacher.module.llm.get_input_embeddings().weight.dtype == (torch.bfloat16 if fast else torch.float32)
        for (name, weight), other in zip(encoder.named_parameters(), teacher.module.parameters()):
            assert torch.equal(weight.float(), other.float()), name
        vectors = teacher.embed(['a red square']).vectors
        assert (1 - torch.nn.functional.cosine_similarity(vectors, expected)).item() < 1e-3
        assert torch.equal(vectors, expected) == fast


@pytest.mark.parametrize('fast', [True, False])
def test_so_is_an_llm_of_which_caption_retrieval_accuracy_is_measured(
    fast: bool, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset([Sample(f'{i}', {'a': f'a {i} b', 'b': f'{i} of them'}) for i in range(8)], tmp_path)
    load, loaded = llm2clip.teacher.sources.load_text_encoder, []

    def load_and_keep(config: TextEncoderConfig) -> tuple[TextEncoder, CaptionTokenizer]:
        loaded.append(load(config))
        return loaded[-1]

    monkeypatch.setattr(llm2clip.teacher.sources, 'load_text_encoder', load_and_keep)
    monkeypatch.setattr(llm2clip.teacher.llm, 'computes_bfloat16', lambda: fast)
    encoders = {'llm': LLMTeacherConfig(str(llm_folder), dtype='bfloat16')}
    evaluate_cra(CRAConfig(f'{tmp_path}/train', ['a', 'b'], encoders), DeviceCPU())
    (encoder, _), = loaded
    assert next(encoder.parameters()).dtype == (torch.bfloat16 if fast else torch.float32)
