# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""An LLM as a text encoder: caption -> tokens -> bidirectional attention -> pooled vector."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.nn as nn
from composer.utils import dist
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llm2clip.config import ConfigError, LoraConfig, TextEncoderConfig
from llm2clip.models.pooling import POOLINGS

__all__ = [
    'CaptionTokenizer', 'TextEncoder', 'encode_texts', 'encoding', 'load_teacher', 'load_text_encoder',
    'save_teacher', 'teacher_config', 'text_encoder_from_config',
]

ENCODER_FILE = 'text_encoder.json'
Tokens = dict[str, torch.Tensor]
_SENTINEL = '\u2063caption\u2063'


class CaptionTokenizer:
    """Captions -> `input_ids`, `attention_mask` and `embed_mask`, padded on the right.

    A text is laid out as ``[BOS or template header][instruction][caption][end token of the template]``; `embed_mask`
    marks the caption and the end token, which are what pooling sees.  The caption is tokenised by itself, so that its
    tokens are the same with and without an instruction.

    Args:
        tokenizer: The LLM's own tokenizer.  Without a pad token it pads with the end token, which the mask hides.
        config: `chat_template`, `max_length` and `instruction` are used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TextEncoderConfig) -> None:
        self.tokenizer = tokenizer
        self.max_length = config.max_length
        self.instruction = config.instruction
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad_id = next((i for i in candidates if isinstance(i, int)), 0)
        self.header, self.footer = self._frame(config.chat_template)

    def _frame(self, chat_template: bool) -> tuple[list[int], list[int]]:
        if not chat_template:
            bos = self.tokenizer.bos_token_id
            return ([bos] if isinstance(bos, int) and bos in self.tokenizer('').input_ids else []), []
        if not self.tokenizer.chat_template:
            raise ConfigError('text_encoder.chat_template is on, but the tokenizer has no chat template')
        message = [{'role': 'user', 'content': _SENTINEL}]
        text = str(self.tokenizer.apply_chat_template(message, tokenize=False))
        before, after = text.split(_SENTINEL)
        return self._plain(before), self._plain(after)[:1]

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def tokenize(self, texts: Sequence[str], query: bool = False) -> list[tuple[list[int], int]]:
        """Token ids of each text, and how many at its start are not the caption's.

        Raises:
            ValueError: A text is empty or longer prefixes than `max_length` leave it no room.
        """
        prefix = self.header + (self._plain(self.instruction) if query and self.instruction else [])
        room = self.max_length - len(prefix) - len(self.footer)
        if room < 1:
            raise ValueError(f'max_length {self.max_length} leaves no room for a caption after {len(prefix)} tokens of '
                             'template and instruction')
        empty = [i for i, text in enumerate(texts) if not text.strip()]
        if empty:
            raise ValueError(f'caption {empty[0]} of the batch is empty')
        ids = self.tokenizer(list(texts), add_special_tokens=False).input_ids
        return [(prefix + caption[:room] + self.footer, len(prefix)) for caption in ids]

    def pad(self, tokens: Sequence[tuple[list[int], int]]) -> Tokens:
        """Token lists -> three ``(B, T)`` tensors."""
        length = max(len(ids) for ids, _ in tokens)
        input_ids = torch.full((len(tokens), length), self.pad_id, dtype=torch.long)
        attention_mask, embed_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        for row, (ids, start) in enumerate(tokens):
            input_ids[row, :len(ids)] = torch.tensor(ids)
            attention_mask[row, :len(ids)] = 1
            embed_mask[row, start:len(ids)] = 1
        return {'input_ids': input_ids, 'attention_mask': attention_mask, 'embed_mask': embed_mask}

    def __call__(self, texts: Sequence[str], query: bool = False) -> Tokens:
        """Tokenise and pad.

        Args:
            texts: B captions.
            query: Put the instruction before each.
        """
        return self.pad(self.tokenize(texts, query))


class TextEncoder(nn.Module):
    """Bidirectional LLM with pooling.

    Args:
        llm: The decoder without its language-model head, optionally wrapped by peft.
        config: `bidirectional` and `pooling` are used.
    """

    def __init__(self, llm: Union[PreTrainedModel, PeftModel], config: TextEncoderConfig) -> None:
        super().__init__()
        if config.pooling not in POOLINGS:
            raise ConfigError(f'text_encoder.pooling: {config.pooling!r} is not one of {", ".join(POOLINGS)}')
        self.llm = llm
        self.config = config
        self.pool = POOLINGS[config.pooling]
        self._layer_names = set(getattr(llm, '_no_split_modules', None) or ())

    @property
    def llm_embed_dim(self) -> int:
        return self.llm.config.hidden_size

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Shard every decoder layer on its own."""
        return type(module).__name__ in self._layer_names

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, embed_mask: torch.Tensor
    ) -> torch.Tensor:
        """``(B, T)`` tokens -> ``(B, llm_embed_dim)`` vectors in float32, not normalised."""
        mask = self._every_token_sees_every_token(attention_mask) if self.config.bidirectional else attention_mask
        output = self.llm(input_ids=input_ids, attention_mask=mask, use_cache=False)
        return self.pool(output.last_hidden_state, embed_mask)

    def _every_token_sees_every_token(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """``(B, 1, T, T)`` additive mask that hides padding only; transformers passes it on as it is."""
        dtype = self.llm.dtype
        assert isinstance(dtype, torch.dtype)
        if torch.is_autocast_enabled(attention_mask.device.type):
            dtype = torch.get_autocast_dtype(attention_mask.device.type)
        hidden = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
        hidden.masked_fill_(attention_mask == 0, torch.finfo(dtype).min)
        return hidden[:, None, None, :].expand(-1, 1, attention_mask.shape[1], -1)


def text_encoder_from_config(
    config: TextEncoderConfig, lora: Optional[LoraConfig] = None
) -> tuple[TextEncoder, CaptionTokenizer]:
    """Load an LLM and its tokenizer.

    Args:
        config: What to load.
        lora: Freeze the LLM and add trainable LoRA weights to it.
    """
    folder, gguf = config.pretrained, config.gguf_file
    if os.path.isabs(folder) and not os.path.isdir(folder):
        raise ConfigError(f'text_encoder.pretrained: there is no folder {folder}')
    tokenizer = AutoTokenizer.from_pretrained(
        folder, gguf_file=gguf, trust_remote_code=config.trust_remote_code)
    llm = AutoModel.from_pretrained(
        folder, gguf_file=gguf, trust_remote_code=config.trust_remote_code,
        dtype=getattr(torch, config.dtype), use_cache=False)
    if lora is not None:
        llm = get_peft_model(llm, PeftLoraConfig(bias='none', **dataclasses.asdict(lora)))
    return TextEncoder(llm, config), CaptionTokenizer(tokenizer, config)


def load_text_encoder(config: TextEncoderConfig) -> tuple[TextEncoder, CaptionTokenizer]:
    """A frozen encoder in evaluation mode."""
    encoder, tokenizer = text_encoder_from_config(config)
    return encoder.eval().requires_grad_(False), tokenizer


def save_teacher(
    encoder: TextEncoder, tokenizer: CaptionTokenizer, lora: Optional[LoraConfig], folder: Union[str, Path]
) -> None:
    """Write the encoder, LoRA merged, as a Hugging Face folder plus how it turns captions into vectors.

    Every rank calls it; rank 0 writes.  The folder appears under its name only when it is complete.

    Args:
        encoder: May be sharded.
        tokenizer: The encoder's.
        lora: As the encoder was built with.
        folder: Where to.
    """
    state = get_model_state_dict(encoder, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_global_rank() == 0:
        # A second, unsharded copy: peft cannot merge into shards.
        whole, _ = text_encoder_from_config(encoder.config, lora)
        whole.load_state_dict(state)
        llm = whole.llm.merge_and_unload() if isinstance(whole.llm, PeftModel) else whole.llm
        folder = Path(folder)
        partial = folder.with_name(f'{folder.name}.tmp')
        llm.save_pretrained(partial, safe_serialization=True)
        tokenizer.tokenizer.save_pretrained(partial)
        (partial / ENCODER_FILE).write_text(json.dumps(encoding(encoder.config), indent=2) + '\n')
        partial.replace(folder)
    dist.barrier()


def encoding(config: TextEncoderConfig) -> dict[str, Any]:
    """How an encoder turns captions into vectors, without where its weights lie."""
    where = ('pretrained', 'gguf_file', 'trust_remote_code')
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in where}


def teacher_config(folder: Union[str, Path]) -> TextEncoderConfig:
    """How the teacher in `folder` was trained to encode.

    Raises:
        ConfigError: The folder is not one that `save_teacher` wrote.
    """
    path = Path(folder) / ENCODER_FILE
    if not path.is_file():
        raise ConfigError(f'{folder} is not a teacher: it has no {ENCODER_FILE} (stage 1 writes it when it ends)')
    return TextEncoderConfig(pretrained=str(folder), **json.loads(path.read_text()))


def load_teacher(folder: Union[str, Path]) -> tuple[TextEncoder, CaptionTokenizer]:
    """The frozen encoder that `save_teacher` wrote."""
    return load_text_encoder(teacher_config(folder))


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in order of length, grouped so that a padded batch holds at most `batch_tokens` tokens."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def encode_texts(
    encoder: TextEncoder,
    tokenizer: CaptionTokenizer,
    texts: Sequence[str],
    batch_tokens: int = 4096,
    precision: str = 'fp32',
    query: bool = False,
) -> torch.Tensor:
    """Embed texts in batches of similar length.

    Args:
        encoder: In evaluation mode, on its device.
        tokenizer: The encoder's.
        texts: N captions.
        batch_tokens: Tokens a forward pass, padding included.
        precision: ``fp32``, or ``amp_bf16`` for autocast.
        query: Put the instruction before each text.

    Returns:
        ``(N, llm_embed_dim)`` in float32 on the CPU, in the order of `texts`.
    """
    device = next(encoder.parameters()).device
    tokens = tokenizer.tokenize(texts, query)
    result = torch.empty(len(texts), encoder.llm_embed_dim)
    for batch in _batches([len(ids) for ids, _ in tokens], batch_tokens):
        inputs = {k: v.to(device) for k, v in tokenizer.pad([tokens[i] for i in batch]).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == 'amp_bf16'):
            result[batch] = encoder(**inputs).float().cpu()
    return result
