# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Webdataset tars, as img2dataset writes CC3M, CC12M, YFCC15M and Recap-DataComp-1B."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Union

from llm2clip.config import ConfigError
from llm2clip.config.ranges import FolderName, Text
from llm2clip.data.caption_files import field, optional_text
from llm2clip.data.convert.samples import Dropped, Part, Sample, Splits, matching_files, sample_name
from llm2clip.data.tars import IMAGES, tar_samples
from llm2clip.files import FileError, parse_json, read_json, reading

__all__ = ['webdataset']


def webdataset(
    files: Union[str, Sequence[str]], captions: dict[Text, Text], id_field: Text = '__key__',
    split: FolderName = 'train',
) -> tuple[Splits, Dropped]:
    """One split of images with captions, one part per tar file.

    Args:
        files: Paths or patterns (``cc3m/*.tar``).
        captions: Caption key -> field of the sample's JSON (``shortSV_captions``), or ``txt`` for its text file.
        id_field: Field of the JSON that is the sample's id; the name inside the tar by default.
        split: Name of the split.

    Raises:
        ConfigError: No tar matches.
        FileError: A tar is damaged or cut off, holds links or paths that lead out of it, or a sample lacks a field; the
            message names tar and sample.
    """
    paths = matching_files(files)
    if not captions:
        raise ConfigError('source.captions: expected caption keys with the fields that hold them')
    parts = [Part(Path(path).stem, partial(_samples, path, dict(captions), id_field)) for path in paths]
    return {split: parts}, Dropped()


def _samples(path: str, captions: dict[str, str], id_field: str, dropped: Dropped) -> Iterator[Sample]:
    count = 0
    for record in tar_samples(path):
        count += 1
        where = f'{path}: sample {record["__key__"]!r}'
        with reading(f'{where}: txt', 'a text in UTF-8'):
            text = record.get('txt', b'').decode()
        fields = {'__key__': record['__key__'], 'txt': text, **parse_json(record.get('json', '{}'), where, dict)}
        sample_id = sample_name(field(fields, id_field, where), f'{where}: {id_field!r}')
        image = next((record[name] for name in IMAGES if name in record), None)
        if image is None:
            dropped.add('no image', sample_id)
            continue
        texts = {key: optional_text(field(fields, name, where), f'{where}: {name!r}')
                 for key, name in captions.items()}
        yield Sample(sample_id, texts, image)
    stats = Path(path).with_name(f'{Path(path).stem}_stats.json')
    if stats.is_file() and (expected := field(read_json(stats, dict), 'successes', str(stats))) != count:
        raise FileError(f'{path}: has {count} samples, expected {expected!r}, as {stats.name} says')
