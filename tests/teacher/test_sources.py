# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Teachers that are no LLMs: models of sentence-transformers, and CLIP's own text tower."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composer.devices import DeviceCPU
from parts import make_samples
from recipes_in_process import run_recipe
from refusals import refused_at
from towers import projected, write_clip
from transformers import AutoModel, AutoTokenizer

from llm2clip.config import ClipTextConfig, SentenceTransformersTeacherConfig
from llm2clip.data.schema import read_samples
from llm2clip.data.vectors import dequantize, stored_vector
from llm2clip.errors import ConfigError, FileError
from llm2clip.modeling.loaders import LoadError
from llm2clip.teacher.clip_text import ClipText, load_clip_tokenizer
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.teacher.sources import SentenceTransformerModel

TEXTS = [text for sample in make_samples(6, images=False) for text in sample.captions.values()]
CPU = DeviceCPU()


def _source(folder: Path, **options: Any) -> SentenceTransformerModel:
    return SentenceTransformerModel(SentenceTransformersTeacherConfig(str(folder), **options))


@torch.no_grad()
def _by_hand(folder: Path, texts: Sequence[str]) -> torch.Tensor:
    """Mean of the last states of each text alone, scaled to length 1."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = [model(**tokenizer(text, return_tensors='pt', truncation=True, max_length=12)).last_hidden_state.mean(1)
            for text in texts]
    return F.normalize(torch.cat(rows), dim=-1)


@pytest.mark.parametrize(('options', 'prompt'), [
    ({}, ''), ({'prompt_name': 'query'}, 'find: '), ({'prompt': 'query: '}, 'query: '),
    ({'prompt_name': 'document'}, '')])
def test_vectors_are_those_of_the_model_with_the_prompt(
    options: dict[str, str], prompt: str, embedder: Path
) -> None:
    teacher = _source(embedder, **options).load(CPU, batch_tokens=60)
    embedded = teacher.embed(TEXTS)
    expected = _by_hand(embedder, [prompt + text for text in TEXTS])
    torch.testing.assert_close(embedded.vectors, expected, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(embedder)
    lengths = [len(tokenizer(prompt + text).input_ids) for text in TEXTS]
    assert embedded.truncated == sum(length > 12 for length in lengths) > 0
    assert embedded.tokens == sum(min(length, 12) for length in lengths)
    assert teacher.width == 32 and teacher.embed([]).vectors.shape[0] == 0
    assert teacher.fingerprint.to_json()['prompt'] == prompt
    assert teacher.fingerprint.kinds == ['sentence_transformers']
    # They take part in a graph, and bfloat16 comes close.
    weight = torch.ones(32, requires_grad=True)
    (embedded.vectors * weight).sum().backward()
    narrow = _source(embedder, **options).load(CPU, precision='amp_bf16').embed(TEXTS).vectors
    assert narrow.dtype == torch.float32 and not torch.equal(narrow, embedded.vectors)
    torch.testing.assert_close(narrow, embedded.vectors, rtol=0, atol=0.05)


def test_the_default_prompt_is_used_unless_another_is_given(embedder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(embedder, tmp_path / 'model')
    path = folder / 'config_sentence_transformers.json'
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, 'default_prompt_name': 'other'}))
    found = _source(folder).load(CPU).embed(TEXTS).vectors
    torch.testing.assert_close(found, _source(embedder, prompt='x ').load(CPU).embed(TEXTS).vectors)
    without = _source(folder, prompt='').load(CPU).embed(TEXTS).vectors
    torch.testing.assert_close(without, _source(embedder).load(CPU).embed(TEXTS).vectors)
    path.write_text(json.dumps({**about, 'prompts': 7}))
    with refused_at(path):
        _source(folder).fingerprint()


def test_the_fingerprint_sees_weights_tokenizer_and_prompt(embedder: Path, tmp_path: Path) -> None:
    source, folder = _source(embedder), shutil.copytree(embedder, tmp_path / 'model')
    first = source.fingerprint()
    assert _source(folder).fingerprint() == first == source.load(CPU).fingerprint
    _source(embedder, prompt_name='query').check_encoding(Fingerprint.of('?', {'prompt': 'find: '}), 'the run')
    with pytest.raises(ValueError, match="prompt is 'x', expected ''"):
        _source(folder, prompt='x').check_encoding(first, 'the run')
    (folder / '1_Pooling/config.json').write_text((folder / '1_Pooling/config.json').read_text() + ' ')
    with pytest.raises(ValueError, match='another teacher than the run: weights is'):
        _source(folder).fingerprint().check(first, str(folder), 'the run')


def test_the_files_that_load_are_copied(embedder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(embedder, tmp_path / 'model')
    for name in ('model.onnx', 'modeling.py', 'photo.png'):
        (folder / name).write_text('')
    source = _source(folder)
    assert source.save(tmp_path / 'copy', source.fingerprint()) == source.fingerprint()
    names = {str(path.relative_to(folder)) for path in folder.rglob('*.*')}
    assert {str(path.relative_to(tmp_path / 'copy')) for path in (tmp_path / 'copy').rglob('*.*')} == \
        {name for name in names if name not in ('model.onnx', 'photo.png', 'README.md')}
    with pytest.raises(ValueError, match='another teacher than the model: prompt'):
        _source(folder, prompt='x').save(tmp_path / 'other', source.fingerprint())


def test_a_folder_without_such_a_model_is_an_error(embedder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt_name: 'querry', .*: query, document, other"):
        _source(embedder, prompt_name='querry').fingerprint()
    with pytest.raises(FileError, match='nowhere/at-all: cannot be read'):
        _source(Path('nowhere/at-all')).fingerprint()
    with pytest.raises(ConfigError, match='text_encoder_in_loop.sharded'):
        _source(embedder).load(CPU, sharded=True)
    (tmp_path / 'modules.json').write_text('[{"type": "sentence_transformers.models.Pooling", "path": "x"}]')
    with pytest.raises(LoadError):
        _source(tmp_path).load(CPU)


@pytest.fixture(scope='module', params=['clip', 'siglip'])
def clip(request: pytest.FixtureRequest, llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp(request.param), llm_folder, request.param)


def test_embeddings_hold_features_of_a_clip_if_captions_fit(
    clip: Path, image_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger('transformers'), 'propagate', True)  # as pytest needs it
    run_recipe(monkeypatch, 'extract_embeddings', 'teacher.type=clip_text', f'teacher.name={clip}',
               f'datasets.train.local={image_dataset}', f'out={tmp_path}/out', 'device=cpu', 'batch_tokens=50')
    # The long captions have more than twelve tokens.
    assert '64 left out' in capfd.readouterr().out
    assert 'UNEXPECTED' not in caplog.text  # the vision tower is no surprise
    model, tokenizer = AutoModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    siglip = {'padding': 'max_length', 'max_length': 12, 'return_attention_mask': False}
    padding = siglip if model.config.model_type == 'siglip' else {}
    for image, row in zip(read_samples(image_dataset)[:10], read_samples(tmp_path / 'out/train')):
        tokens = tokenizer(image['caption.short'], return_tensors='pt', **padding)
        with torch.no_grad():
            expected = projected(model.get_text_features(**tokens))[0]
        found = dequantize(stored_vector(row, 'short')).float()
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
        assert not np.any(row['text_embedding.long'])
    about = json.loads((tmp_path / 'out/train/teacher.json').read_text())
    assert about['teacher']['too_long'] == 'left out'


def test_siglip_reads_lower_case(clip: Path, tmp_path: Path) -> None:
    """SigLIP 2 was trained on lower case, but its published models have the tokenizer of Gemma, which keeps case."""
    tokenizer = load_clip_tokenizer(ClipTextConfig(str(clip)))
    same = torch.equal(*(tokenizer([text])['input_ids'] for text in ('A Dog', 'a dog')))
    assert same == ('siglip' in clip.name)
    tokenizer.tokenizer.save_pretrained(tmp_path)  # as in an export
    ids = [AutoTokenizer.from_pretrained(tmp_path)(text).input_ids for text in ('A Dog', 'a dog')]
    assert (ids[0] == ids[1]) == same


def test_the_fingerprint_of_a_clip_is_that_of_its_text_side(clip: Path, tmp_path: Path) -> None:
    found, whole = ClipText(clip).fingerprint(), AutoModel.from_pretrained(clip)
    hashes = []
    for part in (whole.vision_model, whole.text_model):
        with torch.no_grad():
            next(part.parameters()).add_(1)
        whole.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(clip).save_pretrained(tmp_path)
        hashes.append(ClipText(tmp_path).fingerprint())
    assert hashes[0] == found == ClipText(clip).load(DeviceCPU()).fingerprint != hashes[1]
    assert found.teachers[0]['clip_text'] == whole.config.model_type
    # Under every version of transformers, whatever it calls the weights.
    whole.load_state_dict({name: torch.full_like(value, 0.5) for name, value in whole.state_dict().items()})
    whole.save_pretrained(tmp_path)
    known = {'clip': '7ba3149c511f5e71', 'siglip': '49ede7a3537ec78d'}
    assert ClipText(tmp_path).fingerprint().teachers[0]['weights'] == known[whole.config.model_type]


def test_a_model_that_is_no_clip_is_refused(llm_folder: Path) -> None:
    with pytest.raises(ConfigError, match="^teacher: .*, a 'llama' model"):
        ClipText(llm_folder).load(DeviceCPU())
    with pytest.raises(LoadError, match='/nowhere'):
        ClipText('/nowhere').load(DeviceCPU())
