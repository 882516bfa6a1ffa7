# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Vision towers by name: pixels -> pooled features, with the layer structure that training needs."""

from collections import defaultdict
from itertools import pairwise
from typing import Any, Optional

import torch
import torch.nn as nn
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch.nn.utils import fuse_conv_bn_eval

from llm2clip.config import VisionConfig
from llm2clip.data.images import Preprocessing
from llm2clip.errors import ConfigError, under
from llm2clip.modeling import modeling_llm2clip
from llm2clip.modeling.image_processing_llm2clip import normalize
from llm2clip.models.towers import load_tower, tower_preprocessing
from llm2clip.models.vision_lora import add_lora, dry_forward


class VisionEncoder(modeling_llm2clip.VisionEncoder):
    """A timm or transformers tower without its classifier.
    Set `load_weights` to False if a checkpoint of the whole model is loaded next.

    `width` is that of the pooled features, and `num_layers` the number of layers for learning-rate decay:
    embeddings, blocks, and the rest.
    """

    def __init__(self, config: VisionConfig, load_weights: bool = True) -> None:
        preprocessing = tower_preprocessing(config)
        tower = load_tower(config, load_weights)
        beside = _load_beside(config, preprocessing, load_weights)
        super().__init__(tower.trunk, config.feature_levels, beside)
        self.preprocessing = preprocessing
        self.config = config
        self.tower = tower
        if config.lora is not None:
            add_lora(self.trunk.eval(), config.lora, self.preprocessing.image_size)
        self.layer_ids = self.tower.layer_ids()
        self.num_layers = max(self.layer_ids.values()) + 1
        self.no_weight_decay = self.tower.no_weight_decay
        self._blocks = set(self.tower.blocks())
        if config.gradient_checkpointing:
            self.tower.checkpoint_gradients()
        last = self.num_layers - 1
        if not 0 <= config.freeze_blocks < last:
            raise ConfigError(f'{config.freeze_blocks} is not between 0 and {last - 1}, the blocks of '
                              f'{config.name}', key='freeze_blocks')
        for name, parameter in self.trunk.named_parameters():
            in_frozen_block = config.freeze_blocks > 0 and self.layer_ids[name] <= config.freeze_blocks
            if config.freeze or in_frozen_block:
                parameter.requires_grad_(False)
        self._patch_dropout = 0.0
        self._sample_seed: Optional[torch.Tensor] = None
        self.train()  # frozen parts are in evaluation mode from the beginning

    def drop_patches(self, rate: float) -> None:
        """Leave out the share `rate`, below 1, of an image's patches in training (FLIP, arXiv 2212.00794)."""
        self._patch_dropout = rate
        self.tower.on_tokens(self._keep)

    def _keep(self, tokens: torch.Tensor, prefix: int) -> Optional[torch.Tensor]:
        if not self.training:
            return None
        assert self._sample_seed is not None, 'patch dropout needs the sample_seed of the batch'
        return kept_patches(self._sample_seed.to(tokens.device), tokens.shape[1] - prefix,
                            self._patch_dropout)

    def is_block(self, module: nn.Module) -> bool:
        """Return whether a module is one of the tower's repeated layers."""
        return module in self._blocks

    def train(self, mode: bool = True) -> 'VisionEncoder':
        super().train(mode)
        self.beside.eval()
        if self.config.freeze:
            self.trunk.eval()
        if self.config.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)):
                    module.eval()
        return self

    def fuse_frozen_batch_norms(self) -> None:
        """Fuse BatchNorms of frozen layers into their convolutions; no weights may be loaded later."""
        if self.config.freeze or self.config.freeze_batch_norm:
            training = self.training
            fuse_frozen_batch_norms(self.trunk.eval(), self.preprocessing.image_size)
            self.train(training)
        encoder: Any
        for encoder in self.beside:
            encoder.fuse_frozen_batch_norms()

    def forward(self, pixel_values: torch.Tensor, sample_seed: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Encode images ``(B, 3, H, W)``, in uint8 as loaders return them or normalised, as ``(B, width)``;
        `sample_seed` ``(B,)`` seeds patch dropout."""
        # Not in the loader: Composer keeps a microbatch on the device twice, which is smaller in uint8.
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize(pixel_values, self.preprocessing.mean, self.preprocessing.std)
        self._sample_seed = sample_seed
        return super().forward(pixel_values)


def _load_beside(
    config: VisionConfig, preprocessing: Preprocessing, load_weights: bool
) -> list[VisionEncoder]:
    encoders = []
    for i, tower in enumerate(config.beside):
        with under(f'beside.[{i}]'):
            settings = VisionConfig(**vars(tower), image_size=config.image_size, mean=config.mean,
                                    std=config.std, freeze=True)
            encoder = VisionEncoder(settings, load_weights)
            if encoder.preprocessing != preprocessing:
                raise ConfigError(f'{tower.name} has another mean and std of pixels than {config.name}, and '
                                  'both read the same pixels', key='name')
        encoders.append(encoder)
    return encoders


def kept_patches(sample_seed: torch.Tensor, patches: int, rate: float) -> torch.Tensor:
    """Choose the patches with the smallest hashes: ``(B,)`` int64 seeds -> sorted indices ``(B, kept)``.
    The hash is splitmix64 of a sample's seed and a patch's position; int64 arithmetic wraps around."""
    kept = max(1, round(patches * (1 - rate)))
    x = sample_seed[:, None] + torch.arange(1, patches + 1, device=sample_seed.device) * -7046029254386353131
    for multiplier, shift in ((-4658895280553007687, 30), (-7723592293110705685, 27)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return x.argsort(dim=1, stable=True)[:, :kept].sort(dim=1).values


def fuse_frozen_batch_norms(trunk: nn.Module, image_size: int) -> int:
    """Let frozen convolutions compute the frozen BatchNorms behind them, too; return the number of pairs.

    The network is in evaluation mode, and its final weights are on their device: a fused convolution computes
    with copies of them.  Parameters and their names, which checkpoints and exports contain, do not change.
    This saves BatchNorm's passes over the activations.
    """
    conv: Any
    norm: Any
    pairs: list[tuple[Any, Any]] = []
    for module in trunk.modules():
        for conv, norm in pairwise(module.children()):
            if type(conv) in (nn.Conv2d, Conv2dSame) and type(norm) in (nn.BatchNorm2d, BatchNormAct2d):
                pairs.append((conv, norm))
    if not pairs:
        return 0
    # Outputs of convolutions, and inputs of BatchNorms.
    tensors: dict[nn.Module, list[torch.Tensor]] = defaultdict(list)
    hooks = []
    for conv, norm in pairs:
        hooks += [
            conv.register_forward_hook(lambda module, inputs, output: tensors[module].append(output)),
            norm.register_forward_pre_hook(lambda module, inputs: tensors[module].append(inputs[0])),
        ]
    dry_forward(trunk, image_size, hooks)
    num_fused = 0
    for conv, norm in pairs:
        outputs = tensors[conv]
        inputs = tensors[norm]
        is_frozen = not conv.weight.requires_grad and not norm.weight.requires_grad
        # Both have to run once, the BatchNorm on the output of the convolution.
        if is_frozen and len(outputs) == len(inputs) == 1 and outputs[0] is inputs[0]:
            conv.forward = fuse_conv_bn_eval(conv, norm).forward
            # A BatchNormAct2d contains dropout and activation; a BatchNorm2d contains nothing.
            norm.forward = nn.Sequential(*norm.children()).forward
            num_fused += 1
    return num_fused
