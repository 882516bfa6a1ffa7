# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""`evaluate`, `report` and `search`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional

from omegaconf import MISSING
from pydantic import Field

from llm2clip.config.ranges import (
    AccuracyMetric,
    Component,
    ConfigError,
    Count,
    DeviceName,
    Natural,
    Positive,
    RunWeights,
    Seed,
    Share,
    TeacherPrecision,
    Text,
    Texts,
)
from llm2clip.config.teacher import OneTeacher, Teachers


@dataclass
class EvaluatedModelConfig:
    """What is evaluated: one of `run`, `export` and `pretrained`."""

    run: Optional[Text] = None
    """Folder of a stage-2 run."""
    weights: RunWeights = 'latest'
    """Which weights of the run: `latest`, those of its newest checkpoint, or `best`, which `save_best` kept."""
    wise_ft_alpha: Share = 1.0
    """The share a in (1 - a) · initial + a · trained weights (WiSE-FT).  What began at random (projection, adapter) is
    taken as trained; a run with `initial_weights` is interpolated whole."""
    truncate_dim: Optional[Count] = None
    """How many dimensions of the features are used, the first ones (see `loss.matryoshka_dims`).  Unset: all."""
    text: Optional[Literal['llm', 'clip', 'both']] = None
    """Of a run with `trainable_text.method`, the text features: the LLM's, those of CLIP's text tower, or of method d,
    the projection of both.  Unset: `both` for d, otherwise `llm`."""
    export: Optional[Text] = None
    """Folder that `export_hf` or `import_official` wrote."""
    pretrained: Optional[Text] = None
    """Hub name or folder of a CLIP or SigLIP of transformers, with its own text tower: the baseline."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for forward passes in bfloat16, of images as well as of texts."""
    teacher: Teachers = None
    """The teacher that the model learned from, or a list of several in the order of `train_data.teachers`, as in stage
    2.  A run needs it if its configuration names none; that of an export lies in the folder."""
    batch_tokens: Count = 4096
    """Tokens per forward pass of the teacher."""
    trust_remote_code: bool = False
    """Run code that comes with the teacher of a run or an export. Leave off unless you have read that code."""


@dataclass
class RetrievalConfig:
    """One retrieval benchmark: images, and the captions that belong to them."""

    source: Component = MISSING
    """`name` of the benchmark (`llm2clip/evaluation/sets/`) and where its files are."""
    merge_equal_texts: bool = False
    """Count captions of the same wording as one text, that of every image it is written for."""


@dataclass
class ZeroshotConfig:
    """Classification by class names: an image belongs to the class whose prompts are nearest."""

    source: Component = MISSING
    """`name` of the set and where its files are."""
    templates: Optional[Text] = None
    """Text file with one prompt per line, `{}` or `{c}` for the class name; a class is the mean of its prompts.  Unset:
    the set's own prompts."""
    metric: AccuracyMetric = 'top1'
    """Which number stands for the set beside a baseline and in averages: `top1`, or `mean_per_class`, where classes of
    few images count as much as others.  Where images have any number of classes, it is mean average precision."""


@dataclass
class SGDProbeConfig:
    """Stochastic gradient descent without weight decay, as in the paper (section 4.2).  Features are scaled to mean 0
    and variance 1, and the learning rate falls to 0 along a cosine, of which the paper says nothing."""

    epochs: Count = 50
    """How often it sees each image."""
    batch_size: Count = 1024
    """Images per step."""
    learning_rate: Positive = 0.1
    """At the beginning."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the last step in the next one."""
    seed: Seed = 0
    """Of the order of the images."""


@dataclass
class LinearProbeConfig:
    """A linear classifier on the frozen tower's features."""

    train: Component = MISSING
    """Set to learn from."""
    test: Component = MISSING
    """Set whose images are classified."""
    sgd: Optional[SGDProbeConfig] = None
    """`{}` for the paper's optimizer, which large sets need.  Unset: scikit-learn's logistic regression, whose
    regularisation a fifth of `train` chooses."""
    metric: AccuracyMetric = 'top1'
    """Which number stands for the set beside a baseline and in averages: `top1` or `mean_per_class`."""


@dataclass
class CompositionConfig:
    """Texts of the same words, or nearly so: which of them belongs to an image?"""

    source: Component = MISSING
    """`name` of the set and where its files are."""
    metric: Optional[Text] = None
    """Which of its numbers stands for the set in averages, such as `group_score`; required there if it has several."""


@dataclass
class CRAConfig:
    """Caption retrieval accuracy of text encoders on held-out pairs."""

    captions: Text = MISSING
    """MDS folder with the pairs."""
    caption_keys: Annotated[Texts, Field(min_length=2, max_length=2)] = field(
        default_factory=lambda: ['short', 'long'])
    """The two captions of a sample that have to find each other."""
    teachers: dict[str, OneTeacher] = field(default_factory=dict)
    """Result name -> text encoder: the folder that stage 1 wrote, or a mapping with the `type` of another."""
    limit: Optional[Count] = None
    """Number of pairs, from the first on.  Unset: all."""
    name: Optional[Text] = None
    """Name of the pairs in tables; `coco` puts the paper's numbers beside those of COCO's 5,000 test images."""
    batch_tokens: Count = 4096
    """Tokens per forward pass; texts are packed without padding."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for a forward pass in bfloat16."""


@dataclass
class EvaluateConfig:
    """Numbers of trained models, side by side."""

    retrieval: dict[Text, RetrievalConfig] = field(default_factory=dict)
    """Name in the tables -> retrieval benchmark: images, and the captions that belong to them."""
    zeroshot: dict[Text, ZeroshotConfig] = field(default_factory=dict)
    """Name in the tables -> classification by class names."""
    linear_probe: dict[Text, LinearProbeConfig] = field(default_factory=dict)
    """Name in the tables -> linear classifier on the frozen tower's features."""
    composition: dict[Text, CompositionConfig] = field(default_factory=dict)
    """Name in the tables -> choice between texts that are much alike."""
    models: dict[Text, EvaluatedModelConfig] = field(default_factory=dict)
    """Name in the tables -> model."""
    out: Text = MISSING
    """Folder that receives `results.json`, `results.md` and `report.html`."""
    cache: Text = '${out}/text_embeddings'
    """Folder that keeps the teachers' vectors of captions for the next time, and for other models of that teacher."""
    cra: Optional[CRAConfig] = None
    """Caption retrieval accuracy of text encoders on held-out pairs."""
    baseline: Optional[Text] = None
    """The one of `models` to which the others are compared, with the 95 % interval of the difference."""
    averages: dict[Text, Texts] = field(default_factory=dict)
    """Name -> benchmarks of one kind, `zeroshot.food101` with the name that it has there: the mean of their numbers."""
    bootstrap: Natural = 1000
    """Number of resamples for the 95 % intervals; 0 for none."""
    gallery: Natural = 4
    """Queries that the report shows of each benchmark: this many of the best, the median and the worst; 0 for none."""
    title: str = 'LLM2CLIP'
    """Title of the report."""
    batch_size: Count = 64
    """Images per forward pass."""
    num_workers: Natural = 2
    """Processes per rank that read and decode images."""
    device: Optional[DeviceName] = None
    """`gpu` or `cpu`.  Unset: a GPU if there is one."""

    def check(self) -> None:
        """Raise a ConfigError if there is nothing to evaluate, or the baseline or an average is of something else."""
        benchmarks = self.retrieval or self.zeroshot or self.linear_probe or self.composition
        if self.models and not benchmarks:
            raise ConfigError('retrieval: expected a benchmark there, in zeroshot, in linear_probe or in composition '
                              'for the models')
        if not self.models and (benchmarks or self.cra is None):
            raise ConfigError('models: {}, expected at least one')
        known = [f'{kind}.{name}' for kind in ('retrieval', 'zeroshot', 'linear_probe', 'composition')
                 for name in getattr(self, kind)]
        if [*self.models] == [self.baseline]:
            raise ConfigError(f'baseline: {self.baseline!r} is the only one of models, expected another one beside it')
        if self.baseline is not None and self.baseline not in self.models:
            raise ConfigError(f'baseline: {self.baseline!r}, expected one of models: {", ".join(self.models)}')
        for name, benchmarks in self.averages.items():
            for benchmark in benchmarks:
                if benchmark not in known:
                    raise ConfigError(f'averages.{name}: {benchmark!r}, expected one of {", ".join(known)}')
            if len(kinds := {benchmark.partition('.')[0] for benchmark in benchmarks}) > 1:
                raise ConfigError(f'averages.{name}: benchmarks of {" and ".join(sorted(kinds))}, expected one kind')


@dataclass
class ReportConfig:
    """Everything a pipeline wrote -> one HTML file."""

    results: Text = MISSING
    """Folder that `evaluate` wrote."""
    out: Text = MISSING
    """Receives `report.html`."""
    steps: Annotated[dict[str, Text], Field(min_length=1)] = MISSING
    """Name of a step -> its folder, in the order of the pipeline."""
    galleries: list[Text] = field(default_factory=list)
    """Which retrieval benchmarks are shown in pictures."""
    title: str = 'LLM2CLIP'
    """Title of the report."""


@dataclass
class SearchConfig:
    """Images of a folder, found by a text or an image."""

    model: Text = MISSING
    """Folder that `export_hf` wrote."""
    trust_remote_code: bool = False
    """Run code that comes with a model in that folder. Leave off unless you have read that code."""
    images: Text = MISSING
    """Folder of images, with those in it."""
    index: Text = 'runs/search'
    """Folder for the features of the images, which are of one model and one folder of images."""
    query: Any = None
    """A text, the path of an image file, or a list of them.  Unset: images are only embedded."""
    top: Count = 10
    """Images per query."""
    batch_size: Count = 64
    """Images per forward pass."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for forward passes in bfloat16, of images as well as of texts."""
    truncate_dim: Optional[Count] = None
    """How many dimensions of the features are used, the first ones (see `loss.matryoshka_dims`).  Unset: all."""
    num_workers: Natural = 2
    """Processes that read and decode images."""
    device: Optional[DeviceName] = None
    """`gpu` or `cpu`.  Unset: a GPU if there is one."""
