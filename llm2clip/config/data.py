# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Datasets, and what the loaders of both stages draw from them."""

from dataclasses import dataclass, field
from typing import Annotated, Optional

from omegaconf import MISSING
from pydantic import Field

from llm2clip.config.ranges import (
    Count,
    CropScale,
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
    """Caption keys, of which one is drawn that the sample has and that is not the query's.  `null`: the query's own
    text, of which dropout makes two vectors (unsupervised SimCSE, Gao et al. 2021)."""
    negative: Optional[Text] = None
    """Caption key of a text that is wrong for this query (a hard negative); single samples may leave it empty."""
    random_negative: bool = False
    """Take for hard negative, in place of `negative`, what another sample has under the positive's key; it is drawn
    from the same shard each time the query is seen."""
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
    """Samples per epoch.  Unset: those of all streams.  Bounds what drawing the order of an epoch takes, 48 bytes per
    sample in one process per node."""
    num_canonical_nodes: Count = 64
    """Fixes the sample order for any number of nodes; a multiple or a divisor of the number of nodes."""
    download_retry: Count = 5
    """How often a file is downloaded, with pauses of 1, 2, 4, … seconds, before the run stops."""
    download_timeout: Positive = 120.0
    """Seconds that one download may take."""
    cache_limit: Optional[Size] = None
    """Largest size of the caches per node (`200gb`), which may grow by one shard for each worker besides;
    shards that were there before count, and may be removed as well.  Unset: nothing is removed."""


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
    """For `objective: mntp`: caption key -> weight.  Of those that a sample has, one is drawn each time it is seen,
    never one of weight 0."""


@dataclass
class ImageDataConfig(LoaderConfig):
    """Images for stage 2, each with the embedding of one of its captions."""

    streams: Annotated[dict[Text, ImageStreamConfig], Field(min_length=1)] = field(default_factory=dict)
    """Name -> dataset of images, with the embeddings datasets that hold its captions' embeddings."""
    teachers: list[Text] = field(default_factory=list)
    """Names of the teachers whose embeddings are read.  Those of several are scaled to length 1 and concatenated.
    Unset: the only one that the streams have."""
    caption_weights: Mix = field(default_factory=dict)
    """Caption key -> weight.  Of those that a sample has, one is drawn each time it is seen (paper, section 4.2), never
    one of weight 0.  Unset: all captions alike, which needs the dataset's index in `local`."""
    captions_per_image: Count = 1
    """In training, so many different captions of an image in one batch: it has to find each of them, and each of them
    the image.  An image that has fewer repeats them."""
    image_size: Optional[Count] = None
    """Side of the training images in pixels.  Unset: `model.vision.image_size`, at which evaluation and the exported
    model see images in any case.  For a convolutional network, smaller is faster and often better: random crops enlarge
    what they show (Touvron et al. 2019, arXiv 1906.06423)."""
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
    """Two vectors of each caption: the teacher's, and that of CLIP's own text tower.  Both lie in embeddings datasets;
    the images and texts themselves are not read."""

    streams: Annotated[dict[Text, ImageStreamConfig], Field(min_length=1)] = field(default_factory=dict)
    """Name -> dataset as stage 2 has it, of which the embeddings datasets in `embeddings` are read and nothing else."""
    target: Text = 'clip_text'
    """Name, in `embeddings`, of the embeddings dataset of CLIP's text tower."""
    teachers: list[Text] = field(default_factory=list)
    """Names of the teachers, as stage 2 has them.  Unset: the only one beside `target` that the streams have."""
    caption_weights: Mix = field(default_factory=dict)
    """Caption key -> weight.  Of those that a sample has and that CLIP can read to the end, one is drawn each time the
    sample is seen; a sample without one does not count.  Unset: all captions alike, which needs the embeddings datasets
    in `local`."""
