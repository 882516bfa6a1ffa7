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
from typing import Any, Optional, Union

import psutil
import pytest
import set_files
from parts import UNDECODABLE, make_samples, picture
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

pytestmark = pytest.mark.usefixtures('no_leftovers', 'here')


def _parts(count: int) -> list[Part]:
    """Parts of six samples each."""
    return [Part(f'part{n}', lambda dropped, n=n: make_samples(6, prefix=f's{n}-')) for n in range(count)]


def _write(
    parts: list[Part], out: Union[str, OutputFolder] = 'out', source: str = 'x', **settings: Any
) -> Optional[dict[str, int]]:
    return write_splits({'train': parts}, Dropped(), out, WriterConfig(**settings), {'source': source})


def _card() -> dict[str, Any]:
    return json.loads(Path('out/dataset.json').read_text())


def _is_readable() -> bool:
    return Path('out/dataset.json').exists() or Path('out/train/index.json').exists()


def test_every_sample_is_written_or_counted_by_reason() -> None:
    files = {'c': b'\x00\x00\x00\x18ftypheic\x00', 'f': b'nothing', 'h': picture(1)[:100],
             'wide': encode_image(Image.new('1', (12_000, 9_000)), 'PNG')}
    samples = [*make_samples(8), *(Sample(name, {'short': 'a', 'long': 'b'}, data) for name, data in files.items()),
               Sample('mute', {'short': ' ', 'long': ''}, picture(1)),
               Sample('half', {'short': ' ', 'long': ' one two three\n'}, picture(1)),
               Sample('other', {'short': 'a', 'long': ' '}, picture(1))]
    _write(one_part(samples), max_dropped=0.5, require_any_caption=['long'])
    card = _card()
    assert card['dropped_ids'] == {UNDECODABLE: ['c', 'f', 'h'], 'more than 100,000,000 pixels': ['wide'],
                                   'no caption': ['mute']}
    rows = {row['sample_id']: row for row in read_samples('out/train')}
    assert rows['half']['caption.short'] == '' and rows['half']['caption.long'] == 'one two three'
    assert card['samples'] == {'train': 9} and card['filtered'] == {'no caption long': 1}
    assert card['read'] == len(samples) == 10 + sum(card['dropped'].values())
    assert card['captions']['train']['short'] == {'captions': 8, 'absent': 1, 'words_p5': 3, 'words_p50': 3,
                                                  'words_p95': 3}
    with refused_at('require_any_caption'):
        _write(one_part(samples), 'other', require_any_caption=['it'])


def test_only_large_images_are_made_smaller() -> None:
    images = [picture(1, 40), picture(1, 200), encode_image(Image.new('RGB', (200, 50)), 'PNG')]
    _write(one_part([Sample(f'{i}', {'short': 'a'}, image) for i, image in enumerate(images)]), image_max_side=64)
    small, *others = (row['image'] for row in read_samples('out/train'))
    assert small == images[0] and [Image.open(io.BytesIO(image)).size for image in others] == [(64, 64), (64, 16)]


OTHER = Sample('x', {'short': 'a'}, picture(0))


@pytest.mark.parametrize(('parts', 'words'), [
    (one_part([*make_samples(3), OTHER]), "sample 'x' has captions"), (one_part([]), "split 'train' has no samples"),
    ([*_parts(1), *one_part([OTHER])], 'part-all of split .train. has columns'),
    (_parts(1) * 2, 'two input files would be written to')])
def test_samples_that_do_not_fit_together_are_refused(parts: list[Part], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _write(parts)
    assert not _is_readable()


@pytest.mark.parametrize('num_workers', [1, 2])
def test_errors_of_a_source_name_it_from_any_process(num_workers: int) -> None:
    with refused_at('out/train/part-all', "sample id 's0000' occurs twice"):
        _write([*one_part(make_samples(1) * 2), *_parts(1)], num_workers=num_workers)
    with refused_at('source', 'part bad '):
        _write([Part('bad', lambda dropped: [None]), *_parts(1)],  # pyright: ignore[reportArgumentType, reportReturnType]
               num_workers=num_workers)
    assert not _is_readable()


def test_too_many_bad_samples_are_counted_over_all_parts() -> None:
    parts = [*_parts(1), *one_part([Sample('b', {'short': 'a', 'long': 'b'}, b'x')])]
    with refused_at('out/left_out.csv', '1 of 7 samples.*undecodable image.*set max_dropped=0.15'):
        _write(parts)
    assert not _is_readable()
    assert _write(parts, max_dropped=0.2) == {'train': 6}
    assert _card()['dropped_ids'] == {UNDECODABLE: ['b']} and not Path('out/left_out.csv').exists()


def test_unusable_samples_are_listed_with_similar_files() -> None:
    similar = {'a/DSC 01.jpg': 'dsc_01.JPG', 'u\u0308.png': '\u00fc.png', 'c.jpeg': 'c.png', 'd.png': None}
    set_files.write_images(Path('photos'), [str(Path(name).with_name(file)) for name, file in similar.items() if file])
    Path('photos/e.png').write_bytes(b'damaged')
    captions = Path('captions.csv')
    captions.write_text('image,caption\n' + ''.join(f'{name},a\n' for name in [*similar, 'e.png', '']))
    with refused_at('out/left_out.csv', '6 of 6 samples'):
        write_splits(*image_folder('photos', 'captions.csv'), 'out')
    with open('out/left_out.csv', encoding='utf-8-sig', newline='') as file:
        rows = list(csv.reader(file))
    missing = [['missing image file', f'{Path.cwd()}/photos/{name}', file or ''] for name, file in similar.items()]
    assert rows[1:] == [*missing, [UNDECODABLE, 'e.png', ''], ['no image', 'captions.csv:7', '']]
    captions.write_text('image,caption\nc.png,a\n')
    assert write_splits(*image_folder('photos', 'captions.csv'), 'out') == {'train': 1}
    assert not Path('out/left_out.csv').exists()


def test_an_unfinished_dataset_follows_its_input_files() -> None:
    """Parts of a machine are written again; those of another machine, from other files, are refused."""
    images, file = set_files.image_folder(Path()).values()
    rows = Path(file).read_text()

    def write(out: str, holdout: int = 1, **settings: Any) -> Any:
        config = WriterConfig(**settings)
        return write_splits(*image_folder(images, file, holdout=holdout), out, config, {'holdout': holdout})

    Path(file).write_text(f'{rows}missing.png,c\n')
    with refused_at('out/left_out.csv'):
        write('out')
    assert write('shared', num_shards=2, max_dropped=1) is None
    Path(file).write_text(rows.replace('ball', 'box'))
    with refused_at('out', 'another holdout'):
        write('out', holdout=0)
    assert write('out') == {'train': 1, 'val': 1}
    assert 'a box' in {row['caption.1'] for split in ('train', 'val') for row in read_samples(f'out/{split}')}
    with refused_at('', f'{file}: has changed since'):
        write('shared', num_shards=2, shard_index=1)


def test_machines_share_the_parts_and_only_a_remote() -> None:
    """Each uploads its parts; the last one writes the index; nothing needs to stay on their disks."""
    parts, remote, outs = _parts(5), Path('bucket'), [OutputFolder(f'machine{k}', 'bucket') for k in range(2)]

    def write(machine: int, **options: Any) -> Any:
        return _write(parts, outs[machine], shard_index=machine, num_shards=2, keep_local=False, **options)

    assert write(1) is None and not (remote / 'train/index.json').exists() and not outs[0].fetch(CARD_FILE)
    assert sorted(os.listdir(remote / 'train')) == ['part-part1', 'part-part3']
    shutil.rmtree(outs[1].local / 'train/part-part3')
    assert write(1) is None, 'a part that is in the remote is done'
    for folder in (remote, outs[1].local):
        (folder / 'train/part-part1/part.json').unlink()
    assert write(1) is None
    assert write(0) == {'train': 30}
    assert [row['sample_id'][:3] for row in read_samples(remote / 'train')] == \
        [f's{n}-' for n in range(5) for _ in range(6)]
    assert outs[1].fetch(CARD_FILE) and not [path for out in outs for path in out.local.rglob('*.mds')]
    outs[0] = OutputFolder('third', 'bucket')
    with pytest.raises(ConfigError, match='written with another source'):
        write(0, source='other')


def test_a_machine_that_ends_first_looks_at_few_parts_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a hundred machines that share a hundred thousand parts would look ten million times."""
    looks: list[str] = []
    fetch = OutputFolder.fetch

    def fetch_and_count(out: OutputFolder, name: str) -> bool:
        looks.append(name)
        return fetch(out, name)

    monkeypatch.setattr(OutputFolder, 'fetch', fetch_and_count)
    for shard in (1, 2, 0):
        assert _write(_parts(20), shard_index=shard, num_shards=4) is None
        assert len(looks) == 1 + 1 + 5 + 4  # index, card, the parts of this machine, and one of each
        looks.clear()
    assert _write(_parts(20), shard_index=3, num_shards=4) == {'train': 120}


def test_a_remote_is_not_added_later() -> None:
    """It would lack the parts that were written without it."""
    assert _write(_parts(2), 'begun', num_shards=2) is None
    with pytest.raises(ConfigError, match='was written with another out_remote .*train/part-part0/part.json has it'):
        _write(_parts(2), OutputFolder('begun', 'bucket'))
    _write(_parts(2))
    assert is_written(OutputFolder('out'), {'source': 'x'}, WriterConfig())
    with pytest.raises(ConfigError, match='was written with another out_remote .*out/dataset.json has it'):
        is_written(OutputFolder('out', 'bucket'), {'source': 'x'}, WriterConfig())
    assert not Path('bucket').exists()


def test_workers_end_with_a_killed_command() -> None:
    def wait(dropped: Dropped) -> Iterator[Sample]:
        Path(f'{os.getpid()}.begun').touch()
        time.sleep(60)
        yield Sample('a', {'short': 'a'})

    parts = [Part(f'part{n}', wait) for n in range(3)]
    command = multiprocessing.get_context('fork').Process(target=_write, args=(parts,), kwargs={'num_workers': 2})
    command.start()
    while len(list(Path().glob('*.begun'))) < 2:
        time.sleep(0.05)
    workers = [psutil.Process(int(file.stem)) for file in Path().glob('*.begun')]
    command.kill()
    assert psutil.wait_procs(workers, timeout=120)[1] == []
    assert len(list(Path().glob('*.begun'))) == 2, 'more workers than asked for'
    command.join()


def test_a_failure_leaves_the_finished_parts_and_no_worker() -> None:
    """A part that another worker has begun is finished, too."""
    begun = Path('begun')
    done, slow = (Path(f'out/train/part-{name}/part.json') for name in ('part0', 'slow'))

    def read_slowly(dropped: Dropped) -> list[Sample]:
        begun.touch()
        time.sleep(0.5)
        return make_samples(6)

    def fail(dropped: Dropped) -> Iterator[Sample]:
        while not (done.exists() and begun.exists()):
            time.sleep(0.01)
        raise RuntimeError('failed')

    def write(read: Callable[[Dropped], Iterator[Sample]]) -> Any:
        return _write([*_parts(1), Part('slow', read_slowly), Part('bad', read)], num_workers=2)

    with pytest.raises(RuntimeError, match='failed'):
        write(fail)
    assert slow.is_file() and not multiprocessing.active_children()
    assert not _is_readable() and not Path('out/train/part-bad').exists()
    # Mended and called again, it continues with the part that is missing.
    first = done.stat().st_mtime_ns
    assert write(lambda dropped: iter(make_samples(6, prefix='b'))) == {'train': 18}
    assert done.stat().st_mtime_ns == first


def test_a_part_without_samples_does_not_block_the_next_try() -> None:
    empty, three = one_part([Sample('x', {'short': 'a'}, b'no image')]), one_part(make_samples(3))
    for source, out in (('wrong', 'same'), ('wrong', 'other'), ('right', 'other')):
        with refused_at(f'{out}/left_out.csv', '1 of 1 samples'):
            _write(empty, out, source)
    assert _write(three, 'same', 'wrong') == {'train': 3}, 'the options of the failure'
    assert _write(three, 'other', 'right') == {'train': 3}, 'options that differ from those of the first failure'
    with pytest.raises(ConfigError, match='was written with another source'):
        _write(three, 'other', 'third')


def test_an_empty_part_is_read_once() -> None:
    """As the held-out samples of most tars are, if few are held out."""
    reads: list[str] = []

    def read(dropped: Dropped) -> list[Sample]:
        reads.append('empty')
        return []

    parts = [Part('empty', read), *_parts(1)]
    assert _write(parts) == _write(parts) == {'train': 6} and reads == ['empty']


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The recipe, which converts CSV files into a folder and is given more arguments; what it prints."""
    def run(out: str, *more: str) -> str:
        run_recipe(monkeypatch, 'prepare_data', 'source.name=table', 'source.files=./*.csv', 'source.captions=caption',
                   f'out={out}', *more)
        return capsys.readouterr().out

    return run


def test_no_dataset_is_mixed_with_other_captions_or_options(
    prepare: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither after a call that was stopped between two splits nor after one that has ended."""
    captions, holdout = Path('b.csv'), 'source.holdout=0.3'
    captions.write_text('caption\n' + ''.join(f'caption of {i}\n' for i in range(40)))
    write = part_writer._write_part
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(part_writer, '_write_part',
                      lambda i: write(i) if part_writer._jobs[i].folder[0] == 't' else 1 / 0)
        prepare('stopped', holdout)
    assert 'samples: train ' in prepare('whole', holdout)
    Path('a.csv').write_text('caption\nof another file\n')
    assert 'is complete; convert new input files into another `out`' in prepare('whole', holdout)
    config = Path('whole/config.yaml')
    config.unlink()  # killed before it was written
    prepare('whole', holdout)
    assert config.is_file()
    for option in ('image_max_side=9', 'image_quality=9', 'require_any_caption=[caption]', 'source.sample=0.5'):
        with pytest.raises(ConfigError, match=f'written with another {option.split("=")[0].split(".")[0]}'):
            prepare('whole', holdout, option)
    captions.write_text(captions.read_text().replace('caption of 7', 'caption of 9'))
    with pytest.raises(ConfigError, match='b.csv: has changed since whole was written'):
        prepare('whole', holdout)
    prepare('stopped', holdout)
    texts = [row['caption.0'] for split in ('train', 'val') for row in read_samples(f'stopped/{split}')]
    assert texts.count('caption of 9') == 2
    captions.unlink()
    prepare('whole', holdout)  # which needs it no more


def test_ids_are_left_out(prepare: Callable[..., str]) -> None:
    def left_out(out: str, ids: list[str]) -> str:
        Path(f'{out}.json').write_text(json.dumps(ids))
        part_writer.excluded_ids.cache_clear()
        return prepare(out, f'exclude_ids={out}.json')

    Path('b.csv').write_text('caption\none\ntwo\n')
    said = left_out('out', ['b.csv:2', 'x'])
    assert 'exclude_ids: 1 samples are left out' in said and 'names 2' in said and 'samples: train 1;' in said
    with pytest.raises(ConfigError, match='written with another exclude_ids'):
        left_out('out', ['b.csv:1'])
    with pytest.raises(ConfigError, match='0 samples are left out, and .*none.json names 2; expected ids of samples'):
        left_out('none', ['y', 'x'])
