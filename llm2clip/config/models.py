# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Configuration of models and losses (text encoder, vision tower, adapter), and of plans."""

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, Optional

from omegaconf import MISSING
from pydantic import Field

from llm2clip.config.ranges import (
    Component,
    Count,
    Dims,
    Finite,
    LossName,
    Natural,
    Positive,
    SampleCount,
    Share,
    SmallCount,
    Text,
    Texts,
    VisualProjection,
    WeightType,
)
from llm2clip.config.recipe import Output, RecipeConfig
from llm2clip.errors import ConfigError, nearest


@dataclass
class TextEncoderConfig:
    """LLM as a text encoder: its weights, and how a caption becomes one vector."""

    key: ClassVar[str] = 'text_encoder'  # its key in a configuration
    pretrained: Text = MISSING
    """Hugging Face hub name or local folder of the LLM."""
    gguf_file: Optional[Text] = None
    """Weights file inside `pretrained`, if it is in GGUF format."""
    adapters: list[Text] = field(default_factory=list)
    """LoRA adapters (folders or hub names) to merge into the LLM in this order, before a new one is added."""
    bidirectional: bool = True
    """Drop the causal mask in every layer (LLM2CLIP section 3.1); padding stays masked."""
    pooling: Literal['mean', 'weighted_mean', 'last'] = 'mean'
    """`mean` or `weighted_mean` (token i has weight i) over the caption and the template's end token, or
    `last`, the end token alone."""
    chat_template: Optional[bool] = None
    """Wrap the caption as a user message of the tokenizer's chat template; its header is not pooled.  Unset:
    if the tokenizer has one."""
    instruction: str = ''
    """Text before a query caption, separated by one space; not pooled."""
    max_length: Count = 512
    """Maximum input length in tokens, template and instruction included.
    Longer captions are cut and counted."""
    dtype: WeightType = 'float32'
    """Data type of the LLM's own weights; LoRA weights stay float32.
    FSDP requires one data type, so `float32`."""
    attn_implementation: Optional[Literal['sdpa', 'eager']] = None
    """`sdpa` or `eager`.  Unset: `sdpa`, or `eager` for Gemma 2, because only that soft-caps attention
    scores."""
    trust_remote_code: bool = False
    """Run code that comes with the tokenizer. Leave off unless you have read that code."""


@dataclass
class LoraConfig:
    """LoRA on the LLM (paper, section 4.1) or the vision tower; the names follow peft."""

    r: SmallCount = 16
    """Rank of the LoRA matrices."""
    lora_alpha: Count = 32
    """The LoRA update is scaled by `lora_alpha` / `r`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout probability on the input of the LoRA matrices during training."""
    target_modules: Optional[Texts] = None
    """Names of the projections that get LoRA.  Unset: all attention and MLP projections, for any
    architecture; of a vision tower, all linear layers and 1x1 convolutions."""


@dataclass
class ClipTextConfig:
    """CLIP's own text tower, with its projection and its tokenizer."""

    name: Text = MISSING
    """Hub name or local folder of a CLIP or SigLIP of transformers.
    Texts beyond its maximum length are cut."""
    pretrained: bool = True
    """Start from the weights of `name`; `false`: from random weights."""
    architecture: Component = field(default_factory=dict)
    """Content of a `config.json`, with `model_type` (`clip_text_model`, …), instead of the one in `name`."""


@dataclass
class TrainableTextConfig:
    """Text encoder that stage 2 trains beside the vision tower: the LLM by LoRA, or CLIP's own text tower."""

    lora: Optional[LoraConfig] = None
    """Train new LoRA weights of the LLM in the folder `teacher` (paper, table A4).
    Unset: it stays frozen."""
    clip: Optional[ClipTextConfig] = None
    """CLIP's text tower, trained on the captions in place of the LLM."""


@dataclass
class MNTPConfig:
    """Masked next-token prediction (LLM2Vec, section 2.2), which teaches an LLM to use the context on the
    right."""

    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of tokens to mask.  Each is predicted from the position before it."""
    mask_token: Text = '_'
    """Masked tokens become the first token of this text, because LLMs have no mask token of their own."""


@dataclass
class TowerConfig:
    """Architecture, weights and features of a vision tower from timm or transformers."""

    name: Text = MISSING
    """timm model (also `hf-hub:…`, `local-dir:…`), or hub name or local folder of a Hugging Face image
    model."""
    pretrained: bool = True
    """Start from the weights of `name`; `false`: from random weights."""
    checkpoint: Optional[Text] = None
    """Local weights file of a timm model, instead of the weights of `name`; no code in it is run."""
    remap: bool = False
    """The checkpoint has the same parameters in the same order under other names."""
    architecture: Component = field(default_factory=dict)
    """Content of a `config.json`, with `model_type` (`clip_vision_model`, …),
    instead of the one in `name`."""
    feature_levels: Natural = 0
    """Of a timm model, the number of last feature maps (stages of a convolutional network, blocks of a
    transformer) that are averaged over positions and placed beside the pooled features, each part scaled to
    length 1.  0: the pooled features alone."""


@dataclass
class VisionConfig(TowerConfig):
    """A vision tower, or several that read the same pixels."""

    image_size: SmallCount = 224
    """Side of the square input image in pixels; position embeddings are interpolated to it."""
    mean: Optional[Annotated[list[Share], Field(min_length=3, max_length=3)]] = None
    """Mean of red, green and blue (0 to 1) for normalisation, instead of the tower's own.
    Set `std` as well."""
    std: Optional[Annotated[list[Positive], Field(min_length=3, max_length=3)]] = None
    """Standard deviation of red, green and blue.  Set `mean` as well."""
    freeze: bool = False
    """Freeze the tower, and train only the projection and the adapter (LiT)."""
    freeze_blocks: Natural = 0
    """Freeze the embeddings and the first N blocks; 0 freezes nothing."""
    lora: Optional[LoraConfig] = None
    """Freeze the tower's own weights, and train LoRA weights beside them, which exports merge.  `{}`: with
    the defaults.  Unset: train the tower's own weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a fifth of the step's FLOPs, for much less memory.  With
    FSDP, `fsdp.activation_checkpointing` does the same."""
    freeze_batch_norm: bool = True
    """Use the pretrained statistics of BatchNorm, so that the features of an image do not depend on its
    batch."""
    beside: list[TowerConfig] = field(default_factory=list)
    """Further towers, always frozen, whose features follow those of the first."""


@dataclass
class AdapterConfig:
    """Network from the teacher's vectors to the joint space."""

    name: Literal['residual', 'mlp', 'glu', 'linear', 'identity'] = 'residual'
    """`residual`: the MLP of the official code.  `mlp`, `glu`: as for `visual_projection`.  `linear`: one
    layer.  `identity`: no layer, for equal widths."""
    depth: Natural = 4
    """Number of residual blocks."""
    expansion: SmallCount = 2
    """Hidden width of an MLP relative to its input; 8 in SAIL's `glu`."""
    normalize: bool = True
    """Scale the teacher's vectors to length 1 before the first block of `residual`; the others read them
    unchanged."""


@dataclass
class ModelConfig:
    """Vision tower and adapter, which map to a joint space of `embed_dim` dimensions."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    embed_dim: SmallCount = 1280
    """Width of the joint space."""
    heads: SmallCount = 1
    """Number of pairs of projection and adapter, each with a loss of its own and `embed_dim` / `heads`
    dimensions.  Cosine similarities are the means of theirs, as in an ensemble."""
    visual_projection: VisualProjection = 'linear'
    """From the tower's width to `embed_dim`: `linear`, `affine` (with a bias), `identity` (for equal widths)
    or `pretrained`, the tower's original projection to the space of its CLIP.  `mlp` and `glu` (gated) are
    SAIL's alignment layers with one hidden layer (arXiv 2412.04616), for a frozen tower."""
    visual_projection_expansion: SmallCount = 8
    """Hidden width of `mlp` or `glu` relative to the tower's width; SAIL has 8 for `glu`."""
    visual_projection_init: Literal['orthogonal', 'clip', 'eva'] = 'orthogonal'
    """Initialisation of `linear` or `affine`.  `orthogonal` keeps the angles between the tower's features.
    As in the official code, `clip` and `eva` are random with standard deviation 1 / sqrt(tower's width)
    and 0.00002."""
    logit_scale: Positive = 1 / 0.07
    """Initial factor on the cosine similarities."""
    logit_bias: Optional[Finite] = None
    """Initial bias of the logits, for `loss.name: siglip` only.
    SigLIP starts at -10, with `logit_scale` 10."""

    @property
    def merged(self) -> 'ModelConfig':
        """Configuration of the model after the LoRA weights of its vision tower are merged."""
        return replace(self, vision=replace(self.vision, lora=None))


@dataclass
class LossConfig:
    """Loss of stage 2, over the global batch."""

    name: LossName = 'clip'
    """`clip`: cross-entropy over all candidates.  `siglip`: a sigmoid per pair.  `module:class`: your own
    `torch.nn.Module`."""
    arguments: Component = field(default_factory=dict)
    """Arguments of the class, of a loss of your own."""
    mask_equal_texts: bool = False
    """Do not use samples of the global batch with the same caption as each other's negatives."""
    block_size: Optional[Count] = None
    """Rows of the logit matrix that a rank computes at once, to save memory.  Unset: all."""
    matryoshka_dims: Dims = field(default_factory=list)
    """Average the losses of the first N feature dimensions, scaled to length 1, for each N in the list
    (Matryoshka).  Example: `[64, 128, 256, 512, 1280]`, the last being `model.embed_dim`.
    Empty: one loss over all dimensions."""


@dataclass
class PlanConfig(RecipeConfig):
    """Dry run of a recipe, without a GPU: what it needs, and the errors that can be detected."""

    plan: bool = False
    """Print a plan from the datasets' indexes and a dry run of one step, and exit."""
    plan_ranks: Optional[SmallCount] = None
    """Number of GPUs to plan for.  Unset: the number that the launcher starts."""
    plan_samples: Optional[SampleCount] = None
    """Samples per epoch, or images to embed, for data that is not available yet.
    Of datasets on disk, only captions are then read, for their lengths."""
    plan_mfu: Optional[Annotated[float, Field(gt=0, le=1)]] = None
    """Fraction of the peak FLOP/s of a GPU, for all FLOPs of a step including recomputation.
    Unset: the time follows from FLOPs, bytes in memory and bytes of collectives."""
    plan_price: Optional[Positive] = None
    """Price of one GPU-hour, in any currency."""


@dataclass
class TextPlanConfig(PlanConfig):
    """Dry run of a recipe that may have an LLM."""

    plan_tokens: Optional[Count] = None
    """Mean tokens per text, template included, for time and price.  Unset: estimated from the first shard
    (four characters per token); without data, 80 are assumed, an estimate for DreamLIP's captions."""
    plan_llm: Optional[Text] = None
    """Folder with the `config.json` of the LLM or of the teacher, if that is not available yet."""


@dataclass
class PipelineConfig(TextPlanConfig):
    """Several recipes, one after another.  Further keys of its file are names that steps refer to."""

    resumes = True
    records_duration = False
    steps: Annotated[dict[str, Annotated[list[str], Field(min_length=1)]], Field(min_length=1)] = MISSING
    """Name of a step -> its recipe, YAML files and `key=value` overrides.  `${folder}` in them is the value
    of the key `folder` of the same file; empty ones are left out, and null removes a step."""
    ranks: SmallCount = 1
    """GPUs to use in recipes that Composer's launcher can start on several."""
    start: Optional[Text] = None
    """Name of the first step to run.  Unset: the first of all."""
    only: Optional[Texts] = None
    """Names of the steps to run.  Unset: all."""
    print: bool = False
    """Print the command of each step, and exit."""
    end: str = ''
    """Text to print after the last step."""

    @property
    def output_folder(self) -> str:
        """What the recipe runs, since it writes nothing itself."""
        return f'{len(self.steps)} steps'

    def outputs(self) -> list[Output]:
        """Return no folder: each step locks its own."""
        return []

    def check(self) -> None:
        """Raise a ConfigError if `start` or `only` name no step, or both are set."""
        if self.start is not None and self.only is not None:
            raise ConfigError('expected `start` or `only`, not both', key='start')
        chosen = {name: 'only' for name in self.only or []}
        if self.start is not None:
            chosen[self.start] = 'start'
        for name, key in chosen.items():
            if name not in self.steps:
                raise ConfigError(f'there is no step {name!r}; {nearest(name, self.steps)}', key=key)
