# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Teachers that stage 1 has not trained, through every recipe: a sentence-transformers model and an LLM as it is."""

from pathlib import Path

import pytest
import torch
from composer.devices import DeviceCPU
from launched import stage2_arguments
from parts import make_samples
from recipes_in_process import run_recipe
from transformers import AutoModel

from llm2clip.config import LLMTeacherConfig, SentenceTransformersTeacherConfig
from llm2clip.data.schema import read_samples
from llm2clip.data.vectors import dequantize, stored_vector
from llm2clip.modeling import modeling_llm2clip
from llm2clip.teacher.caption_teacher import TeacherSource
from llm2clip.teacher.fingerprint import TeacherRecord
from llm2clip.teacher.sources import teacher_source
from llm2clip.training.algorithms.batches import TextEncoderInLoop
from llm2clip.training.runs import Stage2Run

TEXTS = [sample.captions['short'] for sample in make_samples(8)]


@pytest.fixture(params=['sentence_transformers', 'llm'])
def teacher(
    request: pytest.FixtureRequest, embedder: Path, llm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[TeacherSource, list[str]]:
    """A teacher, and the keys that name it."""
    if request.param == 'sentence_transformers':
        return (teacher_source(SentenceTransformersTeacherConfig(str(embedder), 'query')),
                [f'teacher={{type: sentence_transformers, name: {embedder}}}', 'teacher.prompt_name=query'])
    # What is compared is computed in one type, whichever processor this is.
    monkeypatch.setattr('llm2clip.teacher.sources.computes_bfloat16', lambda: False)
    return (teacher_source(LLMTeacherConfig(str(llm_folder), pooling='last', dtype='bfloat16')),
            [f'teacher={{type: llm, pretrained: {llm_folder}, pooling: last, dtype: bfloat16}}'])


def test_from_captions_to_an_export(
    teacher: tuple[TeacherSource, list[str]], image_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source, keys), run = teacher, tmp_path / 'run'
    embeddings, export = tmp_path / 'embeddings/s', tmp_path / 'export/llm2clip'
    args = [*stage2_arguments(image_dataset, embeddings), 'train_data.num_workers=0', 'optimizer.name=sgd',
            'max_duration=2ba', 'eval_data=null', f'save_folder={run}']
    run_recipe(monkeypatch, 'extract_embeddings', *keys, f'datasets.s.local={image_dataset}', 'device=cpu',
               f'out={tmp_path}/embeddings', 'batch_tokens=100')
    loaded = source.load(DeviceCPU())
    stored = torch.stack([dequantize(stored_vector(row, 'short')) for row in read_samples(embeddings)[:8]])
    rounded = 2e-2 if 'type: llm' in keys[0] else 2e-3  # bfloat16, or float16 as it is stored
    torch.testing.assert_close(stored, TextEncoderInLoop(loaded).embed(TEXTS), rtol=rounded, atol=rounded / 10)

    # Another prompt, or another pooling, is another teacher than that of the text embeddings.
    other = [f'teacher.{"prompt_name=other" if len(keys) > 1 else "pooling=mean"}']
    with pytest.raises(ValueError, match='the embeddings dataset of train_data comes from another teacher than .*: p'):
        run_recipe(monkeypatch, 'train_stage2', *args, *keys, *other)
    without = [arg for arg in args if '.embeddings.' not in arg and not arg.startswith('eval_data')]
    run_recipe(monkeypatch, 'train_stage2', *without, 'eval_data=null', *keys, 'text_encoder_in_loop.enabled=true')
    record = TeacherRecord.read(run)
    assert record == TeacherRecord(TeacherRecord.read(embeddings).teacher, {'llm_embed_dim': 32})

    # From here on, the run names its teacher.
    run_recipe(monkeypatch, 'evaluate', f'models.m.run={run}', f'out={tmp_path}/evaluate', 'num_workers=0',
               'device=cpu', f'retrieval.r={{local: {image_dataset}, caption_keys: [short]}}', 'bootstrap=0')
    run_recipe(monkeypatch, 'export_hf', f'run={run}', f'out={tmp_path}/export')
    model = Stage2Run(run).load_model()
    with torch.no_grad():
        expected = model.get_text_features(loaded.embed(TEXTS).vectors)
        for kind in (AutoModel, modeling_llm2clip.LLM2CLIPModel):
            found = kind.from_pretrained(export).get_text_features(TEXTS)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
