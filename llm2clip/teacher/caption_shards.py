# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The captions of a dataset, shard by shard, as they are read and get their vectors."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from streaming.base.format.base.reader import Reader

from llm2clip.config import ConfigError, DatasetConfig
from llm2clip.data.schema import SAMPLE_ID, caption_column, caption_keys, check_columns, dataset_fingerprint, read_index
from llm2clip.data.streams.paired_stream import columns_of
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.data.vectors import STORAGES
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord
from llm2clip.teacher.sidecar_files import Sidecar

__all__ = ['CaptionShard', 'CaptionSource']


class CaptionSource:
    """A dataset as it is read, shard by shard.

    Args:
        sidecar: What is written for it.

    Raises:
        ConfigError: Its storage is unknown.
        FileError, ShardError: The dataset is missing or damaged.
        ValueError: It has no captions.
    """

    def __init__(self, sidecar: Sidecar) -> None:
        if sidecar.storage not in STORAGES:
            raise ConfigError(f'storage: {sidecar.storage!r} is not one of {", ".join(STORAGES)}')
        self.sidecar = sidecar
        self.stream, self.shards = _open(sidecar.dataset)
        columns, local = columns_of(self.shards[0]), sidecar.dataset.local
        check_columns(columns, [SAMPLE_ID], local)
        self.keys = caption_keys(columns)
        if not self.keys:
            raise ValueError(f'the dataset in {local} has no caption columns')

    @property
    def index(self) -> dict[str, Any]:
        """The dataset's, as it is now."""
        return read_index(self.sidecar.dataset.local)

    def record(self, fingerprint: Fingerprint) -> TeacherRecord:
        """What the sidecar says about itself."""
        vectors = {'storage': self.sidecar.storage, 'normalized': self.sidecar.normalize, **self.sidecar.about}
        return TeacherRecord(fingerprint, {'dataset': dataset_fingerprint(self.index), 'caption_keys': self.keys,
                                           'vectors': vectors})

    def count(self, numbers: Iterable[int]) -> int:
        """Captions of some shards, those that samples do not have included."""
        return sum(len(self.shards[k]) for k in numbers) * len(self.keys)

    def read(self, k: int, llm_embed_dim: int) -> 'CaptionShard':
        """The captions of a shard, with vectors of that width, all zero.

        Raises:
            ShardError: It is missing, or damaged at its remote as well.
        """
        ids, texts = [], []
        with self.stream.whole(self.shards[k]) as shard:
            for i in range(len(shard)):
                sample = shard[i]
                ids.append(sample[SAMPLE_ID])
                for key in self.keys:
                    texts.append(sample[caption_column(key)])
        return CaptionShard(self, k, ids, texts, torch.zeros(len(texts), llm_embed_dim))


@dataclass
class CaptionShard:
    """The captions of one shard, and their vectors as they come."""

    source: CaptionSource
    number: int
    ids: list[str]
    texts: list[str]
    """Those of the first sample, key by key, then those of the second, and so on; empty where there is none."""
    vectors: torch.Tensor
    """One per caption, zero for an empty one."""
    done: Counter[str] = field(default_factory=Counter)
    """What has been done for it."""

    @property
    def blocks_folder(self) -> Path:
        return self.source.sidecar.out.local / f'shard.{self.number:05}.blocks'


def _open(dataset: DatasetConfig) -> tuple[VerifiedStream, Sequence[Reader]]:
    stream = VerifiedStream(local=dataset.local, remote=dataset.remote)
    shards = stream.open()
    if dist.get_local_rank() == 0:
        stream.set_up_local(shards, np.zeros(len(shards), np.int64))
    dist.barrier()
    return stream, shards
