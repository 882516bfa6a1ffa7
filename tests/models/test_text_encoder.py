# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The LLM as an encoder: pooling, batching, LoRA, adapters, and saving."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from llm2clip.config import ConfigError, LoraConfig, TextEncoderConfig
from llm2clip.models.caption_tokenizer import CaptionTokenizer
from llm2clip.models.llm import load_llm, load_llm_and_head
from llm2clip.models.pooling import last_pool, mean_pool, weighted_mean_pool
from llm2clip.models.teacher import load_teacher, save_teacher
from llm2clip.models.text_encoder import TextEncoder, encode_texts, text_encoder_from_config

TEXTS = ['a red square', 'a blue circle on a wall', 'a', 'a purple stripe painted by somebody who likes green']


def _encoder(folder: Path, **options: object) -> tuple[TextEncoder, CaptionTokenizer]:
    encoder, tokenizer = text_encoder_from_config(TextEncoderConfig(pretrained=str(folder), **options))
    return encoder.eval(), tokenizer


def _trained(folder: Path, seed: int, **options: object) -> tuple[TextEncoder, CaptionTokenizer]:
    """An encoder whose LoRA weights are not those of the beginning."""
    config = TextEncoderConfig(pretrained=str(folder), **options)
    encoder, tokenizer = text_encoder_from_config(config, LoraConfig(r=4))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if 'lora_' in name:
                p.normal_(std=0.1, generator=generator)
    return encoder.eval(), tokenizer


def test_poolings_see_the_captions_own_tokens() -> None:
    hidden, mask = torch.randn(2, 5, 3), torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    torch.testing.assert_close(mean_pool(hidden, mask), torch.stack([hidden[0, 1:3].mean(0), hidden[1, 2:].mean(0)]))
    torch.testing.assert_close(last_pool(hidden, mask), torch.stack([hidden[0, 2], hidden[1, 4]]))
    weighted = (hidden[1, 2] + 2 * hidden[1, 3] + 3 * hidden[1, 4]) / 6
    torch.testing.assert_close(weighted_mean_pool(hidden, mask)[1], weighted)


def test_the_encoder_pools_the_last_layer(llm_folder: Path) -> None:
    encoder, tokenizer = _encoder(llm_folder)
    batch = tokenizer(TEXTS)
    states = encoder(batch['input_ids'], batch['attention_mask'])
    torch.testing.assert_close(encoder(**batch), mean_pool(states, batch['embed_mask']))
    last, _ = _encoder(llm_folder, pooling='last')
    torch.testing.assert_close(last(**batch)[0], states[0, batch['attention_mask'][0].sum() - 1])
    with pytest.raises(ConfigError, match='pooling'):
        _encoder(llm_folder, pooling='max')


def test_an_instruction_changes_the_vector(llm_folder: Path) -> None:
    encoder, tokenizer = _encoder(llm_folder)
    query = encoder(**tokenizer(TEXTS[:1], 'Find it. '))
    assert not torch.allclose(query, encoder(**tokenizer(TEXTS[:1])), atol=1e-4)


def test_encode_texts_keeps_the_order_whatever_the_batches(llm_folder: Path) -> None:
    encoder, tokenizer = _encoder(llm_folder)
    expected = encoder(**tokenizer(TEXTS)).detach()
    for batch_tokens in (1, 20, 1000):
        torch.testing.assert_close(encode_texts(encoder, tokenizer, TEXTS, batch_tokens), expected,
                                   rtol=1e-4, atol=1e-5)


def test_lora_trains_alone_and_merges_into_an_equal_teacher(llm_folder: Path, tmp_path: Path) -> None:
    encoder, tokenizer = _trained(llm_folder, 1)
    trainable = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trainable and all('lora_' in name for name in trainable)
    assert len(trainable) == 2 * 7 * 2
    save_teacher(encoder, tokenizer, LoraConfig(r=4), tmp_path / 'teacher', tmp_path / 'adapter')
    expected = encode_texts(encoder, tokenizer, TEXTS)
    assert not torch.allclose(encode_texts(*_encoder(llm_folder), TEXTS), expected, atol=1e-2)
    teacher, teacher_tokenizer = load_teacher(tmp_path / 'teacher')
    torch.testing.assert_close(encode_texts(teacher, teacher_tokenizer, TEXTS), expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in teacher.parameters())
    # The adapter alone, as peft loads it and as a run stacks it.
    by_peft = TextEncoder(PeftModel.from_pretrained(_encoder(llm_folder)[0].llm, tmp_path / 'adapter'), encoder.config)
    torch.testing.assert_close(encode_texts(by_peft.eval(), tokenizer, TEXTS), expected, rtol=1e-4, atol=1e-4)
    stacked = _encoder(llm_folder, adapters=[str(tmp_path / 'adapter')])
    torch.testing.assert_close(encode_texts(*stacked, TEXTS), expected, rtol=1e-4, atol=1e-4)


def test_adapters_are_merged_in_order_and_a_new_one_goes_on_top(llm_folder: Path, tmp_path: Path) -> None:
    first, tokenizer = _trained(llm_folder, 1)
    save_teacher(first, tokenizer, LoraConfig(r=4), tmp_path / 't1', tmp_path / 'a1')
    second, _ = _trained(llm_folder, 2, adapters=[str(tmp_path / 'a1')])
    save_teacher(second, tokenizer, LoraConfig(r=4), tmp_path / 't2', tmp_path / 'a2')
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


def test_an_adapter_of_another_llm_is_refused(llm_folder: Path, tmp_path: Path) -> None:
    encoder, tokenizer = _trained(llm_folder, 1)
    save_teacher(encoder, tokenizer, LoraConfig(r=4), tmp_path / 'teacher', tmp_path / 'adapter')
    config = LlamaConfig.from_pretrained(llm_folder)
    torch.manual_seed(1)
    LlamaModel(config).save_pretrained(tmp_path / 'same_shape')
    config.hidden_size, config.intermediate_size = 16, 32
    LlamaModel(config).save_pretrained(tmp_path / 'narrow')
    adapters = [str(tmp_path / 'adapter')]
    with pytest.raises(ConfigError, match=f'adapter was trained on another LLM, {llm_folder}'):
        load_llm(TextEncoderConfig(pretrained=str(tmp_path / 'same_shape'), adapters=adapters))
    (tmp_path / 'adapter' / 'base_model.json').unlink()
    with pytest.raises(ConfigError, match='does not fit .* of width 16'):
        load_llm(TextEncoderConfig(pretrained=str(tmp_path / 'narrow'), adapters=adapters))
    with pytest.raises(ConfigError, match='is not a LoRA adapter'):
        load_llm(TextEncoderConfig(pretrained=str(llm_folder), adapters=[str(tmp_path)]))


def test_lora_on_a_projection_that_is_not_there_is_an_error(llm_folder: Path) -> None:
    with pytest.raises(ConfigError, match='no projection called qkv_proj; it has down_proj'):
        text_encoder_from_config(TextEncoderConfig(pretrained=str(llm_folder)),
                                 LoraConfig(target_modules=['q_proj', 'qkv_proj']))


def test_on_meta_nothing_is_in_memory(llm_folder: Path) -> None:
    encoder, _ = text_encoder_from_config(TextEncoderConfig(pretrained=str(llm_folder)), LoraConfig(), on_meta=True)
    assert all(p.is_meta for p in encoder.parameters())
    _, head = load_llm_and_head(TextEncoderConfig(pretrained=str(llm_folder)), on_meta=True)
    assert head.weight.is_meta and head.weight.shape == (400, 32)


def test_a_folder_that_is_no_teacher_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='is not a teacher'):
        load_teacher(tmp_path)
    with pytest.raises(ConfigError, match='no folder /nowhere'):
        _encoder(Path('/nowhere'))
