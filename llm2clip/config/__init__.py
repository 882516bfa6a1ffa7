# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Dataclasses that define the keys of the YAML files, one per recipe.

Parts that are chosen by name (optimizers, schedulers, callbacks, loggers, algorithms, data sources) are
free-form mappings here; `llm2clip.registry` checks their names and arguments.  `llm2clip.config.loading`
reads the files and checks every value against the range in its type;
`llm2clip.help` prints the keys of a recipe.
"""

from llm2clip.config.data import (
    CaptionDataConfig,
    CaptionPairConfig,
    CaptionStreamConfig,
    DatasetConfig,
    ImageDataConfig,
    ImageStreamConfig,
    InheritanceDataConfig,
    LoaderConfig,
    PrepareConfig,
    StreamConfig,
    WriterConfig,
)
from llm2clip.config.evaluate import (
    CRAConfig,
    DemoConfig,
    EvaluateConfig,
    EvaluatedModelConfig,
    ImageFolderConfig,
    ReportConfig,
    RetrievalConfig,
    SearchConfig,
    SGDProbeConfig,
    ZeroshotConfig,
)
from llm2clip.config.export import ExportConfig, ExportTeacherConfig, ExportVisionConfig, ImportConfig
from llm2clip.config.models import (
    AdapterConfig,
    ClipTextConfig,
    LoraConfig,
    LossConfig,
    MNTPConfig,
    ModelConfig,
    PipelineConfig,
    PlanConfig,
    TextEncoderConfig,
    TextPlanConfig,
    TowerConfig,
    TrainableTextConfig,
    VisionConfig,
)
from llm2clip.config.recipe import RecipeConfig
from llm2clip.config.teacher import (
    ClipTextTeacherConfig,
    EmbedConfig,
    ExtractConfig,
    ExtractImagesConfig,
    LLMTeacherConfig,
    SentenceTransformersTeacherConfig,
)
from llm2clip.config.training import (
    FsdpConfig,
    InheritanceConfig,
    SelfDistillationConfig,
    Stage1Config,
    Stage2Config,
    TrainConfig,
)
