# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Several vectors of one caption, one per prompt, from extraction to the batches of stage 2."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from launched import losses
from parts import make_samples, write_dataset
from recipes_in_process import run_recipe

from llm2clip.config import Stage2Config
from llm2clip.config.loading import load_config
from llm2clip.data.captions import caption_key, text_id
from llm2clip.data.schema import read_columns, read_samples
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.teacher.llm import load_teacher
from llm2clip.training.stage2 import make_loaders


@pytest.mark.usefixtures('no_leftovers')
def test_stage2_draws_them_by_keys_of_their_own(
    stage2_args: list[str], teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(32)
    samples[5].captions['long'] = ''
    write_dataset(samples, tmp_path / 'images')
    extract = [f'teacher={teacher_folder}', f'datasets.s.local={tmp_path}/images/train', f'out={tmp_path}/out',
               'device=cpu', "prompts.brief='in a word, {caption} is'", "prompts.mood='the mood of {caption}'"]
    run_recipe(monkeypatch, 'extract_embeddings', *extract)
    out = tmp_path / 'out/s'
    names = [key + name for key in ('long', 'short') for name in ('', '@brief', '@mood')]
    assert {*read_columns(out)} == {'sample_id', *(f'text_embedding.{name}' for name in names)}
    rows, encoder = read_samples(out), load_teacher(teacher_folder)
    prompts = {'': '{caption}', '@brief': 'in a word, {caption} is', '@mood': 'the mood of {caption}'}
    for key, (name, prompt) in product(('short', 'long'), prompts.items()):
        captions = [sample.captions[key] for sample in samples]
        expected = encode_texts(*encoder, [prompt.replace('{caption}', text or '-') for text in captions]).numpy()
        expected[[not text for text in captions]] = 0
        found = np.stack([row[f'text_embedding.{key}{name}'] for row in rows])
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    for changed, part in (("prompts.brief='{caption}?'", 'vectors.prompts.brief'), ('prompts=null', 'caption_keys')):
        with pytest.raises(ValueError, match=f'was begun for another dataset or teacher: {part} is'):
            run_recipe(monkeypatch, 'extract_embeddings', *extract, changed)

    args = [arg for arg in stage2_args if 'eval' not in arg and 'caption_weights' not in arg] + [
        f'train_data.streams.s.local={tmp_path}/images/train', f'train_data.streams.s.embeddings.tiny.local={out}',
        'train_data.num_workers=0', 'train_data.captions_per_image=2', 'max_duration=4ba']
    weights = [f'train_data.caption_weights.{name}=1' for name in names[1:]]
    data, _ = make_loaders(load_config(Stage2Config, [*args, *weights, f'save_folder={tmp_path}/run']))
    of_sample, drawn = {sample.sample_id: (sample, row) for sample, row in zip(samples, rows)}, set()
    for batch in data.dataloader:
        for sample_id, both, text_ids in zip(batch['sample_id'], batch['text_embedding'], batch['text_id']):
            sample, row = of_sample[sample_id]
            for vector, text in zip(both.numpy(), text_ids):
                found = {name for name in names[1:] if (row[f'text_embedding.{name}'] == vector).all()
                         and text == text_id(sample.captions[caption_key(name)])}
                assert found and vector.any()
                drawn |= found
    assert drawn == {*names[1:]}
    del data
    run_recipe(monkeypatch, 'train_stage2', *args, *weights, f'save_folder={tmp_path}/run')
    assert len({*losses(tmp_path / 'run').values()}) == 4
    with pytest.raises(ValueError, match="column 'caption.long@brief' is missing"):
        run_recipe(monkeypatch, 'train_stage2', *args, *weights, f'save_folder={tmp_path}/other',
                   'text_encoder_in_loop.enabled=true', f'teacher={teacher_folder}')
