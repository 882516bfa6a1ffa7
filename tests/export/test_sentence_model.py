# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The teacher in sentence-transformers: the same vectors, with and without instruction, and hard negatives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from parts import make_samples, text_encoder_from_config
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from llm2clip.config import CaptionDataConfig, CaptionPairConfig, CaptionStreamConfig, LoraConfig, TextEncoderConfig
from llm2clip.data.caption_pair_dataset import build_caption_pair_loader
from llm2clip.data.captions import text_id
from llm2clip.data.convert.writer import write_splits
from llm2clip.export.sentence_model import export_sentence_transformers
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.registry import build_source
from llm2clip.teacher.llm import cast_weights, load_teacher, save_teacher

TEXTS = ['a red square', 'a <s> and </s> b', '<s>user\n a', 'a', 'a purple stripe painted by somebody who likes green']


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
def test_stage_1_trains_on_hard_negatives_of_the_library(teacher_folder: Path, tmp_path: Path) -> None:
    export_sentence_transformers(teacher_folder, tmp_path / 'st')
    pairs = [{'query': sample.captions['short'], 'positive': sample.captions['long']}
             for sample in make_samples(12, images=False)]
    model = SentenceTransformer(str(tmp_path / 'st'), device='cpu', trust_remote_code=True)
    mined: Any = mine_hard_negatives(Dataset.from_list(pairs), model, num_negatives=1)
    mined.to_json(tmp_path / 'mined.jsonl')
    write_splits(*build_source({'name': 'text_pairs', 'files': f'{tmp_path}/mined.jsonl'}), tmp_path / 'd')
    data = CaptionDataConfig(num_workers=0, num_canonical_nodes=1, streams={'s': CaptionStreamConfig(
        f'{tmp_path}/d/train', pairs=[CaptionPairConfig(['query'], ['positive'], 'negative')])})
    batch, = build_caption_pair_loader(data, load_teacher(teacher_folder)[1], 12, 3, train=True).dataloader
    negative = {text_id(row['query']): text_id(row['negative']) for row in mined}
    assert len(negative) == 12
    assert batch['negative_text_id'].tolist() == [negative[i] for i in batch['query_text_id'].tolist()]
