# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""LLMs in LLM2Vec's layout: what it does, written out, against the imported teacher."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_in_process import run_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from llm2clip.config import LLMTeacherConfig
from llm2clip.errors import ConfigError
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.official.llm2vec import import_teacher
from llm2clip.teacher.llm import load_teacher, teacher_config

SPECIAL = ['<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<|im_start|>', '<|im_end|>']
BEFORE, AFTER = '<|start_header_id|>user<|end_header_id|>\n\n', '<|eot_id|>'
CAPTIONS = ['a red circle', 'a blue square number 7, painted on a plain wall', ' (leading space)', 'x', 'two\nlines',
            'white space at the end \n']


@pytest.fixture(scope='module')
def official(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM as LLM2Vec saves it, and two LoRA adapters, of which the second was trained on the first."""
    folder = tmp_path_factory.mktemp('official')
    base = folder / 'Llama-3-tiny-Instruct'
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    tokenizer.add_special_tokens({'additional_special_tokens': SPECIAL})
    # What comes with the tokenizer is not what LLM2Vec uses.
    tokenizer.chat_template = "<s>system\nbe nice</s>{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    tokenizer.save_pretrained(base)
    torch.manual_seed(4)
    LlamaModel(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
                           initializer_range=0.2)).save_pretrained(base)
    config = json.loads((base / 'config.json').read_text())
    config.update(architectures=['LlamaBiModel'], auto_map={'AutoModel': 'modeling_llama_encoder.LlamaEncoderModel'})
    (base / 'config.json').write_text(json.dumps(config))
    for i, name in enumerate(('mntp', 'supervised')):
        _write_adapter(folder / name, load_file(base / 'model.safetensors'), str(base), seed=i)
    return folder


def _write_adapter(folder: Path, weights: dict[str, torch.Tensor], base: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    projections = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
    lora = {}
    for name, weight in weights.items():
        if name.split('.')[-2] in projections:
            for side, shape in (('A', (4, weight.shape[1])), ('B', (weight.shape[0], 4))):
                key = f'base_model.model.{name.removesuffix(".weight")}.lora_{side}.weight'
                lora[key] = torch.randn(shape, generator=generator) * 0.2
    folder.mkdir()
    save_file(lora, folder / 'adapter_model.safetensors')
    (folder / 'adapter_config.json').write_text(json.dumps({
        'peft_type': 'LORA', 'task_type': None, 'base_model_name_or_path': base, 'r': 4, 'lora_alpha': 8,
        'lora_dropout': 0.05, 'bias': 'none', 'target_modules': projections, 'inference_mode': True,
        'auto_mapping': {'base_model_class': 'LlamaBiModel', 'parent_library': 'llm2vec.models'}}))
    (folder / 'llm2vec_config.json').write_text(json.dumps({
        'pooling_mode': 'mean', 'max_length': 512, 'doc_max_length': 512, 'skip_instruction': True}))


@torch.no_grad()
def _llm2vec(
    base: Path, adapters: Sequence[Path], caption: str, before: str = BEFORE, after: str = AFTER, instruction: str = ''
) -> torch.Tensor:
    """A caption's vector as LLM2Vec computes it: the whole text is tokenised at once, and as many of its last tokens
    are pooled as caption and template have without what is before."""
    llm = LlamaModel.from_pretrained(base, attn_implementation='eager').eval()
    for adapter in adapters:
        lora = load_file(adapter / 'adapter_model.safetensors')
        for name, parameter in llm.named_parameters():
            key = f'base_model.model.{name.removesuffix(".weight")}.lora_'
            if f'{key}A.weight' in lora:
                parameter += 2.0 * lora[f'{key}B.weight'] @ lora[f'{key}A.weight']
    tokenizer = AutoTokenizer.from_pretrained(base)
    caption = caption.rstrip() if before else caption
    before += f'{instruction.strip()} ' if instruction else ''
    ids = tokenizer(before + caption + after, return_tensors='pt').input_ids
    own = len(tokenizer(caption + after, add_special_tokens=False).input_ids)
    no_mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
    return llm(ids, attention_mask=no_mask).last_hidden_state[0, -own:].mean(0)


def _check_vectors(teacher: Path, base: Path, adapters: Sequence[Path], *frame: str, instruction: str = '') -> None:
    found = encode_texts(*load_teacher(teacher), CAPTIONS, instruction=instruction)
    expected = [_llm2vec(base, adapters, caption, *frame, instruction=instruction) for caption in CAPTIONS]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('adapters', [[], ['mntp', 'supervised']])
def test_vectors_are_those_of_llm2vec(official: Path, adapters: list[str], tmp_path: Path) -> None:
    base, folders = official / 'Llama-3-tiny-Instruct', [official / name for name in adapters]
    import_teacher(LLMTeacherConfig(str(base), adapters=[str(f) for f in folders]), None, tmp_path / 'teacher')
    # With an instruction and with the semicolon that the official training puts after it; white space is joined.
    for instruction in ('', 'Retrieve a similar caption.', ' Given a sentence, retrieve a short one; '):
        _check_vectors(tmp_path / 'teacher', base, folders, instruction=instruction)
    config = teacher_config(tmp_path / 'teacher')
    assert (config.bidirectional, config.pooling, config.max_length, config.instruction) == (True, 'mean', 512, '')
    assert 'auto_map' not in json.loads((tmp_path / 'teacher/config.json').read_text())


def test_other_templates_give_the_vectors_of_llm2vec(official: Path, tmp_path: Path) -> None:
    base = official / 'Llama-3-tiny-Instruct'
    for template, *frame in (('chatml', '<|im_start|>user\n', '<|im_end|>'), ('none', '', '')):
        import_teacher(LLMTeacherConfig(str(base)), template, tmp_path / template)
        _check_vectors(tmp_path / template, base, [], *frame)


def test_an_adapter_folder_names_its_llm(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [official / 'mntp', official / 'supervised']
    run_recipe(monkeypatch, 'import_official', 'teacher.type=llm', f'teacher.pretrained={folders[0]}',
               f'teacher.adapters=[{folders[1]}]', f'out={tmp_path}')
    _check_vectors(tmp_path / 'teacher', official / 'Llama-3-tiny-Instruct', folders)


@pytest.mark.parametrize(('saved', 'options', 'message'), [
    ({'pooling_mode': 'eos_token'}, {}, r"teacher\.pooling: 'mean', but .*llm2vec_config\.json says 'last'"),
    ({'pooling_mode': 'bos_token'}, {}, r"teacher\.pooling: 'mean', but .* says 'bos_token'"),
    ({'max_length': 400}, {}, r'teacher\.max_length: 512, but .* says 400'),
    ({'skip_instruction': False}, {}, 'skip_instruction is false'),
    ({}, {'chat_template': True}, r'teacher\.chat_template: LLM2Vec has templates of its own'),
])
def test_settings_other_than_those_saved_are_refused(
    official: Path, saved: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapter = shutil.copytree(official / 'mntp', tmp_path / 'mntp')
    path = adapter / 'llm2vec_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **saved}))
    config = LLMTeacherConfig(str(official / 'Llama-3-tiny-Instruct'), adapters=[str(adapter)], **options)
    with pytest.raises(ConfigError, match=message):
        import_teacher(config, None, tmp_path / 'teacher')


def test_unknown_and_unusable_templates_are_refused(official: Path, llm_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='template: which one LLM2Vec used cannot be told'):
        import_teacher(LLMTeacherConfig(str(llm_folder)), None, tmp_path / 'teacher')
    with pytest.raises(ConfigError, match=r'the tokenizer has no <\|start_header_id\|> and no <\|end_header_id\|>'):
        import_teacher(LLMTeacherConfig(str(llm_folder)), 'llama3', tmp_path / 'teacher')
    named = shutil.copytree(official / 'Llama-3-tiny-Instruct', tmp_path / 'x')
    path = named / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), '_name_or_path': 'a/Meta-Llama-3-8B-Instruct'}))
    import_teacher(LLMTeacherConfig(str(named)), None, tmp_path / 'teacher')
    _, tokenizer = load_teacher(tmp_path / 'teacher')
    assert tokenizer.tokenizer.decode(tokenizer.header) == f'<s>{BEFORE}'
