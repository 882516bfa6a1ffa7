# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Text encoder as a module of sentence-transformers.

Exported models contain a copy of this file.  It imports only torch, transformers, sentence-transformers and
the files beside it.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
from sentence_transformers.base.modules import InputModule

# Relative, since the copies in an exported model are not part of a package `llm2clip`.
from .loaders import keep_readable, load_encoder, load_tokenizer, read_encoding
from .text_encoder import CaptionTokenizer, TextEncoder, save_llm


class CaptionEncoder(InputModule):
    """Text encoder as the only module of a SentenceTransformer.

    A prompt (``encode(…, prompt_name='query')``) is the instruction before a text: it is read but not pooled.

    Args:
        encoder: Text encoder in evaluation mode; its `config` holds the values that `read_encoding` returns.
        tokenizer: Tokenizer of the encoder.
        prompts: Name -> text of the prompts to treat as instructions.
    """

    config_file_name = 'text_encoder.json'

    def __init__(self, encoder: TextEncoder, tokenizer: CaptionTokenizer, prompts: Mapping[str, str]) -> None:
        super().__init__()
        self.encoder = encoder
        self.caption_tokenizer = tokenizer
        self.tokenizer = tokenizer.tokenizer
        self.instructions = sorted(filter(None, prompts.values()), key=len, reverse=True)

    @property
    def max_seq_length(self) -> int:
        return self.caption_tokenizer.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.caption_tokenizer.max_length = value

    def get_sentence_embedding_dimension(self) -> int:
        return self.encoder.llm_embed_dim

    def tokenize(self, texts: list[str], **kwargs: Any) -> dict[str, torch.Tensor]:
        tokens = []
        for text in texts:
            instruction = next((prefix for prefix in self.instructions
                                if text.startswith(prefix) and text.removeprefix(prefix).strip()), '')
            tokens += self.caption_tokenizer.tokenize([text.removeprefix(instruction)], instruction)
        return self.caption_tokenizer.pad(tokens)

    def preprocess(
        self, inputs: Sequence[Any], prompt: Optional[str] = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        # sentence-transformers 6 calls this in place of `tokenize`.
        return self.tokenize([f'{prompt or ""}{text}' for text in inputs])

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        outputs = dict(features)
        outputs['sentence_embedding'] = self.encoder(
            features['input_ids'], features['attention_mask'], features['embed_mask'])
        return outputs

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        save_llm(self.encoder.llm, self.encoder.config.bidirectional, output_path)
        self.caption_tokenizer.save(output_path)
        keep_readable(Path(output_path))
        # Merged LoRA may be in float32, also if the LLM before stage 1 was in bfloat16.
        config = vars(self.encoder.config) | {'dtype': str(self.encoder.llm.dtype).removeprefix('torch.')}
        Path(output_path, self.config_file_name).write_text(json.dumps(config, indent=2))

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> 'CaptionEncoder':
        accepted = inspect.signature(cls.load_dir_path).parameters
        options = {name: value for name, value in kwargs.items() if name in accepted}
        folder = Path(str(cls.load_dir_path(model_name_or_path, *args, **options)))
        path = folder / 'config_sentence_transformers.json'
        prompts: dict[str, str] = {}
        if path.is_file():  # a teacher's folder has none
            prompts = json.loads(path.read_text(encoding='utf-8'))['prompts']
        encoding = SimpleNamespace(**read_encoding(folder / cls.config_file_name))
        encoder = load_encoder(folder, encoding)
        return cls(encoder, CaptionTokenizer(load_tokenizer(folder), encoding), prompts)
