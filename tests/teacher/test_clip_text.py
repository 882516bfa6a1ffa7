# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""CLIP's own text features as embeddings datasets."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.devices import DeviceCPU
from recipes_in_process import run_recipe
from towers import projected, write_clip
from transformers import AutoModel, AutoTokenizer

from llm2clip.config import ClipTextConfig
from llm2clip.data.schema import read_samples
from llm2clip.data.vectors import dequantize, stored_vector
from llm2clip.errors import ConfigError
from llm2clip.modeling.checks import LoadError
from llm2clip.teacher.clip_text import ClipText, load_clip_tokenizer


@pytest.fixture(scope='module', params=['clip', 'siglip'])
def clip(request: pytest.FixtureRequest, llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp(request.param), llm_folder, request.param)


def test_embeddings_hold_its_features_of_captions_that_fit(
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


def test_its_fingerprint_is_that_of_the_text_side(clip: Path, tmp_path: Path) -> None:
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
