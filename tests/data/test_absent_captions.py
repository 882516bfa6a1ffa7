# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2 and evaluation on images with any number of captions: all that there are, and only those."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import picture, write_dataset
from streaming import MDSWriter

from llm2clip.config import AdapterConfig, DatasetConfig, ImageDataConfig, ImageStreamConfig, ModelConfig, VisionConfig
from llm2clip.data.captions import text_id
from llm2clip.data.convert.samples import Sample
from llm2clip.data.image_text_dataset import build_image_loader
from llm2clip.data.schema import dataset_fingerprint, read_index, vector_columns, vector_rows
from llm2clip.data.vectors import dequantize, float_vectors
from llm2clip.metrics.retrieval import rank_both_ways
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.models.joint import JointLLM2CLIP, embed_captions
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.teacher.llm import load_teacher, teacher_fingerprint
from llm2clip.teacher.sources import LLMTeacher
from llm2clip.training.algorithms.batches import TextEncoderInLoop

IMAGE_SIZE = 32
KEYS = ['en', 'de', 'fr']
DIM = 16

pytestmark = pytest.mark.usefixtures('no_leftovers')


def _samples() -> list[Sample]:
    """Every image has `ja`, and all combinations of the others occur, none of them among them."""
    return [Sample(f'{i}', {**{key: f'{key} of {i}' if i >> k & 1 else '' for k, key in enumerate(KEYS)}, 'ja': 'x'},
                   picture(i)) for i in range(16)]


def _embedding(key: str, sample_id: str) -> np.ndarray:
    return np.random.default_rng(text_id(key + sample_id)).standard_normal(DIM).astype(np.float32)


@pytest.fixture(scope='module', params=['float16', 'int8'])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The images, and an embeddings dataset in which the vector of an absent caption is zero."""
    folder = tmp_path_factory.mktemp('gaps')
    samples = _samples()
    write_dataset(samples, folder)
    keys = [*KEYS, 'ja']
    vectors = np.stack([[_embedding(key, s.sample_id) if s.captions[key] else np.zeros(DIM, np.float32)
                         for key in keys] for s in samples])
    with MDSWriter(out=str(folder / 'embeddings'), columns=vector_columns(keys, DIM, request.param),
                   hashes=['xxh64']) as writer:
        for row in vector_rows([s.sample_id for s in samples], keys, vectors, request.param):
            writer.write(row)
    (folder / 'embeddings/teacher.json').write_text(json.dumps(
        {'dataset': dataset_fingerprint(read_index(folder / 'train')), 'teacher': {}}))
    return folder / 'train', folder / 'embeddings'


def _loader(
    data: tuple[Path, Path], mix: dict[str, float], train: bool, captions: bool = False
) -> torch.utils.data.DataLoader:
    stream = ImageStreamConfig(str(data[0]), embeddings={'t': DatasetConfig(str(data[1]))})
    config = ImageDataConfig(streams={'s': stream}, caption_weights=mix, num_workers=0, num_canonical_nodes=2)
    return build_image_loader(config, IMAGE_SIZE, 8, 5, train=train, captions=captions).dataloader


def test_existing_captions_are_drawn_with_their_embeddings(data: tuple[Path, Path]) -> None:
    samples = {sample.sample_id: sample for sample in _samples()}
    loader = _loader(data, {'en': 1.0, 'de': 1.0, 'fr': 1.0, 'ja': 1e-9}, train=True)
    drawn: dict[str, set[str]] = {sample_id: set() for sample_id in samples}
    for batch in (batch for _ in range(8) for batch in loader):
        for sample_id, text, vector in zip(batch['sample_id'], batch['text_id'].tolist(), dequantize(batch).float()):
            key = next(key for key, caption in samples[sample_id].captions.items() if text_id(caption) == text)
            drawn[sample_id].add(key)
            np.testing.assert_allclose(vector, _embedding(key, sample_id), atol=0.05)
    for sample_id, keys in drawn.items():
        assert keys <= ({key for key in KEYS if samples[sample_id].captions[key]} or {'ja'})
    assert sum(map(len, drawn.values())) > 20
    # Without a mix, any caption is.
    key_of = {text_id(text): key for sample in samples.values() for key, text in sample.captions.items() if text}
    loader = _loader(data, {}, train=True)
    assert {key_of[text] for _ in range(8) for batch in loader for text in batch['text_id'].tolist()} == {*KEYS, 'ja'}


def _model() -> LLM2CLIP:
    torch.manual_seed(0)
    return LLM2CLIP(ModelConfig(VisionConfig('test_efficientnet', False, image_size=32), AdapterConfig(depth=1),
                                embed_dim=8), DIM, load_weights=False).eval()


@torch.no_grad()
def test_evaluation_in_training_uses_all_existing_captions(data: tuple[Path, Path]) -> None:
    model = ComposerLLM2CLIP(_model())
    metric = model.val_metrics['retrieval_recall@10']
    metric.k = 5
    samples, images, texts, image_of_text = _samples(), [], [], []
    for batch in map(float_vectors, _loader(data, dict.fromkeys(KEYS, 1.0), train=False)):
        model.update_metric(batch, model.eval_forward(batch), metric)
        exists = batch['text_id'] != 0
        assert exists.tolist() == [[bool(samples[i].captions[key]) for key in KEYS] for i in batch['index'].tolist()]
        for i, vectors in zip(batch['index'].tolist(), batch['text_embedding']):
            for key, vector in zip(KEYS, vectors):
                expected = _embedding(key, f'{i}') * bool(samples[i].captions[key])
                np.testing.assert_allclose(vector, expected, atol=0.05)
        image_features = model.model.get_image_features(batch['pixel_values'])
        text_features = model.model.get_text_features(batch['text_embedding'])
        for image, vectors, there in zip(image_features, text_features, exists):
            if there.any():
                image_of_text += [len(images)] * int(there.sum())
                images.append(image)
                texts.append(vectors[there])
    expected = rank_both_ways(torch.stack(images), torch.cat(texts), torch.tensor(image_of_text)).recalls()
    assert expected['n_images'] == 14 and expected['n_texts'] == 24
    assert metric.compute().item() == pytest.approx(
        (expected['image_retrieval_recall@5'] + expected['text_retrieval_recall@5']) / 2)


def test_a_teacher_in_the_loop_gives_zeros_if_absent(teacher_folder: Path, data: tuple[Path, Path]) -> None:
    encoder, tokenizer = load_teacher(teacher_folder)
    teacher = TextEncoderInLoop(LLMTeacher(encoder, tokenizer, teacher_fingerprint(teacher_folder)))
    vectors = teacher.embed(['a dog', '', 'a cat', ' '])
    assert not vectors[[1, 3]].any()
    torch.testing.assert_close(vectors[[0, 2]], encode_texts(encoder, tokenizer, ['a dog', 'a cat']).half())
    assert not teacher.embed(['', '']).any()
    # As the loader gives them.
    batch = next(iter(_loader(data, dict.fromkeys(KEYS, 1.0), train=False, captions=True)))
    columns = torch.stack([teacher.embed(column) for column in batch['caption']], dim=1)
    assert torch.equal(columns.any(-1), batch['text_id'] != 0)


@torch.no_grad()
def test_a_trainable_text_tower_gives_zeros_if_absent() -> None:
    embedding = torch.nn.EmbeddingBag(256, DIM)

    def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
        assert all(text.strip() for text in texts)
        return {'input': torch.tensor([list(text.encode()[:1]) for text in texts])}

    model = JointLLM2CLIP(_model(), embedding, tokenize)
    vectors = embed_captions(['a', '', 'b'], model.encode)
    assert not vectors[1].any() and torch.equal(vectors[[0, 2]], model.encode(['a', 'b']))
    outputs = model({'pixel_values': torch.zeros(3, 3, 32, 32), 'caption': [('a', '', 'b'), ('', '', '')]})
    assert outputs['text_features'].shape == (3, 2, 8) and bool(torch.isfinite(outputs['text_features']).all())
