# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Answers as one HTML page of pictures."""

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Union
from urllib.parse import quote

from torchvision.transforms.v2.functional import to_pil_image

from llm2clip.data.images import decode_pixels
from llm2clip.folders import write_text
from llm2clip.search.answers import Answer, Hit

__all__ = ['render_page', 'write_page']

# Pixels of the longer side; twice what the page shows, for dense screens.
THUMBNAIL = 400
_STYLE = '''
:root { color-scheme: light dark; --line: #ddd; --back: #f6f6f6; --faint: #777 }
@media (prefers-color-scheme: dark) { :root { --line: #444; --back: #1d1d1d; --faint: #999 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1250px; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } .about { color: var(--faint); margin-top: 0; overflow-wrap: anywhere }
h2 { border-top: 1px solid var(--line); padding-top: 1rem; display: flex; gap: 1rem; align-items: center;
font-weight: 500; overflow-wrap: anywhere } h2 img { height: 96px; border-radius: 6px }
ol { list-style: none; padding: 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr));
gap: 1rem } figure { margin: 0 } a { display: block; aspect-ratio: 1; background: var(--back); border-radius: 6px;
overflow: hidden; text-align: center; color: var(--faint); text-decoration: none }
a img { width: 100%; height: 100%; object-fit: contain }
figcaption { display: flex; gap: .5rem; font-size: 13px } figcaption b { font-weight: 600 }
figcaption span { color: var(--faint); overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
'''


def write_page(
    path: Union[str, Path], answers: Sequence[Answer], about: str, embed_limit: int = 500
) -> None:
    """Write `render_page` to a file, which is never seen half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render_page(answers, about, path.parent, embed_limit))


def render_page(answers: Sequence[Answer], about: str, folder: Union[str, Path], embed_limit: int = 500) -> str:
    """The page.

    Args:
        answers: Each becomes a heading and a row of pictures, which lead to their files.
        about: What was searched.
        folder: Where the page will be, for the links.
        embed_limit: A page of more pictures shows the files themselves, one of fewer has thumbnails in it.
    """
    embed = sum(len(answer.hits) + answer.query.is_image for answer in answers) <= embed_limit
    sections = ''.join(_section(answer, Path(folder), embed) for answer in answers)
    return ('<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Search</title>'
            f'<style>{_STYLE}</style><body><h1>Search</h1><p class="about">{html.escape(about)}</p>'
            f'{sections}</body></html>\n')


def _section(answer: Answer, folder: Path, embed: bool) -> str:
    query = answer.query
    picture = _picture(query.text, folder, embed) if query.is_image else ''
    figures = ''.join(f'<li>{_figure(hit, folder, embed)}</li>' for hit in answer.hits)
    return f'<section><h2>{picture}<span>{html.escape(query.text)}</span></h2><ol>{figures}</ol></section>'


def _figure(hit: Hit, folder: Path, embed: bool) -> str:
    name = html.escape(os.path.basename(hit.path))
    return (f'<figure><a href="{_link(hit.path, folder)}" title="{html.escape(hit.path)}">'
            f'{_picture(hit.path, folder, embed)}</a>'
            f'<figcaption><b>{hit.score:.3f}</b><span>{name}</span></figcaption></figure>')


def _picture(path: str, folder: Path, embed: bool) -> str:
    source = _link(path, folder)
    if embed:
        try:
            source = f'data:image/jpeg;base64,{base64.b64encode(_thumbnail(path)).decode()}'
        except (OSError, ValueError):  # gone or damaged since it was indexed
            return '<span>not there any more</span>'
    return f'<img loading="lazy" src="{source}" alt="">'


def _thumbnail(path: str) -> bytes:
    image = to_pil_image(decode_pixels(Path(path).read_bytes(), path, at_least=THUMBNAIL))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=85)
    return buffer.getvalue()


def _link(path: str, folder: Path) -> str:
    return quote(os.fsencode(os.path.relpath(path, folder)))
