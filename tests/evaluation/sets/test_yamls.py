# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The shipped fragments, one per benchmark: their sources exist and take those arguments."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llm2clip.evaluation.sets.retrieval import LANGUAGES
from llm2clip.registry import CLASSIFICATION_SETS, RETRIEVAL_SETS, check, named

ROOT = Path(__file__).parents[3]
FILES = sorted(ROOT.glob('yamls/eval/sets/*.yaml'))


def _sources(path: Path) -> dict[str, dict[str, Any]]:
    """Result name -> source."""
    content = yaml.safe_load(path.read_text())
    return {f'{name}.{key}': entry[key] for section in content.values() for name, entry in section.items()
            for key in ('source', 'train', 'test') if key in entry}


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_a_fragment_fits_its_loader(path: Path) -> None:
    assert path.read_text().splitlines()[0].startswith(f'# python recipes/evaluate.py {path.relative_to(ROOT)} ')
    section, = {*yaml.safe_load(path.read_text())} - {'averages'}
    for source in _sources(path).values():
        check(section, *named(source, 'source'))


def test_every_set_has_a_fragment() -> None:
    names = {source['name'] for path in FILES for source in _sources(path).values()}
    assert names == {*RETRIEVAL_SETS, *CLASSIFICATION_SETS}
    languages = [source['language'] for source in _sources(ROOT / 'yamls/eval/sets/xm3600.yaml').values()]
    assert languages == list(LANGUAGES)
