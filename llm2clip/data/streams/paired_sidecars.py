# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Sidecars of one dataset, read as one stream without the dataset itself."""

from collections.abc import Sequence
from typing import Any, Optional

from llm2clip.data.schema import SAMPLE_ID
from llm2clip.data.streams.paired_stream import PairedStream, recorded_dataset
from llm2clip.data.streams.verified_stream import VerifiedStream

__all__ = ['PairedSidecars']


class PairedSidecars(PairedStream):
    """Samples of one sidecar with their rows of others of the same dataset, of which neither images nor texts are read.

    Args:
        local: Folder or cache of the first sidecar.
        sidecars: Folders or caches of the others, and where they come from (or None).
        remote: Where the first comes from.
        embedding_columns: Columns that every sidecar must have.
        **kwargs: Passed to PairedStream.

    Raises:
        FileNotFoundError: A sidecar is missing.
        ValueError: A column is missing or of another type, or two sidecars belong to different datasets.
    """

    def __init__(
        self, local: str, sidecars: Sequence[tuple[str, Optional[str]]], remote: Optional[str] = None,
        embedding_columns: Sequence[str] = (), **kwargs: Any,
    ) -> None:
        super().__init__(local, sidecars, remote, embedding_columns=embedding_columns, **kwargs)
        self._columns = (SAMPLE_ID, *embedding_columns)

    def _check_dataset(self, sidecar: VerifiedStream, where: str) -> None:
        found, expected = recorded_dataset(sidecar), recorded_dataset(self)
        if found != expected:
            raise ValueError(f'{where} belongs to another dataset than the sidecar {self.local}: it was made for '
                             f'content {found}, that one for {expected}')
