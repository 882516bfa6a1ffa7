# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Configuration of `evaluate`, `report`, `search` and `demo`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Optional

from omegaconf import MISSING
from pydantic import Field

from llm2clip.config.ranges import (
    AccuracyMetric,
    Component,
    Count,
    DeviceName,
    Natural,
    Port,
    Positive,
    RunWeights,
    Seed,
    Share,
    TeacherPrecision,
    Text,
    Texts,
)
from llm2clip.config.recipe import Output, RecipeConfig
from llm2clip.config.teacher import Teacher, Teachers
from llm2clip.errors import ConfigError, refuse, under


@dataclass
class EvaluatedModelConfig:
    """Model to evaluate: exactly one of `run`, `export` and `pretrained`."""

    run: Optional[Text] = None
    """Folder of a stage-2 run."""
    weights: RunWeights = 'latest'
    """Weights of the run: those of its `latest` checkpoint, or the `best` ones, which `save_best` kept."""
    wise_ft_alpha: Share = 1.0
    """Factor a in (1 - a) · initial + a · trained weights (WiSE-FT).  Modules that started from random
    weights (projection, adapter) keep their trained weights.
    A run with `initial_weights` is interpolated as a whole."""
    truncate_dim: Optional[Count] = None
    """Number of feature dimensions to use, from the first on (see `loss.matryoshka_dims`).  Unset: all."""
    export: Optional[Text] = None
    """Folder written by `export_hf` or `import_official`."""
    pretrained: Optional[Text] = None
    """Hub name or folder of a CLIP or SigLIP model of transformers, with its own text tower,
    as a baseline."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` to compute image and text features in bfloat16."""
    teacher: Teachers = None
    """Teacher that the model was trained with, or a list of several in the order of `train_data.teachers`.
    Needed if the configuration of the run names none.  An export contains its teacher."""
    batch_tokens: Count = 4096
    """Tokens per forward pass of the teacher."""
    trust_remote_code: bool = False
    """Run code that comes with the teacher of a run or an export.
    Leave off unless you have read that code."""

    def check(self) -> None:
        """Raise a ConfigError if no model or several are named, or a setting does not apply to the model."""
        refuse([
            ('', [self.run, self.export, self.pretrained].count(None) != 2,
             'expected exactly one of run, export and pretrained'),
            ('wise_ft_alpha', self.wise_ft_alpha != 1 and self.run is None,
             f'{self.wise_ft_alpha:g}, expected 1 or a run, which knows what it began with'),
            ('truncate_dim', self.truncate_dim is not None and self.pretrained is not None,
             f'{self.truncate_dim}, expected none for a model of transformers'),
        ])


@dataclass
class RetrievalConfig:
    """Retrieval benchmark: images and their captions."""

    local: Text = MISSING
    """Folder of an image dataset that `prepare_data` wrote."""
    caption_keys: Optional[Texts] = None
    """Keys of the captions to use as texts, such as `short`, or patterns such as `de_*`.  Unset: all.  Images
    with none of these captions are left out and counted."""
    merge_equal_texts: bool = False
    """Count captions with the same wording as one text that belongs to all of their images."""


@dataclass
class ZeroshotConfig:
    """Classification by class names: an image gets the class with the most similar prompts."""

    source: Component = MISSING
    """`name` of the set, and arguments such as the location of its files."""
    templates: Optional[Text] = None
    """Text file with one prompt per line, with `{}` or `{c}` for the class name.  The features of a class are
    the mean over its prompts.  Unset: the set's own prompts."""
    metric: AccuracyMetric = 'top1'
    """Metric for averages and comparisons with a baseline: `top1`, or `mean_per_class`, which gives every
    class the same weight.  Sets with several classes per image use mean average precision instead."""


@dataclass
class SGDProbeConfig:
    """SGD without weight decay, as in the paper (section 4.2).  Features are scaled to mean 0 and variance 1,
    and the learning rate follows a cosine to 0; the paper specifies neither."""

    epochs: Count = 50
    """Passes over the training images."""
    batch_size: Count = 1024
    """Images per step."""
    learning_rate: Positive = 0.1
    """Initial learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    seed: Seed = 0
    """Seed of the order of the images."""


@dataclass
class LinearProbeConfig:
    """Linear classifier on the features of the frozen vision tower."""

    train: Component = MISSING
    """Training set: `name` and arguments."""
    test: Component = MISSING
    """Test set: `name` and arguments."""
    sgd: Optional[SGDProbeConfig] = None
    """`{}` uses the paper's optimizer, which large sets need.  Unset: scikit-learn's logistic regression,
    with a regularisation strength selected on a fifth of `train`."""
    metric: AccuracyMetric = 'top1'
    """Metric for averages and comparisons with a baseline: `top1` or `mean_per_class`."""


@dataclass
class CRAConfig:
    """Caption retrieval accuracy of text encoders on pairs of captions."""

    captions: Text = MISSING
    """Folder of the MDS dataset with the captions."""
    caption_keys: Annotated[Texts, Field(min_length=2, max_length=2)] = field(
        default_factory=lambda: ['short', 'long'])
    """Keys of two captions per sample, each of which has to find the other."""
    teachers: dict[str, Teacher] = field(default_factory=dict)
    """Name in the results -> text encoder: a folder written by stage 1,
    or a mapping with the `type` of another one."""
    limit: Optional[Count] = None
    """Number of samples, from the first on.  Unset: all."""
    name: Optional[Text] = None
    """Name of the dataset in tables.  `coco` adds the paper's numbers for COCO's 5,000 test images."""
    batch_tokens: Count = 4096
    """Tokens per forward pass; texts are packed without padding."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for a forward pass in bfloat16."""


@dataclass
class EvaluateConfig(RecipeConfig):
    """Metrics of trained models, side by side."""

    uses_ranks = True
    resumes = True
    repeats = True

    retrieval: dict[Text, RetrievalConfig] = field(default_factory=dict)
    """Name in the tables -> retrieval benchmark: images and their captions.  The names `flickr30k`, `coco`,
    `sharegpt4v`, `urban1k`, `docci`, `flickr_cn`, `coco_cn` and `xm3600_<language>` add the numbers of
    papers."""
    zeroshot: dict[Text, ZeroshotConfig] = field(default_factory=dict)
    """Name in the tables -> classification by class names."""
    linear_probe: dict[Text, LinearProbeConfig] = field(default_factory=dict)
    """Name in the tables -> linear classifier on the features of the frozen vision tower."""
    models: dict[Text, EvaluatedModelConfig] = field(default_factory=dict)
    """Name in the tables -> model."""
    out: Text = MISSING
    """Folder that receives `results.json`, `results.md` and `report.html`."""
    cache: Text = '${out}/text_embeddings'
    """Folder that caches text embeddings for later evaluations and for other models with the same teacher."""
    cra: Optional[CRAConfig] = None
    """Caption retrieval accuracy of text encoders on pairs of captions."""
    baseline: Optional[Text] = None
    """Name in `models` to compare the other models with; differences get 95 % intervals."""
    averages: dict[Text, Texts] = field(default_factory=dict)
    """Name -> benchmarks of one kind to average, each as `kind.name`, such as `zeroshot.food101`."""
    bootstrap: Natural = 1000
    """Number of bootstrap resamples for the 95 % intervals; 0 disables them."""
    gallery: Natural = 4
    """Number of best, of median and of worst queries that the report shows per benchmark; 0 shows none."""
    title: str = 'LLM2CLIP'
    """Title of the report."""
    batch_size: Count = 64
    """Images per forward pass."""
    num_workers: Natural = 2
    """Processes per rank that read and decode images."""
    device: Optional[DeviceName] = None
    """`gpu` or `cpu`.  Unset: a GPU if there is one."""

    def check(self) -> None:
        """Raise a ConfigError if there is nothing to evaluate, or `baseline` or `averages` names nothing."""
        kinds = {'retrieval': self.retrieval, 'zeroshot': self.zeroshot, 'linear_probe': self.linear_probe}
        has_benchmarks = any(kinds.values())
        refuse([
            ('retrieval', self.models and not has_benchmarks,
             'expected a benchmark there, in zeroshot or in linear_probe for the models'),
            ('models', not self.models and (has_benchmarks or self.cra is None), '{}, expected at least one'),
            ('baseline', self.baseline not in (None, *self.models),
             f'{self.baseline!r}, expected one of models: {", ".join(self.models)}'),
        ])
        for name, model in self.models.items():
            with under(f'models.{name}'):
                model.check()
        for name, benchmarks in self.averages.items():
            kind = benchmarks[0].partition('.')[0]
            known = [f'{kind}.{benchmark}' for benchmark in kinds.get(kind, {})]
            if not {*benchmarks} <= {*known}:
                expected = ', '.join(known) or 'kind.name, such as zeroshot.food101'
                raise ConfigError(f'{benchmarks}, expected benchmarks of one kind: {expected}',
                                  key=f'averages.{name}')


@dataclass
class ReportConfig(RecipeConfig):
    """Results of all steps -> one HTML file."""

    records_duration = False

    results: Text = MISSING
    """Folder written by `evaluate`."""
    out: Text = MISSING
    """Folder that receives `report.html`."""
    steps: Annotated[dict[str, Text], Field(min_length=1)] = MISSING
    """Name of a step -> its output folder, in the order of the pipeline."""
    galleries: list[Text] = field(default_factory=list)
    """Retrieval benchmarks to show with images."""
    title: str = 'LLM2CLIP'
    """Title of the report."""

    def outputs(self) -> list[Output]:
        return [Output(self.out, names=['report.html', 'results.json'])]


@dataclass
class ImageFolderConfig(RecipeConfig):
    """Exported model, and the folder of images that it searches."""

    output_key = 'index'
    records_duration = False
    resumes = True

    model: Text = MISSING
    """Folder written by `export_hf`."""
    trust_remote_code: bool = False
    """Run code that comes with a model in that folder. Leave off unless you have read that code."""
    images: Text = MISSING
    """Folder of images, including its subfolders."""
    index: Text = 'runs/search'
    """Folder that caches the image features of one model and one image folder."""
    top: Count = 10
    """Images per query."""
    batch_size: Count = 64
    """Images per forward pass."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` to compute image and text features in bfloat16."""
    truncate_dim: Optional[Count] = None
    """Number of feature dimensions to use, from the first on (see `loss.matryoshka_dims`).  Unset: all."""
    num_workers: Natural = 2
    """Processes that read and decode images."""
    device: Optional[DeviceName] = None
    """`gpu` or `cpu`.  Unset: a GPU if there is one."""

    def outputs(self) -> list[Output]:
        return [Output(self.index, recipe='search')]  # `demo` uses the same index


@dataclass
class SearchConfig(ImageFolderConfig):
    """Search for images in a folder by a text or an image."""

    query: Any = None
    """A text, the path of an image file, or a list of them.  Unset: only compute the image features."""


@dataclass
class DemoConfig(ImageFolderConfig):
    """Page that searches a folder of images and classifies images."""

    captions: Optional[Text] = None
    """Caption file of the images, as of the source `image_folder`, to show an image's first caption."""
    image_column: Text = 'image'
    """Column of that file with the image's path inside `images`."""
    caption_column: Text = 'caption'
    """Column of that file with the text."""
    host: Text = '127.0.0.1'
    """Address to serve the page on.  `0.0.0.0` lets everybody search who reaches this machine: there is no
    login."""
    port: Port = 7860
    """Port to serve the page on."""
