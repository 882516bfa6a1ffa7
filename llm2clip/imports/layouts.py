# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The official weights' names and ours: one table per layout.

What the tables rest on:

- `eva`, the `.pt` files of LLM2CLIP-EVA02-*: the official code (github.com/microsoft/LLM2CLIP, `eva_clip`), whose
  `CustomCLIP` the files are the bare state dict of, and whose features ours equal.  timm's own conversion of EVA-CLIP
  renames the tower in the same way.
- `hf`, the folders LLM2CLIP-Openai-*: their code and files could not be seen.  `vision_model` and `visual_projection`
  are those of transformers' `CLIPModel`, which `LLM2CLIPModel` is made from.  Public code that uses the models shows
  `text_adapter.adaptor`, a sequence whose sixth part is the projection from 4,096 to 1,280 dimensions, and a parameter
  `logit_scale`.  That the parts of a block are called `ln`, `fn.0` and `fn.3` is taken from the official code, of which
  the adapter is a copy; the published size, 579 million parameters in float32, is that of these weights and no others.
- `timm`, what the official code writes for SigLIP2 towers: that code, whose features ours equal; whether a file of this
  layout was published is not known.  It has no projection of the image side, does not normalise the teacher's vector,
  and keeps the LLM among its weights.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from llm2clip.config import AdapterConfig, ConfigError
from llm2clip.config.ranges import VisualProjection

__all__ = ['LAYOUTS', 'Layout', 'adapter_shape', 'find_layout', 'from_official', 'official_names']

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """How an official file names its weights."""

    name: str
    sign: str
    """A beginning of names that only this layout has."""
    adapter: str
    """Beginning of the adapter's names."""
    prefixes: tuple[tuple[str, str], ...]
    """Ours -> theirs, of beginnings of names; the first that fits."""
    parts: tuple[tuple[str, str], ...] = ()
    """Ours -> theirs, of parts inside the tower's names."""
    left_out: tuple[str, ...] = ()
    """Patterns of names in the file that are not imported: constants that the model computes, and the LLM, which is
    the teacher's."""
    visual_projection: VisualProjection = 'linear'
    normalize: bool = True


LAYOUTS = (
    Layout('timm', 'visual.trunk.', 'text.text_proj.text_adaptor.',
           (('vision_encoder.trunk.', 'visual.trunk.'),),
           left_out=(r'text\.text\..*',), visual_projection='identity', normalize=False),
    Layout('eva', 'visual.cls_token', 'text.text_adaptor.',
           (('vision_encoder.trunk.', 'visual.'), ('visual_projection.', 'visual.head.')),
           (('.attn.norm.', '.attn.inner_attn_ln.'), ('.mlp.norm.', '.mlp.ffn_ln.'), ('.mlp.fc1_g.', '.mlp.w1.'),
            ('.mlp.fc1_x.', '.mlp.w2.'), ('.mlp.fc2.', '.mlp.w3.')),
           (r'visual\.(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)',), visual_projection='affine'),
    Layout('hf', 'vision_model.', 'text_adapter.adaptor.',
           (('vision_encoder.trunk.', ''), ('visual_projection.', 'visual_projection.')),
           left_out=(r'vision_model\.embeddings\.position_ids',)),
)
_BLOCK_PARTS = {'norm': 'ln', 'up': 'fn.0', 'down': 'fn.3'}
_AS_THEY_ARE = ('logit_scale', 'logit_bias')


def find_layout(state: Mapping[str, torch.Tensor]) -> Layout:
    """The layout of an official file.

    Raises:
        ConfigError: It has none of them.
    """
    for layout in LAYOUTS:
        if any(name.startswith(layout.sign) for name in state):
            return layout
    raise ConfigError(f'checkpoint: no official layout: no name begins with '
                      f'{" or ".join(layout.sign for layout in LAYOUTS)}; the first are {sorted(state)[:3]}')


def official_names(layout: Layout, ours: Iterable[str]) -> dict[str, str]:
    """Our parameters' names -> theirs, one to one."""
    ours = list(ours)
    depth = len({name.split('.')[2] for name in ours if name.startswith('adapter.blocks.')})
    names = {name: _official_name(layout, name, depth) for name in ours}
    assert len(set(names.values())) == len(ours)
    return names


def _official_name(layout: Layout, name: str, depth: int) -> str:
    if name in _AS_THEY_ARE:
        return name
    if name.startswith('adapter.'):
        part = name.split('.')
        if part[1] == 'blocks':
            return f'{layout.adapter}{part[2]}.{_BLOCK_PARTS[part[3]]}.{part[4]}'
        return f'{layout.adapter}{depth + ("norm", "projection").index(part[1])}.{part[2]}'
    prefix, theirs = next(pair for pair in layout.prefixes if name.startswith(pair[0]))
    name = theirs + name.removeprefix(prefix)
    for part, their_part in layout.parts:
        name = name.replace(part, their_part)
    return name


def from_official(layout: Layout, state: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> State:
    """The state dict of our model.

    Args:
        layout: Of `state`.
        state: The official one.
        ours: Our parameters' names and, for their shapes, tensors.

    Raises:
        ConfigError: A weight is missing, left over or of another shape.
    """
    names = official_names(layout, ours)
    ignored = {name for name in state if any(re.fullmatch(pattern, name) for pattern in layout.left_out)}
    missing = sorted(set(names.values()) - state.keys())
    unexpected = sorted(state.keys() - set(names.values()) - ignored)
    if missing or unexpected:
        raise ConfigError(f'checkpoint: not the weights of this tower and adapter: it lacks {_some(missing)} and has '
                          f'{_some(unexpected)} besides')
    for name, theirs in names.items():
        found, expected = tuple(state[theirs].shape), tuple(ours[name].shape)
        # Ours is not a scalar, since FSDP2 cannot shard those.
        if found != expected and not (name in _AS_THEY_ARE and found == ()):
            raise ConfigError(f'checkpoint: {theirs} has the shape {found}, expected {expected}; vision.name and '
                              'vision.image_size must be those of the checkpoint')
    return {name: state[theirs].reshape(ours[name].shape) for name, theirs in names.items()}


def adapter_shape(layout: Layout, state: Mapping[str, torch.Tensor]) -> tuple[AdapterConfig, int, int]:
    """The adapter that an official file holds, `llm_embed_dim` and `embed_dim`.

    Raises:
        ConfigError: The file has no whole adapter.
    """
    depth = len([name for name in state if re.fullmatch(re.escape(layout.adapter) + r'\d+\.ln\.weight', name)])
    last = f'{layout.adapter}{depth + 1}.weight'
    if last not in state:
        raise ConfigError(f'checkpoint: it lacks {last}, the projection of an adapter of {depth} blocks (early '
                          'revisions of the Hugging Face folders hold the vision tower alone)')
    embed_dim, width = state[last].shape
    up = state.get(f'{layout.adapter}0.fn.0.weight')
    expansion = AdapterConfig.expansion if up is None else up.shape[0] // width
    return AdapterConfig('residual', depth, expansion, layout.normalize), width, embed_dim


def _some(names: list[str]) -> str:
    return f'{", ".join(names[:3]) or "nothing"}{f" and {len(names) - 3} more" if len(names) > 3 else ""}'
