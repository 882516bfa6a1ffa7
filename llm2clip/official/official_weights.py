# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Import of weights from official checkpoints.

A table per layout maps the official parameter names to ours.  Sources of the tables:

- `eva`, the `.pt` files of LLM2CLIP-EVA02-*: the official code (github.com/microsoft/LLM2CLIP, `eva_clip`).
  The files are the bare state dict of its `CustomCLIP`, whose features equal ours.  timm's own conversion of
  EVA-CLIP renames the tower in the same way.
- `hf`, the folders LLM2CLIP-Openai-*: inferred, since their code and files were not available.
  `vision_model` and `visual_projection` are those of transformers' `CLIPModel`, on which `LLM2CLIPModel` is
  based.  Public code that uses the models shows a parameter `logit_scale` and a sequence
  `text_adapter.adaptor`; its sixth part is the projection from 4,096 to 1,280 dimensions.  The names `ln`,
  `fn.0` and `fn.3` in a block are those of the official code, from which the adapter is copied.  The
  published size, 579 million parameters in float32, matches exactly these weights.
- `timm`, written by the official code for SigLIP2 towers: that code, whose features equal ours.  It is
  unknown whether a file of this layout was published.  The layout has no image projection, does not normalise
  the teacher's vector, and includes the LLM.
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch

from llm2clip.config import AdapterConfig, ModelConfig, VisionConfig
from llm2clip.config.ranges import VisualProjection
from llm2clip.errors import ConfigError
from llm2clip.io.files import read_json, reading
from llm2clip.io.tensors import read_pickle, read_safetensors
from llm2clip.modeling.loaders import check_finite, check_keys
from llm2clip.models.llm2clip import LLM2CLIP

_State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Layout:
    """Parameter names of an official file."""

    sign: str
    """Prefix that only names of this layout have."""
    adapter: str
    """Prefix of the adapter's names."""
    prefixes: tuple[tuple[str, str], ...]
    """Pairs of prefixes, ours -> theirs; the first match counts."""
    parts: tuple[tuple[str, str], ...] = ()
    """Pairs of substrings in the tower's names, ours -> theirs."""
    left_out: str = ''
    """Pattern of names that are not imported: constants that the model computes, or the teacher's LLM."""
    visual_projection: VisualProjection = 'linear'
    normalize: bool = True


_LAYOUTS = (
    # `timm`
    _Layout('visual.trunk.', 'text.text_proj.text_adaptor.',
            (('vision_encoder.trunk.', 'visual.trunk.'),),
            left_out=r'text\.text\..*', visual_projection='identity', normalize=False),
    # `eva`
    _Layout('visual.cls_token', 'text.text_adaptor.',
            (('vision_encoder.trunk.', 'visual.'), ('visual_projection.', 'visual.head.')),
            (('.attn.norm.', '.attn.inner_attn_ln.'), ('.mlp.norm.', '.mlp.ffn_ln.'),
             ('.mlp.fc1_g.', '.mlp.w1.'), ('.mlp.fc1_x.', '.mlp.w2.'), ('.mlp.fc2.', '.mlp.w3.')),
            r'visual\.(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)', visual_projection='affine'),
    # `hf`
    _Layout('vision_model.', 'text_adapter.adaptor.',
            (('vision_encoder.trunk.vision_model.', 'vision_model.'),  # its name in transformers 4
             ('vision_encoder.trunk.', 'vision_model.'), ('visual_projection.', 'visual_projection.')),
            left_out=r'vision_model\.embeddings\.position_ids'),
)
# Files of a folder; the first that exists is read.
_NAMES = ('model.safetensors', 'pytorch_model.bin')
# Keys under which trainers save the weights beside their own state.
_WRAPPERS = ('model', 'module', 'state_dict')
_BLOCK_PARTS = {'norm': 'ln', 'up': 'fn.0', 'down': 'fn.3'}


def _official_names(layout: _Layout, depth: int, ours: Iterable[str]) -> dict[str, str]:
    """Map our parameter names to theirs, of a model with `depth` blocks in its adapter."""
    # The norm and the projection follow the blocks.
    prefixes = [*layout.prefixes, ('logit_', 'logit_'), ('adapter.norm.', f'{layout.adapter}{depth}.'),
                ('adapter.projection.', f'{layout.adapter}{depth + 1}.')]
    for i in range(depth):
        for part, official_part in _BLOCK_PARTS.items():
            prefixes.append((f'adapter.blocks.{i}.{part}.', f'{layout.adapter}{i}.{official_part}.'))
    names: dict[str, str] = {}
    for name in ours:
        prefix, official_prefix = next(pair for pair in prefixes if name.startswith(pair[0]))
        names[name] = official_prefix + name.removeprefix(prefix)
        for substring, official_substring in layout.parts:
            names[name] = names[name].replace(substring, official_substring)
    return names


def _read_weights(path: Path) -> _State:
    """Read a dict of parameter name -> tensor, in float32, without running code."""
    if path.is_dir():
        files = [path / name for name in _NAMES]
        path = next(filter(Path.is_file, files), files[0])
    content: Any = read_safetensors(path).tensors if path.suffix == '.safetensors' else read_pickle(path)
    with reading(path, 'a mapping of parameter names to tensors'):
        for wrapper in _WRAPPERS:
            content = content.get(wrapper, content)
        # DistributedDataParallel adds this prefix.
        state = {name.removeprefix('module.'): value.float() for name, value in content.items()}
    check_finite(state, path)
    return state


class Imported(NamedTuple):
    """Model from an official checkpoint."""

    model: LLM2CLIP
    """In evaluation mode."""
    config: ModelConfig
    llm_embed_dim: int


def import_checkpoint(checkpoint: Union[str, Path], vision: VisionConfig) -> Imported:
    """Import official weights; the file decides adapter and projection, `vision` decides the tower.

    Args:
        checkpoint: File in one of the layouts, or a Hugging Face folder.
        vision: Configuration of the vision tower.

    Raises:
        ConfigError: There are no such weights, or the folder's own configuration differs.
        FileError: A file is damaged, or holds other objects than tensors.
        LoadError: A weight is missing, unexpected, not finite or of another shape.
    """
    state = _read_weights(Path(checkpoint))
    layout, config, llm_embed_dim = _infer_config(state, vision, Path(checkpoint, 'config.json'))
    model = LLM2CLIP(config, llm_embed_dim, load_weights=False)
    ours = model.state_dict()
    names = _official_names(layout, config.adapter.depth, ours)
    # Ours are not scalars, which FSDP2 cannot shard.
    for name in {'logit_scale', 'logit_bias'} & state.keys():
        state[name] = torch.atleast_1d(state[name])
    state = {name: value for name, value in state.items() if not re.fullmatch(layout.left_out, name)}
    check_keys(state, {names[name]: value for name, value in ours.items()},
               f'{checkpoint}, for {vision.name} with images of {vision.image_size} pixels')
    model.load_state_dict({name: state[official] for name, official in names.items()})
    return Imported(model.eval(), config, llm_embed_dim)


def _infer_config(state: _State, vision: VisionConfig, path: Path) -> tuple[_Layout, ModelConfig, int]:
    """Return the layout, the configuration of the model, and the width of its text embeddings."""
    layouts = [layout for layout in _LAYOUTS if any(name.startswith(layout.sign) for name in state)]
    if not layouts:
        signs = ' or '.join(layout.sign for layout in _LAYOUTS)
        raise ConfigError(f'no official layout: no name begins with {signs}; the first are '
                          f'{sorted(state)[:3]}', 'checkpoint')
    layout = layouts[0]
    norm = re.compile(re.escape(layout.adapter) + r'\d+\.ln\.weight')
    depth = len(list(filter(norm.fullmatch, state)))  # one per block
    projection = f'{layout.adapter}{depth + 1}.weight'
    if projection not in state:
        raise ConfigError(f'it lacks {projection}, the projection of an adapter of {depth} blocks (early '
                          'revisions of the Hugging Face folders hold the vision tower alone)', 'checkpoint')
    embed_dim, llm_embed_dim = state[projection].shape
    hidden_dim = state[f'{layout.adapter}0.fn.0.weight'].shape[0]
    adapter = AdapterConfig('residual', depth, hidden_dim // llm_embed_dim, layout.normalize)
    if path.is_file():
        # Shapes do not determine heads, activation and epsilon; the folder's own configuration does.
        with reading(path, 'the vision_config of a CLIP'):
            fields = {'model_type': 'clip_vision_model'}
            fields.update(read_json(path, dict).get('vision_config', {}))
        for name, value in vision.architecture.items():
            if fields.setdefault(name, value) != value:
                raise ConfigError(f'{value!r}, but {path} says {fields[name]!r}',
                                  f'vision.architecture.{name}')
        vision = dataclasses.replace(vision, architecture=fields)
    config = ModelConfig(vision, adapter, embed_dim, visual_projection=layout.visual_projection)
    if 'logit_bias' in state:
        config.logit_bias = 0.0
    return layout, config, llm_embed_dim
