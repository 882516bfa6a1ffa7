# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 1 as a user calls it: a warm start, and what is measured while it trains."""

from pathlib import Path

import pytest
import torch
from parts import make_samples, write_dataset
from recipes_in_process import run_recipe
from safetensors.torch import load_file

from llm2clip.data.convert.samples import Sample
from llm2clip.metrics.retrieval import caption_retrieval_accuracy
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.teacher.llm import load_teacher
from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.checkpoints import read_model


def test_warm_start_then_contrastive_on_its_adapter(
    llm_folder: Path, image_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [f'text_encoder.pretrained={llm_folder}', f'train_data.streams.s.local={image_dataset}', 'run_name=r',
            'global_train_batch_size=8', 'device=cpu', 'progress_bar=false', 'train_data.num_workers=0',
            'train_data.num_canonical_nodes=2', 'optimizer.name=adamw', 'optimizer.lr=1e-2']
    run_recipe(monkeypatch, 'train_stage1', *args, 'objective=mntp', 'train_data.texts={short: 1.0, long: 1.0}',
               'max_duration=4ep', f'save_folder={tmp_path}/mntp')
    losses = list(read_metrics(tmp_path / 'mntp/metrics.jsonl')['loss/train/total'].values())
    assert len(losses) == 32 and losses[-1] < 0.8 * losses[0]
    run_recipe(monkeypatch, 'train_stage1', *args, 'train_data.pairs=[{query: [short], positive: [long]}]',
               f'text_encoder.adapters=[{tmp_path}/mntp/lora]', 'max_duration=1ba', 'optimizer.lr=0.0',
               f'save_folder={tmp_path}/stage1')
    warm, stacked = (load_file(tmp_path / name / 'teacher/model.safetensors') for name in ('mntp', 'stage1'))
    raw = load_file(llm_folder / 'model.safetensors')
    moved = 'layers.0.mlp.up_proj.weight'
    torch.testing.assert_close(stacked[moved], warm[moved])
    assert (raw[moved] - warm[moved]).abs().max() > 1e-3


def test_accuracy_during_stage1_is_that_of_its_teacher(
    stage1_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [Sample(text, {'a': text, 'b': f'{text} on a wall'})
               for text in (sample.captions['long'][:28] for sample in make_samples(40, images=False))]
    write_dataset(samples, tmp_path / 'pairs')
    run_recipe(monkeypatch, 'train_stage1', *stage1_args, 'max_duration=4ba', 'eval_interval=2ba', 'optimizer.lr=0.01',
               'text_encoder.instruction="Find it. "', 'lora.lora_dropout=0.5', 'train_data.num_workers=0',
               f'eval_data.streams.s.local={tmp_path}/pairs/train', 'eval_data.num_workers=0',
               'eval_data.num_canonical_nodes=4', 'global_eval_batch_size=12', f'save_folder={tmp_path}/run')
    measured = read_metrics(tmp_path / 'run/metrics.jsonl')['metrics/eval/cra']
    # Of the first two captions of a dataset, which evaluation reads without instruction and without dropout.
    teacher = load_teacher(tmp_path / 'run/teacher')
    first, second = (encode_texts(*teacher, [sample.captions[key] for sample in samples]) for key in 'ab')
    assert measured.keys() == {2, 4} and measured[2] != measured[4]
    assert measured[4] == pytest.approx(caption_retrieval_accuracy(first, second))


def test_the_teacher_has_the_averaged_weights(
    stage1_args: list[str], image_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the last checkpoint, also if the run ends with an evaluation, after which Composer trains on."""
    run_recipe(monkeypatch, 'train_stage1', *stage1_args, 'algorithms.ema={half_life: 2ba}', 'eval_interval=4ba',
               f'eval_data.streams.s.local={image_dataset}', 'eval_data.num_workers=0', f'save_folder={tmp_path}')
    found = load_file(tmp_path / 'lora/adapter_model.safetensors')
    averaged = {name.replace('.default', ''): value for name, value in read_model(
        (tmp_path / 'checkpoints/latest-rank0.pt').resolve()).items()}
    assert found and all(torch.equal(value, averaged[f'text_encoder.llm.{name}']) for name, value in found.items())
