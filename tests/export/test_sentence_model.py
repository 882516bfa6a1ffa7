# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The teacher in sentence-transformers: the same vectors, with and without instruction, and the same hard negatives."""

from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from datasets import Dataset
from parts import make_samples, text_encoder_from_config, write_dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from llm2clip.config import CaptionDataConfig, CaptionStreamConfig, LoraConfig, TextEncoderConfig
from llm2clip.data.caption_pair_dataset import build_caption_pair_loader
from llm2clip.data.captions import text_id
from llm2clip.data.convert.samples import Sample
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.schema import CAPTION, read_samples
from llm2clip.errors import ConfigError
from llm2clip.export.sentence_model import export_sentence_transformers
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.registry import build_source
from llm2clip.teacher.llm import cast_weights, load_teacher, save_teacher

TEXTS = ['a red square', 'a', 'a purple stripe painted by somebody who likes green']


@pytest.mark.parametrize(('options', 'has_code'), [
    ({}, False), ({'chat_template': False, 'max_length': 8}, False), ({'bidirectional': False}, False),
    ({'chat_template': False, 'pooling': 'last', 'instruction': 'Find it: '}, False), ({'dtype': 'bfloat16'}, False),
    ({'instruction': 'Find it: '}, True), ({'pooling': 'weighted_mean'}, True)])
def test_vectors_are_the_teachers(
    options: dict[str, object], has_code: bool, llm_folder: Path, tmp_path: Path
) -> None:
    config = TextEncoderConfig(pretrained=str(llm_folder), **options)
    has_code = has_code or (config.bidirectional and transformers.__version__.startswith('4.'))
    encoder, tokenizer = text_encoder_from_config(config, LoraConfig(r=4), 0.1)
    save_teacher(encoder, tokenizer, LoraConfig(r=4), tmp_path / 'teacher')
    export_sentence_transformers(tmp_path / 'teacher', tmp_path / 'st')
    teacher = load_teacher(tmp_path / 'teacher')
    cast_weights(teacher[0].llm, torch.float32)  # an export is in float32 if the teacher has LoRA
    assert has_code or not [*(tmp_path / 'st').rglob('*.py')]
    model = SentenceTransformer(str(tmp_path / 'st'), device='cpu', trust_remote_code=has_code)
    assert model.get_embedding_dimension() == 32 and model.max_seq_length == config.max_length
    vectors = model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(vectors, encode_texts(*teacher, TEXTS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.encode_document(TEXTS, convert_to_tensor=True), vectors)
    queries = model.encode_query(TEXTS, convert_to_tensor=True)
    expected = encode_texts(*teacher, TEXTS, instruction=config.instruction)
    torch.testing.assert_close(queries, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(queries, vectors, atol=1e-2) is not bool(config.instruction)


@pytest.mark.usefixtures('no_leftovers')
@pytest.mark.parametrize('limits', [{}, {'range_min': 3}, {'relative_margin': 0.01}])
def test_hard_negatives_are_those_of_the_library(limits: dict[str, Any], llm_folder: Path, tmp_path: Path) -> None:
    config = TextEncoderConfig(pretrained=str(llm_folder), instruction='Find it: ', chat_template=False)
    encoder, tokenizer = text_encoder_from_config(config)
    save_teacher(encoder, tokenizer, None, tmp_path / 'teacher')
    (tmp_path / 'teacher/.cache').mkdir()
    # One image has a text of another one and lacks a caption, and one has the same text twice.
    samples = make_samples(12, images=False)
    shared = samples[0].captions['short']
    samples += [Sample('x', {'short': shared, 'long': ''}), Sample('y', {'short': 'a wall', 'long': 'a wall'})]
    write_dataset(samples, tmp_path / 'd', size_limit='2kb')
    source = {'name': 'hard_negatives', 'dataset': f'{tmp_path}/d/train', 'teacher': f'{tmp_path}/teacher', **limits}
    with patch('llm2clip.teacher.hard_negatives._TEXTS', 10), patch('llm2clip.teacher.hard_negatives._SCORES', 100):
        write_splits(*build_source(source), tmp_path / 'mined')
    # The library hides the captions in a row with the anchor, which must include itself.
    pairs = [pair for sample in samples for pair in product({*sample.captions.values()} - {'', shared}, repeat=2)]
    export_sentence_transformers(tmp_path / 'teacher', tmp_path / 'st')
    mined = mine_hard_negatives(
        Dataset.from_dict(dict(zip(('anchor', 'positive'), map(list, zip(*pairs))))), num_negatives=1, range_max=40,
        model=SentenceTransformer(str(tmp_path / 'st'), device='cpu', trust_remote_code=True), **limits)
    negative = dict(zip(mined['anchor'], mined['negative']))
    assert ('relative_margin' in limits) is (len(negative) < 24)
    for sample, row in zip(samples, read_samples(tmp_path / 'mined/train'), strict=True):
        of_key = {f'negative_of_{key}': negative.get(text, '') for key, text in sample.captions.items()}
        assert {'sample_id': sample.sample_id, **{CAPTION + k: v for k, v in (sample.captions | of_key).items()}} == row
    # Stage 1 trains each query with its own, if there is one.
    data = CaptionDataConfig(num_workers=0, num_canonical_nodes=1, streams={
        's': CaptionStreamConfig(f'{tmp_path}/mined/train')})
    of_query = {text_id(text): text_id(negative.get(text, '')) for s in samples for text in s.captions.values()}
    for batch in build_caption_pair_loader(data, tokenizer, 7, 3, train=True).dataloader:
        assert batch['negative_text_id'].tolist() == [of_query[i] for i in batch['query_text_id'].tolist()]
    for key, message in (('dataset', 'source.dataset: there is no MDS dataset'), ('teacher', 'is not a teacher')):
        with pytest.raises(ConfigError, match=message):
            build_source({**source, key: f'{tmp_path}/nowhere'})
