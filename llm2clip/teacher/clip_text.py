# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The text side of a CLIP or SigLIP: texts -> its own text features."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import torch
import torch.nn as nn
import xxhash
from transformers import AutoModel

from llm2clip.config import ConfigError
from llm2clip.ranks import once_per_node
from llm2clip.remote_code.checks_llm2clip import LoadError, load_checked, load_config, load_tokenizer
from llm2clip.teacher.blocks import Embedded
from llm2clip.teacher.caption_teacher import CaptionTeacher
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.weights import hash_tensors

__all__ = ['ClipTextTeacher', 'ClipTokenizer', 'ClipTokens', 'load_clip']


class ClipTokens(NamedTuple):
    """A tokenised text."""

    ids: list[int]
    cut: bool
    """Whether it was longer than the model reads and lost its end."""


class ClipTokenizer:
    """Texts -> tokens as a CLIP or SigLIP was trained to read them.

    Args:
        name: Hub name or local folder.
        config: The model's.
    """

    def __init__(self, name: str, config: Any) -> None:
        self._tokenizer = load_tokenizer(name)
        if self._tokenizer.pad_token_id is None:
            raise LoadError(f'{name}: its tokenizer has no pad_token, expected one')
        self.max_length: int = getattr(config, 'text_config', config).max_position_embeddings
        # SigLIP was trained on texts that are padded to its full length, without a mask.
        self._siglip = 'siglip' in config.model_type

    def tokenize(self, texts: Sequence[str]) -> list[ClipTokens]:
        whole = self._tokenizer(list(texts), verbose=False).input_ids
        cut = self._tokenizer(list(texts), truncation=True, max_length=self.max_length).input_ids
        return [ClipTokens(ids, len(all_ids) > self.max_length) for ids, all_ids in zip(cut, whole)]

    def pad(self, texts: Sequence[ClipTokens]) -> dict[str, torch.Tensor]:
        """``input_ids`` ``(N, T)`` and, if the model has one, ``attention_mask``."""
        length = self.max_length if self._siglip else max(len(text.ids) for text in texts)
        ids = torch.full((len(texts), length), self._tokenizer.pad_token_id)
        mask = torch.zeros(len(texts), length, dtype=torch.long)
        for i, text in enumerate(texts):
            ids[i, :len(text.ids)], mask[i, :len(text.ids)] = torch.tensor(text.ids), 1
        return {'input_ids': ids} if self._siglip else {'input_ids': ids, 'attention_mask': mask}


def load_clip(name: str, key: str) -> Any:
    """A model of transformers with features of texts, in evaluation mode.

    Args:
        name: Hub name or local folder.
        key: Of the configuration, for messages.

    Raises:
        ConfigError: It has none.
        LoadError: There is no such model, or it is damaged.
    """
    where = f'{key}: {name}'
    model, _ = load_checked(AutoModel.from_pretrained, name, where=where, more=True, trust_remote_code=False,
                            config=load_config(name, where), dtype=torch.float32)
    if not hasattr(model, 'get_text_features'):
        raise ConfigError(f'{where}, a {type(model).__name__}, has no get_text_features')
    return model.eval().requires_grad_(False)


class ClipTextTeacher(CaptionTeacher):
    """CLIP's own text tower, whose vectors are its projected features, not normalised.

    Captions that it cannot read to their end get the vector 0, as those that a sample does not have.

    Args:
        name: Hub name or local folder of a CLIP, SigLIP or another model with `get_text_features`.
        batch_tokens: Tokens per forward pass.
        precision: ``fp32``, or ``amp_bf16`` for autocast.

    Raises:
        ConfigError: It has no text features.
        LoadError: There is no such model, or it is damaged.
    """

    def __init__(self, name: str, batch_tokens: int = 4096, precision: str = 'fp32') -> None:
        self.model = load_clip(name, 'clip_text')
        self.tokenizer = ClipTokenizer(name, self.model.config)
        self.batch_size = max(1, batch_tokens // self.tokenizer.max_length)
        self.precision = precision
        self.fingerprint = Fingerprint.of(once_per_node(self._hash, f'clip_text: {name}'), {
            'clip_text': self.model.config.model_type, 'max_length': self.tokenizer.max_length,
            'too_long': 'left out'})
        self._width: Optional[int] = None

    def _hash(self) -> str:
        digest = xxhash.xxh64()
        hash_tensors({name: value for name, value in self.model.state_dict().items() if name.startswith('text_')},
                     digest)
        return digest.hexdigest()

    @property
    def module(self) -> nn.Module:
        return self.model

    @property
    def llm_embed_dim(self) -> int:
        if self._width is None:
            self._width = self._features(self.tokenize(['a'])).shape[1]
        return self._width

    def tokenize(self, texts: Sequence[str]) -> list[ClipTokens]:
        return self.tokenizer.tokenize(texts)

    def embed_tokens(
        self, tokens: Sequence[ClipTokens], on_batch: Callable[[int], object] = lambda texts: None
    ) -> Embedded:
        vectors = torch.zeros(len(tokens), self.llm_embed_dim, device=self.device)
        # Those of similar length together, so that little is padding.
        order = sorted((i for i, text in enumerate(tokens) if not text.cut), key=lambda i: len(tokens[i].ids))
        for start in range(0, len(order), self.batch_size):
            rows = order[start:start + self.batch_size]
            vectors[rows] = self._features([tokens[i] for i in rows])
            on_batch(len(rows))
        left_out = len(tokens) - len(order)
        on_batch(left_out)
        return Embedded(vectors, sum(len(tokens[i].ids) for i in order), 0, left_out)

    @torch.no_grad()
    def _features(self, texts: Sequence[ClipTokens]) -> torch.Tensor:
        batch = {name: value.to(self.device) for name, value in self.tokenizer.pad(texts).items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == 'amp_bf16'):
            return self.model.get_text_features(**batch).float()
