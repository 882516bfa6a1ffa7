# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A user's own evaluation set: a folder with a captions file, or an MDS dataset."""

from dataclasses import dataclass, field
from typing import Optional

from streaming import LocalDataset

from llm2clip.config.ranges import Texts
from llm2clip.data.caption_files import read_captions
from llm2clip.data.schema import CAPTION, IMAGE, SAMPLE_ID, caption_column, check_dataset, read_index, whole_shard
from llm2clip.evaluation.sets.files import RetrievalSet, retrieval_set

__all__ = ['MDSImages', 'image_folder', 'mds']


def image_folder(
    images: str, captions: str, image_column: str = 'image', caption_column: str = 'caption'
) -> RetrievalSet:
    """A folder of images and a file of captions.  Images without a caption do not count.

    Args:
        images: Folder of the images.
        captions: CSV or TSV file with a header, JSON list or JSON lines; several rows per image are its captions.
        image_column: Column with the image's path inside `images`.
        caption_column: Column with the text.
    """
    found = read_captions(captions, image_column, caption_column).items()
    return retrieval_set(images, found, captions, images, gaps=True)


def mds(local: str, caption_keys: Optional[Texts] = None) -> RetrievalSet:
    """An image dataset that `prepare_data` wrote.  Images that have none of the captions do not count.

    Args:
        local: Folder of the dataset.
        caption_keys: Which captions of an image are its texts, as far as it has them; unset, all.
    """
    columns = list(map(caption_column, caption_keys or ()))
    there = check_dataset(local, [SAMPLE_ID, IMAGE, *columns])
    if caption_keys is None:
        columns = [name for name in there if name.startswith(CAPTION)]
    read_image = MDSImages.open(local)
    samples = ((sample[SAMPLE_ID], [sample[column] for column in columns])
               for shard in read_image.dataset.shards for sample in shard)
    return retrieval_set(local, samples, local, read_image, gaps=True)


@dataclass(frozen=True)
class MDSImages:
    """Reads the images of a local MDS dataset by position, without Streaming's shared memory."""

    local: str
    """Its folder; two readers of one dataset are equal."""
    dataset: LocalDataset = field(compare=False, repr=False)

    @classmethod
    def open(cls, local: str) -> 'MDSImages':
        """Raises a FileError if the index or a shard is damaged, or a shard is missing."""
        for shard in read_index(local)['shards']:
            whole_shard(local, shard)
        return cls(local, LocalDataset(local))

    def __call__(self, position: int) -> bytes:
        return self.dataset[position][IMAGE]
