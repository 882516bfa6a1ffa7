# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Captions as tokens: template, instruction, end token, truncation, padding."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from llm2clip.config import TextEncoderConfig
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer

LONG = 'a purple stripe painted by somebody who likes green'


def _tokenizer(folder: Path, template: str = '', **options: object) -> CaptionTokenizer:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if template:
        tokenizer.chat_template = template
    return CaptionTokenizer(tokenizer, TextEncoderConfig(pretrained='', **options))


def _decode(tokenizer: CaptionTokenizer, ids: list[int]) -> str:
    return tokenizer.tokenizer.decode(ids)


def test_instruction_and_template_are_read_but_not_own(llm_folder: Path) -> None:
    tokenizer = _tokenizer(llm_folder)
    text, = tokenizer.tokenize(['a red square'], 'Find it. ')
    assert _decode(tokenizer, text.ids) == '<s>user\nFind it. a red square</s>'
    assert _decode(tokenizer, text.ids[text.start:]) == 'a red square</s>'
    plain, = tokenizer.tokenize(['a red square'])
    assert plain.ids[plain.start:] == text.ids[text.start:] and 'Find' not in _decode(tokenizer, plain.ids)


@pytest.mark.parametrize(('pooling', 'expected'), [('mean', '<s>a red square'), ('last', '<s>a red square</s>')])
def test_without_template(llm_folder: Path, pooling: str, expected: str) -> None:
    tokenizer = _tokenizer(llm_folder, chat_template=False, pooling=pooling)
    text, = tokenizer.tokenize(['a red square'])
    assert _decode(tokenizer, text.ids) == expected and text.start == 1


def test_the_footer_ends_at_its_first_special_token(llm_folder: Path) -> None:
    mistral = "{% for m in messages %}<s>[INST] {{ m['content'] | trim }} [/INST]\n{% endfor %}"
    phi = "{% for m in messages %}<s>{{ m['content'] }}</s>\n<s>{% endfor %}"
    for template, expected in ((mistral, '<s>[INST] a [/INST]'), (phi, '<s>a</s>')):
        tokenizer = _tokenizer(llm_folder, template)
        assert _decode(tokenizer, tokenizer.tokenize(['a'])[0].ids) == expected


@pytest.mark.parametrize(('content', 'expected', 'instructed'), [
    ("m['content']", '<s>  a  </s>', '<s>Say:  a  </s>'), ("m['content'] | trim", '<s>a</s>', '<s>Say:  a</s>'),
    ("m['content'].rstrip()", '<s>  a</s>', '<s>Say:  a</s>')])
def test_white_space_at_the_ends_as_in_the_template(
    llm_folder: Path, content: str, expected: str, instructed: str
) -> None:
    tokenizer = _tokenizer(llm_folder, f'{{% for m in messages %}}<s>{{{{ {content} }}}}</s>{{% endfor %}}')
    assert _decode(tokenizer, tokenizer.tokenize(['  a  '])[0].ids) == expected
    assert _decode(tokenizer, tokenizer.tokenize(['  a  '], 'Say:')[0].ids) == instructed


def test_the_template_does_not_know_todays_date(llm_folder: Path) -> None:
    dated = ("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
             "<s>{{ date_string }}\n{{ messages[0]['content'] }}</s>")
    tokenizer = _tokenizer(llm_folder, dated)
    assert '26 Jul 2024' in _decode(tokenizer, tokenizer.tokenize(['a'])[0].ids)


def test_truncation_is_counted_and_keeps_the_end_token(llm_folder: Path) -> None:
    whole, = _tokenizer(llm_folder).tokenize([LONG])
    text, = _tokenizer(llm_folder, max_length=12).tokenize([LONG])
    assert len(text.ids) == 12 and text.ids[-1] == 1
    assert text.cut == len(whole.ids) - 12 and whole.cut == 0


def test_what_leaves_no_room_is_an_error(llm_folder: Path) -> None:
    with pytest.raises(ValueError, match='max_length: 1 leaves no room'):
        _tokenizer(llm_folder, max_length=1)
    with pytest.raises(ValueError, match='leaves no room'):
        _tokenizer(llm_folder, max_length=10).tokenize(['a'], 'Find a caption that says the same as this one. ')
    with pytest.raises(ValueError, match='caption 1 .* empty'):
        _tokenizer(llm_folder).tokenize(['a', ' '])


def test_a_template_that_is_not_there_is_an_error_only_if_asked_for(llm_folder: Path) -> None:
    bare = PreTrainedTokenizerFast.from_pretrained(llm_folder)
    bare.chat_template = None
    assert CaptionTokenizer(bare, TextEncoderConfig(pretrained='')).footer == []
    with pytest.raises(ValueError, match='no chat template'):
        CaptionTokenizer(bare, TextEncoderConfig(pretrained='', chat_template=True))


def test_a_tokenizer_without_pad_token_pads_what_the_mask_hides(llm_folder: Path) -> None:
    tokenizer = _tokenizer(llm_folder)
    assert tokenizer.tokenizer.pad_token is None
    batch = tokenizer(['a', LONG])
    assert batch['attention_mask'].sum(1).tolist() == [len(text.ids) for text in tokenizer.tokenize(['a', LONG])]
    assert (batch['input_ids'][batch['attention_mask'] == 0] == tokenizer.pad_id).all()
    assert (batch['embed_mask'] <= batch['attention_mask']).all()
