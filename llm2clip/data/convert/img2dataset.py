# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Webdataset tars, as img2dataset writes CC3M, CC12M, YFCC15M and Recap-DataComp-1B."""

import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Union

from webdataset.tariterators import group_by_keys

from llm2clip.config import ConfigError
from llm2clip.config.ranges import FolderName, Text
from llm2clip.data.caption_files import field, optional_text
from llm2clip.data.convert.samples import Dropped, Part, Sample, Splits, matching_files, sample_name
from llm2clip.files import FileError, parse_json, read_json, reading
from llm2clip.folders import stays_inside

__all__ = ['webdataset']

_IMAGES = ('jpg', 'jpeg', 'png', 'webp')
# Facts about the tar itself.
_ABOUT = re.compile(r'__[^/]*__($|/)')


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
    with reading(path, 'a whole tar with every file once'):
        for record in group_by_keys(_members(path)):
            count += 1
            where = f'{path}: sample {record["__key__"]!r}'
            with reading(f'{where}: txt', 'a text in UTF-8'):
                text = record.get('txt', b'').decode()
            fields = {'__key__': record['__key__'], 'txt': text, **parse_json(record.get('json', '{}'), where, dict)}
            sample_id = sample_name(field(fields, id_field, where), f'{where}: {id_field!r}')
            image = next((record[name] for name in _IMAGES if name in record), None)
            if image is None:
                dropped.add('no image', sample_id)
                continue
            texts = {key: optional_text(field(fields, name, where), f'{where}: {name!r}')
                     for key, name in captions.items()}
            yield Sample(sample_id, texts, image)
    stats = Path(path).with_name(f'{Path(path).stem}_stats.json')
    if stats.is_file() and (expected := field(read_json(stats, dict), 'successes', str(stats))) != count:
        raise FileError(f'{path}: has {count} samples, expected {expected!r}, as {stats.name} says')


class _Member(tarfile.TarInfo):
    """A file in a tar.  `tarfile` takes a header that it cannot read, or none, for the end of a tar that has others."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> '_Member':  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f'no header of a file at byte {tar.offset:,}: {error}') from None


def _members(path: str) -> Iterator[dict[str, Any]]:
    """The files of a tar as `group_by_keys` takes them.

    Raises:
        FileError: The tar has something else than files in it, or goes on after its end.
        TarError: It is damaged or cut off.
    """
    with tarfile.open(path, tarinfo=_Member) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # which otherwise grow
            if not stays_inside(member.name):
                raise FileError(f'{path}: the path {member.name!r} leads out of the tar, expected one inside')
            if not member.isdir() and not member.isreg():
                raise FileError(f'{path}: {member.name!r} is a link or a device, expected a file')
            if member.isreg() and not _ABOUT.match(member.name):
                content = tar.extractfile(member)
                assert content is not None
                yield {'fname': member.name, 'data': content.read(), '__url__': path}
        assert tar.fileobj is not None
        while block := tar.fileobj.read(1 << 20):
            if block.strip(b'\0'):
                raise FileError(f'{path}: goes on after its end, expected one tar, not several in one file')
    yield {}  # ends the last sample
