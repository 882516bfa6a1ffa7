# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Retrieval sets: images with captions, from an MDS dataset that `prepare_data` wrote."""

import dataclasses
import fnmatch
import itertools
from collections.abc import Callable, Sequence
from typing import Optional

from streaming import LocalDataset

from llm2clip.data.schema import (
    CAPTION,
    IMAGE,
    SAMPLE_ID,
    caption_keys,
    read_columns,
    read_index,
    whole_shard,
)
from llm2clip.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RetrievalSet:
    """Images with captions; every caption belongs to one image."""

    name: str
    image_ids: list[str]
    """Unique, in the order of the dataset."""
    captions: list[list[str]]
    """Captions per image, stripped of white space; images without captions do not count."""
    read_image: Callable[[int], bytes]
    """Position -> encoded image; picklable."""

    @property
    def texts(self) -> list[str]:
        """The T captions of all images, image by image."""
        return list(itertools.chain.from_iterable(self.captions))


@dataclasses.dataclass(frozen=True)
class MDSImages:
    """Reader of the images of a local MDS dataset by position, without Streaming's shared memory."""

    local: str
    """Folder of the dataset; readers of the same folder compare equal."""
    dataset: LocalDataset = dataclasses.field(compare=False, repr=False)

    def __call__(self, position: int) -> bytes:
        return self.dataset[position][IMAGE]


def open_retrieval_set(local: str, captions: Optional[Sequence[str]] = None) -> RetrievalSet:
    """Return the images and captions of a dataset, after checking its files.

    Args:
        local: Folder of an image dataset that `prepare_data` wrote.
        captions: Caption keys, or patterns such as ``de_*``; images may lack some of them.  Unset: all keys.

    Raises:
        ConfigError: There is no image dataset, a caption key does not exist, or no image has a caption.
        FileError: The dataset is damaged.
    """
    try:
        keys = caption_keys(read_columns(local, [SAMPLE_ID, IMAGE]))
    except (OSError, ValueError) as error:
        raise ConfigError(str(error), 'local') from error
    if captions is not None:
        matches: list[str] = []
        for pattern in captions:
            named = [pattern] if pattern in keys else fnmatch.filter(keys, pattern)
            if not named:
                raise ConfigError(f'there is no {pattern!r}; {local} has {", ".join(keys)}', 'caption_keys')
            matches += named
        keys = list(dict.fromkeys(matches))
    texts: dict[str, list[str]] = {}
    for shard in read_index(local)['shards']:
        for sample in whole_shard(local, shard):
            image_id = sample[SAMPLE_ID]
            if image_id in texts:  # files that were converted together may use an id twice
                image_id = f'{image_id} ({len(texts)})'
            stripped = [sample[CAPTION + key].strip() for key in keys]
            texts[image_id] = [text for text in stripped if text]
    if not any(texts.values()):
        raise ConfigError(f'no image of {local} has one of the captions {", ".join(keys)}', 'caption_keys')
    return RetrievalSet(local, list(texts), list(texts.values()), MDSImages(local, LocalDataset(local)))
