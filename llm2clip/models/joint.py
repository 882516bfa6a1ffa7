# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 2 with text encoders trained together with the vision tower: the LLM with LoRA, CLIP's own, or both."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from llm2clip.config import ConfigError, LossConfig, SelfDistillationConfig
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.models.sharding import save_trainable_only
from llm2clip.teacher.clip_text import ClipTextTower

__all__ = ['BothTexts', 'ClipBeside', 'ConcatenatedTexts', 'JointLLM2CLIP']

Batch = dict[str, Any]
# Texts -> keyword arguments of their encoder.
Tokenize = Callable[[Sequence[str]], dict[str, Any]]
# B texts or, with K captions per image, K lists of B texts.
Texts = Sequence[Union[str, Sequence[str]]]


def embed_texts(encoder: nn.Module, tokenize: Tokenize, texts: Texts, device: torch.device) -> torch.Tensor:
    """Embed texts as ``(B, D)`` or ``(B, K, D)``, not normalised; an empty text (absent caption) becomes zero."""
    if not isinstance(texts[0], str):
        return torch.stack([embed_texts(encoder, tokenize, column, device) for column in texts], 1)
    absent = torch.tensor([not str(text).strip() for text in texts], device=device)
    # A dash replaces an absent caption, so that every rank of a sharded encoder has a text to encode.
    tokens = tokenize([str(text) if str(text).strip() else '-' for text in texts])
    vectors = encoder(**{name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                         for name, value in tokens.items()})
    return vectors.masked_fill(absent[:, None], 0)


class ConcatenatedTexts(nn.Module):
    """Linear projection of the concatenated features of CLIP's text tower and the LLM, initialised to their sum."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(2 * embed_dim, embed_dim, bias=False)
        with torch.no_grad():
            self.projection.weight.copy_(torch.eye(embed_dim).repeat(1, 2))

    def forward(self, clip_features: torch.Tensor, llm_features: torch.Tensor) -> torch.Tensor:
        """Combine two ``(…, embed_dim)`` features, L2-normalised, into one ``(…, embed_dim)``, not normalised."""
        return self.projection(torch.cat([clip_features, llm_features], dim=-1))


class BothTexts(nn.Module):
    """Adapter that combines the vectors of both text encoders by method d, in place of the LLM's adapter."""

    def __init__(self, adapter: nn.Module, concatenated: ConcatenatedTexts, llm_embed_dim: int) -> None:
        super().__init__()
        self.adapter, self.concatenated, self.llm_embed_dim = adapter, concatenated, llm_embed_dim

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Map LLM and CLIP vectors, ``(…, llm_embed_dim + embed_dim)``, to ``(…, embed_dim)``, not normalised."""
        llm, clip = vectors.tensor_split([self.llm_embed_dim], dim=-1)
        return self.concatenated(F.normalize(clip, dim=-1), F.normalize(self.adapter(llm).float(), dim=-1))


class ClipBeside(nn.Module):
    """CLIP's own text tower and its tokenizer, used beside the LLM (LLM2CLIP section 3.2, methods b to d).

    Raises:
        ConfigError: The width of the tower's features is not `embed_dim`.
    """

    def __init__(
        self, tower: ClipTextTower, tokenize: Tokenize, method: Literal['b', 'c', 'd'], embed_dim: int
    ) -> None:
        super().__init__()
        if tower.width != embed_dim:
            raise ConfigError(f"model.embed_dim: {embed_dim} is not the width of the features of CLIP's text tower, "
                              f'{tower.width}, as trainable_text.method {method} needs')
        self.tower, self.tokenize, self.method = tower, tokenize, method
        self.concatenated = ConcatenatedTexts(embed_dim) if method == 'd' else None

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Shard, and recompute, the same modules as the tower does."""
        return self.tower.fsdp_wrap_fn(module)

    activation_checkpointing_fn = fsdp_wrap_fn

    def forward(self, texts: Texts, llm_features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``clip_text_features`` and, for method d, ``both_text_features``, L2-normalised ``(…, embed_dim)``."""
        vectors = embed_texts(self.tower, self.tokenize, texts, llm_features.device)
        features = {'clip_text_features': F.normalize(vectors.float(), dim=-1)}
        if self.concatenated is not None:
            both = self.concatenated(features['clip_text_features'], llm_features)
            features['both_text_features'] = F.normalize(both.float(), dim=-1)
        return features


class JointLLM2CLIP(ComposerLLM2CLIP):
    """Stage-2 training with trainable text encoders.

    Batches hold ``caption``: B texts or, with K captions per image, K lists of B texts; an absent caption is an empty
    text.  Without `text_encoder`, the LLM is frozen and batches also hold ``text_embedding``.

    Args:
        model: Vision tower and adapter.
        text_encoder, tokenize: Encoder, tokens -> ``(B, llm_embed_dim)``, and its tokenizer: the LLM with LoRA, or
            CLIP's text tower instead.  The adapter takes its vectors.  None: ``text_embedding`` holds the vectors.
        beside: CLIP's text tower, used beside the LLM.
        loss, self_distillation: As for `ComposerLLM2CLIP`.
    """

    def __init__(
        self, model: LLM2CLIP, text_encoder: Optional[nn.Module] = None, tokenize: Optional[Tokenize] = None,
        beside: Optional[ClipBeside] = None, loss: Optional[LossConfig] = None,
        self_distillation: Optional[SelfDistillationConfig] = None,
    ) -> None:
        super().__init__(model, loss, self_distillation)
        self.text_encoder, self.tokenize, self.beside = text_encoder, tokenize, beside
        if beside is not None:
            self.feature_names = (*self.feature_names, 'clip_text_features')
        if beside is not None and beside.method == 'd':
            self.feature_names = (*self.feature_names, 'both_text_features')
            self.tested = 'both_text_features'
        save_trainable_only(self, 'text_encoder')

    def embed(self, texts: Texts) -> torch.Tensor:
        """Embed texts with `text_encoder` by `embed_texts`: ``(B, llm_embed_dim)`` or ``(B, K, llm_embed_dim)``."""
        assert self.text_encoder is not None and self.tokenize is not None
        return embed_texts(self.text_encoder, self.tokenize, texts, self.model.logit_scale.device)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        vectors = batch['text_embedding'] if self.text_encoder is None else self.embed(batch['caption'])
        outputs = self.model(batch['pixel_values'], vectors, batch.get('sample_seed'))
        if self.beside is not None:
            outputs.update(self.beside(batch['caption'], outputs['text_features']))
        return outputs

    def loss(self, outputs: Mapping[str, torch.Tensor], batch: Batch, *args: Any) -> torch.Tensor:
        """Return the loss of `ComposerLLM2CLIP` on the LLM's features plus the method's terms, equally weighted."""
        total = super().loss(outputs, batch)
        if self.beside is None:
            return total
        images, llm, clip = (outputs[name] for name in ('image_features', 'text_features', 'clip_text_features'))
        total = total + self.contrast(images, clip, outputs, batch['text_id'])
        if self.beside.method == 'c':
            # Match the two features of each text; other captions of the same image are negatives, too.
            total = total + self.contrast(clip.flatten(0, -2), llm.flatten(0, -2), outputs, batch['text_id'].flatten())
        if self.beside.method == 'd':
            total = total + self.contrast(images, outputs['both_text_features'], outputs, batch['text_id'])
        return total
