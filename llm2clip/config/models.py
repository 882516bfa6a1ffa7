# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Models and losses: text encoder, vision tower, adapter; and what a plan takes for granted."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Optional

from omegaconf import MISSING
from pydantic import Field

from llm2clip.config.ranges import (
    Component,
    Count,
    Dims,
    Finite,
    Natural,
    Positive,
    SampleCount,
    Share,
    Text,
    Texts,
    VisualProjection,
    WeightType,
)


@dataclass
class TextEncoderConfig:
    """An LLM as a text encoder: where it comes from and how a caption becomes one vector."""

    key: ClassVar[str] = 'text_encoder'  # where it stands in a configuration
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
    """Text before a query caption, with one space between the two; never pooled."""
    max_length: Count = 512
    """Longest input in tokens, template and instruction included; longer captions are cut and counted."""
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
class ClipTextConfig:
    """A CLIP's own text tower, with its projection and its tokenizer."""

    name: Text = MISSING
    """Hub name or local folder of a CLIP or SigLIP of transformers.  Texts that it cannot read to their end are cut."""
    pretrained: bool = True
    """Begin with the weights that belong to `name`; `false`, with random ones."""
    architecture: Component = field(default_factory=dict)
    """Its `config.json` by `model_type` (`clip_text_model` or `siglip_text_model`), in place of the one in `name`."""


@dataclass
class TrainableTextConfig:
    """Text encoders that stage 2 trains beside the vision tower: LoRA on the LLM, CLIP's own text tower, or both."""

    lora: Optional[LoraConfig] = None
    """Train new LoRA weights of the LLM in the folder `teacher` (paper, table A4).  Unset: it is frozen."""
    clip: Optional[ClipTextConfig] = None
    """CLIP's text tower, which is trained on the captions; without `method`, in place of the LLM."""
    method: Optional[Literal['b', 'c', 'd']] = None
    """How CLIP's text tower stays beside the LLM (paper, section 3.2, table 9): `b`, both attract the image features;
    `c`, and each other; `d`, as `b`, and so does a projection of both, concatenated."""


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
    pretrained: bool = True
    """Begin with the weights that belong to `name`; `false`, with random ones."""
    checkpoint: Optional[Text] = None
    """Local file of a timm model's weights in place of those of `name`; read without running code."""
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
    freeze: bool = False
    """Train the projection and the adapter only (LiT)."""
    freeze_blocks: Natural = 0
    """Do not train the embeddings and this many blocks after them."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, a fifth of the FLOPs for much less memory.  With FSDP,
    `fsdp.activation_checkpointing` does the same."""
    freeze_batch_norm: bool = True
    """Keep BatchNorm on its pretrained statistics, so that a sample's features do not depend on its batch."""


@dataclass
class AdapterConfig:
    """From the teacher's vector to the joint space."""

    name: Literal['residual', 'transformer', 'linear', 'identity'] = 'residual'
    """`residual`, the MLP of the official code; `transformer`, whose blocks attend to trained latents (table 8);
    `linear`, or `identity`, for which both widths are equal."""
    depth: Natural = 4
    """Number of residual blocks, or of transformer blocks, of which the paper has one."""
    expansion: Count = 2
    """Hidden width of a block's MLP over its width; NV-Embed-v2's transformer has 4."""
    normalize: bool = True
    """Scale the teacher's vector to length 1 before the first block."""
    heads: Count = 8
    """Of the attention of `transformer`; they divide the width of the teacher's vectors."""
    latents: Count = 512
    """What a block of `transformer` attends to."""


@dataclass
class ModelConfig:
    """Vision tower and adapter, meeting in a space of `embed_dim` dimensions."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    embed_dim: Count = 1280
    """Width of the joint space."""
    visual_projection: VisualProjection = 'linear'
    """From the tower's width to `embed_dim`: `linear`; `affine`, which has a bias; `identity`, where both are equal; or
    `pretrained`, the one that the tower was trained with, into the space of its own CLIP."""
    visual_projection_init: Literal['orthogonal', 'clip', 'eva'] = 'orthogonal'
    """How a `linear` or `affine` one begins: `orthogonal`, which keeps the angles between the tower's features, or, as
    in the official code, at random with standard deviation 1 / sqrt(tower's width) (`clip`) or 0.00002 (`eva`)."""
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
    """Rows of its logit matrix that a rank computes at once.  Unset: all."""
    matryoshka_dims: Dims = field(default_factory=list)
    """Average over the losses of the first so many dimensions of the features, each time scaled to length 1
    (Matryoshka): `[64, 128, 256, 512]`, up to `model.embed_dim`.  Empty: one loss, of all dimensions."""


@dataclass
class PlanConfig:
    """What a run would need and what would go wrong: said in place of running it, on any machine, without GPU."""

    plan: bool = False
    """Print it, from the datasets' indexes and a dry run of a step, and stop."""
    plan_ranks: Optional[Count] = None
    """GPUs to plan for.  Unset: as many as the launcher starts."""
    plan_samples: Optional[SampleCount] = None
    """Samples per epoch, or to embed, for data that is not there yet; no dataset is then looked at."""
    plan_tokens: Optional[Count] = None
    """Mean number of tokens of a text, template included, for time and price.  Unset: estimated from the first shard,
    by four characters per token, or else the longest that the encoder reads."""
    plan_llm: Optional[Text] = None
    """Folder with the `config.json` of the LLM, or of the teacher's, which need not be there then."""
    plan_gpu: Literal['A100', 'H100', 'H200', 'B200'] = 'H100'
    """GPU that the step has to fit."""
    plan_mfu: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of a GPU's peak at which the FLOPs of a step, recomputation included, are taken to be computed."""
    plan_price: Optional[Positive] = None
    """Price of one GPU-hour, in any currency."""
