# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Image dataset and sidecar of embeddings, two MDS datasets read as one stream."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray
from streaming.base.format.base.reader import Reader
from streaming.base.format.mds.reader import MDSReader
from streaming.base.world import World

from llm2clip.data.schema import IMAGE, SAMPLE_ID, check_columns, dataset_fingerprint
from llm2clip.data.verified_stream import VerifiedStream

__all__ = ['FINGERPRINT_FILE', 'PairedStream', 'columns_of', 'read_fingerprint']

FINGERPRINT_FILE = 'teacher.json'


def read_fingerprint(folder: str) -> dict[str, Any]:
    """What a sidecar says of its teacher and of the dataset it was made for.

    Raises:
        FileNotFoundError: The folder holds no sidecar.
    """
    path = Path(folder) / FINGERPRINT_FILE
    if not path.is_file():
        raise FileNotFoundError(f'there is no sidecar in {folder}: {path} does not exist')
    return json.loads(path.read_text())


def columns_of(reader: Reader) -> dict[str, str]:
    """Column name -> MDS type of one shard."""
    assert isinstance(reader, MDSReader)
    return dict(zip(reader.column_names, reader.column_encodings))


class _PairedReader(Reader):
    """One shard of each dataset, sample by sample the same."""

    def __init__(self, images: Reader, sidecar: Reader) -> None:
        super().__init__(images.dirname, images.split, images.compression, images.hashes, images.samples, None)
        self.images = images
        self.sidecar = sidecar
        self.file_pairs = [*images.file_pairs, *sidecar.file_pairs]

    def _evict_raw(self) -> int:
        return self.images._evict_raw() + self.sidecar._evict_raw()

    def _evict_zip(self) -> int:
        return self.images._evict_zip() + self.sidecar._evict_zip()

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        raise TypeError('a paired shard has no bytes of its own')

    def get_sample_data(self, idx: int) -> bytes:
        raise TypeError('a paired shard has no bytes of its own')

    def get_item(self, idx: int) -> dict[str, Any]:
        sample, extra = self.images[idx], self.sidecar[idx]
        if sample[SAMPLE_ID] != extra[SAMPLE_ID]:
            raise ValueError(
                f'sample {idx} of {self.images.file_pairs[0][0].basename} is {sample[SAMPLE_ID]!r} in '
                f'{self.images.dirname} but {extra[SAMPLE_ID]!r} in the sidecar {self.sidecar.dirname}')
        return {**extra, **sample}


class PairedStream(VerifiedStream):
    """A stream of image samples that carry their captions' embeddings.

    Both datasets keep their own remote and cache.  Shard k of the sidecar must hold the samples of shard k of the
    images, in order, which is how `extract_embeddings` writes it; every sample's id is checked when it is read.

    Args:
        local: Folder or cache of the image dataset.
        embeddings: Folder or cache of the sidecar.
        remote: Where the image dataset comes from.
        embeddings_remote: Where the sidecar comes from.
        columns: Image-dataset columns that must exist.
        embedding_columns: Sidecar columns that must exist.
        **kwargs: Passed to VerifiedStream, and in part to the sidecar's.

    Raises:
        FileNotFoundError: A dataset is missing.
        ValueError: A column is missing or of another type, or the sidecar belongs to another dataset.
    """

    def __init__(
        self,
        local: str,
        embeddings: str,
        remote: Optional[str] = None,
        embeddings_remote: Optional[str] = None,
        columns: Sequence[str] = (),
        embedding_columns: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(local=local, remote=remote, **kwargs)
        shared = {k: v for k, v in kwargs.items() if k not in ('proportion', 'repeat', 'choose')}
        self.sidecar = VerifiedStream(local=embeddings, remote=embeddings_remote, **shared)
        self._columns = (SAMPLE_ID, IMAGE, *columns)
        self._embedding_columns = (SAMPLE_ID, *embedding_columns)

    def apply_default(self, default: dict[str, Any]) -> None:
        super().apply_default(default)
        self.sidecar.apply_default(default)

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        images = super().get_shards(world, allow_unsafe_types)
        sidecars = self.sidecar.get_shards(world, allow_unsafe_types)
        where = f'sidecar {self.sidecar.local}'
        for readers, columns, name in ((images, self._columns, self.local),
                                       (sidecars, self._embedding_columns, where)):
            for reader in readers:
                check_columns(columns_of(reader), columns, name)
        if [len(reader) for reader in images] != [len(reader) for reader in sidecars]:
            raise ValueError(f'{where} belongs to another dataset than {self.local}: its shards hold '
                             f'{[len(r) for r in sidecars]} samples, expected {[len(r) for r in images]}')
        self._check_fingerprint(where)
        return [_PairedReader(*pair) for pair in zip(images, sidecars)]

    def _check_fingerprint(self, where: str) -> None:
        folder = os.path.join(self.sidecar.local, self.sidecar.split)
        if self.sidecar.remote and not os.path.isfile(os.path.join(folder, FINGERPRINT_FILE)):
            self.sidecar._download_file(FINGERPRINT_FILE)
        expected = dataset_fingerprint(json.loads(Path(self.local, self.split, 'index.json').read_text()))
        found = read_fingerprint(folder)['dataset']
        if found != expected:
            raise ValueError(f'{where} belongs to another dataset than {self.local}: it was made for content '
                             f'{found}, the dataset has {expected}')

    def set_up_local(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, shards: list[_PairedReader], cache_usage_per_shard: NDArray[np.int64]
    ) -> None:
        images, sidecars = [shard.images for shard in shards], [shard.sidecar for shard in shards]
        sizes = np.zeros_like(cache_usage_per_shard)
        super().set_up_local(images, cache_usage_per_shard)
        self.sidecar.set_up_local(sidecars, sizes)
        cache_usage_per_shard += sizes
        # A shard counts as present when both its files are there in the same form; otherwise preparing it completes
        # it. Nothing is deleted here, since without a remote these files are the user's only copy.
        for k, (image, sidecar) in enumerate(zip(images, sidecars)):
            usage = cache_usage_per_shard[k] - sizes[k], sizes[k]
            if usage != (image.get_raw_size(), sidecar.get_raw_size()):
                cache_usage_per_shard[k] = 0

    def prepare_shard(self, shard: _PairedReader) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().prepare_shard(shard.images) + self.sidecar.prepare_shard(shard.sidecar)

    def discard_damaged(self, shard: Reader) -> int:
        assert isinstance(shard, _PairedReader)
        return super().discard_damaged(shard.images) + self.sidecar.discard_damaged(shard.sidecar)

    def get_index_size(self) -> int:
        return super().get_index_size() + self.sidecar.get_index_size()
