# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The teacher in sentence-transformers: the same vectors, with and without instruction."""

from pathlib import Path

import pytest
import torch
from parts import text_encoder_from_config
from sentence_transformers import SentenceTransformer

from llm2clip.config import LoraConfig, TextEncoderConfig
from llm2clip.export.sentence_model import export_sentence_transformers
from llm2clip.remote_code.text_encoder_llm2clip import encode_texts
from llm2clip.teacher.llm import load_teacher, save_teacher

TEXTS = ['a red square', 'a', 'a purple stripe painted by somebody who likes green']


@pytest.mark.parametrize('options', [
    {'instruction': 'Find it: '}, {'chat_template': False, 'pooling': 'last', 'instruction': 'Find it: '},
    {'bidirectional': False, 'max_length': 16}])
def test_vectors_are_the_teachers(options: dict[str, object], llm_folder: Path, tmp_path: Path) -> None:
    config = TextEncoderConfig(pretrained=str(llm_folder), **options)
    encoder, tokenizer = text_encoder_from_config(config, LoraConfig(r=4), 0.1)
    save_teacher(encoder, tokenizer, LoraConfig(r=4), tmp_path / 'teacher')
    export_sentence_transformers(tmp_path / 'teacher', tmp_path / 'st')
    teacher = load_teacher(tmp_path / 'teacher')
    assert 'SentenceTransformer(' in (tmp_path / 'st/README.md').read_text()
    model = SentenceTransformer(str(tmp_path / 'st'), device='cpu', trust_remote_code=True)
    assert model.get_sentence_embedding_dimension() == 32 and model.max_seq_length == config.max_length
    found = model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, encode_texts(*teacher, TEXTS), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, encode_texts(encoder, tokenizer, TEXTS, instruction='x '), atol=1e-2)
    if config.instruction:
        queries = model.encode(TEXTS, prompt_name='query', convert_to_tensor=True)
        expected = encode_texts(*teacher, TEXTS, instruction='Find it: ')
        torch.testing.assert_close(queries, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(queries, found, atol=1e-2)
