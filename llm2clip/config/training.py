# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""`train_stage1` and `train_stage2`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, Optional, Union

from omegaconf import MISSING
from pydantic import Field

from llm2clip.config.data import CaptionDataConfig, ImageDataConfig, InheritanceDataConfig
from llm2clip.config.evaluate import ZeroshotConfig
from llm2clip.config.models import (
    AdapterConfig,
    LoraConfig,
    LossConfig,
    MNTPConfig,
    ModelConfig,
    PlanConfig,
    TextEncoderConfig,
    TrainableTextConfig,
)
from llm2clip.config.ranges import (
    CheckpointsKept,
    Component,
    ConfigError,
    Count,
    DeviceName,
    Duration,
    Positive,
    Seed,
    TeacherPrecision,
    Text,
    Time,
    Weight,
)
from llm2clip.config.teacher import Teachers


@dataclass
class FsdpConfig:
    """FSDP2: weights, gradients and the optimizer's state are spread over the ranks, a block of the model at a time."""

    activation_checkpointing: bool = False
    """Recompute every block's activations in the backward pass."""
    activation_cpu_offload: bool = False
    """Keep what a block leaves for the backward pass in the host's memory; on GPUs."""
    state_dict_type: Literal['full', 'sharded'] = 'sharded'
    """A checkpoint is one file, gathered by the first rank (`full`), or a folder, where every rank writes its part."""
    mixed_precision: Literal['DEFAULT', 'PURE', 'FULL'] = 'DEFAULT'
    """With a `precision` of 16 bits: weights are gathered in 16 bits and gradients reduced in float32 (`DEFAULT`) or in
    16 bits too (`PURE`), or both are in float32 (`FULL`)."""
    reshard_after_forward: Union[bool, int] = True
    """Free a block's gathered weights after its forward pass and gather them again in the backward pass.  `false` keeps
    them; a number keeps them spread over groups of that many ranks, which are neighbours."""
    replicate: Count = 1
    """Copies of the model (HSDP), usually one per node: each is sharded over ranks that are neighbours."""
    prefetch: Optional[Count] = None
    """How many blocks ahead weights are gathered.  Unset: as torch does it, one ahead in the backward pass."""


@dataclass
class TrainerConfig:
    """Composer's Trainer by its own names."""

    save_folder: Text = MISSING
    """The run's folder: `config.yaml`, `metrics.jsonl` and `checkpoints/`."""
    run_name: Text = MISSING
    """Name of the run for loggers."""
    max_duration: Duration = MISSING
    """Length of the training, as Composer writes time: `4ep` (epochs), `1000ba` (batches)."""
    global_train_batch_size: Count = MISSING
    """Samples per step over all ranks."""
    global_eval_batch_size: Count = 64
    """Samples per batch of the evaluation over all ranks."""
    device_train_microbatch_size: Optional[Count] = None
    """Samples per forward pass, less than the device batch only with `algorithms.grad_cache`, which keeps the loss that
    of the global batch, or with `objective: mntp`, which has no negatives."""
    seed: Seed = 17
    """Seed of initial weights, dropout, draws of captions and augmentation."""
    device: Optional[DeviceName] = None
    """`gpu` or `cpu`.  Unset: a GPU if there is one."""
    precision: Optional[Literal['fp32', 'amp_bf16', 'amp_fp16']] = None
    """`fp32`, `amp_bf16` or `amp_fp16`.  Unset: as Composer chooses, `amp_fp16` on a GPU and `fp32` on a CPU.  Losses,
    temperature and the metrics of evaluations are float32 in any case; with `fp32`, everything is, without TF32."""
    eval_interval: Time = '1ep'
    """Time between two evaluations, on `eval_data` and, in stage 2, `eval_zeroshot`."""
    eval_first: bool = False
    """Evaluate before the first step as well."""
    save_interval: Time = '1ep'
    """Time between two checkpoints, which are written while training goes on."""
    save_num_checkpoints_to_keep: CheckpointsKept = 2
    """Newest checkpoints that are kept on disk, -1 for all.  In an object store, its lifecycle rules decide."""
    checkpoint_folder: Text = '${save_folder}/checkpoints'
    """Folder of the checkpoints: on disk, where nodes may share it, or in an object store (`s3://…`)."""
    autoresume: bool = True
    """Go on from the newest whole checkpoint in `checkpoint_folder`."""
    progress_bar: bool = True
    """Show how far the training is."""
    log_to_console: bool = False
    """Print the metrics as well."""
    console_log_interval: Time = '10ba'
    """Time between two prints of the metrics."""
    dist_timeout: Positive = 300.0
    """Seconds that a rank waits for the others before the run fails."""
    optimizer: Component = field(default_factory=lambda: {'name': 'adamw', 'lr': MISSING})
    """`name` of an optimizer in `llm2clip/registry.py`, and its arguments, of which `lr` is required."""
    scheduler: Component = field(default_factory=lambda: {'name': 'constant'})
    """`name` of a learning-rate schedule in `llm2clip/registry.py`, and its arguments."""
    algorithms: dict[str, Component] = field(default_factory=dict)
    """Name in `llm2clip/registry.py` -> arguments, of what takes part in every step."""
    callbacks: dict[str, Component] = field(default_factory=dict)
    """Name in `llm2clip/registry.py` -> arguments, of what watches the training."""
    loggers: dict[str, Component] = field(default_factory=dict)
    """Name in `llm2clip/registry.py` -> arguments, of where metrics go besides `metrics.jsonl`."""
    compile: Optional[Component] = None
    """Compile the repeated blocks of the model: arguments of `torch.compile`, `{}` for its defaults.  Unset: do not."""
    fsdp: Optional[FsdpConfig] = None
    """Shard the model over the ranks.  Unset: DDP, in which every rank holds the whole model."""


@dataclass
class TrainConfig(PlanConfig, TrainerConfig):
    """What both trainings share."""


@dataclass
class Stage1Config(TrainConfig):
    """Fine-tuning of the LLM into a text encoder."""

    objective: Literal['contrastive', 'mntp'] = 'contrastive'
    """`contrastive` on pairs of captions, or `mntp`, the optional warm start on single texts."""
    algorithms: dict[str, Component] = field(default_factory=lambda: {'clamp_logit_scale': {}})
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mntp: MNTPConfig = field(default_factory=MNTPConfig)
    logit_scale: Positive = 50.0
    """Factor on the cosine similarities, the inverse of the temperature."""
    learn_logit_scale: bool = False
    """Train the factor, from `logit_scale` on."""
    symmetric: bool = False
    """Add the loss from positive to query."""
    mask_equal_texts: bool = True
    """Two samples of the global batch that share a text are not each other's negatives."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which a token does not see another one in a layer of the LLM while it is trained, for pairs
    whose `positive` is `null`: `lora.lora_dropout` alone hardly makes two vectors of a text."""
    train_data: CaptionDataConfig = field(default_factory=CaptionDataConfig)
    eval_data: Optional[CaptionDataConfig] = None
    """Pairs for caption retrieval accuracy while training."""
    teacher_folder: Text = '${save_folder}/teacher'
    """Folder of the merged teacher, written when training ends."""
    lora_folder: Text = '${save_folder}/lora'
    """Folder of the LoRA adapter alone, written when training ends."""


@dataclass
class InheritanceConfig(TrainConfig):
    """Between the stages: the adapter alone learns to give the text features of CLIP's own tower (ProCLIP, arXiv
    2510.18795), so that stage 2 begins in the space of that CLIP."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    instance: Weight = 1.0
    """Factor on the mean squared distance of the features from those of CLIP."""
    structure: Weight = 1.0
    """Factor on the mean smooth L1 loss between distances of two captions' features and of CLIP's, in the global
    batch."""
    block_size: Optional[Count] = None
    """Rows of its matrix of distances that a rank computes at once.  Unset: all."""
    train_data: InheritanceDataConfig = field(default_factory=InheritanceDataConfig)
    eval_data: Optional[InheritanceDataConfig] = None
    """Captions whose features have to find CLIP's, of the same caption among those of all samples, while training."""
    teacher: Teachers = None
    """The teacher that the embeddings datasets must come from, as for stage 2."""
    adapter_folder: Text = '${save_folder}/adapter'
    """Folder of the adapter, written when training ends, for `initial_adapter` of stage 2."""


@dataclass
class TextEncoderInLoopConfig:
    """The frozen teacher in the loop of stage 2, in place of embeddings datasets."""

    enabled: bool = False
    """Embed captions with the teacher while training; the streams then need no `embeddings`."""
    batch_tokens: Count = 16384
    """Tokens per forward pass, as for `extract_embeddings`."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for a forward pass in bfloat16."""
    sharded: bool = False
    """Spread the teacher, which has to be an LLM, over all ranks with FSDP2."""


@dataclass
class SelfDistillationConfig:
    """Hold image features to those of a frozen copy of the initial weights (ProCLIP, arXiv 2510.18795)."""

    enabled: bool = False
    """Add to the loss what follows."""
    instance: Weight = 1.0
    """Factor on the mean squared distance of the features from those of the copy."""
    structure: Weight = 1.0
    """Factor on the mean smooth L1 loss between distances of two images' features and of the copy's."""


@dataclass
class Stage2Config(TrainConfig):
    """Post-training of the vision tower under the frozen teacher's embeddings."""

    model: ModelConfig = field(default_factory=ModelConfig)
    initial_weights: Optional[Text] = None
    """An exported folder whose weights training begins with, in place of the tower's pretrained ones."""
    initial_adapter: Optional[Text] = None
    """Folder of an adapter that `train_inheritance` wrote; together with `model.visual_projection: pretrained`."""
    train_data: ImageDataConfig = field(default_factory=ImageDataConfig)
    eval_data: Optional[ImageDataConfig] = None
    """Images and captions for retrieval recall while training."""
    eval_zeroshot: dict[Text, ZeroshotConfig] = field(default_factory=dict)
    """Name -> set whose images are classified by class names while training, as `evaluate` does it, read by
    `train_data.num_workers` processes per rank."""
    teacher: Teachers = None
    """The teacher that the embeddings datasets must come from, or a list of several in the order of
    `train_data.teachers`: the folder that stage 1 wrote, or a mapping with the `type` of another.  Unset: they must
    only agree with one another."""
    text_encoder_in_loop: TextEncoderInLoopConfig = field(default_factory=TextEncoderInLoopConfig)
    trainable_text: TrainableTextConfig = field(default_factory=TrainableTextConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    self_distillation: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)
    lr_scale: dict[str, Weight] = field(default_factory=dict)
    """Module name (`vision_encoder`, `adapter`, `text_encoder`, `logit_scale`, …) -> factor on its learning rate."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from each layer of the vision tower to the one below it."""
    algorithms: dict[str, Component] = field(default_factory=lambda: {'clamp_logit_scale': {}})

    def check(self) -> None:
        """Raise a ConfigError if text encoders, initial weights or dimensions do not go together."""
        self._check_trainable_text()
        if self.eval_zeroshot:
            self._check_zeroshot()
        if self.text_encoder_in_loop.enabled and self.teacher is None:
            raise ConfigError('teacher: required but not set, since text_encoder_in_loop.enabled is true')
        if self.text_encoder_in_loop.enabled and isinstance(self.teacher, list):
            raise ConfigError('text_encoder_in_loop.enabled: captions are embedded by one teacher, and teacher names '
                              f'{len(self.teacher)}')
        if self.initial_adapter is not None and self.initial_weights is not None:
            raise ConfigError('initial_adapter: initial_weights has an adapter of its own, expected one of the two')
        if self.initial_adapter is not None and self.model.visual_projection in ('linear', 'affine'):
            raise ConfigError(f'model.visual_projection: {self.model.visual_projection} begins with random weights, '
                              'expected pretrained, since initial_adapter leads into the space of the pretrained CLIP')
        if self.loss.matryoshka_dims and self.loss.matryoshka_dims[-1] > self.model.embed_dim:
            raise ConfigError(f'loss.matryoshka_dims: {self.loss.matryoshka_dims[-1]}, expected at most '
                              f'model.embed_dim, {self.model.embed_dim}')

    @property
    def reads_captions(self) -> bool:
        """Whether a text encoder in the model reads the captions."""
        return self.trainable_text.lora is not None or self.trainable_text.clip is not None

    @property
    def reads_vectors(self) -> bool:
        """Whether a frozen LLM's vectors are read from embeddings datasets."""
        return not self.text_encoder_in_loop.enabled and self.trainable_text.lora is None and not self.without_llm

    @property
    def without_llm(self) -> bool:
        """Whether CLIP's own text tower takes the place of the LLM."""
        return self.trainable_text.clip is not None and self.trainable_text.method is None

    def _check_trainable_text(self) -> None:
        texts = self.trainable_text
        if texts.method is not None and texts.clip is None:
            raise ConfigError('trainable_text.clip: required but not set, since trainable_text.method '
                              f"{texts.method} is about CLIP's text tower beside the LLM")
        if texts.lora is not None and self.teacher is None:
            raise ConfigError('teacher: required but not set, since trainable_text.lora trains its LLM')
        if texts.lora is not None and not isinstance(self.teacher, str):
            raise ConfigError('teacher: expected the folder that stage 1 wrote, since trainable_text.lora trains its '
                              'LLM')
        frozen = [key for key, is_set in (('text_encoder_in_loop.enabled', self.text_encoder_in_loop.enabled),
                                          ('initial_adapter', self.initial_adapter is not None)) if is_set]
        if self.without_llm and (texts.lora is not None or frozen):
            unwanted = 'trainable_text.lora' if texts.lora is not None else frozen[0]
            raise ConfigError(f'{unwanted}: there is no LLM, since trainable_text.clip takes its place; expected '
                              'trainable_text.method, or none of it')
        if texts.lora is not None and self.text_encoder_in_loop.enabled:
            raise ConfigError('text_encoder_in_loop.enabled: embeds captions by a frozen LLM, and trainable_text.lora '
                              'trains it; expected one of the two')

    def _check_zeroshot(self) -> None:
        if self.teacher is None and not self.without_llm:
            raise ConfigError('teacher: required but not set, since it embeds the prompts of eval_zeroshot')
        for key, named in (('train_data.teachers', self.train_data.teachers), ('teacher', self.teacher)):
            if isinstance(named, list) and len(named) > 1:
                raise ConfigError(f'eval_zeroshot: its prompts are embedded by one teacher, and {key} names '
                                  f'{len(named)}')
        for taken in ('train', 'eval'):
            if taken in self.eval_zeroshot:
                raise ConfigError(f'eval_zeroshot.{taken}: metrics of {taken}_data have this name, expected another')
