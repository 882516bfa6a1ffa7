# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Teacher embeddings: shard for shard, resumable, bound to dataset and teacher."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.devices import DeviceCPU
from parts import make_samples, write_dataset, write_text_embeddings

from llm2clip.config import DatasetConfig
from llm2clip.data.convert.samples import Sample
from llm2clip.data.schema import read_columns, read_index, read_samples, vector_columns, vector_rows
from llm2clip.data.vectors import dequantize, stored_vector
from llm2clip.errors import ConfigError
from llm2clip.io.remotes import OutputFolder
from llm2clip.modeling.text_encoder import Tokenized, encode_texts
from llm2clip.teacher import extraction
from llm2clip.teacher.embedder import Embedded
from llm2clip.teacher.extraction import ExtractionTask, write_embeddings, write_shard
from llm2clip.teacher.llm import load_teacher
from llm2clip.teacher.sources import LLMTeacher, TeacherFolder


def _vectors(folder: Path, key: str) -> np.ndarray:
    return np.stack([dequantize(stored_vector(sample, key)).numpy() for sample in read_samples(folder)])


def test_embeddings_have_the_same_shards_and_samples(
    image_dataset: Path, embeddings: Path, teacher_folder: Path
) -> None:
    sizes = [[shard['samples'] for shard in read_index(folder)['shards']] for folder in (image_dataset, embeddings)]
    assert sizes[0] == sizes[1] and len(sizes[0]) > 2
    assert read_columns(embeddings) == {'sample_id': 'str', 'text_embedding.short': 'ndarray:float16:32',
                                     'text_embedding.long': 'ndarray:float16:32'}
    expected = encode_texts(*load_teacher(teacher_folder), [s.captions['long'] for s in make_samples(64)])
    assert [s['sample_id'] for s in read_samples(embeddings)] == [s.sample_id for s in make_samples(64)]
    np.testing.assert_allclose(_vectors(embeddings, 'long'), expected.numpy(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('storage', ['float16', 'int8'])
def test_vectors_are_stored_as_configured(teacher_folder: Path, tmp_path: Path, storage: str) -> None:
    """And those of absent captions are zero, and not embedded; what is embedded is counted."""
    texts = [('a dog', ''), ('', 'a cat'), (' ', 'a red square'), ('a dog', 'many words ' * 40)]
    write_dataset([Sample(f's{i}', {'a': a, 'b': b}) for i, (a, b) in enumerate(texts)], tmp_path / 'd')
    done = write_text_embeddings(tmp_path / 'd/train', tmp_path / 'out', teacher_folder, storage=storage)
    encoder = load_teacher(teacher_folder)
    tokens = encoder[1].tokenize([text for pair in texts for text in pair if text.strip()])
    assert done == {'shards': 1, 'captions': 5, 'tokens': sum(len(text.ids) for text in tokens), 'truncated': 1,
                    'left_out': 0, 'absent': 3}
    for key, column in zip('ab', zip(*texts)):
        expected = encode_texts(*encoder, [text.strip() or '-' for text in column]).numpy()
        expected[[not text.strip() for text in column]] = 0
        distances = np.linalg.norm(_vectors(tmp_path / 'out', key) - expected, axis=-1)
        assert distances.max() < (2e-2 if storage == 'int8' else 1e-3) * np.linalg.norm(expected, axis=-1).max()
    fingerprint = json.loads((tmp_path / 'out' / 'teacher.json').read_text())
    assert fingerprint['vectors'] == {'storage': storage, 'normalized': False}


def test_int8_is_within_half_a_step_and_all_vectors_are_finite() -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 2, 64)).astype(np.float32) * 10.0
    vectors[3, 1] = 0
    for row, expected in zip(vector_rows([*map(str, range(50))], ['x', 'y'], vectors, 'int8'), vectors):
        for key, vector in zip('xy', expected):
            stored = stored_vector(row, key)
            assert stored['text_embedding'].dtype == torch.int8 and stored['text_embedding'].abs().max() in (0, 127)
            off = np.abs(dequantize(stored).numpy() - vector)
            assert (off <= 0.501 * float(stored['text_embedding_scale'])).all()
    # Half a step is rounded to even numbers, with no drift away from zero.
    halves = np.array([[[127, 0.5, 1.5, -0.5, -2.5]]], np.float32)
    assert vector_rows(['a'], ['x'], halves, 'int8')[0]['text_embedding.x'].tolist() == [127, 0, 2, 0, -2]
    vectors[1, 1, 2] = np.nan
    for storage in ('float16', 'int8'):
        with pytest.raises(ValueError, match=f"the vector 'y' of sample '1' is not finite in {storage}"):
            vector_rows([*map(str, range(50))], ['x', 'y'], vectors, storage)


def test_finished_shards_are_kept_and_the_rest_is_done(
    image_dataset: Path, embeddings: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded, embed = [], LLMTeacher.embed_prepared

    def stop_in_the_third_shard(self: LLMTeacher, tokens: list[Tokenized], **options: Any) -> Embedded:
        if len(embedded) == 2 * of_a_shard + 1:
            raise KeyboardInterrupt
        embedded.extend(tokens)
        return embed(self, tokens, **options)

    n = len(read_index(image_dataset)['shards'])
    of_a_shard = 2 * read_index(image_dataset)['shards'][0]['samples']
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LLMTeacher, 'embed_prepared', stop_in_the_third_shard)
        write_text_embeddings(image_dataset, tmp_path / 'out', teacher_folder, part_tokens=1)
    assert not (tmp_path / 'out' / 'index.json').exists()
    done = write_text_embeddings(image_dataset, tmp_path / 'out', teacher_folder, part_tokens=100)
    assert done['shards'] == n - 2 and done['captions'] == 2 * 64 - 2 * of_a_shard
    for row, other in zip(read_samples(tmp_path / 'out'), read_samples(embeddings), strict=True):
        np.testing.assert_allclose(row['text_embedding.long'], other['text_embedding.long'], rtol=2e-3, atol=2e-3)
    assert write_text_embeddings(image_dataset, tmp_path / 'out', teacher_folder)['shards'] == 0


def test_leftovers_of_a_killed_process_are_replaced(image_dataset: Path, teacher_folder: Path, tmp_path: Path) -> None:
    """Also where another process, in a container or on a node without the first rank, has the same id."""
    for folder, pid in (('out', 1), ('node', os.getpid())):
        (left := tmp_path / folder / f'shard.00000.mds.tmp.{pid}').mkdir(parents=True)
        (left / 'shard.00000.mds').write_bytes(b'x')
    write_text_embeddings(image_dataset, tmp_path / 'out', teacher_folder)
    rows = vector_rows(['a'], ['x'], np.ones((1, 1, 4), np.float32), 'float16')
    write_shard(OutputFolder(tmp_path / 'node'), 0, rows, vector_columns(['x'], 4, 'float16'))
    assert not list(tmp_path.glob('*/*.tmp.*')) and (tmp_path / 'node/shard.00000.json').is_file()


def test_extraction_takes_remotes(image_dataset: Path, embeddings: Path, teacher_folder: Path, tmp_path: Path) -> None:
    """Downloads what it lacks, uploads what it writes, and resumes from the remote alone."""
    dataset = DatasetConfig(local=str(tmp_path / 'cache'), remote=str(image_dataset))
    missing, *there = sorted(shutil.copytree(image_dataset, tmp_path / 'cache').rglob('*.mds'))
    missing.unlink()
    teacher = TeacherFolder(teacher_folder).load(DeviceCPU())
    remote = tmp_path / 'bucket' / 'embeddings'
    write_embeddings(ExtractionTask(dataset, OutputFolder(tmp_path / 'out', str(remote))), teacher)
    assert read_index(remote) == read_index(embeddings)
    np.testing.assert_array_equal(_vectors(remote, 'long'), _vectors(embeddings, 'long'))
    assert sorted((tmp_path / 'cache').rglob('*.mds')) == there  # what was downloaded goes, and nothing else
    shutil.rmtree(tmp_path / 'out')
    (remote / 'index.json').unlink()
    (remote / 'shard.00001.json').unlink()
    done = write_embeddings(ExtractionTask(dataset, OutputFolder(tmp_path / 'out', str(remote))), teacher)
    assert done['shards'] == 1 and read_index(remote) == read_index(embeddings)
    assert not list(remote.glob('*.part'))
    # Another remote, or one that is added later, would lack the shards that are done.
    for out, before in ((tmp_path / 'out', f"'{remote}'"), (embeddings, None)):
        with pytest.raises(ValueError, match=f"out_remote is {before}, expected '.*other'"):
            write_embeddings(ExtractionTask(dataset, OutputFolder(out, str(tmp_path / 'other'))), teacher)
    assert not (tmp_path / 'other').exists()


def test_a_shard_beyond_the_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, '_LARGEST_SHARD', 100)
    rows = vector_rows(['a', 'b'], ['raw'], np.ones((2, 1, 32), np.float32), 'float16')
    with pytest.raises(ConfigError, match='shard.00000.mds would have 128 bytes'):
        extraction.write_shard(OutputFolder(tmp_path), 0, rows, vector_columns(['raw'], 32, 'float16'))
    assert not [*tmp_path.glob('*')]
