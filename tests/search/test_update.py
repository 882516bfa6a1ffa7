# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The index follows its folder, whatever happens to either."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from search_folders import write_export, write_photo
from transformers import AutoImageProcessor, AutoModel

import llm2clip.search.exported as exported
from llm2clip.config import ConfigError
from llm2clip.export.check import pictures
from llm2clip.search.exported import ExportedModel
from llm2clip.search.index import INDEX_FILE, Index
from llm2clip.search.update import UNREADABLE_FILE, Update, update_index

ROOT = Path(__file__).parents[2]


def update(folder: Path, model: Path, photos: Path, **options: Any) -> Update:
    return update_index(Index(folder), ExportedModel(model, 'cpu'), str(photos), **{'num_workers': 0, **options})


def direct(model_folder: Path, paths: list[Path]) -> np.ndarray:
    """Vectors as a user of transformers computes them."""
    model, processor = AutoModel.from_pretrained(model_folder), AutoImageProcessor.from_pretrained(model_folder)
    images = [Image.open(path) for path in paths]
    with torch.no_grad():
        return model.get_image_features(**processor(images, return_tensors='pt')).numpy()


def test_vectors_are_those_of_the_exported_model(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    Image.fromarray(noise).resize((900, 600)).save(photos / 'large.jpg')
    for i, data in enumerate(pictures(32).values()):
        (photos / f'kind_{i}.jpg').write_bytes(data)
    result = update(tmp_path / 'index', model_folder, photos, batch_size=4, num_workers=2)
    assert (result.images, result.added, result.changed, result.removed) == (14, 14, 0, 0)
    paths, vectors = Index(tmp_path / 'index').load()
    assert paths == sorted(paths) and set(paths) == {str(p.relative_to(photos)) for p in photos.rglob('*.*g')}
    np.testing.assert_allclose(vectors, direct(model_folder, [photos / path for path in paths]), atol=1e-3)
    assert len(np.unique(vectors, axis=0)) == 14


def test_only_new_and_changed_files_are_read(
    model_folder: Path, photos: Path, tmp_path: Path, reads: list[str]
) -> None:
    folder = tmp_path / 'index'
    update(folder, model_folder, photos)
    assert len(reads) == 8 and Index(folder).finished
    reads.clear()
    assert update(folder, model_folder, photos) == Update(images=8) and not reads
    write_photo(photos / 'new.png', 100)
    write_photo(photos / '2.png', 101)
    os.utime(photos / 'odd/3.png', (200, 200))
    (photos / '4.png').unlink()
    (photos / '6.png').rename(photos / 'renamed.png')
    result = update(folder, model_folder, photos)
    assert sorted(reads) == ['2.png', 'new.png', 'odd/3.png', 'renamed.png']
    assert (result.images, result.added, result.changed, result.removed) == (8, 2, 2, 2)
    paths, vectors = Index(folder).load()
    np.testing.assert_allclose(vectors, direct(model_folder, [photos / path for path in paths]), atol=1e-3)


def test_unreadable_images_are_named_and_tried_again_only_when_they_change(
    model_folder: Path, photos: Path, tmp_path: Path, reads: list[str]
) -> None:
    folder = tmp_path / 'index'
    (photos / 'empty.jpg').touch()
    (photos / 'cut.png').write_bytes((photos / '0.png').read_bytes()[:60])
    (photos / 'notes.txt').touch()
    result = update(folder, model_folder, photos)
    assert set(result.unreadable) == {'empty.jpg', 'cut.png'} and result.images == result.added == 8
    lines = '\n'.join(result.lines())
    assert '2 unreadable' in lines and '  cut.png cannot be decoded: ' in lines and '1 .txt' in lines
    assert ' at 0x' not in lines
    assert [line.split('\t')[0] for line in (folder / UNREADABLE_FILE).read_text().splitlines()] == [
        'cut.png', 'empty.jpg']
    reads.clear()
    again = update(folder, model_folder, photos)
    assert not reads and not again.unreadable and again.known_unreadable == 2 and Index(folder).finished
    assert '2 unreadable as before' in '\n'.join(again.lines())
    write_photo(photos / 'cut.png', 50)
    third = update(folder, model_folder, photos)
    assert reads == ['cut.png'] and third.images == 9 and third.known_unreadable == 1


def test_a_file_that_may_not_be_read_now_is_tried_again(
    model_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / 'index'
    read_bytes = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path.name == '0.png':
            raise PermissionError(13, 'Permission denied')
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'read_bytes', denied)
        result = update(folder, model_folder, photos)
        assert result.unreadable == {'0.png': 'Permission denied'} and result.images == 7
        assert update(folder, model_folder, photos).unreadable == {'0.png': 'Permission denied'}
    assert update(folder, model_folder, photos) == Update(images=8, changed=1)


def test_any_error_of_a_decoder_is_about_its_image_alone(
    model_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = exported.decode_pixels

    def fragile(data: bytes, path: str) -> torch.Tensor:
        if path == '0.png':
            raise KeyError('tag')
        return decode(data, path)

    monkeypatch.setattr(exported, 'decode_pixels', fragile)
    result = update(tmp_path / 'index', model_folder, photos, batch_size=1)
    assert result.unreadable == {'0.png': "cannot be decoded: KeyError: 'tag'"} and result.images == 7


def test_a_very_long_image_takes_no_more_memory(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((2, 40_000, 3), np.uint8)
    pixels[:, 19_000:21_000] = [255, 0, 0]
    Image.fromarray(pixels).save(photos / 'long.png')
    Image.new('RGB', (2, 2), (255, 0, 0)).save(photos / 'red.png')
    seen: list[int] = []
    interpolate = F.interpolate

    def noted(pixels: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        resized = interpolate(pixels, *args, **options)
        seen.append(resized.numel())
        return resized

    monkeypatch.setattr(F, 'interpolate', noted)
    pixels_of = exported._Pixels(photos, ['long.png', 'red.png'], 32)
    (_, long), (_, red) = pixels_of[0], pixels_of[1]
    assert isinstance(long, torch.Tensor) and len(seen) == 2 and max(seen) <= 3 * 32 * 16 * 32
    torch.testing.assert_close(long, red)


def test_names_that_are_no_text(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b'caf\xe9.png')
    write_photo(photos / name, 9)
    assert update(tmp_path / 'index', model_folder, photos).images == 9
    assert name in Index(tmp_path / 'index').load()[0]
    assert update(tmp_path / 'index', model_folder, photos).added == 0


def test_interrupted_it_goes_on_where_it_was(
    model_folder: Path, photos: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / 'index'
    decode = exported.decode_pixels

    def interrupted(data: bytes, path: str) -> torch.Tensor:
        if len(reads) == 5:
            raise KeyboardInterrupt
        return decode(data, path)

    with monkeypatch.context() as patch:
        patch.setattr(exported, 'decode_pixels', interrupted)
        with pytest.raises(KeyboardInterrupt):
            update(folder, model_folder, photos, batch_size=2)
    assert len(Index(folder).states()) == 4 and not Index(folder).finished
    reads.clear()
    assert update(folder, model_folder, photos).added == len(reads) == 4
    assert Index(folder).count() == 8 and Index(folder).finished


SLOW = '''
import sys, time
import llm2clip.search.exported as exported
import llm2clip.search.update as update

decode = exported.decode_pixels
def slow(*args, **options):
    time.sleep(0.15)
    return decode(*args, **options)
exported.decode_pixels, update.COMMIT_SECONDS = slow, 0
index, model, photos = sys.argv[1:]
update.update_index(update.Index(index), exported.ExportedModel(model, 'cpu'), photos, batch_size=2)
'''


def test_killed_it_goes_on_where_it_was_and_nobody_else_writes_meanwhile(
    model_folder: Path, photos: Path, tmp_path: Path, reads: list[str]
) -> None:
    for i in range(8, 40):
        write_photo(photos / f'{i}.png', i)
    folder = tmp_path / 'index'
    process = subprocess.Popen([sys.executable, '-c', SLOW, str(folder), str(model_folder), str(photos)], cwd=ROOT,
                               env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    try:
        deadline = time.monotonic() + 60
        while not (folder / INDEX_FILE).is_file() or Index(folder).about() is None or Index(folder).count() < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(ConfigError, match=f'is being written by process {process.pid} on '):
            update(folder, model_folder, photos)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = set(Index(folder).states())
    assert 4 <= len(done) < 40 and not Index(folder).finished
    # At once: what the killed process has left running holds no lock.
    assert update(folder, model_folder, photos).images == 40
    assert len(reads) == 40 - len(done) and not done & set(reads)


def test_an_index_of_something_else_is_refused_and_kept(
    model_folder: Path, teacher_folder: Path, photos: Path, tmp_path: Path, reads: list[str]
) -> None:
    folder = tmp_path / 'index'
    update(folder, model_folder, photos)
    others = {
        'other weights': ({'model': write_export(tmp_path / 'weights', teacher_folder, seed=4)},
                          'was made with another model: .*replace=true to discard its 8 images'),
        'other width': ({'model': write_export(tmp_path / 'width', teacher_folder, embed_dim=8)}, 'another model'),
        'other images': ({'photos': photos / 'odd'}, 'is of the images in .*photos, not of those in .*photos/odd'),
        'other precision': ({'precision': 'amp_bf16'}, 'made with precision=fp32, not amp_bf16'),
    }
    for options, message in others.values():
        arguments = {'model': model_folder, 'photos': photos, **options}
        reads.clear()
        with pytest.raises(ConfigError, match=message):
            update(folder, **arguments)
        assert not reads and Index(folder).count() == 8
    result = update(folder, **{'model': model_folder, 'photos': photos, **others['other width'][0]}, replace=True)
    assert result.added == 8 and Index(folder).load()[1].shape == (8, 8)
    reads.clear()
    update(folder, others['other width'][0]['model'], photos, replace=True)
    assert not reads  # replace does not discard an index that fits


def test_a_copy_of_the_model_is_the_same_model(
    model_folder: Path, teacher_folder: Path, photos: Path, tmp_path: Path, reads: list[str]
) -> None:
    update(tmp_path / 'index', model_folder, photos)
    reads.clear()
    assert update(tmp_path / 'index', write_export(tmp_path / 'copy', teacher_folder), photos).images == 8
    assert not reads


def test_what_is_no_index(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    with pytest.raises(ConfigError, match='index: .*file is a file; expected a folder'):
        Index(tmp_path / 'file')
    folder = tmp_path / 'index'
    folder.mkdir()
    (folder / INDEX_FILE).write_text('something else that somebody keeps here')
    with pytest.raises(ConfigError, match=f'{INDEX_FILE}: file is not a database'):
        update(folder, model_folder, photos)
    (folder / INDEX_FILE).write_bytes(b'')  # killed between its creation and its first row
    assert update(folder, model_folder, photos).images == 8


def test_a_folder_without_images_leaves_the_index_alone(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    update(tmp_path / 'index', model_folder, photos)
    photos.rename(tmp_path / 'elsewhere')
    photos.mkdir()
    with pytest.raises(ConfigError, match='images: no image in'):
        update(tmp_path / 'index', model_folder, photos)
    assert Index(tmp_path / 'index').count() == 8


def test_what_is_no_model(model_folder: Path, teacher_folder: Path, tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(ConfigError, match='model: .* is no folder that recipes/export_hf.py wrote') as error:
            ExportedModel(folder, 'cpu')
        return str(error.value)

    assert 'there is no such folder' in message(tmp_path / 'none')
    assert f'did you mean model={model_folder}?' in message(model_folder.parent)
    (tmp_path / 'preprocessor_config.json').write_text('{}')
    for text, expected in [('{"model_type": "llama"}', "is of a 'llama' model"), ('{', 'its config.json is damaged'),
                           ('{"model_type": "llm2clip"}', 'it has no *.safetensors')]:
        (tmp_path / 'config.json').write_text(text)
        assert expected in message(tmp_path)
