# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Crossmodal-3600."""

from pathlib import Path

import pytest
from set_files import xm3600 as write_xm3600

from llm2clip.config import ConfigError
from llm2clip.evaluation.sets.languages import LANGUAGES, xm3600


def test_a_language_of_xm3600(tmp_path: Path) -> None:
    arguments = write_xm3600(tmp_path)
    found = xm3600(**arguments)
    assert found.name == 'xm3600_de' and found.image_ids == ['000411001ff7dd4f.jpg', '000ef8db2c7dd84a.jpg']
    assert found.captions == [['Bild 000411001ff7dd4f', 'ein zweites'], ['Bild 000ef8db2c7dd84a', 'ein zweites']]
    assert [len(captions) for captions in xm3600(**arguments, captions_per_image=1).captions] == [1, 1]
    assert xm3600(**{**arguments, 'language': 'no'}).captions[0] == ['bilde 000411001ff7dd4f']


def test_an_unknown_language_lists_all(tmp_path: Path) -> None:
    arguments = write_xm3600(tmp_path)
    assert len(LANGUAGES) == len(set(LANGUAGES)) == 36
    with pytest.raises(ConfigError, match=f"there is no 'xx'; there are {', '.join(LANGUAGES)}$"):
        xm3600(**{**arguments, 'language': 'xx'})
    # What YAML makes of `language: no`.
    with pytest.raises(ConfigError, match="there is no False; .*; in YAML, 'no' needs quotes"):
        xm3600(**{**arguments, 'language': False})
    with pytest.raises(ConfigError, match=r"captions.jsonl:1 has no 'fr'; it has image/key, image/locale, de, no"):
        xm3600(**{**arguments, 'language': 'fr'})
