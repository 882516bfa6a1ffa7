# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Webdataset tars, as img2dataset writes CC3M, CC12M, YFCC15M and Recap-DataComp-1B."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Union

from webdataset.tariterators import group_by_keys, tar_file_expander

from llm2clip.config import ConfigError
from llm2clip.data.caption_files import field, parse_json
from llm2clip.data.convert.samples import Dropped, Part, Sample, Splits, matching_files

__all__ = ['webdataset']

_IMAGES = ('jpg', 'jpeg', 'png', 'webp')


def webdataset(
    files: Union[str, Sequence[str]], captions: Mapping[str, str], id_field: str = '__key__', split: str = 'train'
) -> tuple[Splits, Dropped]:
    """One split of images with captions, one part per tar file.

    Args:
        files: Paths or patterns (``cc3m/*.tar``).
        captions: Caption key -> field of the sample's JSON (``shortSV_captions``), or ``txt`` for its text file.
        id_field: Field of the JSON that is the sample's id; the name inside the tar by default.
        split: Name of the split.

    Raises:
        ConfigError: No tar matches.
        ValueError: A tar is damaged or cut off, or a sample lacks a field; the message names tar and sample.
    """
    paths = matching_files(files)
    if not captions:
        raise ConfigError('source.captions: expected caption keys with the fields that hold them')
    parts = [Part(Path(path).stem, partial(_samples, path, dict(captions), id_field)) for path in paths]
    return {split: parts}, Dropped()


def _samples(path: str, captions: dict[str, str], id_field: str, dropped: Dropped) -> Iterator[Sample]:
    count = 0
    with open(path, 'rb') as stream:
        records = group_by_keys(tar_file_expander([{'url': path, 'stream': stream}]))
        while True:
            try:
                record = next(records, None)
            except Exception as error:
                raise ValueError(f'{path} is damaged after {count} samples: {error}') from None
            if record is None:
                break
            count += 1
            where = f'{path}: sample {record["__key__"]!r}'
            fields = {'__key__': record['__key__'], 'txt': record.get('txt', b'').decode(),
                      **parse_json(record.get('json', '{}'), where)}
            sample_id = str(field(fields, id_field, where))
            image = next((record[name] for name in _IMAGES if name in record), None)
            if image is None:
                dropped.add('no image', sample_id)
                continue
            texts = {key: str(field(fields, name, where) or '') for key, name in captions.items()}
            yield Sample(sample_id, texts, image)
    # A tar that was cut off between two files reads like a whole one; img2dataset says how many there should be.
    stats = Path(path).with_name(f'{Path(path).stem}_stats.json')
    if stats.is_file() and (expected := json.loads(stats.read_text())['successes']) != count:
        raise ValueError(f'{path} is cut off: it has {count} samples, but {stats.name} says {expected}')
