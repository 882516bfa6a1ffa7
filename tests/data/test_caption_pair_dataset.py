# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 1's batches: the right texts on the right side or the right tokens masked, drawn the same way every time, and
clear errors."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import check_resumed, make_samples, text_encoder_from_config, write_dataset
from refusals import refused_at
from streaming.base.util import clean_stale_shared_memory

from llm2clip.config import CaptionDataConfig, CaptionPairConfig, CaptionStreamConfig, MNTPConfig, TextEncoderConfig
from llm2clip.data.caption_pair_dataset import build_caption_pair_loader, pair_columns, stream_pairs
from llm2clip.data.captions import text_id
from llm2clip.data.convert.samples import Sample
from llm2clip.data.convert.text_pairs import plain_text
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.masked_text_dataset import _mask_tokens, build_masked_text_loader
from llm2clip.data.schema import read_index, whole_shard
from llm2clip.data.text_batches import count_tokens, split_by_length, split_packed
from llm2clip.errors import ConfigError, FileError
from llm2clip.modeling.text_encoder import CaptionTokenizer
from llm2clip.models.caption_contrastive import CaptionContrastive
from llm2clip.teacher.llm import load_caption_tokenizer

BOTH = [CaptionPairConfig(['short'], ['long']), CaptionPairConfig(['long'], ['short'])]

pytestmark = pytest.mark.usefixtures('no_leftovers')


@pytest.fixture
def tokenizer(llm_folder: Path) -> CaptionTokenizer:
    return load_caption_tokenizer(TextEncoderConfig(
        pretrained=str(llm_folder), instruction='Find: ', chat_template=False, max_length=64))


def _loader(
    folder: Path, tokenizer: CaptionTokenizer, pairs: list[CaptionPairConfig] = BOTH, train: bool = True,
    workers: int = 0, seed: int = 3, **options: Any
) -> torch.utils.data.DataLoader:
    clean_stale_shared_memory()
    config = CaptionDataConfig(streams={'s': CaptionStreamConfig(str(folder))}, pairs=pairs, num_workers=workers,
                               **{'num_canonical_nodes': 4, **options})
    return build_caption_pair_loader(config, tokenizer, 8, seed, train=train).dataloader


def _texts(tokenizer: CaptionTokenizer, batch: dict[str, Any], side: str, all_of_it: bool = False) -> list[str]:
    """The captions, without the space that stands between them and an instruction, or all that is read."""
    mask = batch[f'{side}_attention_mask' if all_of_it else f'{side}_embed_mask'] == 1
    texts = [tokenizer.tokenizer.decode(ids[m]) for ids, m in zip(batch[f'{side}_input_ids'], mask)]
    return texts if all_of_it else [text.removeprefix(' ') for text in texts]


def _seen(loader: torch.utils.data.DataLoader, tokenizer: CaptionTokenizer) -> list[tuple[str, str, str]]:
    return [row for batch in loader for row in zip(
        batch['sample_id'], _texts(tokenizer, batch, 'query', True), _texts(tokenizer, batch, 'positive', True))]


def test_a_pair_is_two_captions_of_one_sample(image_dataset: Path, tokenizer: CaptionTokenizer) -> None:
    """In directions with weights and instructions, by default that of the tokenizer."""
    pairs = [CaptionPairConfig(['short'], ['long'], weight=3.0), CaptionPairConfig(['long'], ['short'], instruction='')]
    samples = {sample.sample_id: sample.captions for sample in make_samples(64)}
    from_short = []
    for batch in _loader(image_dataset, tokenizer, pairs):
        queries, positives = (_texts(tokenizer, batch, side) for side in ('query', 'positive'))
        assert batch['query_text_id'].tolist() == [text_id(query) for query in queries]
        whole = _texts(tokenizer, batch, 'query', True)
        for sample_id, query, positive, text in zip(batch['sample_id'], queries, positives, whole):
            captions = samples[sample_id]
            assert sorted((query, positive)) == sorted(captions.values())
            from_short.append(query == captions['short'])
            assert text.startswith('<s>Find: a' if from_short[-1] else '<s>a')
        assert not any('Find' in text for text in _texts(tokenizer, batch, 'positive', True))
    assert len(from_short) == 64 and 0.6 < sum(from_short) / 64 < 0.9


def test_a_resumed_epoch_has_the_batches_that_are_left(image_dataset: Path, tokenizer: CaptionTokenizer) -> None:
    check_resumed(lambda: _loader(image_dataset, tokenizer, num_canonical_nodes=48))


def test_a_draw_depends_on_seed_epoch_and_sample_alone(image_dataset: Path, tokenizer: CaptionTokenizer) -> None:
    loader = _loader(image_dataset, tokenizer)
    first, second = _seen(loader, tokenizer), _seen(loader, tokenizer)
    assert sorted(first) != sorted(second)
    assert _seen(_loader(image_dataset, tokenizer, workers=2), tokenizer) == first
    assert sorted(_seen(_loader(image_dataset, tokenizer, shuffle_seed=1), tokenizer)) == sorted(first)
    assert sorted(_seen(_loader(image_dataset, tokenizer, seed=4), tokenizer)) != sorted(first)


def test_a_random_negative_is_of_the_positives_kind(tmp_path: Path, tokenizer: CaptionTokenizer) -> None:
    samples = make_samples(32, images=False)
    write_dataset(samples, tmp_path / 'd', size_limit='2kb')
    pairs = [CaptionPairConfig(['short'], ['long'], random_negative=True),
             CaptionPairConfig(['long'], ['short'], random_negative=True)]
    loader, epochs = _loader(tmp_path / 'd/train', tokenizer, pairs, workers=2), []
    for _ in range(2):
        rows = []
        for batch in loader:
            positives, negatives = (_texts(tokenizer, batch, side) for side in ('positive', 'negative'))
            for positive, negative in zip(positives, negatives):
                assert positive != negative and ('number' in positive) is ('number' in negative)
            assert batch['negative_text_id'].tolist() == [text_id(negative) for negative in negatives]
            rows += zip(batch['sample_id'], negatives)
        epochs.append(rows)
    assert len({negative for _, negative in epochs[0]}) > 16 and sorted(epochs[0]) != sorted(epochs[1])
    shards = {sample_id: i for i, shard in enumerate(read_index(tmp_path / 'd/train')['shards'])
              for sample_id in (row['sample_id'] for row in whole_shard(tmp_path / 'd/train', shard))}
    owner = {text: sample.sample_id for sample in samples for text in sample.captions.values()}
    assert max(shards.values()) == 1 and all(shards[owner[negative]] == shards[own] for own, negative in epochs[0])
    # A sample that is alone in its shard has none.
    alone = [Sample(f'{i}', {'short': f'{i}', 'long': 'x ' * 1500}) for i in range(8)]
    write_dataset(alone, tmp_path / 'e', size_limit='4kb')
    batch, = _loader(tmp_path / 'e/train', tokenizer, pairs)
    assert batch['negative_text_id'].tolist() == [0] * 8


def test_a_dataset_smaller_than_a_batch_is_named(
    tmp_path: Path, image_dataset: Path, tokenizer: CaptionTokenizer
) -> None:
    write_dataset(make_samples(7, images=False), tmp_path / 'd')
    config = CaptionDataConfig(pairs=BOTH, num_workers=0, num_canonical_nodes=4, streams={
        'large': CaptionStreamConfig(str(image_dataset)), 'small': CaptionStreamConfig(str(tmp_path / 'd/train'))})
    with refused_at('streams.small'):
        build_caption_pair_loader(config, tokenizer, 8, 3, train=True)


def test_a_global_batch_has_the_pairs_of_one_stream(tmp_path: Path, tokenizer: CaptionTokenizer) -> None:
    streams = {}
    for name in ('a', 'b'):
        write_dataset(make_samples(24, images=False, prefix=name), tmp_path / name)
        streams[name] = CaptionStreamConfig(str(tmp_path / name / 'train'), proportion=0.5)
    streams['b'].pairs = [CaptionPairConfig(['long'], ['short'])]
    config = CaptionDataConfig(streams=streams, pairs=BOTH[:1], num_workers=0, num_canonical_nodes=2)
    origins = []
    for batch in build_caption_pair_loader(config, tokenizer, 8, 3, train=True).dataloader:
        origin, = {sample_id[0] for sample_id in batch['sample_id']}
        assert all(('number' in text) is (origin == 'b') for text in _texts(tokenizer, batch, 'query'))
        origins.append(origin)
    assert set(origins) == {'a', 'b'}


def test_absent_captions_in_evaluation(tmp_path: Path, tokenizer: CaptionTokenizer) -> None:
    samples = [Sample(f'{i}', {'short': f'short {i}' if i % 4 else '', 'long': f'long {i}' if i % 3 else ''})
               for i in range(1, 9)]
    write_dataset(samples, tmp_path / 'd')
    pairs = [CaptionPairConfig(['short'], ['long'])]
    batch, = _loader(tmp_path / 'd/train', tokenizer, pairs, train=False)
    found = zip(batch['sample_id'], batch['query_text_id'].tolist(), batch['positive_text_id'].tolist())
    assert sorted(found) == [(s.sample_id, text_id(s.captions['short']), text_id(s.captions['long'])) for s in samples]
    assert not any('Find' in text for text in _texts(tokenizer, batch, 'query', True))


def test_evaluation_counts_samples_with_two_captions(llm_folder: Path) -> None:
    model = CaptionContrastive(text_encoder_from_config(TextEncoderConfig(pretrained=str(llm_folder)))[0])
    metric = model.val_metrics['cra']
    # The third pair is wrong, and the fourth has a placeholder's vector that is nearest to all queries.
    vectors = {'query': torch.eye(4), 'positive': torch.stack([*torch.eye(4)[:2], torch.eye(4)[0], torch.ones(4)])}
    model.update_metric({'query_text_id': torch.tensor([1, 2, 3, 4]), 'positive_text_id': torch.tensor([5, 6, 0, 0]),
                         'index': torch.arange(4)}, vectors, metric)
    assert metric.compute().item() == 100.0


def test_without_pairs_any_two_captions_are_one(image_dataset: Path) -> None:
    config = CaptionDataConfig(streams={'s': CaptionStreamConfig(str(image_dataset))})
    pairs = stream_pairs(config, train=True)
    assert pairs == {'s': [CaptionPairConfig(['long', 'short'], ['long', 'short'])]}
    assert pair_columns(pairs['s']) == ['caption.long', 'caption.short']
    assert stream_pairs(config, train=False) == {'s': [CaptionPairConfig(['long'], ['short'])]}
    config.streams['s'].remote = 's3://bucket/data'
    with refused_at('streams.s.pairs'):
        stream_pairs(config, train=True)


@pytest.mark.parametrize(('pair', 'train', 'words'), [
    (CaptionPairConfig(['short'], ['tiny']), True, r"column 'caption\.tiny' is missing"),
    (CaptionPairConfig(['short'], ['short']), True, r'pairs\[0\]: a caption cannot be its own positive'),
    (CaptionPairConfig(['short'], ['long'], 'short', True), True, r'pairs\[0\]: .*, got both'),
    (CaptionPairConfig(['short'], None), False, r'pairs: evaluation needs one pair')])
def test_a_pair_that_makes_no_sense_is_refused(
    pair: CaptionPairConfig, train: bool, words: str, image_dataset: Path, tokenizer: CaptionTokenizer
) -> None:
    with pytest.raises((ConfigError, FileError), match=words):
        _loader(image_dataset, tokenizer, [pair], train)


def test_microbatches_hold_every_text_with_little_padding(tokenizer: CaptionTokenizer) -> None:
    texts = {'query': [f'a {"very " * (i * 7 % 10)}' for i in range(23)],
             'positive': ['b' * (i % 9 + 1) for i in range(23)]}
    batch: dict[str, Any] = {'index': torch.arange(23), 'sample_id': [str(i) for i in range(23)]}
    for side, lines in texts.items():
        batch.update({f'{side}_{k}': v for k, v in tokenizer(lines).items()}, **{f'{side}_row': torch.arange(23)})
    assert split_by_length(batch, 23) == [batch]
    parts = split_by_length(batch, 5)
    assert [len(part['index']) for part in parts] == [5, 5, 5, 5, 3]
    assert [i for part in parts for i in part['sample_id']] == batch['sample_id']
    for side, lines in texts.items():
        back = {}
        for part in parts:
            back.update(zip(part[f'{side}_row'].tolist(), _texts(tokenizer, part, side)))
            assert part[f'{side}_attention_mask'].sum(1).max() == part[f'{side}_input_ids'].shape[1]
        assert back == {i: line.strip() if side == 'positive' else line for i, line in enumerate(lines)}
    slots = sum(part['query_attention_mask'].numel() for part in parts)
    assert slots < 0.7 * batch['query_attention_mask'].numel()
    packed = split_packed(batch, 5)
    assert [count_tokens(part) for part in packed] == [count_tokens(part) for part in parts]
    for part, row in zip(parts, packed):
        found = row['input_ids'][0].split([length for n, length in row['runs'] for _ in range(n)])
        places = iter(row['places'])
        for side in texts:
            for ids, mask in zip(part[f'{side}_input_ids'], part[f'{side}_attention_mask'] == 1):
                assert torch.equal(found[next(places)], ids[mask])


@pytest.mark.parametrize('seed', range(20))
def test_microbatches_of_a_number_of_tokens(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any lengths, number of tokens, and needs of another rank."""
    draw = random.Random(seed)
    n, longest = draw.randint(1, 20), draw.randint(1, 9)
    batch: dict[str, Any] = {'index': torch.arange(n)}
    for side in ('query_', 'positive_'):
        lengths = torch.tensor([[draw.randint(1, longest)] for _ in range(n)])
        batch[side + 'attention_mask'] = (torch.arange(longest) < lengths).long()
        batch[side + 'input_ids'] = torch.arange(n * longest).reshape(n, longest)
        batch[side + 'row'] = torch.arange(n)
    max_tokens, size, others = draw.randint(2 * longest, 40 * longest), draw.randint(1, n), draw.randint(1, n)
    alone = split_by_length(batch, size, max_tokens)
    monkeypatch.setattr('llm2clip.ranks.dist.all_gather_object', lambda count: [count, others])
    parts = split_by_length(batch, size, max_tokens)
    assert len(parts) == max(len(alone), others) and all(1 <= len(part['index']) <= size for part in parts)
    assert all(count_tokens(part)['total'] <= max_tokens for part in parts)
    for side in ('query_row', 'positive_row'):
        assert sorted(torch.cat([part[side] for part in parts]).tolist()) == list(range(n))
    # No two neighbouring parts fit into one, without the needs of another rank.
    for first, second in zip(alone, alone[1:]):
        fits = len(first['index']) < size
        tokens = sum(int(second[f'{side}_attention_mask'].sum(1).max()) for side in ('query', 'positive'))
        assert not fits or count_tokens(first)['total'] + tokens > max_tokens


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
    assert _mask_tokens([5, 6], 0, 7, 0.01, 0) == ([5, 7], [-100, 6]), 'at least one, and never the first'


def test_captions_and_plain_text_are_mixed(image_dataset: Path, tmp_path: Path, tokenizer: CaptionTokenizer) -> None:
    lines = '\n\n'.join(f'The plain sentence number {i} is long enough to be taken.' for i in range(40))
    (tmp_path / 'wiki.txt').write_text(f' = Heading = \n{lines}\n')
    assert write_splits(*plain_text(f'{tmp_path}/wiki.txt'), tmp_path / 'wiki') == {'train': 40}
    assert json.loads((tmp_path / 'wiki/dataset.json').read_text())['filtered'] == {'short line': 1}
    streams = {'captions': CaptionStreamConfig(str(image_dataset)),
               'wiki': CaptionStreamConfig(str(tmp_path / 'wiki' / 'train'), texts={'text': 1.0})}
    captions = {text for sample in make_samples(64) for text in sample.captions.values()}
    origins = set()
    config = CaptionDataConfig(streams=streams, texts={'short': 1.0, 'long': 1.0}, num_workers=0, num_canonical_nodes=4)
    for batch in build_masked_text_loader(config, tokenizer, MNTPConfig(), 8, 3).dataloader:
        assert count_tokens(batch) == {'total': int(batch['attention_mask'].sum()),
                                       'loss_generating': int((batch['labels'] >= 0).sum())}
        whole = torch.where(batch['labels'] >= 0, batch['labels'], batch['input_ids'])
        for ids, mask in zip(whole, batch['attention_mask']):
            text = tokenizer.tokenizer.decode(ids[mask == 1]).removeprefix('<s>').removesuffix('</s>')
            origins.add('wiki' if text.startswith('The plain sentence') else 'captions' if text in captions else text)
    assert origins == {'wiki', 'captions'}


def test_a_stream_without_texts_is_named(image_dataset: Path, tokenizer: CaptionTokenizer) -> None:
    config = CaptionDataConfig(streams={'s': CaptionStreamConfig(str(image_dataset))})
    with refused_at('streams.s.texts'):
        build_masked_text_loader(config, tokenizer, MNTPConfig(), 8, 3)
