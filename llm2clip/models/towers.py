# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Image models of timm and transformers behind one interface."""

import copy
import difflib
import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Protocol

import timm
import timm.models
import torch
import torch.nn as nn
import transformers
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import group_parameters
from timm.models.eva import Eva
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from llm2clip.config import ImageDataConfig, VisionConfig
from llm2clip.data.images import Preprocessing
from llm2clip.errors import ConfigError
from llm2clip.io.files import reading
from llm2clip.modeling.loaders import check_finite, load_checked, load_config
from llm2clip.modeling.modeling_llm2clip import TRUNK_OPTIONS, new_trunk
from llm2clip.teacher.clip_text import load_architecture

# (tokens (B, T, D), number of prefix tokens) -> indices (B, kept) of the patches to keep; None keeps all.
Keep = Callable[[torch.Tensor, int], Optional[torch.Tensor]]
# What training and exports need of a model of timm, the user's too, beside its forward pass.
_INTERFACE = ('head_hidden_size', 'num_features', 'num_classes', 'pretrained_cfg', 'reset_classifier',
              'get_classifier', 'group_matcher')


class Tower(Protocol):
    """Interface of an image model to the vision encoder, independent of the model's library."""

    trunk: nn.Module
    no_weight_decay: set[str]
    """Names of parameters without weight decay; one-dimensional ones never decay."""

    def architecture(self) -> dict[str, Any]:
        """Return the `VisionConfig.architecture` that rebuilds the model; empty if its name suffices."""
        return {}

    def layer_ids(self) -> dict[str, int]:
        """Map parameter names to layers: 0 for the embeddings, one per block, the last for the rest."""
        ...

    def on_tokens(self, keep: Keep) -> None:
        """Let `keep` select patches before the first block; a ConfigError for a tower without patches."""

    def checkpoint_gradients(self) -> None:
        """Enable recomputation of the blocks' activations in the backward pass."""

    def blocks(self) -> list[nn.Module]:
        """Return the tower's repeated layers, in order.

        Lists with modules of a single class are searched.  Among classes with at least a third of all
        parameters, the most frequent one is returned: a transformer's layers,
        or a convolutional network's residual blocks.
        """
        by_class: dict[type[nn.Module], list[nn.Module]] = {}
        for module in self.trunk.modules():
            classes = {type(child) for child in module.children()}
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(classes) == 1:
                by_class.setdefault(classes.pop(), []).extend(module.children())
        third = _num_parameters(self.trunk) / 3
        large = [blocks for blocks in by_class.values() if sum(map(_num_parameters, blocks)) >= third]
        return max(large, key=len, default=[])


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _keep_patches(
    keep: Keep, tokens: torch.Tensor, prefix: int
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    indices = keep(tokens, prefix)
    if indices is None:
        return tokens, None
    patches = tokens[:, prefix:].gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))
    return torch.cat([tokens[:, :prefix], patches], dim=1), indices


class _PatchDrop(nn.Module):
    """Replacement for the patch dropout of timm's towers; EVA also needs the indices, for its RoPE."""

    def __init__(self, keep: Keep, prefix: int, with_indices: bool) -> None:
        super().__init__()
        self.keep, self.prefix, self.with_indices = keep, prefix, with_indices

    def forward(self, tokens: torch.Tensor) -> Any:
        kept = _keep_patches(self.keep, tokens, self.prefix)
        return kept if self.with_indices else kept[0]


class TimmTower(Tower):
    """A timm model without its classifier."""

    def __init__(self, config: VisionConfig, load_weights: bool) -> None:
        trunk = _load_timm(config, load_weights)
        missing = [name for name in _INTERFACE if not hasattr(trunk, name)]
        if missing:
            raise ConfigError(f'{config.name} lacks {", ".join(missing)}, which docs/guides/stage2.md '
                              'describes', key='name')
        trunk.reset_classifier(0)
        module: Any
        for module in trunk.modules():
            if getattr(module, 'inplace', False):
                module.inplace = False  # autograd would clone the inputs of SiLU and others
        self.trunk: Any = trunk
        self.name = config.name
        self.levels = config.feature_levels
        if self.levels:
            has_maps = hasattr(trunk, 'forward_intermediates')
            num_maps = len(list(trunk.feature_info)) if has_maps else 0
            if self.levels > num_maps:
                raise ConfigError(f'{self.levels}, expected at most {num_maps}, the feature maps that timm '
                                  f'gives of {self.name}', key='feature_levels')
        self.no_weight_decay = set(getattr(trunk, 'no_weight_decay', set)())

    def layer_ids(self) -> dict[str, int]:
        matcher = self.trunk.group_matcher(coarse=False)
        if isinstance(matcher, dict):  # it is a function for some convolutional networks
            for part, patterns in matcher.items():
                if isinstance(patterns, (list, tuple)):
                    kept: list[Any] = []
                    for names, layer in patterns:
                        # Drop the patterns that assign everything after the last block to that block (timm's
                        # MATCH_PREV_GROUP): parameters without a pattern form a separate last layer.
                        if layer != (99999,) or re.compile(names).groups > 0:
                            kept.append((names, layer))
                    matcher[part] = kept
        ids = group_parameters(self.trunk, matcher, reverse=True)
        # timm's group numbers may have gaps, since a group may be empty.
        rank = {layer: i for i, layer in enumerate(sorted(set(ids.values())))}
        return {name: rank[layer] for name, layer in ids.items()}

    def on_tokens(self, keep: Keep) -> None:
        if not hasattr(self.trunk, 'patch_drop'):
            raise ConfigError(f'{self.name} has no patches to drop', key='algorithms.patch_dropout')
        if self.levels:
            raise ConfigError('the maps of model.vision.feature_levels need all patches; set one of the two',
                              key='algorithms.patch_dropout')
        self.trunk.patch_drop = _PatchDrop(keep, self.trunk.num_prefix_tokens, isinstance(self.trunk, Eva))

    def checkpoint_gradients(self) -> None:
        if not hasattr(self.trunk, 'set_grad_checkpointing'):
            raise ConfigError(f'{self.name} has no set_grad_checkpointing', key='gradient_checkpointing')
        self.trunk.set_grad_checkpointing(True)


def _load_timm(config: VisionConfig, load_weights: bool, with_classifier: bool = False) -> Any:
    """Load a timm model with its classifier, which a checkpoint may lack unless `with_classifier` is set."""
    size: dict[str, Any] = {}
    if _timm_config(config.name).fixed_input_size:
        size['img_size'] = config.image_size
    path = config.checkpoint
    pretrained = config.pretrained and load_weights and path is None
    with reading(config.name, 'a model of timm'):
        trunk: Any = timm.create_model(config.name, pretrained=pretrained, **size)
    if not load_weights:
        return trunk
    if path is not None:
        # Converted and interpolated as timm does for its own weights.
        convert = getattr(sys.modules[type(trunk).__module__], 'checkpoint_filter_fn', None)
        with reading(f'checkpoint: {path}', f'weights of {type(trunk).__name__}'):
            result = timm.models.load_checkpoint(trunk, path, strict=config.remap, remap=config.remap,
                                                 filter_fn=convert)
        missing = list(result.missing_keys)
        if not with_classifier:
            classifier = f'{trunk.pretrained_cfg["classifier"]}.'
            missing = [name for name in missing if not name.startswith(classifier)]
        if missing or result.unexpected_keys:
            raise ConfigError(f'{path} lacks {missing[:3]} of the tower and has '
                              f'{list(result.unexpected_keys)[:3]} besides', key='checkpoint')
    check_finite(trunk.state_dict(), path or config.name)
    return trunk


def _timm_config(name: str) -> timm.models.PretrainedCfg:
    """Return timm's configuration of a pretrained model, which it reads from the files of one on the Hub."""
    return timm.models.PretrainedCfg(**timm.models.resolve_model_input_args(name)['pretrained_cfg'])


class TransformersTower(Tower):
    """A Hugging Face image model, or the image tower of a CLIP or SigLIP model."""

    def __init__(self, config: VisionConfig, load_weights: bool) -> None:
        architecture = _architecture(config)
        if config.checkpoint is not None:
            raise ConfigError(f'{config.name} is a transformers model, whose weights are a folder: give it '
                              'as name', key='checkpoint')
        if config.feature_levels:
            raise ConfigError(f'{config.name} is a transformers model, expected 0, or a model of timm',
                              key='feature_levels')
        if config.pretrained and load_weights:
            trunk, _ = load_checked(
                AutoModel.from_pretrained, config.name, more=True, config=architecture, dtype=torch.float32,
                trust_remote_code=False, **TRUNK_OPTIONS.get(architecture.model_type, {}))
        else:
            trunk = new_trunk(architecture)
        self.trunk: Any = _at_image_size(trunk, config.image_size)
        self.name = config.name
        parts = {'position_embedding', 'position_embeddings', 'class_embedding', 'cls_token',
                 'register_tokens'}
        self.no_weight_decay = {
            name for name, _ in self.trunk.named_parameters() if parts & set(name.split('.'))}

    def architecture(self) -> dict[str, Any]:
        return self.trunk.config.to_diff_dict()

    def layer_ids(self) -> dict[str, int]:
        blocks = self.blocks()
        block_layers: dict[nn.Parameter, int] = {}
        for layer, block in enumerate(blocks, 1):
            block_layers.update(dict.fromkeys(block.parameters(), layer))
        layers: dict[str, int] = {}
        outside = 0  # layer of a parameter outside the blocks: before the first one, and after it
        for name, parameter in self.trunk.named_parameters():
            if parameter in block_layers:
                outside = len(blocks) + 1
            layers[name] = block_layers.get(parameter, outside)
        return layers

    def on_tokens(self, keep: Keep) -> None:
        embeddings = getattr(getattr(self.trunk, 'vision_model', self.trunk), 'embeddings', None)
        if embeddings is None or not hasattr(self.trunk.config, 'patch_size'):
            raise ConfigError(f'{self.name} has no patches to drop', key='algorithms.patch_dropout')
        patches = _grid(self.trunk.config) ** 2
        embeddings.register_forward_hook(lambda module, inputs, tokens: _keep_patches(
            keep, tokens, tokens.shape[1] - patches)[0])

    def checkpoint_gradients(self) -> None:
        self.trunk.gradient_checkpointing_enable({'use_reentrant': False})


def _architecture(config: VisionConfig) -> PretrainedConfig:
    whole = load_architecture(config.name, config.architecture)
    return getattr(whole, 'vision_config', whole)


def _grid(config: Any) -> int:
    return config.image_size // config.patch_size


def _at_image_size(trunk: Any, image_size: int) -> PreTrainedModel:
    """Return the tower for another resolution, with position embeddings interpolated as timm does."""
    if getattr(trunk.config, 'image_size', image_size) == image_size:
        return trunk
    architecture = copy.deepcopy(trunk.config)
    architecture.image_size = image_size
    resized = new_trunk(architecture)
    state = trunk.state_dict()
    for name, value in resized.state_dict().items():
        if state[name].shape != value.shape:
            table = state[name].view(1, -1, value.shape[-1])
            old = _grid(trunk.config)
            new = _grid(architecture)
            prefix = table.shape[1] - old ** 2
            resampled = resample_abs_pos_embed(  # pyright: ignore[reportCallIssue]
                table, [new, new], [old, old], prefix)
            state[name] = resampled.view(value.shape)
    resized.load_state_dict(state)
    return resized


def _is_timm(config: VisionConfig) -> bool:
    if config.architecture:
        return False
    return config.name.startswith(('hf-hub:', 'local-dir:')) or timm.is_model(config.name)


def copy_registration(trunk: Any, folder: Path) -> bool:
    """Copy the module by which the user registers a tower with timm into an exported folder; return whether
    there is one.  Its copy is vision_tower.py."""
    name = getattr(trunk, 'pretrained_cfg', {}).get('architecture', '')
    if not timm.is_model(name) or timm.models.model_entrypoint(name).__module__.startswith('timm.'):
        return False
    shutil.copy(inspect.getfile(timm.models.model_entrypoint(name)), folder / 'vision_tower.py')
    return True


def train_image_size(data: ImageDataConfig, vision: VisionConfig) -> int:
    """Return the side of training images in pixels; a ConfigError if the tower does not support it."""
    size = data.image_size or vision.image_size
    if size != vision.image_size and (not _is_timm(vision) or _timm_config(vision.name).fixed_input_size):
        raise ConfigError(f'{size}, but {vision.name} only takes images of model.vision.image_size, '
                          f'{vision.image_size}', key='train_data.image_size')
    return size


def tower_preprocessing(config: VisionConfig) -> Preprocessing:
    """Return the tower's image size and normalisation without loading weights.

    Raises:
        ConfigError: Neither timm nor transformers knows the tower, or only one of `mean` and `std` is set.
        FileError: The image processor of a transformers tower lacks image_mean or image_std.
    """
    if (config.mean is None) != (config.std is None):
        raise ConfigError('only one of mean and std is set, expected both or neither', key='mean')
    if config.mean and config.std:
        return Preprocessing(config.image_size, tuple(config.mean), tuple(config.std))
    if _is_timm(config):
        data = _timm_config(config.name)
        return Preprocessing(config.image_size, tuple(data.mean), tuple(data.std))
    if '/' not in config.name and not os.path.isdir(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), 1)
        hint = ''.join(f'; did you mean {name!r}?' for name in near)
        raise ConfigError(f'{config.name!r} is not a model of timm, of one of the `modules`, a folder, or '
                          f'OWNER/NAME on the Hugging Face hub{hint}', key='name')
    with reading(config.name, 'an image processor with image_mean and image_std, or `mean` and `std` in the '
                 'configuration'):
        data, _ = ImageProcessingMixin.get_image_processor_dict(config.name)
        return Preprocessing(config.image_size, tuple(data['image_mean']), tuple(data['image_std']))


def load_tower(config: VisionConfig, load_weights: bool = True) -> Tower:
    """Load the configured tower, without its weights if a checkpoint of the whole model is loaded next."""
    if _is_timm(config):
        return TimmTower(config, load_weights)
    return TransformersTower(config, load_weights)


def load_projection(config: VisionConfig, embed_dim: int, load_weights: bool = True) -> nn.Module:
    """Load the pretrained projection of a tower, from its pooled features to the joint space of images and
    texts.

    It is the classifier of timm's CLIP towers, the `visual_projection` of transformers' CLIP towers, and the
    identity for towers without one, such as SigLIP.  Arguments are as for `load_tower`.
    """
    if _is_timm(config):
        classifier = _load_timm(config, load_weights, with_classifier=True).get_classifier()
        return classifier if isinstance(classifier, nn.Linear) else nn.Identity()
    architecture = _architecture(config)
    tower: Any = MODEL_MAPPING[type(architecture)]
    with_projection = getattr(transformers, f'{tower.__name__}WithProjection', None)
    if with_projection is None:
        return nn.Identity()
    if not load_weights:
        return nn.Linear(architecture.hidden_size, embed_dim, bias=False)
    # `projection_dim` may differ between the configurations of the whole model and its vision part.
    whole = load_config(config.name)
    architecture.projection_dim = getattr(whole, 'projection_dim', architecture.projection_dim)
    model, _ = load_checked(with_projection.from_pretrained, config.name, more=True,
                            config=architecture, dtype=torch.float32)
    return model.visual_projection
