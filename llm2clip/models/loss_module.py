# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A loss of the user over the global batch, as a module with parameters."""

from collections.abc import Mapping

import torch
import torch.nn as nn
from torch.func import functional_call

from llm2clip.config import LossConfig
from llm2clip.device import exact_float32
from llm2clip.errors import ConfigError
from llm2clip.losses.contrastive import all_gather
from llm2clip.registry import build, check


class LossModule(nn.Module):
    """Wrapper of a module that computes the loss of the global batch, which each rank computes as a whole.

    The module maps three tensors in float32 to a scalar: ``image_features`` ``(N, D)`` and ``text_features``
    ``(N, K, D)`` of the N images of all ranks and microbatches with K texts each, L2-normalised, and
    ``logit_scale`` ``(1,)``, the log of the temperature's inverse.

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
        """Return the loss of the global batch from this rank's outputs of model and `forward`."""
        images = outputs['image_features']
        texts = outputs['text_features']
        scale = outputs['logit_scale']
        if texts.ndim == 2:
            texts = texts[:, None]
        parameters: dict[str, torch.Tensor] = {}
        for name, parameter in self.named_parameters():
            parameters[name.removeprefix('loss.')] = outputs[name].view(parameter.shape)
        # DDP waits for a gradient of every output, also of those that the module does not use.
        unused = torch.cat([value.flatten() for value in (images, texts, scale, *parameters.values())]).sum()
        with exact_float32(images.device.type):
            loss = functional_call(self.loss, parameters, (all_gather(images), all_gather(texts), scale))
            return loss + 0 * unused


def build_loss(config: LossConfig) -> LossModule:
    """Build the module that ``loss.name`` and ``loss.arguments`` choose; errors as for `registry.build`."""
    check('loss', config.name, {}, 'loss.name')
    loss = build('loss', config.name, config.arguments, 'loss.arguments')
    for name, parameter in loss.named_parameters():
        if parameter.ndim == 0:
            raise ConfigError(f'the parameter {name} of {config.name} is a scalar, which FSDP2 cannot shard, '
                              'expected shape (1,)', key='loss.name')
    return LossModule(loss)
