# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Text towers of CLIP and SigLIP, frozen or trained: from texts to text features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.nn as nn
from tokenizers import normalizers
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPTextModelWithProjection,
    PretrainedConfig,
    Siglip2TextConfig,
    Siglip2TextModel,
    SiglipTextConfig,
    SiglipTextModel,
)

from llm2clip.config import ClipTextConfig
from llm2clip.device import Device
from llm2clip.errors import ConfigError, under
from llm2clip.io.folders import atomic_folder
from llm2clip.io.tensors import hash_tensors, published_state
from llm2clip.modeling.loaders import (
    check_no_code,
    keep_readable,
    load_checked,
    load_config,
    load_tokenizer,
)
from llm2clip.modeling.text_encoder import Tokenized, pad, to_device
from llm2clip.teacher.caption_teacher import CaptionTeacher, TeacherSource
from llm2clip.teacher.embedder import Embedded, OnBatch
from llm2clip.teacher.fingerprint import Fingerprint, hash_settings

KIND = 'text tower of a CLIP'
# transformers has classes for these stand-alone text towers, but its auto classes do not find them.
for _config, _model in ((SiglipTextConfig, SiglipTextModel), (Siglip2TextConfig, Siglip2TextModel)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
# Keys: model_type of a full model and of a stand-alone text tower.
_TOWERS: dict[str, Any] = {
    'clip': CLIPTextModelWithProjection, 'clip_text_model': CLIPTextModelWithProjection,
    'siglip': SiglipTextModel, 'siglip_text_model': SiglipTextModel,
    'siglip2': Siglip2TextModel, 'siglip2_text_model': Siglip2TextModel,
}


class ClipTokenizer:
    """Tokenizer of the CLIP or SigLIP `name` (hub name or local folder), with the padding of its training."""

    def __init__(self, name: str, config: Any) -> None:
        self.tokenizer = load_tokenizer(name)
        self.max_length: int = getattr(config, 'text_config', config).max_position_embeddings
        # SigLIP was trained on texts that are padded to its full length, without a mask.
        self._siglip = 'siglip' in config.model_type
        # SigLIP 2 was trained on lower case; the tokenizer of its published models does not convert to it.
        backend = getattr(self.tokenizer, 'backend_tokenizer', None)
        if self._siglip and backend is not None:
            others = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        whole = self.tokenizer(list(texts), verbose=False).input_ids
        cut = self.tokenizer(list(texts), truncation=True, max_length=self.max_length).input_ids
        return [Tokenized(ids, 0, len(all_ids) - len(ids)) for ids, all_ids in zip(cut, whole)]

    def pad(self, texts: Sequence[Tokenized]) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` ``(N, T)`` and, if the model uses one, ``attention_mask`` ``(N, T)``."""
        pad_id = self.tokenizer.pad_token_id
        if self._siglip:
            return {'input_ids': pad(texts, pad_id, self.max_length)['input_ids']}
        padded = pad(texts, pad_id)
        return {'input_ids': padded['input_ids'], 'attention_mask': padded['attention_mask']}

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tokenise, truncate and pad N texts."""
        return self.pad(self.tokenize(texts))


class ClipTextTower(nn.Module):
    """Text tower of a transformers CLIP or SigLIP with its projection, without the image side.

    `llm_embed_dim` is the dimension of the text features.
    """

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk
        self.config: PretrainedConfig = trunk.config
        text_model = getattr(trunk, 'text_model', trunk)  # SigLIP has no such submodule in transformers 5
        self._layers = set(text_model.encoder.layers)
        head = getattr(trunk, 'text_projection', None) or text_model.head
        self.llm_embed_dim: int = head.out_features

    def forward(self, input_ids: torch.Tensor, attention_mask: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Return projected features ``(N, llm_embed_dim)``, not normalised, of tokens ``(N, T)``."""
        outputs = self.trunk(input_ids=input_ids, attention_mask=attention_mask)
        return outputs.get('text_embeds', outputs.get('pooler_output'))

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Whether a module is a layer, which FSDP shards and activation checkpointing recomputes alone."""
        return module in self._layers

    activation_checkpointing_fn = fsdp_wrap_fn


def load_clip_text(config: ClipTextConfig, load_weights: bool = True) -> ClipTextTower:
    """Load a text tower in training mode; a ConfigError if it is none of a CLIP or SigLIP."""
    architecture = load_architecture(config.name, config.architecture)
    kind = _TOWERS.get(architecture.model_type)
    if kind is None:
        raise ConfigError(f'{config.name}, a {architecture.model_type!r} model, expected one with the text '
                          f'tower of a CLIP or SigLIP: {", ".join(_TOWERS)}')
    text = getattr(architecture, 'text_config', architecture)
    # The full model's projection_dim counts; that of its text config may differ.
    text.projection_dim = getattr(architecture, 'projection_dim', getattr(text, 'projection_dim', None))
    if config.pretrained and load_weights:
        trunk, _ = load_checked(kind.from_pretrained, config.name, more=True, config=text,
                                dtype=torch.float32)
    else:
        trunk = kind(text)
    return ClipTextTower(trunk.train())


def load_clip_tokenizer(config: ClipTextConfig) -> ClipTokenizer:
    """Load the tokenizer of a text tower."""
    return ClipTokenizer(config.name, load_architecture(config.name, config.architecture))


def load_architecture(name: str, architecture: Mapping[str, Any]) -> PretrainedConfig:
    """Build the transformers configuration of a `model_type` and its fields, or load that of `name`.

    Raises:
        ConfigError: There is no configuration with these fields.
        LoadError: That of `name` cannot be loaded.
    """
    if not architecture:
        return load_config(name)
    fields = dict(architecture)
    check_no_code(fields, 'architecture')
    model_type: Any = fields.pop('model_type', None)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # each model type raises errors of its own
        raise ConfigError(f'expected the fields of a {model_type!r} model ({error})',
                          key='architecture') from error


def save_clip_text(
    tower: ClipTextTower, state: Mapping[str, torch.Tensor], tokenizer: ClipTokenizer,
    folder: Union[str, Path]
) -> None:
    """Save a tower, which may be sharded, with its full weights `state` and its tokenizer in transformers
    format.  The folder is written atomically."""
    with torch.device('meta'):
        whole = ClipTextTower(type(tower.trunk)(tower.config))
    whole.load_state_dict(state, assign=True)
    with atomic_folder(folder, KIND) as out:
        whole.trunk.save_pretrained(out, safe_serialization=True, state_dict=published_state(whole.trunk))
        tokenizer.tokenizer.save_pretrained(out)
        keep_readable(out)


class _ClipTextTeacher(CaptionTeacher):
    """Frozen `ClipTextTower`; its vectors are the projected features, not normalised.

    Captions above the maximum length are truncated with `cut`; otherwise their vectors are zero.
    """

    def __init__(self, tower: ClipTextTower, tokenizer: ClipTokenizer, fingerprint: Fingerprint,
                 batch_tokens: int, precision: str, cut: bool) -> None:
        super().__init__(tower, tower.llm_embed_dim, fingerprint, batch_tokens, precision)
        self.tokenizer, self.cut = tokenizer, cut

    def prepare(self, items: Sequence[str]) -> list[Tokenized]:
        return self.tokenizer.tokenize(items)

    @torch.no_grad()
    def embed_prepared(self, inputs: Sequence[Tokenized], on_batch: OnBatch) -> Embedded:
        vectors = torch.zeros(len(inputs), self.width, device=self.device)
        embedded = [i for i, text in enumerate(inputs) if self.cut or not text.cut]
        # Batches of similar lengths need little padding.
        embedded.sort(key=lambda i: len(inputs[i].ids))
        batch_size = max(1, self.batch_tokens // self.tokenizer.max_length)
        for start in range(0, len(embedded), batch_size):
            rows = embedded[start:start + batch_size]
            batch = to_device(self.tokenizer.pad([inputs[i] for i in rows]), self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == 'amp_bf16'):
                features = self.module(**batch).float()
            vectors[rows] = features
            on_batch(len(rows))
        left_out = len(inputs) - len(embedded)
        on_batch(left_out)
        tokens = sum(len(inputs[i].ids) for i in embedded)
        truncated = sum(inputs[i].cut > 0 for i in embedded)
        return Embedded(vectors, tokens, truncated, left_out)


class ClipText(TeacherSource):
    """Source of a CLIP or SigLIP text tower.

    Args:
        name: Hub name or local folder of a CLIP or SigLIP, or a folder that `save_clip_text` wrote.
        cut: Whether to truncate captions above the maximum length; otherwise their vectors are zero, like
            those of captions that a sample lacks.
    """

    def __init__(self, name: Union[str, Path], cut: bool = False) -> None:
        self.name, self._cut = str(name), cut

    def encoding(self) -> dict[str, Any]:
        config = load_config(self.name)
        return {'clip_text': config.model_type, 'too_long': 'cut' if self._cut else 'left out'}

    def fingerprint(self) -> Fingerprint:
        tower = self._read()
        tokenizer = load_clip_tokenizer(ClipTextConfig(self.name))
        settings = hash_settings(tower.config.to_diff_dict(), tokenizer.tokenizer)
        return Fingerprint.of(hash_tensors(published_state(tower.trunk)),
                              {'config_and_tokenizer': settings} | self.encoding())

    def _load(self, device: Device, fingerprint: Fingerprint, batch_tokens: int, precision: str, sharded: bool
              ) -> CaptionTeacher:
        tower = device.module_to_device(self._read())
        tokenizer = load_clip_tokenizer(ClipTextConfig(self.name))
        return _ClipTextTeacher(tower, tokenizer, fingerprint, batch_tokens, precision, self._cut)

    def _read(self) -> ClipTextTower:
        with under('teacher'):
            return load_clip_text(ClipTextConfig(self.name)).eval().requires_grad_(False)
