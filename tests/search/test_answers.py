# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What is found, in the terminal and on the page."""

import base64
import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipes_in_process import run_recipe
from search_folders import write_export, write_photo
from transformers import AutoImageProcessor, AutoModel

from llm2clip.config import ConfigError, SearchConfig
from llm2clip.config_files import load_config
from llm2clip.export.hf import LLM2CLIPModel
from llm2clip.search.answers import Answer, Hit, Query, Searcher, read_queries
from llm2clip.search.arguments import literal_queries
from llm2clip.search.exported import ExportedModel
from llm2clip.search.index import Index
from llm2clip.search.page import render_page, write_page
from llm2clip.search.prompt import typed_answers
from llm2clip.search.update import update_index

TEXTS = ['a red square', 'a green circle number 7']


@pytest.fixture
def searcher(model_folder: Path, photos: Path, tmp_path: Path) -> Searcher:
    index, model = Index(tmp_path / 'index'), ExportedModel(model_folder, 'cpu')
    update_index(index, model, str(photos), num_workers=0)
    return Searcher(index, model)


def queries(*values: str) -> list[Query]:
    return read_queries(list(values))


def test_scores_are_those_of_the_exported_model(searcher: Searcher, model_folder: Path, photos: Path) -> None:
    model, processor = AutoModel.from_pretrained(model_folder), AutoImageProcessor.from_pretrained(model_folder)
    paths = sorted(photos.rglob('*.png'))
    asked = str(photos / 'odd/5.png')
    with torch.no_grad():
        image = model.get_image_features(**processor([Image.open(path) for path in paths], return_tensors='pt'))
        query = torch.cat([model.get_text_features(TEXTS), image[paths.index(photos / 'odd/5.png')][None]])
    expected = (query @ image.T).numpy()
    answers = searcher.answer(queries(*TEXTS, asked), top=8)
    for answer, text, row in zip(answers, [*TEXTS, asked], expected):
        assert answer.query.text == text and len(answer.hits) == 8
        assert [hit.score for hit in answer.hits] == sorted((hit.score for hit in answer.hits), reverse=True)
        found = {hit.path: hit.score for hit in answer.hits}
        np.testing.assert_allclose([found[str(path)] for path in paths], row, atol=1e-3)
    assert answers[2].hits[0].path == asked and answers[2].hits[0].score == pytest.approx(1, abs=1e-3)
    assert len(searcher.answer(queries(TEXTS[0]), top=3)[0].hits) == 3
    assert len(searcher.answer(queries(TEXTS[0]), top=100)[0].hits) == 8


def test_equal_images_come_in_the_order_of_their_paths(searcher: Searcher, photos: Path) -> None:
    for name in ('c', 'a', 'b'):
        write_photo(photos / f'{name}.png', 2)
    update_index(searcher.index, searcher.model, str(photos), num_workers=0)
    hits = Searcher(searcher.index, searcher.model).answer(queries(str(photos / '2.png')), top=4)[0].hits
    assert [os.path.basename(hit.path) for hit in hits] == ['2.png', 'a.png', 'b.png', 'c.png']


def test_a_text_is_embedded_once(
    searcher: Searcher, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    embed = LLM2CLIPModel.get_text_features

    def noted(self: LLM2CLIPModel, texts: list[str], **options: Any) -> torch.Tensor:
        asked.extend(texts)
        return embed(self, texts, **options)

    monkeypatch.setattr(LLM2CLIPModel, 'get_text_features', noted)
    first = searcher.answer(queries(*TEXTS, TEXTS[0]), top=8)
    assert asked == TEXTS and first[0] == first[2]
    again = Searcher(Index(tmp_path / 'index'), ExportedModel(model_folder, 'cpu'))
    assert again.answer(queries(*TEXTS), top=8) == first[:2] and asked == TEXTS


def test_without_a_teacher_images_and_known_texts_are_answered(
    searcher: Searcher, model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    known = searcher.answer(queries(TEXTS[0]), top=2)
    shutil.copytree(model_folder, tmp_path / 'model', ignore=shutil.ignore_patterns('teacher'))
    alone = Searcher(searcher.index, ExportedModel(tmp_path / 'model', 'cpu'))
    assert alone.answer(queries(str(photos / '0.png')), top=1)[0].hits[0].score > 0.99
    assert alone.answer(queries(TEXTS[0]), top=2) == known
    with pytest.raises(ConfigError, match='has no teacher/, the LLM that embeds texts'):
        alone.answer(queries('something new'), top=2)


def test_an_index_of_another_model_is_not_searched(searcher: Searcher, teacher_folder: Path, tmp_path: Path) -> None:
    other = write_export(tmp_path / 'other', teacher_folder, embed_dim=8)
    with pytest.raises(ConfigError, match='was made with another model'):
        Searcher(searcher.index, ExportedModel(other, 'cpu'))
    with pytest.raises(ConfigError, match='index: there is none in .*; give the folder of `images`'):
        Searcher(Index(tmp_path / 'none'), searcher.model)


def test_queries_are_texts_or_image_files(photos: Path) -> None:
    assert read_queries(None) == []
    assert read_queries(' a dog ') == [Query('a dog', False)]
    assert read_queries(['a dog', str(photos / '0.png')]) == [Query('a dog', False), Query(str(photos / '0.png'), True)]
    with pytest.raises(ConfigError, match='query: there is no image file nowhere.jpg'):
        read_queries('nowhere.jpg')
    with pytest.raises(ConfigError, match='query: a text is empty'):
        read_queries(['a', ' '])
    for value in (7, True, {'a dog': 'on the beach'}):
        with pytest.raises(ConfigError, match='query: expected texts, and YAML reads .*put quotes around it'):
            read_queries(value)


@pytest.mark.parametrize('text', ['dog #1', 'a sign: no dogs', 'no', '7', '#1', '{a dog}', '*', '50 % off', "a dog's"])
def test_a_text_is_read_as_it_is_typed(text: str) -> None:
    config = load_config(SearchConfig, literal_queries(['model=m', f'query={text}']))
    assert read_queries(config.query) == [Query(text, False)] and config.model == 'm'


def test_several_texts_in_one_argument() -> None:
    config = load_config(SearchConfig, literal_queries(['model=m', 'query=[a dog, "no"]']))
    assert read_queries(config.query) == [Query('a dog', False), Query('no', False)]


def test_a_damaged_image_as_query(searcher: Searcher, tmp_path: Path) -> None:
    (tmp_path / 'cut.png').write_bytes(b'\x89PNG')
    with pytest.raises(ConfigError, match='query: .*cut.png cannot be decoded'):
        searcher.answer(queries(str(tmp_path / 'cut.png')), top=1)


def test_the_page_has_the_right_pictures_in_the_right_order(tmp_path: Path) -> None:
    colours = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255), 'a&b <c>#?': (255, 255, 0)}
    for name, colour in colours.items():
        Image.new('RGB', (600, 900), colour).save(tmp_path / f'{name}.png')
    found = {name: str(tmp_path / f'{name}.png') for name in colours}
    answers = [
        Answer(Query('<b>green', False), [Hit(found['green'], 0.5), Hit(found['a&b <c>#?'], 0.25)]),
        Answer(Query(found['red'], True), [Hit(found['red'], 1.0), Hit(found['blue'], -0.125)])]
    write_page(tmp_path / 'pages/out.html', answers, 'four <images>')
    page = (tmp_path / 'pages/out.html').read_text()
    images = [Image.open(io.BytesIO(base64.b64decode(data)))
              for data in re.findall('<img[^>]* src="data:image/jpeg;base64,([^"]*)"', page)]
    expected = [colours[name] for name in ('green', 'a&b <c>#?', 'red', 'red', 'blue')]  # with the query
    assert len(images) == 5 and all(max(image.size) <= 400 for image in images)
    for image, colour in zip(images, expected):
        np.testing.assert_allclose(image.getpixel((100, 100)), colour, atol=6)
    assert re.findall('<b>([^<]*)</b>', page) == ['0.500', '0.250', '1.000', '-0.125']
    assert '&lt;b&gt;green' in page and 'four &lt;images&gt;' in page and 'a&amp;b &lt;c&gt;#?.png</span>' in page
    links = re.findall('<a href="([^"]*)"', page)
    assert links[:2] == ['../green.png', '../a%26b%20%3Cc%3E%23%3F.png']
    # More pictures than are embedded: the files themselves, wherever the page is.
    linked = render_page(answers, '', tmp_path / 'pages', embed_limit=4)
    assert 'data:' not in linked
    assert re.findall('<img[^>]* src="([^"]*)"', linked)[:2] == ['../green.png', '../a%26b%20%3Cc%3E%23%3F.png']
    assert 'data:' in render_page(answers, '', tmp_path, embed_limit=5)


def test_an_image_that_is_gone_does_not_break_the_page(tmp_path: Path) -> None:
    page = render_page([Answer(Query('a', False), [Hit(str(tmp_path / 'gone.png'), 0.5)])], '', tmp_path)
    assert 'not there any more' in page and 'gone.png' in page


def test_the_prompt_goes_on_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(['a dog', 'nowhere.png', 'a cat', ''])
    answers = list(typed_answers(lambda asked: [Answer(asked[0], [Hit('a.png', 0.5)])], lambda _: next(lines)))
    assert [answer.query.text for answer in answers] == ['a dog', 'a cat']
    output = capsys.readouterr().out
    assert output.count('  0.500  a.png') == 2 and 'there is no image file nowhere.png' in output


def test_the_recipe_as_a_user_calls_it(
    model_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f'model={model_folder}', f'index={tmp_path}/index', 'device=cpu', 'num_workers=0']
    monkeypatch.chdir(tmp_path)
    run_recipe(monkeypatch, 'search', *common, 'images=photos', "query=['a red square', photos/2.png]", 'top=3',
               'html=out.html')
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert '8 images (8 added, 0 changed, 0 removed)' in output.err and 'wrote out.html' in output.err
    assert len(lines) == 8 and lines[0] == 'a red square' and lines[4:6] == ['photos/2.png', '  1.000  photos/2.png']
    assert Path('out.html').read_text().count('<figure>') == 6
    run_recipe(monkeypatch, 'search', *common, 'query=a red square', 'top=3')
    assert capsys.readouterr().out.splitlines() == lines[:4]
    for arguments, message in [
        (['query=nowhere.png'], 'query: there is no image file nowhere.png'),
        (['query=a', 'top=0'], 'top: 0'), (['images=none'], 'images: there is no folder none'),
        (['imags=photos'], 'did you mean images'), (['images=photos', 'precision=half'], "precision: 'half'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run_recipe(monkeypatch, 'search', *common, *arguments)


def test_without_a_teacher_a_new_text_stops_the_recipe_before_the_index_is_made(
    model_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_folder, tmp_path / 'model', ignore=shutil.ignore_patterns('teacher'))
    with pytest.raises(ConfigError, match='has no teacher/'):
        run_recipe(monkeypatch, 'search', f'model={tmp_path}/model', f'index={tmp_path}/index', f'images={photos}',
                   'query=a dog', 'device=cpu')
    assert not (tmp_path / 'index').exists()
