# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""`prepare_data`."""

from dataclasses import dataclass, field
from typing import Annotated, Optional

from omegaconf import MISSING
from pydantic import Field

from llm2clip.config.ranges import Component, ConfigError, Count, EngineName, Natural, Remote, Share, Size, Text


@dataclass
class WriterConfig:
    """How datasets are written."""

    size_limit: Size = '64mb'
    """Largest size of a shard, as Streaming writes sizes (`64mb`)."""
    max_dropped: Share = 0.02
    """Largest share of the input, from 0 to 1, that may be unusable before the conversion fails.  What these settings
    and the source's filters leave out does not count."""
    require_any_caption: list[Text] = field(default_factory=list)
    """Leave out samples that have no caption of any of these keys, such as those of the training's
    `caption_weights`."""
    exclude_ids: Optional[Text] = None
    """JSON file with a list of ids of samples that are left out, such as near-copies that another tool found."""
    image_max_side: Optional[Count] = None
    """Longest side in pixels: larger images are made smaller and saved as JPEG.  Unset: every image keeps its bytes."""
    image_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of those JPEGs, from 1 to 100."""
    num_workers: Count = 1
    """Processes, each on a part (an input file) of its own; those of `engine: local`."""
    shard_index: Natural = 0
    """Which of `num_shards` this is, from 0."""
    num_shards: Count = 1
    """Machines that share the parts and the `out` folder, or its remote."""
    keep_local: bool = True
    """With a remote, keep shards here too after they were uploaded."""


@dataclass
class PrepareConfig(WriterConfig):
    """Raw files -> MDS datasets."""

    out: Text = MISSING
    """Folder that receives one MDS dataset per split."""
    out_remote: Optional[Remote] = None
    """Place to which the datasets are uploaded as well (`s3://…`, `gs://…`, …); machines that do not share `out` need
    it."""
    source: Component = MISSING
    """`name` of the source and its arguments."""
    extend: bool = False
    """Add input files to a dataset that is there: more files that `source.files` matches, or more entries of it.  What
    is there stays as it is, and the shards of the new files come after it."""
    engine: EngineName = 'local'
    """`local`: the parts are written by the processes of this machine. `ray`: by a Ray cluster, a part per CPU."""

    def check(self) -> None:
        """Raise a ConfigError if there is no such machine, if the source has no files that could become more, or if
        Ray, which has all machines, is told of several."""
        if self.extend and 'files' not in self.source:
            raise ConfigError(f'extend: the source {self.source.get("name")} has no `files`, expected one that has: a '
                              'dataset grows by input files')
        if self.shard_index >= self.num_shards:
            raise ConfigError(f'shard_index: {self.shard_index}, expected one of {self.num_shards} machines, counted '
                              'from 0')
        if self.engine == 'ray' and self.num_shards > 1:
            raise ConfigError(f'num_shards: {self.num_shards}, expected 1 with engine=ray, which gives the parts to '
                              'the machines of the cluster')
