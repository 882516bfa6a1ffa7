# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The vocabulary of the YAML files, one dataclass per recipe.

Parts that are chosen by name (optimizers, schedulers, callbacks, loggers, algorithms, data sources) are free-form
mappings here; `llm2clip.registry` checks their names and arguments.  `llm2clip.config_files` reads the files and checks
every value against the range in its type.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional, Union

from omegaconf import MISSING
from pydantic import Field

from llm2clip.ranges import (
    CheckpointsKept,
    Compression,
    Count,
    CropScale,
    DeviceName,
    Duration,
    Finite,
    FolderName,
    Mix,
    Natural,
    Positive,
    Repository,
    RunWeights,
    SampleCount,
    Seed,
    Share,
    Size,
    Switch,
    TeacherPrecision,
    Text,
    Texts,
    Time,
    VisualProjection,
    Weight,
    WeightType,
)

__all__ = [
    'AdapterConfig', 'CRAConfig', 'CaptionDataConfig', 'CaptionPairConfig', 'CaptionStreamConfig', 'ConfigError',
    'DatasetConfig', 'EvaluateConfig', 'EvaluatedModelConfig', 'ExportConfig', 'ExportTeacherConfig',
    'ExportVisionConfig', 'ExtractConfig', 'FsdpConfig', 'HubConfig', 'ImageDataConfig', 'ImageStreamConfig',
    'ImportConfig', 'LinearProbeConfig', 'LoaderConfig', 'LoraConfig', 'LossConfig', 'MNTPConfig', 'ModelConfig',
    'OnlineConfig', 'PlanConfig', 'PrepareConfig', 'ReportConfig', 'RetrievalConfig', 'SearchConfig',
    'Stage1Config', 'Stage2Config', 'StreamConfig', 'TeacherConfig', 'TextEncoderConfig', 'TrainConfig', 'VisionConfig',
    'WriterConfig', 'ZeroshotConfig',
]

Component = dict[str, Any]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its origin and what was expected."""


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class TextEncoderConfig:
    """An LLM as a text encoder: where it comes from and how a caption becomes one vector."""

    pretrained: Text = MISSING
    """Hugging Face hub name or local folder of the LLM."""
    gguf_file: Optional[Text] = None
    """File inside `pretrained` when the weights are GGUF."""
    adapters: list[Text] = field(default_factory=list)
    """LoRA adapters (folders or hub names) merged into the LLM in this order, before a new one is added."""
    bidirectional: bool = True
    """Drop the causal mask in every layer (LLM2CLIP section 3.1); padding stays masked."""
    pooling: Literal['mean', 'weighted_mean', 'last'] = 'mean'
    """`mean` or `weighted_mean` over the caption's own tokens, or `last`, the end token after them."""
    chat_template: Optional[bool] = None
    """Wrap the caption as a user message of the tokenizer's chat template, whose header is not pooled.  Unset: if the
    tokenizer has one."""
    instruction: str = ''
    """Text put before a query caption; never pooled."""
    max_length: Count = 512
    """Longest input in tokens, template and instruction included; longer captions are truncated and counted."""
    dtype: WeightType = 'float32'
    """Type of the LLM's own weights; LoRA weights stay float32.  FSDP needs one type, hence `float32`."""
    attn_implementation: Optional[Literal['sdpa', 'eager']] = None
    """`sdpa` or `eager`.  Unset: `sdpa`, but `eager` for Gemma 2, whose soft cap on attention scores only that has."""
    trust_remote_code: bool = False
    """Run code that comes with the tokenizer. Leave off unless you have read that code."""


@dataclass
class LoraConfig:
    """Low-rank adaptation of the LLM (paper, section 4.1); the names follow peft."""

    r: Count = 16
    """Rank of the adaptation."""
    lora_alpha: Count = 32
    """The adaptation is scaled by `lora_alpha` / `r`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Probability with which an input of the adaptation is dropped while it is trained."""
    target_modules: Optional[Texts] = None
    """Names of projections; unset, those of attention and MLP in every layer, whatever the architecture calls them."""


@dataclass
class MNTPConfig:
    """Masked next-token prediction (LLM2Vec, section 2.2): an LLM learns to use the context on its right."""

    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of a text's tokens that are masked; each is predicted from the position before it."""
    mask_token: Text = '_'
    """Text whose first token stands for a masked one; LLMs have no mask token of their own."""


@dataclass
class VisionConfig:
    """A vision tower from timm or transformers."""

    name: Text = MISSING
    """timm model (also `hf-hub:…`, `local-dir:…`), or hub name or local folder of a Hugging Face image model."""
    pretrained: bool = False
    """Load the weights that belong to `name`."""
    checkpoint: Optional[Text] = None
    """Local file of a timm model's weights instead; read without running code."""
    remap: bool = False
    """The checkpoint has other key names but the same parameters in the same order."""
    architecture: Component = field(default_factory=dict)
    """A Hugging Face model's `config.json` by `model_type` (`clip_vision_model`, …), in place of the one in `name`."""
    image_size: Count = 224
    """Side of the square input, in pixels; position embeddings are interpolated to it."""
    mean: Optional[Annotated[list[Share], Field(min_length=3, max_length=3)]] = None
    """Of red, green and blue, from 0 to 1, in place of the tower's own normalisation; together with `std`."""
    std: Optional[Annotated[list[Positive], Field(min_length=3, max_length=3)]] = None
    """Standard deviation per colour; together with `mean`."""
    lock: bool = False
    """Train the projection and the adapter only (LiT)."""
    lock_blocks: Natural = 0
    """Do not train the embeddings and this many blocks after them."""
    gradient_checkpointing: Switch = False
    """Recompute activations in the backward pass, a fifth of the FLOPs for much less memory; `auto`: if the step would
    not fit the GPU otherwise.  With FSDP, `fsdp.activation_checkpointing` does the same."""
    freeze_batch_norm: bool = True
    """Keep BatchNorm on its pretrained statistics, so that a sample's features do not depend on its batch."""


@dataclass
class AdapterConfig:
    """From the teacher's vector to the joint space."""

    name: Literal['residual', 'linear', 'identity'] = 'residual'
    """`residual`, the MLP of the official code; `linear`, or `identity`, for which both widths are equal."""
    depth: Natural = 4
    """Number of residual blocks."""
    expansion: Count = 2
    """Hidden width of a block over its width."""
    normalize: bool = True
    """Scale the teacher's vector to length 1 before the first block."""


@dataclass
class ModelConfig:
    """Vision tower and adapter, meeting in a space of `embed_dim` dimensions."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    embed_dim: Count = 1280
    """Width of the joint space."""
    visual_projection: VisualProjection = 'linear'
    """From the tower's width to `embed_dim`: `linear`; `affine`, which has a bias; or `identity`, for which both widths
    are equal."""
    logit_scale: Positive = 1 / 0.07
    """Factor on the cosine similarities at the beginning."""
    logit_bias: Optional[Finite] = None
    """Added to the logits at the beginning, for `loss.name: siglip`; SigLIP starts at -10, and `logit_scale` at 10."""


@dataclass
class LossConfig:
    """Loss of stage 2, over the global batch."""

    name: Literal['clip', 'siglip'] = 'clip'
    """`clip`, or the pairwise sigmoids of `siglip`."""
    label_smoothing: Share = 0.0
    """Share of the target, from 0 to 1, that is spread over all candidates; for `clip`."""
    mask_equal_texts: bool = False
    """Two samples of the global batch that drew the same caption are not each other's negatives."""
    block_size: Optional[Count] = None
    """Rows of the logit matrix that a rank computes at once, among those of its own images.  Unset: all of them."""


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class DatasetConfig:
    """Where an MDS dataset is."""

    local: Text = MISSING
    """Folder of the dataset, or the cache when `remote` is set."""
    remote: Optional[Text] = None
    """Any place Streaming reads from (`s3://…`, `gs://…`, `sftp://…`, a path)."""


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
    positive: Texts = MISSING
    """Caption keys, of which one is drawn that the sample has and that is not the query's."""
    negative: Optional[Text] = None
    """Caption key of a text that is wrong for this query (a hard negative); single samples may leave it empty."""
    instruction: Optional[str] = None
    """Put before the query of this direction, in place of `text_encoder.instruction`; never pooled."""
    weight: Positive = 1.0
    """How often this direction is drawn, relative to the others of its list."""


@dataclass
class CaptionStreamConfig(StreamConfig):
    """A dataset of captions, texts or images with captions."""

    pairs: Optional[Annotated[list[CaptionPairConfig], Field(min_length=1)]] = None
    """In place of `train_data.pairs`."""
    texts: Optional[Mix] = None
    """In place of `train_data.texts`."""


@dataclass
class ImageStreamConfig(StreamConfig):
    """A dataset of images, with the sidecars that hold its captions' embeddings."""

    embeddings: dict[Text, DatasetConfig] = field(default_factory=dict)
    """Teacher's name -> sidecar."""
    caption_mix: Optional[Mix] = None
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
    num_canonical_nodes: Count = 64
    """Fixes the sample order for any number of nodes; a multiple or a divisor of the number of nodes."""
    download_retry: Count = 5
    """How often a file is downloaded, with pauses of 1, 2, 4, … seconds, before the run stops."""
    download_timeout: Positive = 120.0
    """Seconds that one download may take."""
    cache_limit: Optional[Size] = None
    """Largest size of the caches per node (`200gb`).  Unset: everything that was downloaded is kept."""


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
    """Name -> dataset of images, with the sidecars that hold its captions' embeddings."""
    teachers: list[Text] = field(default_factory=list)
    """Names of the teachers whose embeddings are read.  Those of several are scaled to length 1 and concatenated.
    Unset: the only one that the streams have."""
    caption_mix: Mix = field(default_factory=dict)
    """Caption key -> weight.  Of those that a sample has, one is drawn each time it is seen (paper, section 4.2), never
    one of weight 0.  Unset: all captions alike, which needs the dataset's index in `local`."""
    crop_scale: CropScale = field(default_factory=lambda: [0.9, 1.0])
    """Smallest and largest share of the area that a training crop keeps."""
    color_jitter: Annotated[float, Field(ge=0, le=2.5)] = 0.0
    """Strength of random brightness, contrast, saturation and (a fifth of it) hue."""
    grayscale: Share = 0.0
    """Probability of a grey training image."""


# ---------------------------------------------------------------------------------------------------------------------
# One configuration per recipe
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class FsdpConfig:
    """FSDP2: weights, gradients and the optimizer's state are spread over the ranks, a block of the model at a time."""

    activation_checkpointing: Switch = False
    """Recompute every block's activations in the backward pass; `auto`: if the step would not fit the GPU otherwise."""
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
class PlanConfig:
    """What a run would need and what would go wrong: said in place of running it, on any machine, without GPU."""

    plan: bool = False
    """Print it, from the datasets' indexes and a step on tensors without content, and stop."""
    plan_ranks: Optional[Count] = None
    """GPUs to plan for.  Unset: as many as the launcher starts."""
    plan_samples: Optional[SampleCount] = None
    """Samples per epoch, or to embed, for data that is not there yet; no dataset is then looked at."""
    plan_tokens: Optional[Count] = None
    """Mean number of tokens of a text, template included, for time and price.  Unset: estimated from the first shard
    that is there, by four characters per token, or else the longest that the encoder reads."""
    plan_llm: Optional[Text] = None
    """Folder with the `config.json` of the LLM, or of the one that the teacher will be: a plan then needs neither the
    network nor the teacher."""
    plan_gpu: Literal['A100', 'H100', 'H200', 'B200'] = 'H100'
    """GPU that proposals are made for."""
    plan_mfu: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of a GPU's peak at which the FLOPs of a step, recomputation included, are taken to be computed."""
    plan_price: Optional[Positive] = None
    """Price of one GPU-hour, in any currency."""


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
    """Samples per forward pass.  Smaller than the device batch only with `algorithms.grad_cache`, which keeps the loss
    that of the global batch (or with `objective: mntp`, whose loss has no negatives)."""
    seed: Seed = 17
    """Seed of initial weights, dropout, draws of captions and augmentation."""
    device: Optional[DeviceName] = None
    """`gpu` or `cpu`.  Unset: a GPU if there is one."""
    precision: Optional[Literal['fp32', 'amp_bf16', 'amp_fp16']] = None
    """`fp32`, `amp_bf16` or `amp_fp16`.  Unset: as Composer chooses, `amp_fp16` on a GPU and `fp32` on a CPU.  Losses,
    temperature and the metrics of evaluations are float32 in any case; with `fp32`, everything is, without TF32."""
    eval_interval: Time = '1ep'
    """Time between two evaluations on `eval_data`."""
    save_interval: Time = '1ep'
    """Time between two checkpoints, which are written while training goes on."""
    save_num_checkpoints_to_keep: CheckpointsKept = 2
    """Newest checkpoints that are kept on disk, -1 for all.  In an object store, its lifecycle rules decide."""
    checkpoint_folder: Text = '${save_folder}/checkpoints'
    """Folder of the checkpoints: on disk, where nodes may share it, or in an object store (`s3://…`)."""
    autoresume: bool = True
    """Go on from the newest whole checkpoint in `checkpoint_folder`."""
    log_interval: Time = '1ba'
    """Time between two readings of the losses and metrics of a step, for which the host waits for the GPU; a loss or
    weight that is not finite stops the run at the next one.  They are also read at the end of an epoch and before every
    checkpoint and evaluation."""
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
    loss_scale: Positive = 50.0
    """Factor on the cosine similarities, the inverse of the temperature."""
    learn_scale: bool = False
    """Train the factor, from `loss_scale` on."""
    symmetric: bool = False
    """Add the loss from positive to query."""
    mask_equal_texts: bool = True
    """Two samples of the global batch that share a text are not each other's negatives."""
    train_data: CaptionDataConfig = field(default_factory=CaptionDataConfig)
    eval_data: Optional[CaptionDataConfig] = None
    """Pairs for caption retrieval accuracy while training."""
    teacher_folder: Text = '${save_folder}/teacher'
    """Folder of the merged teacher, written when training ends."""
    adapter_folder: Text = '${save_folder}/adapter'
    """Folder of the LoRA adapter alone, written when training ends."""


@dataclass
class OnlineConfig:
    """The frozen teacher in the loop of stage 2, in place of sidecars."""

    enabled: bool = False
    """Embed captions with `teacher` while training; the streams then need no `embeddings`."""
    batch_tokens: Count = 16384
    """Tokens per forward pass; texts are packed without padding."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for a forward pass in bfloat16."""
    sharded: bool = False
    """Spread the LLM over all ranks with FSDP2."""


@dataclass
class Stage2Config(TrainConfig):
    """Post-training of the vision tower under the frozen teacher's embeddings."""

    model: ModelConfig = field(default_factory=ModelConfig)
    initial_weights: Optional[Text] = None
    """An exported folder whose weights training begins with, in place of the tower's pretrained ones."""
    train_data: ImageDataConfig = field(default_factory=ImageDataConfig)
    eval_data: Optional[ImageDataConfig] = None
    """Images and captions for retrieval recall while training."""
    teacher: Optional[Text] = None
    """Folder of the teacher that the sidecars must come from.  Unset: they must only agree with one another."""
    online: OnlineConfig = field(default_factory=OnlineConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lr_scale: dict[str, Weight] = field(default_factory=dict)
    """Module name (`vision_encoder`, `adapter`, `logit_scale`, …) -> factor on its learning rate."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from each layer of the vision tower to the one below it."""
    algorithms: dict[str, Component] = field(default_factory=lambda: {'clamp_logit_scale': {}})


@dataclass
class WriterConfig:
    """How datasets are written."""

    size_limit: Size = '64mb'
    """Largest size of a shard, as Streaming writes sizes (`64mb`)."""
    compression: Optional[Compression] = None
    """Compression of shards, as Streaming names it (`zstd`, `zstd:7`, …).  Images are compressed already."""
    max_dropped: Share = 0.02
    """Largest share of the input, from 0 to 1, that may be unusable before the conversion fails.  What these settings
    leave out does not count."""
    require_any_caption: list[Text] = field(default_factory=list)
    """Leave out samples that have no caption of any of these keys, such as those of the training's `caption_mix`."""
    image_max_side: Optional[Count] = None
    """Longest side in pixels: larger images are made smaller and saved as JPEG.  Unset: every image keeps its bytes."""
    image_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of those JPEGs, from 1 to 100."""
    num_workers: Count = 1
    """Processes, each on a part (an input file) of its own."""
    machine: Natural = 0
    """Which of `machines` this is, from 0."""
    machines: Count = 1
    """Machines that share the parts and the `out` folder, or its remote."""
    keep_local: bool = True
    """With a remote, keep shards here too after they were uploaded."""


@dataclass
class PrepareConfig(WriterConfig):
    """Raw files -> MDS datasets."""

    out: Text = MISSING
    """Folder that receives one MDS dataset per split."""
    out_remote: Optional[Text] = None
    """Place to which the datasets are uploaded as well (`s3://…`, `gs://…`, …); machines that do not share `out` need
    it."""
    source: Component = MISSING
    """`name` of the source and its arguments."""

    def check(self) -> None:
        """Raise a ConfigError if there is no such machine."""
        if self.machine >= self.machines:
            raise ConfigError(f'machine: {self.machine}, expected one of {self.machines} machines, counted from 0')


@dataclass
class TeacherConfig:
    """A frozen teacher of captions: one of `teacher`, `text_encoder` and `sentence_transformer`."""

    teacher: Optional[Text] = None
    """Folder that stage 1 wrote."""
    text_encoder: Optional[TextEncoderConfig] = None
    """Any LLM, not trained by stage 1."""
    sentence_transformer: Optional[Text] = None
    """Folder or hub name of a sentence-transformers model."""
    trust_remote_code: bool = False
    """Run code that comes with the sentence-transformers model. Leave off unless you have read that code."""
    batch_tokens: Count = 4096
    """Tokens per forward pass; texts are packed without padding."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for a forward pass in bfloat16."""


@dataclass
class ExtractConfig(PlanConfig, TeacherConfig):
    """Captions of an image MDS -> their embeddings by a frozen teacher."""

    datasets: Annotated[dict[FolderName, DatasetConfig], Field(min_length=1)] = MISSING
    """Name -> image or caption dataset."""
    out: Text = MISSING
    """Sidecars go to `out/<name>`."""
    out_remote: Optional[Text] = None
    """Place to which the sidecars are uploaded, to `out_remote/<name>`; nodes that do not share `out` need it."""
    storage: Literal['float16', 'int8'] = 'float16'
    """`float16`, or `int8` with one float32 scale per vector, half the size."""
    normalize: bool = False
    """Store vectors of length 1.  The adapter of stage 2 normalises them in any case, unless `adapter.normalize` is
    false."""
    device: Optional[DeviceName] = None
    """`gpu` or `cpu`.  Unset: a GPU if there is one."""
    dist_timeout: Positive = 3600.0
    """Seconds that ranks wait for the one with the most work at the end."""


@dataclass
class EvaluatedModelConfig(TeacherConfig):
    """What is evaluated: one of `run`, `export`, `official` and `pretrained`.  A run needs its teacher, if its own
    configuration does not name it, and official weights theirs; the teacher of an export lies in the folder."""

    run: Optional[Text] = None
    """Folder of a stage-2 run."""
    weights: RunWeights = 'latest'
    """Which weights of the run: `latest`, those of its newest checkpoint, or `best`, which `save_best` kept."""
    export: Optional[Text] = None
    """Folder that `export_hf` wrote."""
    official: Optional[Text] = None
    """Official LLM2CLIP weights, a file or a Hugging Face folder, as for `import_official`."""
    vision: Optional[VisionConfig] = None
    """The tower of `official`."""
    pretrained: Optional[Text] = None
    """Hub name or folder of a CLIP or SigLIP of transformers, with its own text tower: the baseline."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for forward passes in bfloat16, of images as well as of texts."""
    teachers: list[Text] = field(default_factory=list)
    """In place of `teacher`: the folders of `train_data.teachers`, in that order; their vectors are concatenated."""


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
    templates: Text = MISSING
    """Text file with one prompt per line, `{}` for the class name; a class is the mean of its prompts."""


@dataclass
class LinearProbeConfig:
    """Logistic regression on the frozen tower's features."""

    train: Component = MISSING
    """Set to learn from; a fifth of it chooses the regularisation."""
    test: Component = MISSING
    """Set whose images are classified."""


@dataclass
class CRAConfig:
    """Caption retrieval accuracy of text encoders on held-out pairs."""

    captions: Text = MISSING
    """MDS folder with the pairs."""
    caption_keys: Annotated[list[Text], Field(min_length=2, max_length=2)] = field(
        default_factory=lambda: ['short', 'long'])
    """The two captions of a sample that have to find each other."""
    encoders: dict[str, TextEncoderConfig] = field(default_factory=dict)
    """Result name -> LLM, not trained here, and how it encodes."""
    teachers: dict[str, Text] = field(default_factory=dict)
    """Result name -> folder that stage 1 wrote, which knows how it encodes."""
    limit: Optional[Count] = None
    """Number of pairs, from the first on.  Unset: all."""
    batch_tokens: Count = 4096
    """Tokens per forward pass; texts are packed without padding."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for a forward pass in bfloat16."""


@dataclass
class EvaluateConfig:
    """Numbers of trained models, side by side."""

    models: dict[Text, EvaluatedModelConfig] = field(default_factory=dict)
    """Name in the tables -> model."""
    out: Text = MISSING
    """Folder that receives `results.json`, `results.md` and `report.html`."""
    cache: Text = '${out}/text_embeddings'
    """Folder that keeps the teachers' vectors of captions for the next time, and for other models of that teacher."""
    retrieval: dict[Text, RetrievalConfig] = field(default_factory=dict)
    """Name in the tables -> retrieval benchmark: images, and the captions that belong to them."""
    zeroshot: dict[Text, ZeroshotConfig] = field(default_factory=dict)
    """Name in the tables -> classification by class names."""
    linear_probe: dict[Text, LinearProbeConfig] = field(default_factory=dict)
    """Name in the tables -> logistic regression on the frozen tower's features."""
    cra: Optional[CRAConfig] = None
    """Caption retrieval accuracy of text encoders on held-out pairs."""
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
        """Raise a ConfigError if there is nothing to evaluate."""
        if self.models and not (self.retrieval or self.zeroshot or self.linear_probe):
            raise ConfigError('retrieval: expected a benchmark there, in zeroshot or in linear_probe for the models')
        if not self.models and (self.retrieval or self.zeroshot or self.linear_probe or self.cra is None):
            raise ConfigError('models: {}, expected at least one')


@dataclass
class HubConfig:
    """Where a finished folder is uploaded."""

    push_to_hub: Optional[Repository] = None
    """`owner/name` of a repository on the Hugging Face Hub.  The token is read from HF_TOKEN in the environment, and
    from nowhere else.  Unset: the folder is not uploaded."""
    private: bool = False
    """Make that repository a private one."""


@dataclass
class ExportConfig(HubConfig):
    """Stage-2 run and teacher -> one Hugging Face folder."""

    run: Text = MISSING
    """Folder of a stage-2 run."""
    weights: RunWeights = 'latest'
    """`latest` or `best`, as for `evaluate`."""
    teacher: Optional[Text] = None
    """Folder of the teacher that the run learned from.  Unset: as the run's configuration names it."""
    teachers: list[Text] = field(default_factory=list)
    """In place of `teacher`: the folders of `train_data.teachers`, in that order; their vectors are concatenated."""
    out: Text = MISSING
    """The model goes to `out/llm2clip`."""
    remote_code: bool = False
    """Put the code into the folder that loads it, by `trust_remote_code=True`, where this package is not installed."""
    results: Optional[Text] = None
    """Folder that `evaluate` wrote about these weights; its numbers go into the model card."""


@dataclass
class ExportVisionConfig(HubConfig):
    """Stage-2 run -> its vision tower alone, as transformers or timm load it."""

    run: Text = MISSING
    """Folder of a stage-2 run."""
    weights: RunWeights = 'latest'
    """`latest` or `best`, as for `evaluate`."""
    out: Text = MISSING
    """Folder that receives the tower."""
    projection: bool = True
    """Include the projection into the joint space, where the class has a place for one: CLIP's, and timm's."""


@dataclass
class ExportTeacherConfig:
    """Teacher -> one sentence-transformers folder."""

    teacher: Text = MISSING
    """Folder that stage 1 wrote."""
    out: Text = MISSING
    """Folder that receives the sentence-transformers model."""
    prompts: Optional[dict[str, str]] = None
    """Name -> instruction, for `encode(…, prompt_name=…)`.  Unset: `query`, the teacher's own instruction."""


@dataclass
class ImportConfig:
    """Official LLM2CLIP weights -> this project's folders: the model in `out`/llm2clip, a teacher in `out`/teacher."""

    checkpoint: Optional[Text] = None
    """Weights of the model: a file (`.pt`, `.safetensors`), or a Hugging Face folder.  Unset: the teacher alone."""
    vision: Optional[VisionConfig] = None
    """The tower of `checkpoint`.  A Hugging Face folder says the `architecture` itself."""
    teacher: Optional[Text] = None
    """Folder of the teacher that the model learned from, imported before."""
    text_encoder: Optional[TextEncoderConfig] = None
    """That teacher as it is published: an LLM, and in `adapters` LLM2Vec's adapters if they are not merged."""
    template: Optional[Literal['llama3', 'chatml', 'none']] = None
    """What LLM2Vec puts around a caption: `llama3`, `chatml` or `none`.  Unset: by the LLM's name, as LLM2Vec does."""
    out: Text = MISSING
    """Folder that receives `llm2clip` (the model) and `teacher`."""

    def check(self) -> None:
        """Raise a ConfigError if there is not one teacher, or a model without its tower."""
        if (self.teacher is None) == (self.text_encoder is None):
            raise ConfigError('teacher: expected either this (a folder of this project) or text_encoder (an official '
                              'LLM)')
        if self.checkpoint is not None and self.vision is None:
            raise ConfigError('vision: required but not set, since checkpoint is')


@dataclass
class ReportConfig:
    """Everything a pipeline wrote -> one HTML file."""

    results: Text = MISSING
    """Folder that `evaluate` wrote."""
    out: Text = MISSING
    """Receives `report.html` and `results.json`, whose format is described in `llm2clip/evaluation/report.py`."""
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
    images: Optional[Text] = None
    """Folder of images, with those in it.  New, changed and removed files are brought into the index.  Unset: the index
    is searched as it is."""
    index: Text = 'runs/search'
    """Folder of the index, which is of one model and one folder of images."""
    query: Any = None
    """A text, the path of an image file, or a list of them.  Unset, the index is only brought up to date."""
    top: Count = 10
    """Images per query."""
    html: Optional[Text] = None
    """File for a page with the pictures."""
    batch_size: Count = 64
    """Images per forward pass."""
    precision: TeacherPrecision = 'fp32'
    """`fp32`, or `amp_bf16` for forward passes in bfloat16, of images as well as of texts."""
    num_workers: Natural = 2
    """Processes per rank that read and decode images."""
    device: Optional[DeviceName] = None
    """`gpu` or `cpu`.  Unset: a GPU if there is one."""
