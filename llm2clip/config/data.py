# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Datasets: how they are written, and what the loaders of both stages draw from them."""

from dataclasses import dataclass, field
from typing import Annotated, Optional

from omegaconf import MISSING
from pydantic import Field

from llm2clip.config.ranges import (
    Component,
    ConfigError,
    Count,
    CropScale,
    EngineName,
    Mix,
    Natural,
    Positive,
    Remote,
    SampleCount,
    Seed,
    Share,
    Size,
    Text,
    Texts,
)


@dataclass
class DatasetConfig:
    """Where an MDS dataset is."""

    local: Text = MISSING
    """Folder of the dataset, or the cache when `remote` is set."""
    remote: Optional[Remote] = None
    """Any place Streaming reads from (`s3://…`, `gs://…`, `sftp://…`, a path), other than `local`."""


@dataclass
class StreamConfig(DatasetConfig):
    """A dataset among those that a training draws from."""

    proportion: Optional[Positive] = None
    """Share of the epoch drawn from this stream; for all streams or for none."""
    repeat: Optional[Positive] = None
    """How often an epoch repeats this stream."""


@dataclass
class CaptionPairConfig:
    """Two texts of one sample that belong together, and the direction between them."""

    query: Texts = MISSING
    """Caption keys, of which one is drawn that the sample has."""
    positive: Optional[Texts] = MISSING
    """Caption keys, of which one is drawn, never the query's.  `null`: the query's own text, of which dropout makes
    two vectors (unsupervised SimCSE, Gao et al. 2021)."""
    negative: Optional[Text] = None
    """Caption key of a text that is wrong for this query (a hard negative); single samples may leave it empty."""
    random_negative: bool = False
    """In place of `negative`, a text of another sample of the shard under the positive's key, drawn each time."""
    instruction: Optional[str] = None
    """Put before the query of this direction, in place of `text_encoder.instruction`; never pooled."""
    weight: Positive = 1.0
    """How often this direction is drawn, relative to the others of its list."""

    @property
    def keys(self) -> list[str]:
        """Of the captions that are drawn, each once."""
        return list(dict.fromkeys([*self.query, *(self.positive or [])]))

    @property
    def has_negative(self) -> bool:
        return self.negative is not None or self.random_negative


@dataclass
class CaptionStreamConfig(StreamConfig):
    """A dataset of captions, texts or images with captions."""

    pairs: Optional[Annotated[list[CaptionPairConfig], Field(min_length=1)]] = None
    """In place of `train_data.pairs`."""
    texts: Optional[Mix] = None
    """In place of `train_data.texts`."""


@dataclass
class ImageStreamConfig(StreamConfig):
    """A dataset of images, with the embeddings datasets that hold its captions' embeddings."""

    embeddings: dict[Text, DatasetConfig] = field(default_factory=dict)
    """Teacher's name -> embeddings dataset."""
    caption_weights: Optional[Mix] = None
    """In place of that of `train_data`."""


@dataclass
class LoaderConfig:
    """What the loaders of both stages share."""

    num_workers: Natural = 2
    """Processes per rank that read and decode samples, each two batches ahead in shared memory."""
    shuffle: bool = True
    """Draw the samples of an epoch in random order; evaluation never does."""
    shuffle_seed: Seed = 9176
    """Seed of that order."""
    epoch_size: Optional[SampleCount] = None
    """Samples per epoch, for whose order a node takes 48 bytes each.  Unset: those of all streams."""
    num_canonical_nodes: Count = 64
    """Fixes the sample order for any number of nodes; a multiple or a divisor of the number of nodes."""
    download_retry: Count = 5
    """How often a file is downloaded, with pauses of 1, 2, 4, … seconds, before the run stops."""
    download_timeout: Positive = 120.0
    """Seconds that one download may take."""
    cache_limit: Optional[Size] = None
    """Largest size of the caches per node (`200gb`), beyond which shards are removed, also those that were there
    before; one shard per worker may come on top.  Unset: nothing is removed."""


@dataclass
class CaptionDataConfig(LoaderConfig):
    """Captions for stage 1.  Each global batch comes from one stream: mixing would make negatives trivial."""

    streams: Annotated[dict[Text, CaptionStreamConfig], Field(min_length=1)] = field(default_factory=dict)
    """Name -> dataset of captions, texts or images with captions."""
    pairs: list[CaptionPairConfig] = field(default_factory=list)
    """For `objective: contrastive`: pairs of caption keys, of which one is drawn each time a sample is seen.  Unset:
    any two captions of a sample, which needs the dataset's index in `local`.  `eval_data` takes one pair, with one key
    per side; unset, the first two captions of the dataset."""
    texts: Mix = field(default_factory=dict)
    """For `objective: mntp`: caption key -> weight, by which one text is drawn each time a sample is seen."""


@dataclass
class ImageDataConfig(LoaderConfig):
    """Images for stage 2, each with the embedding of one of its captions."""

    streams: Annotated[dict[Text, ImageStreamConfig], Field(min_length=1)] = field(default_factory=dict)
    """Name -> dataset of images, with the embeddings datasets that hold its captions' embeddings."""
    teachers: list[Text] = field(default_factory=list)
    """Names of the teachers whose embeddings are read.  Those of several are scaled to length 1 and concatenated.
    Unset: the only one that the streams have."""
    caption_weights: Mix = field(default_factory=dict)
    """Caption key -> weight, by which one caption is drawn each time a sample is seen (paper, section 4.2).  Unset: all
    captions alike, which needs the dataset's index in `local`."""
    captions_per_image: Count = 1
    """Different captions of an image in one batch of the training, which it has to find, and they the image.  An image
    that has fewer repeats them."""
    image_size: Optional[Count] = None
    """Side of the training images in pixels.  Unset: `model.vision.image_size`, at which evaluation sees images in any
    case.  Smaller is faster, and often better for a convolutional network (Touvron et al. 2019, arXiv 1906.06423)."""
    crop_scale: CropScale = field(default_factory=lambda: [0.9, 1.0])
    """Smallest and largest share of the area that a training crop keeps."""
    color_jitter: Annotated[float, Field(ge=0, le=2.5)] = 0.0
    """Strength of random brightness, contrast, saturation and (a fifth of it) hue."""
    grayscale: Share = 0.0
    """Probability of a grey training image."""
    horizontal_flip: Share = 0.0
    """Probability of a mirrored training image."""


@dataclass
class InheritanceDataConfig(LoaderConfig):
    """Two vectors of each caption, the teacher's and that of CLIP's own text tower, of two embeddings datasets."""

    streams: Annotated[dict[Text, ImageStreamConfig], Field(min_length=1)] = field(default_factory=dict)
    """Name -> dataset as stage 2 has it, of which the embeddings datasets in `embeddings` are read and nothing else."""
    target: Text = 'clip_text'
    """Name, in `embeddings`, of the embeddings dataset of CLIP's text tower."""
    teachers: list[Text] = field(default_factory=list)
    """Names of the teachers, as stage 2 has them.  Unset: the only one beside `target` that the streams have."""
    caption_weights: Mix = field(default_factory=dict)
    """Caption key -> weight, by which one of the captions that CLIP can read to the end is drawn each time; a sample
    without one does not count.  Unset: all alike, which needs the embeddings datasets in `local`."""


@dataclass
class WriterConfig:
    """How datasets are written."""

    size_limit: Size = '64mb'
    """Largest size of a shard, as Streaming writes sizes (`64mb`)."""
    max_dropped: Share = 0.02
    """Largest share of the input that may be unusable before the conversion fails.  What these settings and the
    source's filters leave out does not count."""
    require_any_caption: list[Text] = field(default_factory=list)
    """Leave out samples that have no caption of any of these keys."""
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
    """Place to which they are uploaded as well (`s3://…`, …); machines that do not share `out` need it."""
    source: Component = MISSING
    """`name` of the source and its arguments."""
    extend: bool = False
    """Add input files, more that `source.files` matches or names, to a dataset that is there, behind its shards."""
    engine: EngineName = 'local'
    """`local`: the parts are written by the processes of this machine. `ray`: by a Ray cluster, a part per CPU."""

    def check(self) -> None:
        """Raise a ConfigError if `extend`, `shard_index` or `num_shards` does not fit the rest."""
        if self.extend and 'files' not in self.source:
            raise ConfigError(f'extend: the source {self.source.get("name")} has no `files`, expected one that has: a '
                              'dataset grows by input files')
        if self.shard_index >= self.num_shards:
            raise ConfigError(f'shard_index: {self.shard_index}, expected one of {self.num_shards} machines, counted '
                              'from 0')
        if self.engine == 'ray' and self.num_shards > 1:
            raise ConfigError(f'num_shards: {self.num_shards}, expected 1 with engine=ray, which gives the parts to '
                              'the machines of the cluster')
