# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Configuration of `train_stage1`, `train_inheritance` and `train_stage2`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Optional, Union

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
    TextEncoderConfig,
    TextPlanConfig,
    TrainableTextConfig,
)
from llm2clip.config.ranges import (
    CheckpointFolder,
    CheckpointsKept,
    Component,
    Count,
    DeviceName,
    Duration,
    Positive,
    RunFolder,
    Seed,
    TeacherPrecision,
    Text,
    Time,
    Weight,
)
from llm2clip.config.recipe import Output
from llm2clip.config.teacher import Teachers, teacher_type
from llm2clip.errors import refuse, under


@dataclass
class FsdpConfig:
    """FSDP2: shard weights, gradients and optimizer state over the ranks,
    one block of the model at a time."""

    activation_checkpointing: bool = False
    """Recompute the activations of every block in the backward pass."""
    activation_cpu_offload: bool = False
    """Keep activations for the backward pass in host memory; GPUs only."""
    state_dict_type: Literal['full', 'sharded'] = 'sharded'
    """`full`: rank 0 gathers a checkpoint into one file.  `sharded`: every rank writes its part into a
    folder."""
    mixed_precision: Literal['DEFAULT', 'PURE', 'FULL'] = 'DEFAULT'
    """For a 16-bit `precision`.  `DEFAULT`: gather weights in 16 bits, reduce gradients in float32.  `PURE`:
    both in 16 bits.  `FULL`: both in float32."""
    reshard_after_forward: Union[bool, Count] = True
    """Free the gathered weights of a block after its forward pass, and gather them again in the backward
    pass.  `false` keeps them.  A number keeps them sharded over groups of that many neighbouring ranks."""
    replicate: Count = 1
    """Number of copies of the model (HSDP), usually one per node.
    Each is sharded over neighbouring ranks."""


@dataclass
class TrainerConfig:
    """Arguments of Composer's Trainer, under its names."""

    save_folder: RunFolder = MISSING
    """Run folder on a disk, with `config.yaml`, `metrics.jsonl` and `checkpoints/`."""
    run_name: Text = MISSING
    """Name of the run for loggers."""
    max_duration: Duration = MISSING
    """Length of the training in Composer's notation: `4ep` (epochs), `1000ba` (batches)."""
    global_train_batch_size: Count = MISSING
    """Samples per step over all ranks."""
    global_eval_batch_size: Count = 64
    """Samples per evaluation batch over all ranks."""
    device_train_microbatch_size: Optional[Count] = None
    """Samples per forward pass.  Unset: the device batch size.  A smaller value needs
    `algorithms.grad_cache`, which keeps the loss of the global batch, or `objective: mntp`,
    which has no negatives."""
    seed: Seed = 17
    """Seed of initial weights, dropout, caption sampling and augmentation."""
    device: Optional[DeviceName] = None
    """`gpu` or `cpu`.  Unset: a GPU if there is one."""
    precision: Optional[Literal['fp32', 'amp_bf16', 'amp_fp16']] = None
    """`fp32`, `amp_bf16` or `amp_fp16`.  Unset: Composer's default, `amp_fp16` on a GPU and `fp32` on a CPU,
    the only one there.  Losses, temperature and evaluation metrics are float32 in any case.
    `fp32` also turns TF32 off."""
    eval_interval: Time = '1ep'
    """Time between evaluations on `eval_data` and, in stage 2, `eval_zeroshot`."""
    eval_first: bool = False
    """Also evaluate before the first step."""
    save_interval: Time = '1ep'
    """Time between checkpoints, such as `500ba`."""
    save_num_checkpoints_to_keep: CheckpointsKept = 2
    """Newest checkpoints to keep on disk, -1 for all.  In an object store, its lifecycle rules decide."""
    checkpoint_folder: CheckpointFolder = '${save_folder}/checkpoints'
    """Folder of the checkpoints: on disk, where nodes may share it, or in an object store (`s3://…`)."""
    autoresume: bool = True
    """Resume from the newest complete checkpoint in `checkpoint_folder`."""
    progress_bar: bool = True
    """Show a progress bar; in a log file, a line every ten seconds."""
    log_to_console: bool = False
    """Print metrics to the console."""
    console_log_interval: Time = '10ba'
    """Time between metrics on the console."""
    log_gradient_norms: bool = False
    """Log `gradient_norm/NAME`, the L2 norm of each parameter's gradient before clipping, after each step."""
    dist_timeout: Positive = 1800.0
    """Seconds that a rank waits for the others before the run fails."""
    optimizer: Component = field(default_factory=lambda: {'name': 'adamw', 'lr': MISSING})
    """`name` of an optimizer in `llm2clip/registry.py`, and its arguments; `lr` is required."""
    scheduler: Component = field(default_factory=lambda: {'name': 'constant'})
    """`name` of a learning-rate schedule in `llm2clip/registry.py`, and its arguments."""
    algorithms: dict[str, Component] = field(default_factory=dict)
    """Name of an algorithm in `llm2clip/registry.py` -> arguments.  Algorithms change the training steps."""
    callbacks: dict[str, Component] = field(default_factory=dict)
    """Name of a callback in `llm2clip/registry.py` -> arguments.  Callbacks monitor the training."""
    loggers: dict[str, Component] = field(default_factory=dict)
    """Name of a logger in `llm2clip/registry.py` -> arguments.  `metrics.jsonl` is always written."""
    compile: Optional[Component] = None
    """Arguments of `torch.compile` for the repeated blocks of the model, `{}` for defaults, which need a C
    compiler.  Unset: no compilation."""
    fsdp: Optional[FsdpConfig] = None
    """Shard the model over the ranks with FSDP2.  Unset: DDP, where every rank holds the whole model."""


@dataclass
class SelfDistillationConfig:
    """Keep image features close to those of a frozen copy of the initial weights (ProCLIP, arXiv
    2510.18795)."""

    enabled: bool = False
    """Add the two terms below to the loss."""
    instance: Weight = 1.0
    """Weight of the mean squared distance between the features and those of the copy."""
    structure: Weight = 1.0
    """Weight of the mean smooth L1 loss between pairwise distances of the features and those of the copy."""


@dataclass
class TrainConfig(TextPlanConfig, TrainerConfig):
    """Settings of every training."""

    output_key = 'save_folder'
    uses_ranks = True
    has_best_weights: ClassVar[bool] = False
    """Whether other recipes read the weights that the callback `save_best` writes."""
    # Settings of stage 2 alone, as they are in other trainings.
    lr_scale = {}
    layer_decay = 1.0
    self_distillation = SelfDistillationConfig()
    loss = LossConfig()

    def check(self) -> None:
        """Raise a ConfigError if keys conflict, whatever the device and the number of ranks."""
        refuse([
            ('algorithms.channels_last', self.fsdp is not None and 'channels_last' in self.algorithms,
             'fsdp cannot shard such weights; leave out one of the two'),
            ('callbacks.save_best', 'save_best' in self.callbacks and not self.has_best_weights,
             'only the weights of stage 2 can be read from it, expected none here'),
        ])
        training: Any = self
        with under('train_data'):
            _check_epoch(training.train_data)

    @property
    def has_negatives(self) -> bool:
        """Whether the samples of a batch are negatives of each other, which the loss needs all at once."""
        return True

    def outputs(self) -> list[Output]:
        outputs = super().outputs()
        checkpoints = Path(os.path.abspath(self.checkpoint_folder))
        is_inside = checkpoints.is_relative_to(os.path.abspath(self.save_folder))
        if '://' not in self.checkpoint_folder and not is_inside:
            outputs.append(Output(self.checkpoint_folder))
        return outputs

    def resume_hint(self) -> str:
        if not self.autoresume:
            return ''
        return f'the same command resumes from the newest checkpoint in {self.checkpoint_folder}, if any'


def _check_epoch(data: Any) -> None:
    """Raise a ConfigError if `proportion`, `repeat` and `epoch_size` of a loader do not go together."""
    has_proportions = any(stream.proportion is not None for stream in data.streams.values())
    for name, stream in data.streams.items():
        refuse([
            (f'streams.{name}.repeat',
             stream.repeat is not None and (has_proportions or data.epoch_size is not None),
             'expected none beside epoch_size or a proportion, which decide how much of a dataset an epoch '
             'takes; set proportion for all datasets instead'),
            (f'streams.{name}.proportion', has_proportions and stream.proportion is None,
             'required but not set, since other datasets have one'),
        ])


@dataclass
class Stage1Config(TrainConfig):
    """Fine-tuning of the LLM into a text encoder."""

    objective: Literal['contrastive', 'mntp'] = 'contrastive'
    """`contrastive` on pairs of captions, or `mntp`, the optional warm start on single texts."""
    device_train_microbatch_tokens: Optional[Count] = None
    """Tokens per forward pass at most, without padding.  Each step has as few passes as its texts need, and
    all ranks equally many.  Needs `algorithms.grad_cache` or `objective: mntp`."""
    algorithms: dict[str, Component] = field(default_factory=lambda: {'clamp_logit_scale': {}})
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mntp: MNTPConfig = field(default_factory=MNTPConfig)
    logit_scale: Positive = 50.0
    """Factor on the cosine similarities, the inverse of the temperature."""
    learn_logit_scale: bool = False
    """Train the factor, starting from `logit_scale`."""
    symmetric: bool = False
    """Average the loss with the one from positive to query."""
    mask_equal_texts: bool = True
    """Do not use samples of the global batch that share a text as each other's negatives."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of the attention weights in the LLM during training, for pairs with `positive:
    null`.  `lora.lora_dropout` alone hardly separates two vectors of the same text."""
    train_data: CaptionDataConfig = field(default_factory=CaptionDataConfig)
    eval_data: Optional[CaptionDataConfig] = None
    """Pairs for caption retrieval accuracy during training."""
    teacher_folder: Text = '${save_folder}/teacher'
    """Folder for the merged teacher, written when training ends."""
    lora_folder: Text = '${save_folder}/lora'
    """Folder for the LoRA adapter alone, written when training ends."""

    @property
    def has_negatives(self) -> bool:
        return self.objective == 'contrastive'

    def check(self) -> None:
        super().check()
        if self.objective == 'mntp':
            refuse([
                ('algorithms.grad_cache', 'grad_cache' in self.algorithms,
                 'objective mntp has no negatives; its microbatches need no cache'),
                ('eval_data', self.eval_data is not None, 'objective mntp has no evaluation'),
            ])
        tokens = self.device_train_microbatch_tokens
        refuse([
            ('device_train_microbatch_tokens', tokens and tokens < 3 * self.text_encoder.max_length,
             f'{tokens}, expected at least three texts of text_encoder.max_length, '
             f'{self.text_encoder.max_length}'),
            ('device_train_microbatch_tokens',
             tokens and self.has_negatives and 'grad_cache' not in self.algorithms,
             'passes see only their own negatives; expected `algorithms: {grad_cache: {}}` with it'),
            ('text_encoder.dtype', self.fsdp is not None and self.text_encoder.dtype != 'float32',
             f'{self.text_encoder.dtype} does not go with fsdp, which needs the float32 of the LoRA weights '
             'everywhere; precision: amp_bf16 computes in bfloat16'),
        ])


@dataclass
class InheritanceConfig(TrainConfig):
    """Training of the adapter alone, between the stages, to reproduce the text features of CLIP's own tower
    (ProCLIP, arXiv 2510.18795).  Stage 2 then starts in the space of that CLIP."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    instance: Weight = 1.0
    """Weight of the mean squared distance between the features and CLIP's features."""
    structure: Weight = 1.0
    """Weight of the mean smooth L1 loss between pairwise distances of the features and those of CLIP's
    features, over the global batch."""
    block_size: Optional[Count] = None
    """Rows of the distance matrix that a rank computes at once, to save memory.  Unset: all."""
    train_data: InheritanceDataConfig = field(default_factory=InheritanceDataConfig)
    eval_data: Optional[InheritanceDataConfig] = None
    """Captions for retrieval recall during training: a feature has to find CLIP's feature of the same
    caption."""
    teacher: Teachers = None
    """Teacher that the embeddings datasets have to come from, as for stage 2."""
    adapter_folder: Text = '${save_folder}/adapter'
    """Folder for the adapter, written when training ends, for `initial_adapter` of stage 2."""


@dataclass
class TextEncoderInLoopConfig:
    """Frozen teacher in the loop of stage 2, instead of embeddings datasets."""

    enabled: bool = False
    """Embed captions with the teacher during training.  Datasets then need no `embeddings`."""
    batch_tokens: Count = 16384
    """Tokens per forward pass, as for `extract_embeddings`."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for a forward pass in bfloat16."""
    sharded: bool = False
    """Shard the teacher, which has to be an LLM, over all ranks with FSDP2."""


@dataclass
class Stage2Config(TrainConfig):
    """Training of the vision tower and the adapter against the frozen teacher's embeddings."""

    has_best_weights = True

    model: ModelConfig = field(default_factory=ModelConfig)
    initial_weights: Optional[Text] = None
    """Exported folder, or folder of a run, with weights to start from, not the tower's pretrained ones."""
    initial_adapter: Optional[Text] = None
    """Adapter folder written by `train_inheritance`.  Use it with `model.visual_projection: pretrained`."""
    train_data: ImageDataConfig = field(default_factory=ImageDataConfig)
    eval_data: Optional[ImageDataConfig] = None
    """Images and captions for retrieval recall during training."""
    eval_zeroshot: dict[Text, ZeroshotConfig] = field(default_factory=dict)
    """Name -> set for zero-shot classification during training, as in `evaluate`.  Its images are read by
    `train_data.num_workers` processes per rank."""
    teacher: Teachers = None
    """Teacher of the embeddings datasets: the folder that stage 1 wrote, or a mapping with the `type` of
    another.  A list names several, in the order of `train_data.teachers`.
    Unset: any, if all datasets have the same."""
    text_encoder_in_loop: TextEncoderInLoopConfig = field(default_factory=TextEncoderInLoopConfig)
    trainable_text: TrainableTextConfig = field(default_factory=TrainableTextConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    self_distillation: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)
    lr_scale: dict[str, Weight] = field(default_factory=dict)
    """Module name (`vision_encoder`, `adapter`, `text_encoder`, `logit_scale`, …)
    -> factor on its learning rate."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from each layer of the vision tower to the layer below it."""
    algorithms: dict[str, Component] = field(default_factory=lambda: {'clamp_logit_scale': {}})

    @property
    def begins_at_random(self) -> bool:
        """Whether the vision tower begins with random weights."""
        vision = self.model.vision
        return vision.checkpoint is None and not vision.pretrained and self.initial_weights is None

    @property
    def reads_captions(self) -> bool:
        """Whether the model contains a text encoder that reads captions."""
        return self.trainable_text.lora is not None or self.trainable_text.clip is not None

    @property
    def reads_vectors(self) -> bool:
        """Whether vectors of a frozen LLM are read from embeddings datasets."""
        return not self.text_encoder_in_loop.enabled and not self.reads_captions

    def check(self) -> None:
        self._check_text_encoder()
        if self.eval_zeroshot:
            self._check_zeroshot()
        self._check_model()
        self._check_loss()
        for key, data in {'train_data': self.train_data, 'eval_data': self.eval_data}.items():
            if data is not None and any(stream.image_embeddings for stream in data.streams.values()):
                self._check_image_embeddings(key, data)
        super().check()

    def _check_zeroshot(self) -> None:
        refuse([
            ('teacher', self.teacher is None and self.trainable_text.clip is None,
             'required but not set, since it embeds the prompts of eval_zeroshot'),
            ('eval_zeroshot', len(self.train_data.teachers) > 1 or isinstance(self.teacher, list),
             'its prompts are embedded by one teacher, and there are several'),
            ('eval_zeroshot', not {'eval', 'train'}.isdisjoint(self.eval_zeroshot),
             'eval and train are the names of metrics of eval_data and train_data, expected others'),
        ])

    def _check_model(self) -> None:
        vision = self.model.vision
        projection = self.model.visual_projection
        refuse([
            ('initial_adapter', self.initial_adapter is not None and self.initial_weights is not None,
             'initial_weights has an adapter of its own, expected one of the two'),
            ('model.visual_projection',
             self.initial_adapter is not None and projection in ('linear', 'affine'),
             f'{projection} begins with random weights, expected pretrained, since initial_adapter leads '
             'into the space of the pretrained CLIP'),
            ('model.vision.lora', vision.freeze and vision.lora is not None,
             'model.vision.freeze freezes these weights, too; set one of the two'),
            ('model.vision.gradient_checkpointing',
             vision.gradient_checkpointing and self.fsdp is not None and self.fsdp.activation_checkpointing,
             'fsdp.activation_checkpointing recomputes the activations, too; set one of the two'),
            ('model.visual_projection', projection == 'pretrained' and self.begins_at_random,
             'there is no pretrained one, since model.vision.pretrained is false'),
            ('model.visual_projection',
             projection == 'pretrained' and (vision.feature_levels or vision.beside),
             'the pretrained one has no place for the features of model.vision.feature_levels and beside, '
             'expected linear'),
            ('model.heads', self.model.embed_dim % self.model.heads,
             f'{self.model.heads}, expected a divisor of model.embed_dim, {self.model.embed_dim}'),
        ])

    def _check_loss(self) -> None:
        loss = self.loss
        is_own = ':' in loss.name
        largest_dim = max(loss.matryoshka_dims, default=0)
        refuse([
            ('model.logit_bias', (loss.name == 'siglip') != (self.model.logit_bias is not None),
             'loss.name: siglip needs one, which starts at -10, and other losses have none'),
            ('loss.arguments', loss.arguments and not is_own,
             f'loss.name: {loss.name} takes none, expected module:class as the name'),
            ('loss.name', is_own and (loss.mask_equal_texts or loss.matryoshka_dims),
             'expected clip or siglip, since mask_equal_texts and matryoshka_dims are theirs'),
            ('loss.matryoshka_dims', self.model.heads > 1 and loss.matryoshka_dims,
             'the features of several model.heads have no first dimensions of their own, expected none'),
            ('loss.matryoshka_dims', largest_dim > self.model.embed_dim,
             f'{largest_dim}, expected at most model.embed_dim, {self.model.embed_dim}'),
        ])

    def _check_text_encoder(self) -> None:
        trains_lora = self.trainable_text.lora is not None
        in_loop = self.text_encoder_in_loop.enabled
        if self.trainable_text.clip is not None:
            without_llm = 'trainable_text.clip takes the place of the LLM; expected one of the two'
            refuse([
                ('trainable_text.lora', trains_lora, without_llm),
                ('text_encoder_in_loop.enabled', in_loop, without_llm),
                ('initial_adapter', self.initial_adapter is not None, without_llm),
            ])
        refuse([
            ('teacher', trains_lora and teacher_type(self.teacher) != 'folder',
             'expected a folder of stage 1, since trainable_text.lora trains its LLM'),
            ('text_encoder_in_loop.enabled', in_loop and trains_lora,
             'embeds captions by a frozen LLM, and trainable_text.lora trains it; expected one of the two'),
            ('teacher', in_loop and not teacher_type(self.teacher),
             'expected one that embeds captions, since text_encoder_in_loop.enabled is true'),
        ])

    def _check_image_embeddings(self, loader: str, data: ImageDataConfig) -> None:
        embeddings = f'{loader}.streams.<name>.image_embeddings'
        needs_images = {
            'self_distillation.enabled': self.self_distillation.enabled,
            'loss.mask_equal_texts': self.loss.mask_equal_texts,
            'algorithms.patch_dropout': 'patch_dropout' in self.algorithms,
            'text_encoder_in_loop.enabled': self.text_encoder_in_loop.enabled,
            'trainable_text': self.reads_captions,
            f'{loader}.image_size': data.image_size,
            f'{loader}.color_jitter': data.color_jitter,
            f'{loader}.grayscale': data.grayscale,
            f'{loader}.horizontal_flip': data.horizontal_flip,
        }
        refuse([
            ('model.vision.freeze', not self.model.vision.freeze,
             f'expected true, since {embeddings} has vectors of the tower'),
            *((key, is_set,
               f'needs the images or captions, and {embeddings} is read in place of them')
              for key, is_set in needs_images.items()),
        ])
