# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Configuration of datasets: how they are written, and how the data loaders of all trainings read them."""

from dataclasses import dataclass, field
from typing import Annotated, Optional

from omegaconf import MISSING
from pydantic import Field

from llm2clip.config.ranges import (
    Component,
    Count,
    CropScale,
    Mix,
    Natural,
    OutRemote,
    Positive,
    Remote,
    SampleCount,
    Seed,
    Share,
    Size,
    SmallCount,
    Text,
    Texts,
)
from llm2clip.config.recipe import Output, RecipeConfig
from llm2clip.errors import ConfigError


@dataclass
class DatasetConfig:
    """Location of an MDS dataset."""

    local: Text = MISSING
    """Folder of the dataset; with `remote`, its local cache."""
    remote: Optional[Remote] = None
    """Place that Streaming reads from (`s3://…`, `gs://…`, `sftp://…`, a path), other than `local`."""


@dataclass
class StreamConfig(DatasetConfig):
    """One of the datasets that a training mixes."""

    proportion: Optional[Positive] = None
    """Share of the epoch drawn from this dataset, relative to the others.
    Set it for all datasets or for none."""
    repeat: Optional[Annotated[float, Field(gt=0, le=10_000)]] = None
    """Number of times that an epoch repeats this dataset,
    with the same caption and crop of a sample each time."""


@dataclass
class CaptionPairConfig:
    """Two kinds of captions of a sample that form positive pairs, and the direction between them."""

    query: Texts = MISSING
    """Caption keys of the query.  One that the sample has is drawn."""
    positive: Optional[Texts] = MISSING
    """Caption keys of the positive.  One other than the query's is drawn.  `null`: the query's own text,
    which dropout maps to a second vector (unsupervised SimCSE, Gao et al. 2021)."""
    negative: Optional[Text] = None
    """Caption key of a hard negative, a text that is wrong for the query.  Samples may lack it."""
    random_negative: bool = False
    """Instead of `negative`, draw a text of another sample of the shard under the key of the positive."""
    instruction: Optional[str] = None
    """Text before the query of this pair, instead of `text_encoder.instruction`; not pooled."""
    weight: Positive = 1.0
    """Sampling weight of this pair among the pairs of its list."""

    @property
    def keys(self) -> list[str]:
        """Caption keys of query and positive, without duplicates."""
        return list(dict.fromkeys([*self.query, *(self.positive or [])]))

    @property
    def has_negative(self) -> bool:
        return self.negative is not None or self.random_negative


@dataclass
class CaptionStreamConfig(StreamConfig):
    """Dataset of captions, texts or images with captions."""

    pairs: Optional[Annotated[list[CaptionPairConfig], Field(min_length=1)]] = None
    """Override `pairs` of `train_data` or `eval_data` for this dataset."""
    texts: Optional[Mix] = None
    """Override `train_data.texts` for this dataset."""


@dataclass
class ImageStreamConfig(StreamConfig):
    """Dataset of images, with the embeddings datasets of its captions."""

    embeddings: dict[Text, DatasetConfig] = field(default_factory=dict)
    """Name of a teacher -> embeddings dataset with its vectors."""
    image_embeddings: Optional[DatasetConfig] = None
    """Embeddings dataset of the images, read in place of them.  `extract_image_embeddings` writes it by the
    tower that `model.vision` names, which then has to be frozen.  Set it for all datasets or for none."""
    caption_weights: Optional[Mix] = None
    """Override `caption_weights` of `train_data` or `eval_data` for this dataset."""


@dataclass
class LoaderConfig:
    """Settings of every data loader."""

    num_workers: Natural = 2
    """Processes per rank that read and decode samples.  Each keeps two batches ready in shared memory."""
    shuffle: bool = True
    """Shuffle the samples of an epoch.  Evaluation never shuffles."""
    shuffle_seed: Seed = 9176
    """Seed of the shuffle."""
    epoch_size: Optional[SampleCount] = None
    """Samples per epoch.  Their order takes 33 bytes per sample on each node.
    Unset: the samples of all datasets."""
    num_canonical_nodes: SmallCount = 64
    """Keeps the sample order the same for any number of nodes that divides it or is a multiple of it."""
    download_retry: SmallCount = 5
    """Maximum attempts to download a file, with pauses of 1, 2, 4, … seconds, before the run stops."""
    download_timeout: Positive = 120.0
    """Timeout of one download in seconds."""
    cache_limit: Optional[Size] = None
    """Maximum size of the caches per node, such as `200gb`, plus one shard per worker.  Beyond it, shards are
    deleted, including those from before the run.  Unset: nothing is deleted."""


@dataclass
class CaptionDataConfig(LoaderConfig):
    """Captions for stage 1.  Each global batch comes from one dataset,
    because mixing would make negatives trivial."""

    streams: Annotated[dict[Text, CaptionStreamConfig], Field(min_length=1)] = field(default_factory=dict)
    """Name -> dataset of captions, texts or images with captions."""
    pairs: list[CaptionPairConfig] = field(default_factory=list)
    """For `objective: contrastive`: pairs of caption keys.  One pair is drawn each time a sample is seen.
    Unset: any two captions of a sample; this requires datasets without `remote`.  `eval_data` takes a single
    pair with one key per side; unset, the first two captions of the dataset."""
    texts: Mix = field(default_factory=dict)
    """For `objective: mntp`: caption key -> sampling weight.
    One text is drawn each time a sample is seen."""


@dataclass
class ImageDataConfig(LoaderConfig):
    """Images for stage 2, each with embeddings of its captions."""

    streams: Annotated[dict[Text, ImageStreamConfig], Field(min_length=1)] = field(default_factory=dict)
    """Name -> dataset of images, with the embeddings datasets of its captions."""
    teachers: list[Text] = field(default_factory=list)
    """Names in `embeddings`.  The vectors of several are scaled to length 1 and concatenated.
    Unset: the only one."""
    caption_weights: Mix = field(default_factory=dict)
    """Caption key -> sampling weight.  One caption is drawn each time a sample is seen (paper, section 4.2).
    Unset: all captions with equal weight, which requires datasets without `remote`."""
    captions_per_image: SmallCount = 1
    """Captions per image in a training batch.  The image has to match each of them, and each of them the
    image.  An image with fewer captions repeats them."""
    image_size: Optional[SmallCount] = None
    """Side of the training images in pixels.  Unset: `model.vision.image_size`, which evaluation always uses.
    A smaller size is faster, and often better for convolutional networks
    (Touvron et al. 2019, arXiv 1906.06423)."""
    crop_scale: CropScale = field(default_factory=lambda: [0.9, 1.0])
    """Minimum and maximum share of the image area in a random training crop."""
    color_jitter: Annotated[float, Field(ge=0, le=2.5)] = 0.0
    """Strength of random changes of brightness, contrast and saturation; hue gets a fifth of it."""
    grayscale: Share = 0.0
    """Probability of converting a training image to grayscale."""
    horizontal_flip: Share = 0.0
    """Probability of mirroring a training image."""


@dataclass
class InheritanceDataConfig(LoaderConfig):
    """Captions, each with the vectors of the teacher and of CLIP's own text tower
    from two embeddings datasets."""

    streams: Annotated[dict[Text, ImageStreamConfig], Field(min_length=1)] = field(default_factory=dict)
    """Name -> dataset as in stage 2, of which only `embeddings` is read."""
    target: Text = 'clip_text'
    """Name, in `embeddings`, of the embeddings dataset of CLIP's text tower."""
    teachers: list[Text] = field(default_factory=list)
    """Names of the teachers to use, as in stage 2.  Unset: the only one besides `target`."""
    caption_weights: Mix = field(default_factory=dict)
    """Caption key -> sampling weight.  Each time, one caption within CLIP's maximum length is drawn;
    samples without one do not count.
    Unset: all with equal weight, which requires embeddings datasets without `remote`."""


@dataclass
class WriterConfig:
    """Settings for writing datasets."""

    size_limit: Size = '64mb'
    """Maximum size of a shard in Streaming's notation, such as `64mb`."""
    max_dropped: Share = 0.02
    """Maximum share of unusable samples before the conversion fails.  Samples that these settings or filters
    of the source leave out do not count."""
    require_any_caption: list[Text] = field(default_factory=list)
    """Leave out samples that have none of these captions."""
    exclude_ids: Optional[Text] = None
    """JSON file with a list of sample ids to leave out, such as near-duplicates that another tool found."""
    image_max_side: Optional[SmallCount] = None
    """Maximum image side in pixels; larger images are downscaled and saved as JPEG.
    Unset: files stay unchanged."""
    image_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """JPEG quality of downscaled images, from 1 to 100."""
    num_workers: SmallCount = 1
    """Processes of this machine.  Each converts one part (usually an input file) at a time."""
    shard_index: Natural = 0
    """Index of this machine among `num_shards`, from 0."""
    num_shards: Count = 1
    """Number of machines that share the conversion, and the `out` folder or its remote."""
    keep_local: bool = True
    """With a remote, keep local copies of the uploaded shards."""


@dataclass
class PrepareConfig(WriterConfig, RecipeConfig):
    """Raw files -> MDS datasets."""

    resumes = True

    out: Text = MISSING
    """Folder that receives one MDS dataset per split."""
    out_remote: Optional[OutRemote] = None
    """Remote folder for uploads (`s3://…`, …).  Machines that do not share `out` need it."""
    source: Component = MISSING
    """`name` of the source and its arguments."""

    def outputs(self) -> list[Output]:
        return [Output(self.out, part=self.shard_index if self.num_shards > 1 else None)]

    def check(self) -> None:
        """Raise a ConfigError if `shard_index` is not below `num_shards`."""
        if self.shard_index >= self.num_shards:
            raise ConfigError(f'{self.shard_index}, expected one of {self.num_shards} machines, counted from '
                              '0', key='shard_index')
