# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Datasets are written whole or not at all, in parts by several processes and machines, stopped and continued."""

import csv
import io
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import set_files
from parts import UNDECODABLE, make_samples, picture, write_dataset
from PIL import Image
from recipes_in_process import run_recipe
from refusals import refused_at

from llm2clip.config import WriterConfig
from llm2clip.data.convert import part_writer
from llm2clip.data.convert.image_folder import image_folder
from llm2clip.data.convert.samples import Dropped, Part, Sample, one_part
from llm2clip.data.convert.writer import CARD_FILE, is_written, write_splits
from llm2clip.data.images import encode_image
from llm2clip.data.schema import read_samples
from llm2clip.errors import ConfigError
from llm2clip.io.remotes import OutputFolder

pytestmark = pytest.mark.usefixtures('no_leftovers')


def _part(n: int, prefix: str = 's') -> Part:
    return Part(f'part{n}', lambda dropped: make_samples(6, prefix=f'{prefix}{n}-'))


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
    with refused_at('require_any_caption'):
        write_dataset(samples, tmp_path / 'other', require_any_caption=['it'])


def test_only_large_images_are_made_smaller(tmp_path: Path) -> None:
    wide = encode_image(Image.new('RGB', (200, 50)), 'PNG')
    images = {'small': picture(1, 40), 'large': picture(1, 200), 'wide': wide}
    samples = [Sample(name, {'short': 'a'}, image) for name, image in images.items()]
    write_dataset(samples, tmp_path / 'out', image_max_side=64)
    small, large, wide = (row['image'] for row in read_samples(tmp_path / 'out/train'))
    assert small == picture(1, 40)
    assert Image.open(io.BytesIO(large)).size == (64, 64) and Image.open(io.BytesIO(wide)).size == (64, 16)


OTHER = Sample('x', {'short': 'a'}, picture(0))


@pytest.mark.parametrize(('parts', 'words'), [
    (one_part(make_samples(1) * 2), "train/part-all: sample id 's0000' occurs twice"),
    (one_part([*make_samples(3), OTHER]), "sample 'x' has captions"), (one_part([]), "split 'train' has no samples"),
    ([_part(0), *one_part([OTHER])], 'part-all of split .train. has columns'),
    ([_part(0), _part(0)], 'two input files would be written to')])
def test_samples_that_do_not_fit_together_are_refused(parts: list[Part], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        write_splits({'train': parts}, Dropped(), tmp_path / 'out')
    assert not (tmp_path / 'out' / CARD_FILE).exists() and not (tmp_path / 'out/train/index.json').exists()


def test_too_many_bad_samples_are_counted_over_all_parts(tmp_path: Path) -> None:
    splits = {'train': [_part(0), *one_part([Sample('b', {'short': 'a', 'long': 'b'}, b'x')])]}
    with refused_at(tmp_path / 'out/left_out.csv', '1 of 7 samples.*undecodable image.*set max_dropped=0.15'):
        write_splits(splits, Dropped(), tmp_path / 'out')
    assert not OutputFolder(tmp_path / 'out').fetch(CARD_FILE) and not (tmp_path / 'out/train/index.json').exists()
    assert write_splits(splits, Dropped(), tmp_path / 'out', WriterConfig(max_dropped=0.2)) == {'train': 6}
    card = json.loads((tmp_path / 'out/dataset.json').read_text())
    assert card['dropped_ids'] == {UNDECODABLE: ['b']}
    assert not (tmp_path / 'out/left_out.csv').exists()


def test_unusable_samples_are_listed_with_similar_files(tmp_path: Path) -> None:
    photos, captions, out = tmp_path / 'photos', tmp_path / 'captions.csv', tmp_path / 'out'
    similar = {'a/DSC 01.jpg': 'dsc_01.JPG', 'u\u0308.png': '\u00fc.png', 'c.jpeg': 'c.png', 'd.png': None,
               'e.png': 'e.png'}
    for name, file in similar.items():
        if file is not None:
            path = photos / Path(name).with_name(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(0))
    (photos / 'e.png').write_bytes(b'damaged')
    captions.write_text('image,caption\n' + ''.join(f'{name},a\n' for name in [*similar, '']))

    def write() -> Any:
        return write_splits(*image_folder(str(photos), str(captions)), out)

    with refused_at(out / 'left_out.csv', '6 of 6 samples'):
        write()
    with open(out / 'left_out.csv', encoding='utf-8-sig', newline='') as file:
        rows = list(csv.reader(file))
    del similar['e.png']
    missing = [['missing image file', f'{photos}/{name}', file or ''] for name, file in similar.items()]
    assert rows[1:] == [*missing, [UNDECODABLE, 'e.png', ''], ['no image', f'{captions}:7', '']]
    captions.write_text('image,caption\nc.png,a\n')
    assert write() == {'train': 1} and not (out / 'left_out.csv').exists()


def test_an_unfinished_dataset_follows_its_input_files(tmp_path: Path) -> None:
    """Parts of a machine are written again; those of another machine, from other files, are refused."""
    images, file = set_files.image_folder(tmp_path).values()
    rows = Path(file).read_text()

    def write(out: str, holdout: int = 1, **settings: Any) -> Any:
        config = WriterConfig(**settings)
        return write_splits(*image_folder(images, file, holdout=holdout), tmp_path / out, config, {'holdout': holdout})

    Path(file).write_text(f'{rows}missing.png,c\n')
    with refused_at(tmp_path / 'out/left_out.csv'):
        write('out')
    assert write('shared', num_shards=2, max_dropped=1) is None
    Path(file).write_text(rows.replace('ball', 'box'))
    with refused_at('out', 'another holdout'):
        write('out', holdout=0)
    assert write('out') == {'train': 1, 'val': 1}
    assert 'a box' in {row['caption.1'] for split in ('train', 'val') for row in read_samples(tmp_path / 'out' / split)}
    with refused_at('', f'{file}: has changed since'):
        write('shared', num_shards=2, shard_index=1)


def test_machines_share_the_parts_and_only_a_remote(tmp_path: Path) -> None:
    """Each uploads its parts; the last one writes the index; nothing needs to stay on their disks."""
    splits, remote = {'train': [_part(n) for n in range(5)]}, tmp_path / 'bucket'
    first, second = (WriterConfig(shard_index=k, num_shards=2, keep_local=False) for k in range(2))
    outs = [OutputFolder(tmp_path / f'machine{k}', str(remote)) for k in range(2)]
    assert write_splits(splits, Dropped(), outs[1], second) is None
    assert not (remote / 'train/index.json').exists() and not outs[0].fetch(CARD_FILE)
    assert sorted(path.name for path in (remote / 'train').iterdir()) == ['part-part1', 'part-part3']
    shutil.rmtree(outs[1].local / 'train/part-part3')
    assert write_splits(splits, Dropped(), outs[1], second) is None, 'a part that is in the remote is done'
    (remote / 'train/part-part1/part.json').unlink()
    (outs[1].local / 'train/part-part1/part.json').unlink()
    assert write_splits(splits, Dropped(), outs[1], second) is None
    assert write_splits(splits, Dropped(), outs[0], first) == {'train': 30}
    assert [row['sample_id'][:3] for row in read_samples(remote / 'train')] == \
        [f's{n}-' for n in range(5) for _ in range(6)]
    assert outs[1].fetch(CARD_FILE)
    assert not [path for out in outs for path in out.local.rglob('*.mds')]
    with pytest.raises(ConfigError, match='written with another source'):
        write_splits(splits, Dropped(), OutputFolder(tmp_path / 'third', str(remote)), first, {'source': 'other'})


def test_a_machine_that_ends_first_looks_at_few_parts_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, a hundred machines that share a hundred thousand parts would look ten million times."""
    looks: list[str] = []
    fetch = OutputFolder.fetch

    def fetch_and_count(out: OutputFolder, name: str) -> bool:
        looks.append(name)
        return fetch(out, name)

    monkeypatch.setattr(OutputFolder, 'fetch', fetch_and_count)
    splits = {'train': [_part(n) for n in range(20)]}

    def write(shard: int) -> Any:
        return write_splits(splits, Dropped(), tmp_path / 'out', WriterConfig(shard_index=shard, num_shards=4))

    for shard in (1, 2, 0):
        assert write(shard) is None
        assert len(looks) == 1 + 1 + 5 + 4  # index, card, the parts of this machine, and one of each
        looks.clear()
    assert write(3) == {'train': 120}


def test_a_remote_is_not_added_later(tmp_path: Path) -> None:
    """It would lack the parts that were written without it."""
    splits, remote = {'train': [_part(0), _part(1)]}, str(tmp_path / 'bucket')
    assert write_splits(splits, Dropped(), tmp_path / 'begun', WriterConfig(num_shards=2)) is None
    with pytest.raises(ConfigError, match='was written with another out_remote .*train/part-part0/part.json has it'):
        write_splits(splits, Dropped(), OutputFolder(tmp_path / 'begun', remote))
    write_splits(splits, Dropped(), tmp_path / 'whole')
    assert is_written(OutputFolder(tmp_path / 'whole'), {}, WriterConfig())
    with pytest.raises(ConfigError, match='was written with another out_remote .*whole/dataset.json has it'):
        is_written(OutputFolder(tmp_path / 'whole', remote), {}, WriterConfig())
    assert not (tmp_path / 'bucket').exists()


@pytest.mark.parametrize('num_workers', [1, 2])
def test_parts_are_in_order_whichever_process_writes_them(num_workers: int, tmp_path: Path) -> None:
    def part(n: int) -> Part:
        return Part(f'part{n}', lambda dropped: [Sample(f's{n}', {'process': f'{os.getpid()}'})])

    splits = {'train': [part(n) for n in range(6)]}
    write_splits(splits, Dropped(), tmp_path / 'out', WriterConfig(num_workers=num_workers))
    rows = read_samples(tmp_path / 'out/train')
    assert [row['sample_id'] for row in rows] == [f's{n}' for n in range(6)]
    processes = {row['caption.process'] for row in rows}
    assert (f'{os.getpid()}' in processes) is (num_workers == 1) and len(processes) <= num_workers


def test_workers_end_with_a_killed_command(tmp_path: Path) -> None:
    def wait(dropped: Dropped) -> Iterator[Sample]:
        (tmp_path / f'{os.getpid()}.begun').touch()
        time.sleep(60)
        yield Sample('a', {'short': 'a'})

    splits = {'train': [Part(f'part{n}', wait) for n in range(2)]}
    command = multiprocessing.get_context('fork').Process(
        target=write_splits, args=(splits, Dropped(), tmp_path / 'out', WriterConfig(num_workers=2)))
    command.start()
    while len(list(tmp_path.glob('*.begun'))) < 2:
        time.sleep(0.05)
    workers = [psutil.Process(int(file.stem)) for file in tmp_path.glob('*.begun')]
    command.kill()
    assert psutil.wait_procs(workers, timeout=120)[1] == []
    command.join()


def test_a_failure_leaves_the_finished_parts(tmp_path: Path) -> None:
    config, done = WriterConfig(num_workers=2), [tmp_path / f'out/train/part-part{n}/part.json' for n in range(2)]

    def read(dropped: Dropped) -> Iterator[Sample]:
        while not all(path.exists() for path in done):
            time.sleep(0.01)
        raise RuntimeError('killed')

    with pytest.raises(RuntimeError, match='killed'):
        write_splits({'train': [_part(0), _part(1), Part('part2', read)]}, Dropped(), tmp_path / 'out', config)
    assert not OutputFolder(tmp_path / 'out').fetch(CARD_FILE) and not (tmp_path / 'out/train/index.json').exists()
    assert not (tmp_path / 'out/train/part-part2').exists()
    # Mended and called again, it continues with the part that is missing.
    first = done[0].stat().st_mtime_ns
    assert write_splits({'train': [_part(n) for n in range(3)]}, Dropped(), tmp_path / 'out', config) == {'train': 18}
    assert done[0].stat().st_mtime_ns == first


@pytest.mark.parametrize('num_workers', [1, 2])
def test_errors_of_a_source_name_it_from_any_process(num_workers: int, tmp_path: Path) -> None:
    def write(part: Part) -> None:
        write_splits({'train': [part, _part(0)]}, Dropped(), tmp_path / 'out', WriterConfig(num_workers=num_workers))

    with refused_at(tmp_path / 'out/train/part-all'):
        write(*one_part(make_samples(1) * 2))
    with refused_at('source', 'part bad '):
        write(Part('bad', lambda dropped: [None]))  # pyright: ignore[reportArgumentType, reportReturnType]


def test_no_worker_outlives_an_error(tmp_path: Path) -> None:
    begun = tmp_path / 'begun'

    def slow(dropped: Dropped) -> Iterator[Sample]:
        begun.touch()
        time.sleep(1)
        yield from make_samples(1)

    def fail(dropped: Dropped) -> Iterator[Sample]:
        while not begun.exists():
            time.sleep(0.01)
        raise RuntimeError('failed')

    with pytest.raises(RuntimeError, match='failed'):
        write_splits({'train': [Part('slow', slow), Part('fail', fail)]}, Dropped(), tmp_path / 'out',
                     WriterConfig(num_workers=2))
    assert (tmp_path / 'out/train/part-slow/part.json').is_file() and not multiprocessing.active_children()


def test_a_part_without_samples_does_not_block_the_next_try(tmp_path: Path) -> None:
    empty = {'train': one_part([Sample('x', {'short': 'a'}, b'no image')])}
    three = {'train': one_part(make_samples(3))}

    def write(splits: dict[str, list[Part]], source: str, out: str = 'other') -> Any:
        return write_splits(splits, Dropped(), tmp_path / out, description={'source': source})

    for source, out in (('wrong', 'same'), ('wrong', 'other'), ('right', 'other')):
        with refused_at(tmp_path / out / 'left_out.csv', '1 of 1 samples'):
            write(empty, source, out)
    assert write(three, 'wrong', 'same') == {'train': 3}, 'the options of the failure'
    assert write(three, 'right') == {'train': 3}, 'options that differ from those of the first failure'
    with pytest.raises(ConfigError, match='was written with another source'):
        write(three, 'third')


def test_an_empty_part_is_read_once(tmp_path: Path) -> None:
    """As the held-out samples of most tars are, if few are held out."""
    reads: list[str] = []

    def read(dropped: Dropped) -> list[Sample]:
        reads.append('empty')
        return []

    def write(source: str) -> Any:
        return write_splits({'train': [Part('empty', read), Part('three', lambda dropped: make_samples(3))]},
                            Dropped(), tmp_path / 'out', description={'source': source})

    assert write('x') == write('x') == {'train': 3} and reads == ['empty']


@pytest.fixture
def prepare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The recipe, which converts CSV files into a folder and is given more arguments; what it prints."""
    def run(out: str, *more: str) -> str:
        run_recipe(monkeypatch, 'prepare_data', 'source.name=table', f'source.files={tmp_path}/*.csv',
                   'source.captions=caption', f'out={tmp_path}/{out}', *more)
        return capsys.readouterr().out

    return run


def test_no_dataset_is_mixed_with_other_captions_or_options(
    prepare: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither after a call that was stopped between two splits nor after one that has ended."""
    captions, holdout = tmp_path / 'b.csv', 'source.holdout=0.3'
    captions.write_text('caption\n' + ''.join(f'caption of {i}\n' for i in range(40)))
    write = part_writer._write_part
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(part_writer, '_write_part',
                      lambda i: write(i) if part_writer._jobs[i].folder[0] == 't' else 1 / 0)
        prepare('stopped', holdout)
    assert 'samples: train ' in prepare('whole', holdout)
    (tmp_path / 'a.csv').write_text('caption\nof another file\n')
    assert 'is complete; convert new input files into another `out`' in prepare('whole', holdout)
    config = tmp_path / 'whole/config.yaml'
    config.unlink()  # killed before it was written
    prepare('whole', holdout)
    assert config.is_file()
    for option in ('image_max_side=9', 'image_quality=9', 'require_any_caption=[caption]', 'source.sample=0.5'):
        with pytest.raises(ConfigError, match=f'written with another {option.split("=")[0].split(".")[0]}'):
            prepare('whole', holdout, option)
    captions.write_text(captions.read_text().replace('caption of 7', 'caption of 9'))
    with pytest.raises(ConfigError, match=f'{captions}: has changed since {tmp_path}/whole was written'):
        prepare('whole', holdout)
    prepare('stopped', holdout)
    texts = [row['caption.0'] for split in ('train', 'val') for row in read_samples(tmp_path / 'stopped' / split)]
    assert texts.count('caption of 9') == 2
    captions.unlink()
    prepare('whole', holdout)  # which needs it no more


def test_ids_are_left_out(prepare: Callable[..., str], tmp_path: Path) -> None:
    def left_out(out: str, ids: list[str]) -> str:
        (tmp_path / f'{out}.json').write_text(json.dumps(ids))
        part_writer.excluded_ids.cache_clear()
        return prepare(out, f'exclude_ids={tmp_path}/{out}.json')

    (tmp_path / 'b.csv').write_text('caption\none\ntwo\n')
    said = left_out('out', ['b.csv:2', 'x'])
    assert 'exclude_ids: 1 samples are left out' in said and 'names 2' in said and 'samples: train 1;' in said
    with pytest.raises(ConfigError, match='written with another exclude_ids'):
        left_out('out', ['b.csv:1'])
    with pytest.raises(ConfigError, match='0 samples are left out, and .*none.json names 2; expected ids of samples'):
        left_out('none', ['y', 'x'])
