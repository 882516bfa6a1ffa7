# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Teacher embeddings: shard for shard, resumable, bound to dataset and teacher."""

from pathlib import Path

import numpy as np
import pytest
import torch
from parts import make_samples, write_dataset

from llm2clip.config import TextEncoderConfig
from llm2clip.data.schema import read_columns, read_index
from llm2clip.evaluate import _read_samples
from llm2clip.extract import extract_sidecar, teacher_fingerprint
from llm2clip.models.teacher import load_teacher, save_teacher
from llm2clip.models.text_encoder import encode_texts, text_encoder_from_config


def test_sidecar_has_the_same_shards_samples_and_the_teachers_vectors(
    image_dataset: Path, sidecar: Path, teacher_folder: Path
) -> None:
    sizes = [[shard['samples'] for shard in read_index(folder)['shards']] for folder in (image_dataset, sidecar)]
    assert sizes[0] == sizes[1] and len(sizes[0]) > 2
    assert read_columns(sidecar) == {'sample_id': 'str', 'text_embedding.short': 'ndarray:float16:32',
                                     'text_embedding.long': 'ndarray:float16:32'}
    samples = _read_samples(str(sidecar))
    expected = encode_texts(*load_teacher(teacher_folder), [s.captions['long'] for s in make_samples(64)])
    assert [s['sample_id'] for s in samples] == [s.sample_id for s in make_samples(64)]
    np.testing.assert_allclose(np.stack([s['text_embedding.long'] for s in samples]), expected.numpy(),
                               rtol=2e-3, atol=2e-3)


def test_finished_shards_are_kept_and_the_rest_is_done(
    image_dataset: Path, sidecar: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = *load_teacher(teacher_folder), teacher_fingerprint(teacher_folder)
    calls = []

    def stop_at_third(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_texts(*args, **kwargs)

    monkeypatch.setattr('llm2clip.extract.encode_texts', stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        extract_sidecar(image_dataset, tmp_path / 'out', *parts)
    assert not (tmp_path / 'out' / 'index.json').exists()
    extract_sidecar(image_dataset, tmp_path / 'out', *parts)
    assert len(calls) == 1 + len(read_index(image_dataset)['shards'])
    assert read_index(tmp_path / 'out') == read_index(sidecar)


def test_a_sidecar_begun_for_another_teacher_is_refused(
    image_dataset: Path, sidecar: Path, teacher_folder: Path
) -> None:
    fingerprint = {**teacher_fingerprint(teacher_folder), 'pooling': 'last'}
    with pytest.raises(ValueError, match='another dataset or teacher'):
        extract_sidecar(image_dataset, sidecar, *load_teacher(teacher_folder), fingerprint)


def test_fingerprint_sees_weights_and_options(llm_folder: Path, teacher_folder: Path, tmp_path: Path) -> None:
    encoder, tokenizer = text_encoder_from_config(TextEncoderConfig(pretrained=str(llm_folder), pooling='last'))
    save_teacher(encoder, tokenizer, None, tmp_path / 'pooled')
    first, second = teacher_fingerprint(teacher_folder), teacher_fingerprint(tmp_path / 'pooled')
    assert first['weights'] == second['weights'] and first != second
    path = tmp_path / 'pooled' / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-1] + b'\x7f')
    assert teacher_fingerprint(tmp_path / 'pooled')['weights'] != first['weights']


def test_damaged_and_missing_datasets_are_named(teacher_folder: Path, tmp_path: Path) -> None:
    parts = *load_teacher(teacher_folder), teacher_fingerprint(teacher_folder)
    with pytest.raises(FileNotFoundError, match='nowhere'):
        extract_sidecar(tmp_path / 'nowhere', tmp_path / 'out', *parts)
    write_dataset(make_samples(20), tmp_path / 'd')
    shard = tmp_path / 'd' / 'train' / 'all' / 'shard.00000.mds'
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match='shard.00000.mds is damaged'):
        extract_sidecar(tmp_path / 'd' / 'train', tmp_path / 'out', *parts)
    (tmp_path / 'd' / 'train' / 'index.json').write_text('{')
    with pytest.raises(ValueError, match='index.json is damaged'):
        extract_sidecar(tmp_path / 'd' / 'train', tmp_path / 'out2', *parts)
