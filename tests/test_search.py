# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The features follow their folder, and answers are those of the exported model."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.devices import DeviceCPU
from parts import picture
from PIL import Image
from recipes_in_process import run_recipe
from refusals import refused_at
from remotes import free_port
from trained import trained
from transformers import AutoImageProcessor, AutoModel

import llm2clip.evaluation.evaluated_models
from llm2clip.config import SearchConfig
from llm2clip.errors import ConfigError
from llm2clip.evaluation.evaluated_models import TrainedLLM2CLIP
from llm2clip.export.hf import export_folder
from llm2clip.io.tensors import read_safetensors, write_safetensors
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.search import INDEX_FILE, embed_images, find_images, load_model, nearest

TEXTS = ['a red square', 'a green circle number 7']
INDEX = Path('index', INDEX_FILE)
Model = tuple[TrainedLLM2CLIP, str]


def write_photo(path: Path, seed: int) -> None:
    """A picture that was last changed `seed` seconds after 1970."""
    path.write_bytes(picture(seed))
    os.utime(path, (seed, seed))


@pytest.fixture(scope='module')
def model_folder(exported: tuple[LLM2CLIP, Path]) -> Path:
    return exported[1]


@pytest.fixture(scope='module')
def model(model_folder: Path) -> Model:
    return load_model(SearchConfig(str(model_folder)), DeviceCPU())


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight pictures in the working directory, the odd ones in a folder inside."""
    monkeypatch.chdir(tmp_path)
    folder = Path('photos')
    (folder / 'odd').mkdir(parents=True)
    for i in range(8):
        write_photo(folder / f'{"odd/" if i % 2 else ""}{i}.png', i)
    return folder


def embed(model: Model, photos: str = 'photos', **options: Any) -> dict[str, torch.Tensor]:
    config = SearchConfig(images=photos, index='index', num_workers=0, **options)
    paths, features = embed_images(config, *model)
    return {os.path.relpath(path, photos): row for path, row in zip(paths, features, strict=True)}


def direct(model_folder: Path, paths: list[Path]) -> torch.Tensor:
    model, processor = AutoModel.from_pretrained(model_folder), AutoImageProcessor.from_pretrained(model_folder)
    with torch.no_grad():
        return model.get_image_features(**processor([Image.open(path) for path in paths], return_tensors='pt'))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each image that this process decodes."""
    names: list[str] = []
    decode = llm2clip.evaluation.evaluated_models.decode_pixels
    monkeypatch.setattr(llm2clip.evaluation.evaluated_models, 'decode_pixels',
                        lambda data, name: [decode(data, name), names.append(name)][0])
    return names


def test_only_new_and_changed_files_are_read(
    model_folder: Path, model: Model, photos: Path, reads: list[str]
) -> None:
    assert len(embed(model)) == len(reads) == 8
    before = INDEX.stat()
    assert len(embed(model)) == len(reads) == 8 and INDEX.stat() == before
    reads.clear()
    write_photo(photos / os.fsdecode(b'caf\xe9.png'), 100)
    write_photo(photos / '2.png', 101)
    os.utime(photos / 'odd/3.png', (200, 200))
    (photos / '4.png').unlink()
    (photos / 'cut.png').write_bytes((photos / '0.png').read_bytes()[:60])
    found = embed(model, batch_size=3)
    assert sorted(reads) == ['2.png', os.fsdecode(b'caf\xe9.png'), 'odd/3.png'] and len(found) == 8
    images = direct(model_folder, [photos / path for path in found])
    torch.testing.assert_close(torch.stack([*found.values()]).float(), images, atol=1e-3, rtol=0)
    (photos / '2.png').unlink()
    assert len(embed(model)) == 7


def test_stopped_it_keeps_what_it_has(model: Model, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    decode = llm2clip.evaluation.evaluated_models.decode_pixels

    def interrupted(data: bytes, name: str) -> torch.Tensor:
        if len(reads) == 5:
            raise KeyboardInterrupt
        return decode(data, name)

    with monkeypatch.context() as patch:
        patch.setattr(llm2clip.evaluation.evaluated_models, 'decode_pixels', interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed(model, batch_size=2)
    reads.clear()
    assert len(embed(model)) == 8 and len(reads) == 4


def test_features_of_something_else_are_refused_and_kept(
    model_folder: Path, model: Model, teacher_folder: Path, reads: list[str]
) -> None:
    embed(model)
    before = INDEX.read_bytes()
    of_run = trained('timm:test_efficientnet', [teacher_folder], image_size=32, seed=4, embed_dim=16)
    export_folder(*of_run, Path('other'))
    configs = (SearchConfig('other'),
               SearchConfig(str(model_folder), precision='amp_bf16'), SearchConfig(str(model_folder), truncate_dim=8))
    for config in configs:
        with pytest.raises(ConfigError, match='is of another model'):
            embed(load_model(config, DeviceCPU()))
    with pytest.raises(ConfigError, match='images in another folder'):
        embed(model, 'photos/odd')
    reads.clear()
    shutil.copytree(model_folder, 'same')
    embed(load_model(SearchConfig('same'), DeviceCPU()))
    assert not reads and INDEX.read_bytes() == before
    for damaged in (before[:-9], b'something else that somebody keeps here', b''):
        INDEX.write_bytes(damaged)
        with refused_at(INDEX):
            embed(model)
        assert INDEX.read_bytes() == damaged


def test_images_are_found_by_suffix_in_every_folder() -> None:
    for name in ['b.JPG', 'a/c.png', 'a/b/d.webp', 'notes.txt', 'e.heic', '.hidden.png', '.git/f.png']:
        path = Path('files', name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'12345')
    Path('files/broken.png').symlink_to('nowhere')
    found = find_images('files')
    assert list(found) == ['a/b/d.webp', 'a/c.png', 'b.JPG']
    assert found['b.JPG'] == [5, Path('files/b.JPG').stat().st_mtime_ns]
    with refused_at('images'):
        find_images('nowhere')


@pytest.mark.parametrize('count', [1, 7, 5000])
@pytest.mark.parametrize('levels', [2, 1000])
def test_the_nearest_are_those_of_a_full_sort(count: int, levels: int) -> None:
    """Of many equal similarities, too, and beside an undefined one."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(levels, (count, 4), generator=generator).half()
    query = torch.randint(-2, 3, (4,), generator=generator).float()
    if count > 7:
        images[4321] = torch.nan
    scores, order = (images.float() @ query).sort(descending=True, stable=True)
    for top in (1, 5, 6000):
        found = nearest(images, query, top)
        assert [position for position, _ in found] == order[:top].tolist()
        assert [score for _, score in found] == pytest.approx(scores[:top].tolist(), nan_ok=True)


def test_an_index_whose_files_are_not_sorted_keeps_its_rows(model: Model) -> None:
    before = embed(model)
    tensors, metadata = read_safetensors(INDEX)
    files = json.loads(bytes(tensors['files'].tolist()))
    text = bytearray(json.dumps(dict(reversed(files.items()))).encode())
    features = tensors['features'].flip(0)
    write_safetensors(INDEX, {'files': torch.frombuffer(text, dtype=torch.uint8), 'features': features}, metadata)
    after = embed(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def search(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The recipe, which returns the key that it refuses."""
    def call(*arguments: str, model: object = model_folder) -> str:
        try:
            run_recipe(monkeypatch, 'search', f'model={model}', 'index=index', 'images=photos', 'device=cpu',
                       'num_workers=0', *arguments)
        except ConfigError as error:
            return error.key
        return ''

    return call


def test_the_recipe_answers_as_the_exported_model(
    search: Callable[..., str], model_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photo(photos / 'a.png', 2)  # the same as 2.png
    asked, paths = f'{photos}/2.png', sorted(photos.rglob('*.png'))
    assert not search(f"query=['{TEXTS[0]}', {asked}]", 'top=9')
    lines = capsys.readouterr().out.splitlines()
    images = direct(model_folder, paths)
    with torch.no_grad():
        text = AutoModel.from_pretrained(model_folder).get_text_features(TEXTS[:1])[0]
    assert lines[0] == TEXTS[0] and lines[10:13] == [asked, f'  1.000  {asked}', f'  1.000  {photos}/a.png']
    for answer, query in ((lines[1:10], text), (lines[11:], images[paths.index(Path(asked))])):
        scores = {path: float(score) for score, path in map(str.split, answer)}
        assert [*scores.values()] == sorted(scores.values(), reverse=True)
        assert [scores[str(path)] for path in paths] == pytest.approx((images @ query).tolist(), abs=2e-3)
    for argument in ('query=nowhere.png', 'query=[7]', 'query={a: 1}', 'truncate_dim=17'):
        assert search(argument) == argument.partition('=')[0]
    assert search('query=a', model=photos) == 'model'


def test_images_as_queries_need_no_teacher(
    search: Callable[..., str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, 'model', ignore=shutil.ignore_patterns('teacher'))
    assert search('query=a dog', model='model') == 'model' and not Path('index').exists()
    assert not search('query=photos/0.png', 'top=1', model='model')
    assert capsys.readouterr().out == 'photos/0.png\n  1.000  photos/0.png\n'


def test_the_page_answers_opens_uploads_alone_and_bounds_queries(
    model_folder: Path, model: Model, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    httpx = pytest.importorskip('httpx')
    processing_utils = pytest.importorskip('gradio.processing_utils')
    for name in ('GRADIO_ANALYTICS_ENABLED', 'GRADIO_RUN_HISTORY', 'GRADIO_TEMP_DIR', 'no_proxy'):
        monkeypatch.setenv(name, '')  # so that what the recipe puts there is undone
        monkeypatch.delenv(name)
    port = free_port()
    url, args = f'http://127.0.0.1:{port}', [f'model={model_folder}', 'images=photos', f'port={port}', 'top=9',
                                             'device=cpu', 'num_workers=0', 'index=index', 'captions=captions.csv',
                                             'caption_column=text']
    Path('captions.csv').write_text('image,text\n./2.png,noise of seed 2\n2.png,more\n')
    write_photo(photos / os.fsdecode(b'\xff.png'), 9)
    texts = AutoModel.from_pretrained(model_folder).get_text_features(TEXTS)
    logits = model[0].model.logit_scale.exp() * direct(model_folder, [photos / '2.png']) @ texts.T

    def ask(event: int, *data: Any) -> str:
        httpx.post(f'{url}/gradio_api/queue/join', json={'data': data, 'fn_index': event, 'session_hash': 'a'})
        return httpx.get(f'{url}/gradio_api/queue/data?session_hash=a', timeout=60).text

    def upload(name: str, content: bytes) -> dict[str, Any]:
        path, = httpx.post(f'{url}/gradio_api/upload', files={'files': (name, content)}).json()
        return {'path': path, 'meta': {'_type': 'gradio.FileData'}}

    def visit(server: Any) -> None:
        with refused_at('host, port'):
            run_recipe(monkeypatch, 'demo', *args, 'index=other')
        by_text, by_image, zeroshot = (event['id'] for event in httpx.get(f'{url}/config').json()['dependencies']
                                       if event['api_visibility'] == 'private')
        assert '  \N{REPLACEMENT CHARACTER}.png' in ask(by_text, TEXTS[0])
        assert 'Type a text first.' in ask(by_text, ' ') and 'at most' in ask(by_text, 10_001 * 'a')
        os.mkfifo(photos / 'pipe')  # would block its reader
        for path in (photos.absolute() / '2.png', photos.absolute() / 'pipe'):
            assert 'caption' not in ask(by_image, {'path': str(path)})
            assert 'Choose an image first.' in ask(zeroshot, {'path': str(path)}, 'a, b')
        for event in (by_text, by_image):
            ask(event, {'path': 'http://a.example/2.png', 'meta': {'_type': 'gradio.FileData'}})
        assert not urls
        assert httpx.get(f'{url}/gradio_api/file={photos.absolute()}/2.png').status_code == 403
        assert 'cannot be decoded' in ask(by_image, upload('a.jpg', b'a'))
        photo = upload('2.png', (photos / '2.png').read_bytes())
        assert '1.000  2.png: noise of seed 2"' in ask(by_image, photo)
        answer = ask(zeroshot, photo, '\n'.join(TEXTS))
        found = [float(value) for value in re.findall(r'"confidence": ?([\d.e-]+)', answer)]
        assert found == pytest.approx(sorted(logits.softmax(-1)[0].tolist(), reverse=True), abs=1e-3)
        assert '"confidences"' in ask(zeroshot, photo, ', '.join(map(str, range(100))))
        assert 'Type 2 to 100 labels.' in ask(zeroshot, photo, ', '.join(map(str, range(101))))
        server.close()
        raise SystemExit(130)  # as Ctrl-C does

    monkeypatch.setattr('gradio.Blocks.block_thread', visit)
    urls: list[str] = []
    monkeypatch.setattr('gradio.processing_utils.async_ssrf_protected_get', lambda url: urls.append(url))
    monkeypatch.setattr('gradio.processing_utils.async_ssrf_protected_download',
                        processing_utils.async_ssrf_protected_download)  # so that what the recipe changes is undone
    run_recipe(monkeypatch, 'demo', *args)
