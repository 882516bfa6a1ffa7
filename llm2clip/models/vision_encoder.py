# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Vision towers by name, each with its own preprocessing."""

from pathlib import Path

import timm
import timm.models
import torch
import torch.nn as nn

from llm2clip.config import ConfigError, VisionConfig
from llm2clip.preprocessing import Preprocessing

__all__ = ['VisionEncoder', 'vision_preprocessing']


def vision_preprocessing(config: VisionConfig) -> Preprocessing:
    """The tower's own normalisation, known before any weight is loaded.

    Raises:
        ConfigError: timm has no such model.
    """
    if config.name not in timm.list_models():
        raise ConfigError(f'model.vision.name: timm has no model {config.name!r}')
    data = timm.get_pretrained_cfg(config.name) or timm.models.PretrainedCfg()
    return Preprocessing(config.image_size, tuple(data.mean), tuple(data.std))


class VisionEncoder(nn.Module):
    """A timm tower without its classifier.

    Args:
        config: Which tower, and where its weights are.
        load_weights: Off when a checkpoint of the whole model follows.
    """

    def __init__(self, config: VisionConfig, load_weights: bool = True) -> None:
        super().__init__()
        self.preprocessing = vision_preprocessing(config)
        checkpoint = config.checkpoint if load_weights else None
        if checkpoint and not Path(checkpoint).is_file():
            raise ConfigError(f'model.vision.checkpoint: there is no file {checkpoint}')
        self.trunk = timm.create_model(config.name, pretrained=config.pretrained and load_weights)
        if checkpoint:
            timm.models.load_checkpoint(self.trunk, checkpoint, remap=config.remap)
        self.trunk.reset_classifier(0)  # pyright: ignore[reportCallIssue]
        self.freeze_batch_norm = config.freeze_batch_norm

    @property
    def width(self) -> int:
        """Size of the tower's pooled features."""
        width = self.trunk.num_features
        assert isinstance(width, int)
        return width

    def train(self, mode: bool = True) -> 'VisionEncoder':
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(B, 3, H, W)`` -> ``(B, width)``."""
        return self.trunk(pixel_values)
