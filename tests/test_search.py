# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The index follows its folder, whatever happens to either, and answers as the exported model does."""

import base64
import io
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composer.devices import DeviceCPU
from parts import picture
from PIL import Image
from recipes_in_process import run_recipe
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoImageProcessor, AutoModel

import llm2clip.evaluation.models
import llm2clip.search
import llm2clip.weights
from llm2clip.config import AdapterConfig, ConfigError, ModelConfig, VisionConfig
from llm2clip.evaluation.gallery import write_search_page
from llm2clip.evaluation.images import encode_batches
from llm2clip.evaluation.models import TrainedLLM2CLIP
from llm2clip.export.check import pictures
from llm2clip.export.hf import export_folder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.search import (
    INDEX_FILE,
    Entry,
    Index,
    IndexFormat,
    find_images,
    load_model,
    read_index,
    read_queries,
    search,
    update_index,
)
from llm2clip.teacher.fingerprint import TeacherRecord
from llm2clip.teacher.folder import teacher_fingerprint

TEXTS = ['a red square', 'a green circle number 7']
Model = tuple[TrainedLLM2CLIP, str]


def write_export(out: Path, teacher: Path, seed: int = 3) -> Path:
    """A random model with a tower for 32 x 32 pixels."""
    config = ModelConfig(VisionConfig('test_efficientnet', False, image_size=32), AdapterConfig(depth=1), embed_dim=16)
    torch.manual_seed(seed)
    model = LLM2CLIP(config, 32, load_weights=False).eval()
    record = TeacherRecord(teacher_fingerprint(teacher), {'llm_embed_dim': 32})
    export_folder(model, config, record, teacher, out)
    return out


def write_photo(path: Path, seed: int) -> None:
    """A picture that was last changed `seed` seconds after 1970."""
    path.write_bytes(picture(seed))
    os.utime(path, (seed, seed))


@pytest.fixture(scope='module')
def model_folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp('export') / 'llm2clip', teacher_folder)


@pytest.fixture(scope='module')
def model(model_folder: Path) -> Model:
    return load_model(str(model_folder), DeviceCPU())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight pictures, the odd ones in a folder inside."""
    folder = tmp_path / 'photos'
    (folder / 'odd').mkdir(parents=True)
    for i in range(8):
        write_photo(folder / f'{"odd/" if i % 2 else ""}{i}.png', i)
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each image that this process decodes."""
    names: list[str] = []
    decode = llm2clip.evaluation.models.decode_pixels

    def noted(data: bytes, name: str) -> torch.Tensor:
        names.append(name)
        return decode(data, name)

    monkeypatch.setattr(llm2clip.evaluation.models, 'decode_pixels', noted)
    return names


def update(folder: Path, model: Model, photos: Path, **options: Any) -> tuple[Index, str]:
    index = read_index(str(folder), model[1], str(photos))
    return index, update_index(index, model[0], **{'num_workers': 0, **options})


def indexed(folder: Path, model: Model) -> dict[str, np.ndarray]:
    """Path -> features, as they lie on the disk."""
    return {path: entry.feature for path, entry in read_index(str(folder), model[1]).entries.items()}


def direct(model_folder: Path, paths: list[Path]) -> torch.Tensor:
    """Features as a user of transformers computes them."""
    model, processor = AutoModel.from_pretrained(model_folder), AutoImageProcessor.from_pretrained(model_folder)
    with torch.no_grad():
        return model.get_image_features(**processor([Image.open(path) for path in paths], return_tensors='pt'))


def test_features_are_those_of_the_exported_model_and_of_its_evaluation(
    model_folder: Path, model: Model, photos: Path, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    Image.fromarray(noise).resize((900, 600)).save(photos / 'large.jpg')
    for i, data in enumerate(pictures(32).values()):
        (photos / f'kind_{i}.jpg').write_bytes(data)
    update(tmp_path / 'index', model, photos, batch_size=4, num_workers=2)
    found = indexed(tmp_path / 'index', model)
    assert set(found) == {str(path.relative_to(photos)) for path in photos.rglob('*.*g')} and len(found) == 14
    features = np.array(list(found.values()), np.float32)
    np.testing.assert_allclose(features, direct(model_folder, [photos / path for path in found]), atol=1e-3)
    batches = encode_batches(model[0], lambda i: (photos / list(found)[i]).read_bytes(), list(found), batch_size=4,
                             num_workers=0)
    evaluated = torch.cat([batch.features for batch in batches])
    np.testing.assert_array_equal(features, evaluated.half().float())


def test_scores_are_those_of_the_exported_model(
    model_folder: Path, model: Model, photos: Path, tmp_path: Path
) -> None:
    index, _ = update(tmp_path / 'index', model, photos)
    paths, asked = sorted(photos.rglob('*.png')), str(photos / 'odd/5.png')
    images = direct(model_folder, paths)
    with torch.no_grad():
        texts = AutoModel.from_pretrained(model_folder).get_text_features(TEXTS)
    expected = torch.cat([texts, images[paths.index(Path(asked))][None]]) @ images.T
    answers = search(index, model[0], [*TEXTS, asked], top=100)
    for hits, row in zip(answers, expected, strict=True):
        assert [score for _, score in hits] == sorted((score for _, score in hits), reverse=True)
        np.testing.assert_allclose([dict(hits)[str(path)] for path in paths], row, atol=1e-3)
    assert answers[2][0] == (asked, pytest.approx(1, abs=1e-3))
    assert search(index, model[0], [TEXTS[1], asked, TEXTS[1]], top=3) == [
        answers[1][:3], answers[2][:3], answers[1][:3]]


def test_equal_images_come_in_the_order_of_their_paths(model: Model, photos: Path, tmp_path: Path) -> None:
    update(tmp_path / 'index', model, photos)
    for name in ('c', 'a', 'b'):
        write_photo(photos / f'{name}.png', 2)
    index, _ = update(tmp_path / 'index', model, photos)
    hits, = search(index, model[0], [str(photos / '2.png')], top=4)
    assert [os.path.basename(path) for path, _ in hits] == ['2.png', 'a.png', 'b.png', 'c.png']


def test_only_new_and_changed_files_are_read(
    model_folder: Path, model: Model, photos: Path, tmp_path: Path, reads: list[str]
) -> None:
    folder = tmp_path / 'index'
    assert update(folder, model, photos)[1] == '8 images, 8 of them new or changed; 0 are gone' and len(reads) == 8
    reads.clear()
    before = (folder / INDEX_FILE).stat()
    assert '0 of them new' in update(folder, model, photos)[1] and not reads
    assert (folder / INDEX_FILE).stat() == before
    write_photo(photos / 'new.png', 100)
    write_photo(photos / '2.png', 101)
    os.utime(photos / 'odd/3.png', (200, 200))
    (photos / '4.png').unlink()
    (photos / '6.png').rename(photos / 'renamed.png')
    assert update(folder, model, photos)[1] == '8 images, 4 of them new or changed; 2 are gone'
    assert sorted(reads) == ['2.png', 'new.png', 'odd/3.png', 'renamed.png']
    found = indexed(folder, model)
    assert len(found) == 8
    np.testing.assert_allclose(list(found.values()), direct(model_folder, [photos / path for path in found]), atol=1e-3)
    for path in ('new.png', 'renamed.png'):
        (photos / path).unlink()
    update(folder, model, photos)
    assert len(indexed(folder, model)) == 6


def test_images_that_cannot_be_read_are_named_and_the_others_go_on(
    model: Model, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / 'empty.jpg').touch()
    (photos / 'cut.png').write_bytes((photos / '0.png').read_bytes()[:60])
    (photos / 'notes.txt').touch()
    read_bytes, decode = Path.read_bytes, llm2clip.evaluation.models.decode_pixels

    def denied(path: Path) -> bytes:
        if path.name == '0.png':
            raise PermissionError(13, 'Permission denied', str(path))
        return read_bytes(path)

    def fragile(data: bytes, name: str) -> torch.Tensor:
        if name == '2.png':
            raise KeyError('tag')
        return decode(data, name)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'read_bytes', denied)
        patch.setattr(llm2clip.evaluation.models, 'decode_pixels', fragile)
        index, said = update(tmp_path / 'index', model, photos, batch_size=1)
    assert said.startswith('6 images, 6 of them new') and said.endswith('other files were left out: 1 .txt')
    for reason in (f'unreadable: {photos}/0.png: cannot be read (Permission denied), expected an image',
                   "unreadable: 2.png: KeyError('tag')",
                   "unreadable: the image of sample 'cut.png' cannot be decoded: ",
                   "unreadable: the image of sample 'empty.jpg' cannot be decoded: "):
        assert said.count(reason) == 1, said
    assert index.missing == read_index(str(tmp_path / 'index'), model[1]).missing == 0
    write_photo(photos / 'cut.png', 50)
    said = update(tmp_path / 'index', model, photos)[1]
    assert said.startswith('9 images, 3 of them new') and said.count('unreadable') == 1


def test_a_very_long_image_takes_no_more_memory(model: Model, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    long, red = (model[0].preprocess((photos / name).read_bytes(), name) for name in ('long.png', 'red.png'))
    assert len(seen) == 2 and max(seen) <= 3 * 32 * 16 * 32
    torch.testing.assert_close(long, red)


def test_names_that_are_no_text(model: Model, photos: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b'caf\xe9.png')
    write_photo(photos / name, 9)
    assert '9 of them new' in update(tmp_path / 'index', model, photos)[1]
    assert name in indexed(tmp_path / 'index', model)
    assert '0 of them new' in update(tmp_path / 'index', model, photos)[1]


def test_stopped_it_goes_on_where_it_was(
    model: Model, photos: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / 'index'
    with monkeypatch.context() as patch:
        decode = llm2clip.evaluation.models.decode_pixels

        def interrupted(data: bytes, name: str) -> torch.Tensor:
            if len(reads) == 5:
                raise KeyboardInterrupt
            return decode(data, name)

        patch.setattr(llm2clip.evaluation.models, 'decode_pixels', interrupted)
        with pytest.raises(KeyboardInterrupt):
            update(folder, model, photos, batch_size=2)
    assert len(indexed(folder, model)) == 4 and read_index(str(folder), model[1]).missing == 4
    reads.clear()
    assert '8 images, 4 of them new' in update(folder, model, photos)[1] and len(reads) == 4
    assert read_index(str(folder), model[1]).missing == 0


def test_killed_it_has_what_was_saved_whole(
    model: Model, photos: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at any moment leaves the file of the last save, which is never seen half written."""
    folder, kept = tmp_path / 'index', []
    save_file = llm2clip.weights.save_file

    def noted(tensors: Any, path: Path, about: Any) -> None:
        kept.append(len(indexed(folder, model)) if (folder / INDEX_FILE).is_file() else 0)
        save_file(tensors, path, about)
        with safe_open(path, 'numpy') as file:
            assert path.name != INDEX_FILE and int(file.metadata()['missing']) == 8 - len(reads)

    monkeypatch.setattr(llm2clip.weights, 'save_file', noted)
    monkeypatch.setattr(llm2clip.search, 'SAVE_SECONDS', 0)
    update(folder, model, photos, batch_size=2)
    assert kept == [0, 2, 4, 6, 8] and os.listdir(folder) == [INDEX_FILE]


def test_an_index_of_something_else_is_refused_and_kept(
    model_folder: Path, model: Model, teacher_folder: Path, photos: Path, tmp_path: Path, reads: list[str]
) -> None:
    folder = tmp_path / 'index'
    update(folder, model, photos)
    before = (folder / INDEX_FILE).read_bytes()
    other = load_model(str(write_export(tmp_path / 'other', teacher_folder, seed=4)), DeviceCPU())
    same = load_model(str(shutil.copytree(model_folder, tmp_path / 'same')), DeviceCPU())
    reads.clear()
    for asked, images, message in [
        (other, photos, 'was made with another model; give another `index`, or remove that file'),
        (other, None, 'was made with another model'), (model, photos / 'odd', 'not of those in .*photos/odd'),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_index(str(folder), asked[1], None if images is None else str(images))
    assert '0 of them new' in update(folder, same, photos)[1] and not reads  # a copy is the same model
    assert (folder / INDEX_FILE).read_bytes() == before


def test_what_is_no_index(model: Model, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='index: there is none in .*; give the folder of `images`'):
        read_index(str(tmp_path / 'none'), model[1])
    (tmp_path / 'file').touch()
    with pytest.raises(ConfigError, match='index: .*File exists'):
        read_index(str(tmp_path / 'file'), model[1], str(photos))
    update(tmp_path / 'index', model, photos)
    file = tmp_path / 'index' / INDEX_FILE
    for damaged in (file.read_bytes()[:-9], b'something else that somebody keeps here', b''):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f'{INDEX_FILE}: cannot be read .*expected an index of images'):
            update(tmp_path / 'index', model, photos)
        assert file.read_bytes() == damaged


def test_a_folder_without_images_leaves_the_index_alone(model: Model, photos: Path, tmp_path: Path) -> None:
    update(tmp_path / 'index', model, photos)
    photos.rename(tmp_path / 'elsewhere')
    with pytest.raises(ConfigError, match='images: .*photos: No such file'):
        update(tmp_path / 'index', model, photos)
    photos.mkdir()
    (photos / 'a.heic').touch()
    with pytest.raises(ConfigError, match='images: no image in .*expected files that end in .*, found 1 .heic'):
        update(tmp_path / 'index', model, photos)
    assert len(indexed(tmp_path / 'index', model)) == 8


def test_images_are_found_by_suffix_in_every_folder_once(tmp_path: Path) -> None:
    names = ['b.JPG', 'a/c.png', 'a/b/d.webp', 'notes.txt', 'README', 'e.heic', '.hidden.png', '.git/f.png']
    for name in names:
        path = tmp_path / 'photos' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'12345')
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere/g.png').touch()
    (tmp_path / 'photos/link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'photos/a/loop').symlink_to(tmp_path / 'photos')
    (tmp_path / 'photos/broken.png').symlink_to(tmp_path / 'nowhere')
    found, others = find_images(str(tmp_path / 'photos'))
    assert list(found) == ['a/b/d.webp', 'a/c.png', 'b.JPG', 'link/g.png']
    assert found['b.JPG'] == (5, (tmp_path / 'photos/b.JPG').stat().st_mtime_ns)
    assert sorted(others.split(', ')) == ['1 .heic', '1 .png', '1 .txt', '1 no suffix']


def test_what_is_no_model(model_folder: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, model_folder.parent):
        with pytest.raises(ConfigError, match='model: .* is not the folder llm2clip/ that recipes/export_hf.py wrote'):
            load_model(str(folder), DeviceCPU())


def test_queries_are_texts_or_image_files(photos: Path) -> None:
    assert read_queries(None) == [] and read_queries('a dog') == ['a dog']
    assert read_queries(['a dog', str(photos / '0.png')]) == ['a dog', str(photos / '0.png')]
    with pytest.raises(ConfigError, match='query: there is no image file nowhere.jpg'):
        read_queries('nowhere.jpg')
    for value in (7, True, {'a dog': 'on the beach'}, ['a', ' ']):
        with pytest.raises(ConfigError, match='query: expected texts, and YAML reads .*put quotes around'):
            read_queries(value)


def test_the_page_has_the_right_pictures_in_the_right_order(tmp_path: Path) -> None:
    colours = {'red': (255, 0, 0), 'green': (0, 255, 0), 'a&b <c>#?': (255, 255, 0)}
    for name, colour in colours.items():
        Image.new('RGB', (600, 900), colour).save(tmp_path / f'{name}.png')
    found = {name: str(tmp_path / f'{name}.png') for name in [*colours, 'gone']}
    write_search_page(str(tmp_path / 'pages/out.html'), 'three <images>', [
        ('<b>green', [(found['green'], 0.5), (found['a&b <c>#?'], 0.25)]),
        (found['red'], [(found['red'], 1.0), (found['gone'], -0.125)])])
    page = (tmp_path / 'pages/out.html').read_text()
    images = [Image.open(io.BytesIO(base64.b64decode(data)))
              for data in re.findall('<img[^>]* src="data:image/jpeg;base64,([^"]*)"', page)]
    for image, name in zip(images, ('green', 'a&b <c>#?', 'red'), strict=True):
        assert max(image.size) <= 400
        np.testing.assert_allclose(np.asarray(image)[100, 100], colours[name], atol=6)
    assert re.findall('<b>([^<]*)</b>', page) == ['0.500', '0.250', '1.000', '-0.125']
    assert '&lt;b&gt;green' in page and 'three &lt;images&gt;' in page and 'a&amp;b &lt;c&gt;#?.png</fig' in page
    assert page.count('gone or damaged') == 1
    assert re.findall('<a href="([^"]*)"', page)[:2] == ['../green.png', '../a%26b%20%3Cc%3E%23%3F.png']


def _call(
    monkeypatch: pytest.MonkeyPatch, folder: Path, model: Path, *arguments: str, index: Optional[Path] = None
) -> None:
    monkeypatch.chdir(folder)
    run_recipe(monkeypatch, 'search', f'model={model}', f'index={index or folder / "index"}', 'device=cpu',
               'num_workers=0', *arguments)


def test_the_recipe_as_a_user_calls_it(
    model_folder: Path, model: Model, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    _call(monkeypatch, tmp_path, model_folder, 'images=photos', "query=['a red square', photos/2.png]", 'top=3',
          'html=out.html')
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert '8 images, 8 of them new' in output.err and 'wrote out.html' in output.err
    assert len(lines) == 8 and lines[0] == 'a red square' and lines[4:6] == ['photos/2.png', f'  1.000  {photos}/2.png']
    assert Path('out.html').read_text().count('<figure>') == 6
    # Without images: the index as it is, also if it is not complete.
    index = read_index('index', model[1])
    index.missing = 3
    index.save()
    _call(monkeypatch, tmp_path, model_folder, 'query=a red square', 'top=3')
    output = capsys.readouterr()
    assert output.out.splitlines() == lines[:4] and '3 images are missing; give `images` to go on' in output.err
    for arguments, message in [
        (['query=nowhere.png'], 'query: there is no image file nowhere.png'), ([], 'query: expected a text'),
        (['query=a', 'top=0'], 'top .command line.: 0, expected at least 1'),
        (['images=none', 'query=a'], 'is of the images in .*/photos'),
        (['imags=photos'], 'did you mean images'),
    ]:
        with pytest.raises(ConfigError, match=message):
            _call(monkeypatch, tmp_path, model_folder, *arguments)


def test_another_precision_has_an_index_of_its_own(
    model_folder: Path, model: Model, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = ['images=photos', 'precision=amp_bf16', 'query=a red square', 'top=8']
    _call(monkeypatch, tmp_path, model_folder, 'images=photos', 'query=a red square', 'top=8')
    with pytest.raises(ConfigError, match='was made with precision=fp32, not amp_bf16; give another `index`'):
        _call(monkeypatch, tmp_path, model_folder, *narrow)
    scores = [capsys.readouterr().out.splitlines()[1:]]
    _call(monkeypatch, tmp_path, model_folder, *narrow, index=tmp_path / 'narrow')
    scores.append(capsys.readouterr().out.splitlines()[1:])
    full, other = ({line.split()[1]: float(line.split()[0]) for line in lines} for lines in scores)
    assert full != other and full == pytest.approx(other, abs=0.02) and len(full) == 8
    with pytest.raises(ConfigError, match='was made with precision=amp_bf16, not fp32'):
        read_index(str(tmp_path / 'narrow'), model[1])
    wide, short = (load_file(tmp_path / name / INDEX_FILE)['features'] for name in ('index', 'narrow'))
    assert not np.array_equal(wide, short)
    np.testing.assert_allclose(wide, short, atol=0.03)


def test_few_dimensions_in_int8(
    model_folder: Path, model: Model, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    """An index of its own, which goes on with new files as any other."""
    few = ['dim=8', 'storage=int8', 'query=a red square', 'top=8']
    _call(monkeypatch, tmp_path, model_folder, 'images=photos', *few)
    write_photo(photos / 'new.png', 100)
    _call(monkeypatch, tmp_path, model_folder, 'images=photos', *few, 'top=9')
    output = capsys.readouterr()
    assert '9 images, 1 of them new' in output.err
    tensors = load_file(tmp_path / 'index' / INDEX_FILE)
    assert tensors['features'].dtype == np.int8 and tensors['features'].shape == (9, 8)
    assert tensors['scales'].dtype == np.float32 and tensors['scales'].shape == (9,)
    paths = sorted(photos.rglob('*.png'))
    with torch.no_grad():
        text = AutoModel.from_pretrained(model_folder).get_text_features(TEXTS[:1])
    text, images = (F.normalize(features[:, :8], dim=-1) for features in (text, direct(model_folder, paths)))
    found = {line.split()[1]: float(line.split()[0]) for line in output.out.splitlines()[-9:]}
    for path, score in zip(paths, (text @ images.T)[0].tolist(), strict=True):
        assert found[str(path)] == pytest.approx(score, abs=0.02)
    for other, message in ((few[1:], 'dim=8, not None'), ([few[0], *few[2:]], 'storage=int8, not float16'),
                           (['dim=4', *few[1:]], 'dim=8, not 4')):
        with pytest.raises(ConfigError, match=f'was made with {message}; give another `index`'):
            _call(monkeypatch, tmp_path, model_folder, *other)
    with pytest.raises(ConfigError, match='dim: 17, expected at most the 16 dimensions of the model'):
        _call(monkeypatch, tmp_path, model_folder, 'dim=17', 'query=a')


@pytest.mark.parametrize(('cosine', 'recall'), [(0.8, 0.97), (0.96, 0.89)])
def test_int8_finds_what_float32_finds(cosine: float, recall: float, tmp_path: Path) -> None:
    """Of the ten nearest of 10,000 images in 100 clusters, by the mean cosine of two images of a cluster."""
    generator, how = np.random.default_rng(0), IndexFormat(storage='int8')

    def near(centres: np.ndarray, n: int) -> np.ndarray:
        vectors = centres[generator.integers(len(centres), size=n)]
        vectors = vectors + (1 / cosine - 1) ** 0.5 * generator.standard_normal((n, 128))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    centres = generator.standard_normal((100, 128))
    images, texts = near(centres, 10_000), near(centres, 100)
    index = Index(tmp_path / INDEX_FILE, 'm', '/photos', how)
    for i, stored in enumerate(zip(*how.stored(torch.from_numpy(images)))):
        index.entries[f'{i:05}'] = Entry(0, 0, *stored)
    index.save()
    assert (tmp_path / INDEX_FILE).stat().st_size < 10_000 * (128 + 4 + 20)
    index = read_index(str(tmp_path), 'm', how=how)
    model: Any = SimpleNamespace(text_features=lambda asked: (torch.from_numpy(texts), 0))
    answers = search(index, model, [f'text {i}' for i in range(100)], 10)
    shared = [len({int(path[-5:]) for path, _ in hits} & {*np.argsort(-images @ text)[:10]})
              for hits, text in zip(answers, texts, strict=True)]
    assert sum(shared) / 1000 == pytest.approx(recall, abs=0.01)


def test_images_as_queries_need_no_teacher_and_texts_are_refused_before_the_index_is_made(
    model_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, tmp_path / 'model', ignore=shutil.ignore_patterns('teacher'))
    with pytest.raises(ConfigError, match='model: there is no model/teacher, the teacher that embeds texts'):
        _call(monkeypatch, tmp_path, Path('model'), 'images=photos', 'query=a dog')
    assert not (tmp_path / 'index').exists()
    _call(monkeypatch, tmp_path, Path('model'), 'images=photos', 'query=photos/0.png', 'top=1')
    assert capsys.readouterr().out == f'photos/0.png\n  1.000  {photos}/0.png\n'


@pytest.mark.parametrize('text', ['dog #1', 'a sign: no dogs', 'no', '7', '#1', '{a dog}', '*', '50 % off', "a dog's"])
def test_a_text_is_read_as_it_is_typed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(llm2clip.search, 'read_queries', lambda value: seen.append(value) or [])
    with pytest.raises(ConfigError, match='query: expected'):
        run_recipe(monkeypatch, 'search', 'model=m', f'query={text}')
    assert seen == [text]


def test_several_texts_in_one_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(llm2clip.search, 'read_queries', lambda value: seen.append(list(value)) or [])
    with pytest.raises(ConfigError, match='query: expected'):
        run_recipe(monkeypatch, 'search', 'model=m', 'query=[a dog, "no"]')
    assert seen == [['a dog', 'no']]
