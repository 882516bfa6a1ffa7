# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2: vision tower and text adapter, trained with a contrastive loss."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torchmetrics import Metric

from llm2clip.config import LossConfig, ModelConfig, SelfDistillationConfig
from llm2clip.config.ranges import VisualProjection
from llm2clip.device import exact_float32
from llm2clip.errors import ConfigError, refuse, under
from llm2clip.losses.contrastive import all_gather, clip_loss, siglip_loss
from llm2clip.losses.distillation import instance_loss, structure_loss
from llm2clip.metrics.classification import MeanAveragePrecision, MeanPerClass, ZeroshotTop1
from llm2clip.metrics.retrieval import RetrievalRecall
from llm2clip.modeling.adapter import Adapter, AlignmentHead, Heads, make_heads, make_projection
from llm2clip.modeling.modeling_llm2clip import Towers
from llm2clip.models.adapter_folder import build_adapter
from llm2clip.models.model_with_metrics import ModelWithMetrics
from llm2clip.models.towers import load_projection
from llm2clip.models.vision_encoder import VisionEncoder
from llm2clip.registry import build, check

Batch = dict[str, torch.Tensor]


class LLM2CLIP(Towers):
    """Vision tower and text adapter that map images and text embeddings to a joint space.

    `llm_embed_dim` is the width of the text embeddings, `config.embed_dim` that of the joint space.
    `load_weights` loads the tower's pretrained weights.
    """

    def __init__(self, config: ModelConfig, llm_embed_dim: int, load_weights: bool = True) -> None:
        with under('model.vision'):
            vision_encoder = VisionEncoder(config.vision, load_weights)
        head = dataclasses.replace(config, embed_dim=config.embed_dim // config.heads)
        projection = make_heads(
            config.heads, lambda: _visual_projection(head, vision_encoder.width, load_weights))
        adapter = make_heads(
            config.heads, lambda: build_adapter(config.adapter, llm_embed_dim, head.embed_dim))
        super().__init__(vision_encoder, projection, adapter, math.log(config.logit_scale), config.logit_bias)
        self.heads = config.heads

    # Composer only looks up these methods on the direct children of a ComposerModel.
    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Shard every block of the vision tower and the adapter, and each part around its blocks, as an FSDP
        unit.  The outermost unit keeps the temperature and the bias, which stay float32."""
        if module in (self.vision_encoder, self.visual_projection, self.adapter):
            return next(module.parameters(), None) is not None
        return self.is_block(module)

    def is_block(self, module: nn.Module) -> bool:
        """Return whether a module is a repeated layer of the vision tower or of the adapter."""
        return self.vision_encoder.is_block(module) or Adapter.is_block(module)

    def fsdp_float32_inputs_fn(self, module: nn.Module) -> bool:
        """Return whether FSDP leaves the dtype of a module's inputs unchanged, as for the adapter."""
        return module is self.adapter

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """Recompute each block of the vision tower separately with `fsdp.activation_checkpointing`."""
        return self.vision_encoder.is_block(module)

    def get_image_features(
        self, pixel_values: torch.Tensor, sample_seed: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Encode images ``(B, 3, H, W)``, or features ``(B, width)`` of the tower, as ``(B, embed_dim)``,
        L2-normalised; arguments as for `VisionEncoder`."""
        is_pooled = pixel_values.ndim == 2
        pooled = pixel_values.float() if is_pooled else self.vision_encoder(pixel_values, sample_seed)
        return F.normalize(self.visual_projection(pooled).float(), dim=-1)

    def get_text_features(self, text_embedding: torch.Tensor) -> torch.Tensor:
        """Project text embeddings ``(…, llm_embed_dim)`` to ``(…, embed_dim)``, L2-normalised."""
        assert text_embedding.is_floating_point(), f'{text_embedding.dtype} without its scales'
        return F.normalize(self.adapter(text_embedding.float()).float(), dim=-1)

    def forward(
        self, pixel_values: torch.Tensor, text_embedding: torch.Tensor,
        sample_seed: Optional[torch.Tensor] = None
    ) -> Batch:
        """Return ``image_features``, ``text_features``, ``logit_scale`` (its log), and any ``logit_bias``."""
        # Copies, since FSDP2 frees gathered parameters after the forward pass.
        outputs = {
            'image_features': self.get_image_features(pixel_values, sample_seed),
            'text_features': self.get_text_features(text_embedding),
            'logit_scale': self.logit_scale.clone(),
        }
        if self.logit_bias is not None:
            outputs['logit_bias'] = self.logit_bias.clone()
        return outputs


def projection_kind(projection: nn.Module) -> VisualProjection:
    """Return the kind of a projection layer, pretrained or not, or that of each head."""
    if isinstance(projection, Heads):
        projection = projection[0]
    if isinstance(projection, AlignmentHead):
        return 'mlp' if projection.gate is None else 'glu'
    if isinstance(projection, nn.Linear):
        return 'linear' if projection.bias is None else 'affine'
    return 'identity'


def _visual_projection(config: ModelConfig, width: int, load_weights: bool) -> nn.Module:
    if config.visual_projection in ('pretrained', 'identity'):
        projection: Any = nn.Identity()
        if config.visual_projection == 'pretrained':
            with under('model.vision'):
                projection = load_projection(config.vision, config.embed_dim, load_weights)
        width = getattr(projection, 'out_features', width)
        if width != config.embed_dim:
            raise ConfigError(f'{config.embed_dim} is not the width of the features of {config.vision.name}, '
                              f'{width}, as model.visual_projection: {config.visual_projection} needs',
                              key='model.embed_dim')
        return projection
    projection = make_projection(width, config.embed_dim, config.visual_projection,
                                 config.visual_projection_expansion)
    if not isinstance(projection, nn.Linear):
        return projection
    if config.visual_projection_init == 'orthogonal':
        # Orthogonal rows distort the angles between the pretrained tower's features least.
        nn.init.orthogonal_(projection.weight)
    else:
        # As in the official eva_clip/transformer.py, and in eva_vit_model.py: 0.02 times 0.001.
        std = {'clip': width ** -0.5, 'eva': 2e-5}[config.visual_projection_init]
        nn.init.normal_(projection.weight, std=std)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    return projection


def check_truncate_dim(dim: Optional[int], config: ModelConfig) -> None:
    """Raise a ConfigError for `truncate_dim` if a model's features have fewer than `dim` dimensions, or
    several heads."""
    if dim is not None:
        refuse([
            ('truncate_dim', config.heads > 1, f'the model has {config.heads} heads, expected 1'),
            ('truncate_dim', dim > config.embed_dim,
             f'{dim}, expected at most the {config.embed_dim} dimensions of the model'),
        ])


def truncate_dims(model: LLM2CLIP, config: ModelConfig, dim: Optional[int]) -> ModelConfig:
    """Truncate a model's features to `dim` dimensions, L2-normalised again; return its new configuration.

    `loss.matryoshka_dims` trains such features (arXiv 2205.13147).  The last layer of either side keeps its
    first `dim` rows.  The model is changed in place, unless `dim` is None.
    """
    if dim is None:
        return config
    for side in ('visual_projection', 'adapter'):
        layer = getattr(model, side)
        if isinstance(layer, nn.Identity):
            layer = nn.Linear(config.embed_dim, config.embed_dim, bias=side == 'adapter')
            nn.init.eye_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            setattr(model, side, layer)
        last = getattr(layer, 'projection', layer)
        last.out_features = dim
        for parameter in last.parameters():
            parameter.data = parameter.data[:dim].clone()
    adapter = config.adapter
    if adapter.name == 'identity':
        adapter = dataclasses.replace(adapter, name='linear')
    return dataclasses.replace(config, embed_dim=dim, adapter=adapter,
                               visual_projection=projection_kind(model.visual_projection))


class LossModule(nn.Module):
    """Wrapper of a module that maps, in float32, ``image_features`` ``(N, D)`` and ``text_features``
    ``(N, K, D)`` of the global batch and ``logit_scale`` ``(1,)`` to its loss, a scalar; every rank does so.

    Its parameters are outputs of the model's forward pass, as `logit_scale` is, so that GradCache, DDP and
    FSDP2 treat them in the same way.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, anything: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return name -> parameter, flattened.  On GPUs, FSDP2 of torch 2.7 requires the unused input."""
        return {name: parameter.flatten().clone() for name, parameter in self.named_parameters()}

    def global_loss(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of the global batch from this rank's outputs of the model and of `forward`."""
        texts = outputs['text_features']
        if texts.ndim == 2:
            texts = texts[:, None]
        inputs = all_gather(outputs['image_features']), all_gather(texts), outputs['logit_scale']
        parameters = {name.removeprefix('loss.'): outputs[name].view(parameter.shape)
                      for name, parameter in self.named_parameters()}
        # DDP waits for a gradient of every output, also of those that the module does not use.
        zero = 0 * torch.stack([value.sum() for value in outputs.values()]).sum()
        with exact_float32(texts.device.type):
            return functional_call(self.loss, parameters, inputs) + zero


def build_loss(config: LossConfig) -> Optional[LossModule]:
    """Build the module that ``loss.name`` and ``loss.arguments`` select; None for a loss of this package."""
    if ':' not in config.name:
        return None
    check('loss', config.name, {}, 'loss.name')
    return LossModule(build('loss', config.name, config.arguments, 'loss.arguments'))


class ComposerLLM2CLIP(ModelWithMetrics):
    """Stage-2 training on text embeddings.

    A training batch holds ``pixel_values`` ``(B, 3, H, W)`` in uint8, ``text_embedding``
    ``(B, llm_embed_dim)`` of any float type, ``text_id`` and ``sample_seed`` ``(B,)``.  With K captions per
    image, and in evaluation, ``text_embedding`` is ``(B, K, llm_embed_dim)`` and ``text_id`` ``(B, K)``.
    Evaluation also needs the images' ``index`` ``(B,)``.  ``image_embedding`` ``(B, width)``, features of the
    frozen tower, may replace ``pixel_values``.  With ``initial_image_features`` ``(B, embed_dim)``, the loss
    includes the distillation losses towards them, weighted by `self_distillation`.

    A batch of a zero-shot set has ``class_features`` ``(C, embed_dim)`` and ``label``: each image's class
    ``(B,)`` or, for any number of classes, a 0 or 1 per class ``(B, C)``.  Its ``text_embedding`` is ignored.
    """

    feature_names = ('image_features', 'text_features')
    # Metrics for images with captions, with one class each, and with any number of classes.
    retrieval_metrics: dict[str, type[Metric]] = {'retrieval_recall@10': RetrievalRecall}
    zeroshot_metrics: dict[str, type[Metric]] = {'zeroshot_top1': ZeroshotTop1,
                                                 'mean_per_class': MeanPerClass}
    multilabel_metrics: dict[str, type[Metric]] = {'mean_average_precision': MeanAveragePrecision}
    metrics = retrieval_metrics | zeroshot_metrics | multilabel_metrics

    def __init__(
        self, model: LLM2CLIP, loss: Optional[LossConfig] = None,
        self_distillation: Optional[SelfDistillationConfig] = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.self_distillation = self_distillation or SelfDistillationConfig()
        self.loss_config = loss or LossConfig()
        self.loss_module = build_loss(self.loss_config)

    def forward(self, batch: Batch) -> Batch:
        """Return `features` and, if the loss is the user's, its parameters."""
        outputs = self.features(batch)
        if self.loss_module is None:
            return outputs
        return outputs | self.loss_module(outputs['image_features'])

    def features(self, batch: Batch) -> Batch:
        """Return the outputs of `LLM2CLIP` for this rank's samples."""
        key = 'image_embedding' if 'image_embedding' in batch else 'pixel_values'
        return self.model(batch[key], batch['text_embedding'], batch.get('sample_seed'))

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch, *_: Any) -> torch.Tensor:
        """Return this rank's part of the loss; the mean over ranks is the loss of the global batch."""
        images = outputs['image_features']
        texts = outputs['text_features']
        heads = self.model.heads
        text_id = None
        if self.loss_config.mask_equal_texts:
            text_id = batch['text_id'].to(images.device)
        if self.loss_module is not None:
            loss = self.loss_module.global_loss(outputs)
        elif heads == 1:
            loss = self._contrastive_loss(images, texts, outputs, text_id)
        else:
            # The features of a head have the length 1 / sqrt(heads).
            parts = zip((images * heads).chunk(heads, -1), texts.chunk(heads, -1))
            losses = [self._contrastive_loss(*features, outputs, text_id) for features in parts]
            loss = torch.stack(losses).mean()
        if 'initial_image_features' in batch:
            targets = batch['initial_image_features'].to(images.device)
            weights = self.self_distillation
            loss = (loss + weights.instance * instance_loss(images, targets)
                    + weights.structure * structure_loss(images, targets, self.loss_config.block_size))
        return loss

    def _contrastive_loss(
        self, images: torch.Tensor, texts: torch.Tensor, outputs: Mapping[str, torch.Tensor],
        text_id: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """Return the loss of the features of one head."""
        config = self.loss_config
        scale = outputs['logit_scale']
        if config.name == 'siglip':
            return siglip_loss(images, texts, scale, outputs['logit_bias'], text_id, config.block_size,
                               config.matryoshka_dims)
        return clip_loss(images, texts, scale, text_id, config.block_size, config.matryoshka_dims)

    def update_metric(self, batch: Batch, outputs: Batch, metric: Metric) -> None:
        if 'label' in batch:
            metric.update(outputs['image_features'], batch['class_features'], batch['label'], batch['index'])
        else:
            metric.update(outputs['image_features'], outputs['text_features'], batch['index'],
                          batch['text_id'])
