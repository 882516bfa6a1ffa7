# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Data of the MNTP warm start: which tokens are masked, and from which texts."""

import json
from pathlib import Path

import pytest
import torch
from parts import make_samples, write_dataset
from streaming.base.util import clean_stale_shared_memory

from llm2clip.config import CaptionDataConfig, CaptionStreamConfig, ConfigError, MNTPConfig, TextEncoderConfig
from llm2clip.data.convert.samples import Sample
from llm2clip.data.convert.texts import plain_text
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.texts import _count_tokens, _mask_tokens, build_masked_text_loader
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer
from llm2clip.teacher.llm import load_caption_tokenizer

pytestmark = pytest.mark.usefixtures('no_leftovers')


@pytest.fixture
def tokenizer(llm_folder: Path) -> CaptionTokenizer:
    return load_caption_tokenizer(TextEncoderConfig(pretrained=str(llm_folder), instruction='No: ', max_length=64))


def _loader(tokenizer: CaptionTokenizer, workers: int = 0, seed: int = 3, **streams: CaptionStreamConfig
            ) -> torch.utils.data.DataLoader:
    config = CaptionDataConfig(streams=streams, texts={'short': 1.0, 'long': 1.0}, num_workers=workers,
                               num_canonical_nodes=4)
    return build_masked_text_loader(config, tokenizer, MNTPConfig(), 8, seed, 'train_data').dataloader


def test_a_fifth_of_the_own_tokens_is_masked_and_remembered() -> None:
    ids = list(range(100, 150))
    total = 0
    for seed in range(100):
        tokens, labels = _mask_tokens(ids, 3, 7, 0.2, seed)
        masked = [i for i, label in enumerate(labels) if label >= 0]
        assert masked and min(masked) >= 3
        assert all(tokens[i] == 7 and labels[i] == ids[i] for i in masked)
        assert all(tokens[i] == ids[i] for i in range(50) if i not in masked)
        total += len(masked)
    assert 0.18 < total / (100 * 47) < 0.22
    assert _mask_tokens(ids, 3, 7, 0.2, 5) == _mask_tokens(ids, 3, 7, 0.2, 5) != _mask_tokens(ids, 3, 7, 0.2, 6)


def test_at_least_one_token_is_masked_but_never_the_first() -> None:
    for seed in range(20):
        tokens, labels = _mask_tokens([5, 6], 0, 7, 0.01, seed)
        assert tokens == [5, 7] and labels == [-100, 6]


def test_captions_and_plain_text_are_mixed(image_dataset: Path, tmp_path: Path, tokenizer: CaptionTokenizer) -> None:
    lines = '\n\n'.join(f'The plain sentence number {i} is long enough to be taken.' for i in range(40))
    (tmp_path / 'wiki.txt').write_text(f' = Heading = \n{lines}\n')
    splits, dropped = plain_text([str(tmp_path / 'wiki.txt')])
    assert write_splits(splits, dropped, tmp_path / 'wiki') == {'train': 40}
    assert json.loads((tmp_path / 'wiki/dataset.json').read_text())['filtered'] == {'short line': 1}
    streams = {'captions': CaptionStreamConfig(str(image_dataset)),
               'wiki': CaptionStreamConfig(str(tmp_path / 'wiki' / 'train'), texts={'text': 1.0})}
    captions = {text for sample in make_samples(64) for text in sample.captions.values()}
    origins = set()
    for batch in _loader(tokenizer, **streams):
        assert _count_tokens(batch) == {'total': int(batch['attention_mask'].sum()),
                                       'loss_generating': int((batch['labels'] >= 0).sum())}
        whole = torch.where(batch['labels'] >= 0, batch['labels'], batch['input_ids'])
        for ids, mask in zip(whole, batch['attention_mask']):
            text = tokenizer.tokenizer.decode(ids[mask == 1]).removeprefix('<s>user\n').removesuffix('</s>')
            origins.add('wiki' if text.startswith('The plain sentence') else 'captions' if text in captions else text)
    assert origins == {'wiki', 'captions'}


def test_texts_are_drawn_among_those_that_a_sample_has(tmp_path: Path, tokenizer: CaptionTokenizer) -> None:
    samples = [Sample(f'{i}', {'short': f'short text {i}' if i % 2 else '', 'long': '' if i % 2 else f'long text {i}'})
               for i in range(8)]
    write_dataset(samples, tmp_path / 'd')
    batch, = _loader(tokenizer, s=CaptionStreamConfig(f'{tmp_path}/d/train'))
    whole = torch.where(batch['labels'] >= 0, batch['labels'], batch['input_ids'])
    for sample_id, ids, mask in zip(batch['sample_id'], whole, batch['attention_mask']):
        text, = filter(None, samples[int(sample_id)].captions.values())
        assert text in tokenizer.tokenizer.decode(ids[mask == 1])


@pytest.mark.usefixtures('no_leftovers')
def test_masks_do_not_depend_on_workers(image_dataset: Path, tokenizer: CaptionTokenizer) -> None:
    stream = CaptionStreamConfig(str(image_dataset))
    labels, loaders = [], []
    for workers, seed in ((0, 3), (2, 3), (0, 4)):
        loaders.append(_loader(tokenizer, workers, seed, s=stream))  # whose workers the fixture ends
        batches = list(loaders[-1])
        labels.append([row[row >= 0].tolist() for batch in batches for row in batch['labels']])
        clean_stale_shared_memory()
    assert labels[0] == labels[1] != labels[2]


def test_bad_options_are_named(image_dataset: Path, tokenizer: CaptionTokenizer) -> None:
    config = CaptionDataConfig(streams={'s': CaptionStreamConfig(str(image_dataset))})
    for mntp, message in ((MNTPConfig(mask_token=''), 'mntp.mask_token'), (MNTPConfig(), r'train_data\.texts')):
        with pytest.raises(ConfigError, match=message):
            build_masked_text_loader(config, tokenizer, mntp, 8, 3, 'train_data')
