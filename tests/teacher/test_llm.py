# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The LLM as an encoder: LoRA, adapters, saving and fingerprint."""

import ctypes
import gc
import threading
from pathlib import Path

import pytest
import torch
from llms import TEXTS
from parts import text_encoder_from_config
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from refusals import refused_at
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from llm2clip.config import LoraConfig, TextEncoderConfig
from llm2clip.errors import ConfigError
from llm2clip.modeling.loaders import LoadError
from llm2clip.modeling.text_encoder import CaptionTokenizer, TextEncoder, encode_texts
from llm2clip.teacher.llm import add_lora, apply_lora_apart, load_llm, load_teacher, save_lora, save_teacher
from llm2clip.teacher.lora import LoraLinear

LORA = LoraConfig(r=4)


def _encoder(folder: Path, seed: int = 0, **options: object) -> tuple[TextEncoder, CaptionTokenizer]:
    """An encoder, which has a trained LoRA if a seed is given."""
    torch.manual_seed(seed)
    config = TextEncoderConfig(pretrained=str(folder), **options)
    encoder, tokenizer = text_encoder_from_config(config, LORA if seed else None, 0.1)
    return encoder.eval(), tokenizer


def test_lora_trains_alone_and_merges_into_an_equal_teacher(llm_folder: Path, tmp_path: Path) -> None:
    encoder, tokenizer = _encoder(llm_folder, 1)
    trainable = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * 2 and all('lora_' in name for name in trainable)
    assert sum(isinstance(module, LoraLinear) for module in encoder.modules()) == 2 * 7
    save_teacher(encoder, tokenizer, LORA, tmp_path / 'teacher', tmp_path / 'adapter')
    expected = encode_texts(encoder, tokenizer, TEXTS)
    assert not torch.allclose(encode_texts(*_encoder(llm_folder), TEXTS), expected, atol=1e-2)
    teacher, teacher_tokenizer = load_teacher(tmp_path / 'teacher')
    torch.testing.assert_close(encode_texts(teacher, teacher_tokenizer, TEXTS), expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in teacher.parameters())
    # The adapter alone, as peft loads it.
    by_peft = TextEncoder(PeftModel.from_pretrained(_encoder(llm_folder)[0].llm, tmp_path / 'adapter'), encoder.config)
    torch.testing.assert_close(encode_texts(by_peft.eval(), tokenizer, TEXTS), expected, rtol=1e-4, atol=1e-4)


def test_lora_is_taken_out_of_the_merged_weights_to_the_last_bit(llm_folder: Path, tmp_path: Path) -> None:
    encoder, tokenizer = _encoder(llm_folder, 1, dtype='bfloat16')
    save_teacher(encoder, tokenizer, LORA, tmp_path / 'teacher')
    merged = load_file(tmp_path / 'teacher' / 'model.safetensors')
    assert {weight.dtype for weight in merged.values()} == {torch.float32}
    expected, found = encoder.state_dict(), load_teacher(tmp_path / 'teacher')[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) and found[name].dtype == weight.dtype
               for name, weight in expected.items())
    # A wider type than that of the training is no harm, and needs nothing apart.
    wide, _ = load_teacher(tmp_path / 'teacher', in_float32=True)
    assert not any('lora_' in name for name, _ in wide.named_parameters())


def _memory() -> int:
    line, = (line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('RssAnon'))
    return int(line.split()[1]) * 1024


def test_a_teacher_is_never_in_memory_in_a_wider_type(tmp_path: Path) -> None:
    with torch.device('meta'):
        llm = LlamaModel(LlamaConfig(vocab_size=8, hidden_size=512, intermediate_size=2 ** 14, num_hidden_layers=5,
                                     num_attention_heads=4, num_key_value_heads=2))
    # Of one value, so that they are written in no time.
    llm.to_empty(device='cpu').apply(lambda module: [p.data.fill_(0.5) for p in module.parameters(recurse=False)])
    in_float32 = 4 * sum(p.numel() for p in llm.parameters())
    llm.save_pretrained(tmp_path)
    save_lora(add_lora(llm, LoraConfig(r=2)), LoraConfig(r=2), tmp_path / 'lora.safetensors')
    del llm
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what `set_up_process` keeps, if a test before this one has called it
    before, peak, ended = _memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, _memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        narrow = load_llm(TextEncoderConfig(str(tmp_path), dtype='bfloat16'))
        apply_lora_apart(narrow, tmp_path, tmp_path / 'lora.safetensors')
    finally:
        ended.set()
        watcher.join()
    assert 0.5 * in_float32 < peak < 0.95 * in_float32


def test_adapters_are_merged_in_float32_into_a_narrow_llm(llm_folder: Path, tmp_path: Path) -> None:
    save_teacher(*_encoder(llm_folder, 1), LORA, tmp_path / 'teacher', tmp_path / 'adapter')
    exact, narrow = (load_llm(TextEncoderConfig(str(llm_folder), adapters=[str(tmp_path / 'adapter')], dtype=dtype))
                     for dtype in ('float32', 'bfloat16'))
    for (name, weight), other in zip(exact.named_parameters(), narrow.parameters()):
        assert torch.equal(weight.to(torch.bfloat16), other), name


def test_adapters_are_merged_in_order_and_a_new_one_goes_on_top(llm_folder: Path, tmp_path: Path) -> None:
    first, tokenizer = _encoder(llm_folder, 1)
    save_teacher(first, tokenizer, LORA, tmp_path / 't1', tmp_path / 'a1')
    second, _ = _encoder(llm_folder, 2, adapters=[str(tmp_path / 'a1')])
    save_teacher(second, tokenizer, LORA, tmp_path / 't2', tmp_path / 'a2')
    expected = encode_texts(second, tokenizer, TEXTS)
    torch.testing.assert_close(encode_texts(*load_teacher(tmp_path / 't2'), TEXTS), expected, rtol=1e-4, atol=1e-4)
    both = _encoder(llm_folder, adapters=[str(tmp_path / 'a1'), str(tmp_path / 'a2')])
    torch.testing.assert_close(encode_texts(*both, TEXTS), expected, rtol=1e-4, atol=1e-4)
    only_second = _encoder(llm_folder, adapters=[str(tmp_path / 'a2')])
    assert not torch.allclose(encode_texts(*only_second, TEXTS), expected, atol=1e-2)


def test_an_adapter_of_the_causal_lm_is_merged_too(llm_folder: Path, tmp_path: Path) -> None:
    full = get_peft_model(LlamaForCausalLM.from_pretrained(llm_folder), PeftLoraConfig(
        r=2, target_modules=['q_proj', 'up_proj'], task_type='CAUSAL_LM', init_lora_weights=False)).eval()
    full.save_pretrained(tmp_path)
    merged = load_llm(TextEncoderConfig(pretrained=str(llm_folder), adapters=[str(tmp_path)]))
    ids = torch.randint(2, 400, (2, 6))
    expected = full(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(merged.eval()(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_folders_without_llm_or_adapter_are_named(llm_folder: Path, tmp_path: Path) -> None:
    save_teacher(*_encoder(llm_folder, 1), LORA, tmp_path / 'teacher', tmp_path / 'adapter')
    torch.manual_seed(1)
    LlamaModel(LlamaConfig.from_pretrained(llm_folder)).save_pretrained(tmp_path / 'same_shape')
    with pytest.raises(ConfigError, match='was trained on another LLM'):
        load_llm(TextEncoderConfig(pretrained=str(tmp_path / 'same_shape'), adapters=[str(tmp_path / 'adapter')]))
    with refused_at(tmp_path):
        load_llm(TextEncoderConfig(pretrained=str(llm_folder), adapters=[str(tmp_path)]))
    with pytest.raises(LoadError, match='text_encoder.pretrained: /nowhere: cannot be loaded'):
        _encoder(Path('/nowhere'))
    with pytest.raises(ConfigError, match='no projection called qkv_proj'):
        text_encoder_from_config(TextEncoderConfig(pretrained=str(llm_folder)),
                                 LoraConfig(target_modules=['q_proj', 'qkv_proj']))
