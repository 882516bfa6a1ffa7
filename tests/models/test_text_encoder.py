# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The LLM as an encoder: attention, padding, pooling, LoRA, and saving."""

from pathlib import Path

import pytest
import torch

from llm2clip.config import ConfigError, LoraConfig, TextEncoderConfig
from llm2clip.models.text_encoder import (
    CaptionTokenizer,
    TextEncoder,
    encode_texts,
    load_teacher,
    save_teacher,
    text_encoder_from_config,
)

TEXTS = ['a red square', 'a blue circle on a wall', 'a', 'a purple stripe painted by somebody who likes green']


def _encoder(folder: Path, **options: object) -> tuple[TextEncoder, CaptionTokenizer]:
    encoder, tokenizer = text_encoder_from_config(TextEncoderConfig(pretrained=str(folder), **options))
    return encoder.eval(), tokenizer


@pytest.mark.parametrize('bidirectional', [True, False])
def test_the_first_token_sees_the_last_only_without_causal_mask(llm_folder: Path, bidirectional: bool) -> None:
    encoder, tokenizer = _encoder(llm_folder, bidirectional=bidirectional)
    encoder.pool = lambda hidden, mask: hidden[:, 1]
    batch = tokenizer([TEXTS[1]])
    changed = {**batch, 'input_ids': batch['input_ids'].clone()}
    changed['input_ids'][0, -1] = 7
    same = torch.allclose(encoder(**batch), encoder(**changed), atol=1e-6)
    assert same is not bidirectional


@pytest.mark.parametrize('bidirectional', [True, False])
def test_company_and_padding_do_not_matter(llm_folder: Path, bidirectional: bool) -> None:
    encoder, tokenizer = _encoder(llm_folder, bidirectional=bidirectional)
    alone = torch.cat([encoder(**tokenizer([text])) for text in TEXTS])
    torch.testing.assert_close(encoder(**tokenizer(TEXTS)), alone, rtol=1e-4, atol=1e-5)
    batch = tokenizer(TEXTS)
    left = {key: torch.stack([row.roll(int((m == 0).sum())) for row, m in zip(value, batch['attention_mask'])])
            for key, value in batch.items()}
    torch.testing.assert_close(encoder(**left), alone, rtol=1e-4, atol=1e-5)


def test_mean_pooling_is_over_the_captions_own_tokens(llm_folder: Path) -> None:
    encoder, tokenizer = _encoder(llm_folder)
    batch = tokenizer(TEXTS[:1])
    states = encoder.llm(input_ids=batch['input_ids'], attention_mask=encoder._every_token_sees_every_token(
        batch['attention_mask'])).last_hidden_state
    own = len(tokenizer.tokenizer(TEXTS[0], add_special_tokens=False).input_ids)
    assert batch['input_ids'].shape[1] == own + 1 and batch['input_ids'][0, 0] == 0
    torch.testing.assert_close(encoder(**batch), states[:, 1:].mean(1))


def test_last_pooling_takes_the_last_own_token(llm_folder: Path) -> None:
    encoder, tokenizer = _encoder(llm_folder, pooling='last')
    torch.testing.assert_close(encoder(**tokenizer(TEXTS))[2], encoder(**tokenizer(TEXTS[2:3]))[0],
                               rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match='pooling'):
        _encoder(llm_folder, pooling='max')


def test_instruction_and_template_are_read_but_not_pooled(llm_folder: Path) -> None:
    encoder, tokenizer = _encoder(llm_folder, chat_template=True, instruction='Find it. ')
    (ids, start), = tokenizer.tokenize(TEXTS[:1], query=True)
    text = tokenizer.tokenizer.decode(ids)
    assert text == '<s>user\nFind it. a red square</s>'
    assert tokenizer.tokenizer.decode(ids[start:]) == 'a red square</s>'
    (plain, _), = tokenizer.tokenize(TEXTS[:1])
    assert 'Find' not in tokenizer.tokenizer.decode(plain)
    query = encoder(**tokenizer(TEXTS[:1], query=True))
    assert not torch.allclose(query, encoder(**tokenizer(TEXTS[:1])), atol=1e-4)


def test_truncation_keeps_the_end_token(llm_folder: Path) -> None:
    _, tokenizer = _encoder(llm_folder, chat_template=True, max_length=12)
    (ids, _), = tokenizer.tokenize([TEXTS[3]])
    assert len(ids) == 12 and ids[-1] == 1
    with pytest.raises(ValueError, match='leaves no room'):
        _encoder(llm_folder, max_length=1)[1].tokenize(['a'])


def test_empty_caption_is_an_error(llm_folder: Path) -> None:
    with pytest.raises(ValueError, match='caption 1 .* empty'):
        _encoder(llm_folder)[1](['a', ' '])


def test_encode_texts_keeps_the_order_whatever_the_batches(llm_folder: Path) -> None:
    encoder, tokenizer = _encoder(llm_folder)
    expected = encoder(**tokenizer(TEXTS)).detach()
    for batch_tokens in (1, 20, 1000):
        torch.testing.assert_close(encode_texts(encoder, tokenizer, TEXTS, batch_tokens), expected,
                                   rtol=1e-4, atol=1e-5)


def test_lora_trains_alone_and_merges_into_an_equal_teacher(llm_folder: Path, tmp_path: Path) -> None:
    config = TextEncoderConfig(pretrained=str(llm_folder))
    encoder, tokenizer = text_encoder_from_config(config, LoraConfig(r=4))
    assert sum(map(encoder.fsdp_wrap_fn, encoder.modules())) == 2
    trainable = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trainable and all('lora_' in name for name in trainable)
    assert len(trainable) == 2 * 7 * 2
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if 'lora_B' in name:
                p.normal_(generator=torch.Generator().manual_seed(1))
    save_teacher(encoder, tokenizer, LoraConfig(r=4), tmp_path / 'teacher')
    teacher, teacher_tokenizer = load_teacher(tmp_path / 'teacher')
    expected = encode_texts(encoder.eval(), tokenizer, TEXTS)
    torch.testing.assert_close(encode_texts(teacher, teacher_tokenizer, TEXTS), expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_folder_that_is_no_teacher_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='is not a teacher'):
        load_teacher(tmp_path)
    with pytest.raises(ConfigError, match='no folder /nowhere'):
        _encoder(Path('/nowhere'))
