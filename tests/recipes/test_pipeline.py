# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Every recipe in turn on a folder of pictures, as a user would call them."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parts import make_samples, picture, write_dataset
from PIL import Image
from recipes_in_process import run_recipe
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from llm2clip.data.convert.samples import Sample
from llm2clip.data.schema import read_samples
from llm2clip.export.check import pictures
from llm2clip.metrics.retrieval import caption_retrieval_accuracy, rank_both_ways
from llm2clip.remote_code.text_encoder_llm2clip import encode_texts
from llm2clip.teacher.folder import load_teacher
from llm2clip.training.callbacks.jsonl_logger import read_metrics


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
               f'text_encoder.adapters=[{tmp_path}/mntp/adapter]', 'max_duration=1ba', 'optimizer.lr=0.0',
               f'save_folder={tmp_path}/stage1')
    warm, stacked = (load_file(tmp_path / name / 'teacher/model.safetensors') for name in ('mntp', 'stage1'))
    raw = load_file(llm_folder / 'model.safetensors')
    moved = 'layers.0.mlp.up_proj.weight'
    torch.testing.assert_close(stacked[moved], warm[moved])
    assert (raw[moved] - warm[moved]).abs().max() > 1e-3


def test_caption_retrieval_while_stage1_trains_is_that_of_its_teacher(
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


def test_images_to_report(
    llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path('photos').mkdir()
    rows = ['image,caption']
    encoded = [*pictures(32).values(), *map(picture, range(5, 24))]
    for i, sample in enumerate(make_samples(24)):
        Path('photos', f'{i}.png').write_bytes(encoded[i])
        rows += [f'{i}.png,{text}' for text in sample.captions.values()]
    Path('captions.csv').write_text('\n'.join(rows).replace(', painted', ' painted') + '\n')

    def run(name: str, *args: str) -> None:
        run_recipe(monkeypatch, name, *args)

    data, small = 'data/photos/train', ['global_train_batch_size=8', 'run_name=r', 'max_duration=3ba', 'device=cpu',
                                        'progress_bar=false', 'train_data.num_workers=0',
                                        'train_data.num_canonical_nodes=2', 'optimizer.lr=1e-3']
    prepare = ['source.name=image_folder', 'source.images=photos', 'source.captions=captions.csv', 'out=data/photos']
    run('prepare_data', *prepare)
    run('prepare_data', *prepare)
    run('train_stage1', *small, 'save_folder=s1', f'text_encoder.pretrained={llm_folder}',
        f'train_data.streams.p.local={data}', 'train_data.pairs=[{query: ["0"], positive: ["1"]}]')
    assert capsys.readouterr().out.endswith('wrote the teacher to s1/teacher and its adapter to s1/adapter\n')
    run('extract_embeddings', 'teacher=s1/teacher', f'datasets.train.local={data}', 'out=emb', 'device=cpu')
    run('train_stage2', *small, 'save_folder=s2', f'train_data.streams.p.local={data}', 'teacher=s1/teacher',
        'train_data.streams.p.embeddings.t.local=emb/train', 'train_data.caption_mix={"0": 1.0, "1": 1.0}',
        'model.vision={name: test_efficientnet, pretrained: false}', 'model.vision.image_size=32', 'model.embed_dim=16')
    assert 'the vision tower begins with random weights' in capsys.readouterr().out
    run('evaluate', 'models.m.run=s2', 'out=eval', 'num_workers=0', 'device=cpu',
        f'retrieval.photos.source={{name: mds, local: {data}, caption_keys: ["0", "1"]}}',
        f'cra.captions={data}', 'cra.caption_keys=["0","1"]', 'cra.teachers.cra=s1/teacher')
    run('export_hf', 'run=s2', 'out=export')
    run('export_vision', 'run=s2', 'out=export/vision')
    run('export_sentence_transformers', 'teacher=s1/teacher', 'out=export/st')
    run('report', 'results=eval', 'out=.', 'galleries=[photos]', 'steps={stage1: s1, stage2: s2}')

    results = json.loads(Path('eval/results.json').read_text())
    photos = results['retrieval']['photos']['models']['m']
    assert photos['n_images'] == 24 and photos['n_texts'] == 48
    teacher = load_teacher('s1/teacher')
    first, second = (F.normalize(encode_texts(*teacher, [sample[f'caption.{key}'] for sample in read_samples(data)]))
                     for key in '01')
    found = [(first @ second.T).argmax(way) == torch.arange(24) for way in (0, 1)]
    assert results['cra']['cra'] == pytest.approx(50 * sum(part.float().mean().item() for part in found), abs=1e-3)
    assert Path('export/st/modules.json').is_file() and Path('export/vision/model.safetensors').is_file()
    assert Path('report.html').stat().st_size > 10_000 and Path('export/llm2clip/model.safetensors').is_file()

    # The export gives the same numbers, from plain pictures.
    model = AutoModel.from_pretrained('export/llm2clip')
    processor = AutoImageProcessor.from_pretrained('export/llm2clip')
    images = [Image.open(f'photos/{i}.png') for i in range(24)]
    captions = [line.split(',')[1] for line in Path('captions.csv').read_text().splitlines()[1:]]
    with torch.no_grad():
        found = rank_both_ways(model.get_image_features(**processor(images, return_tensors='pt')),
                               model.get_text_features(captions), torch.arange(24).repeat_interleave(2)).recalls()
    assert {name: photos[name] for name in found} == pytest.approx(found, abs=1e-3)
