# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The teacher as a sentence-transformers folder, and the module that loads it."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import InputModule

from llm2clip.files import read_json, write_json
from llm2clip.folders import check_replaceable, complete_folder
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer, TextEncoder
from llm2clip.teacher.folder import ENCODER_FILE, encoding, load_teacher

__all__ = ['CaptionEncoder', 'export_sentence_transformers']

KIND = 'sentence-transformers model'
PROMPTS_FILE = 'config_sentence_transformers.json'


class CaptionEncoder(InputModule):
    """The text encoder as the one module of a SentenceTransformer.

    A prompt (``encode(…, prompt_name='query')``) arrives as the beginning of a text; it becomes the instruction, which
    is read but not pooled.

    Args:
        encoder: In evaluation mode.
        tokenizer: The encoder's.
        prompts: Name -> text of the prompts that are instructions.
    """

    config_file_name = ENCODER_FILE

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
            instruction = next((i for i in self.instructions if text.startswith(i) and text[len(i):].strip()), '')
            tokens += self.caption_tokenizer.tokenize([text[len(instruction):]], instruction)
        return self.caption_tokenizer.pad(tokens)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        names = ('input_ids', 'attention_mask', 'embed_mask')
        return {**features, 'sentence_embedding': self.encoder(**{name: features[name] for name in names})}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.encoder.llm.save_pretrained(output_path, safe_serialization=safe_serialization)
        self.save_tokenizer(output_path)
        write_json(Path(output_path, ENCODER_FILE), encoding(self.encoder.config))

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> 'CaptionEncoder':
        where = inspect.signature(cls.load_dir_path).parameters
        folder = cls.load_dir_path(model_name_or_path, *args, **{k: v for k, v in kwargs.items() if k in where})
        path = Path(folder, PROMPTS_FILE)
        prompts = read_json(path, dict).get('prompts', {}) if path.is_file() else {}
        return cls(*load_teacher(folder), prompts)


def export_sentence_transformers(
    teacher: Union[str, Path], out: Union[str, Path], prompts: Optional[Mapping[str, str]] = None
) -> None:
    """Write a folder for `SentenceTransformer(out)`, which needs this package installed but no remote code.

    Args:
        teacher: Folder that stage 1 wrote.
        out: The folder to write.
        prompts: Name -> instruction; unset, ``query`` is the teacher's own, if it has one.
    """
    check_replaceable(out, KIND)
    # In float32 the whole of LoRA is in the weights, which is all that such a folder has.
    encoder, tokenizer = load_teacher(teacher, 'float32')
    if prompts is None:
        prompts = {'query': tokenizer.instruction} if tokenizer.instruction else {}
    model = SentenceTransformer(modules=[CaptionEncoder(encoder, tokenizer, prompts)], prompts=dict(prompts),
                                similarity_fn_name='cosine', device='cpu')
    with complete_folder(out, KIND) as partial:
        model.save(str(partial), create_model_card=False)
