# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""An LLM as a text encoder: tokens -> bidirectional attention -> pooled vector."""

from collections.abc import Callable, Iterator, Sequence
from typing import Optional, Union

import torch
import torch.nn as nn
from composer.utils import dist
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from llm2clip.config import ConfigError, LoraConfig, TextEncoderConfig
from llm2clip.teacher.caption_tokenizer import CaptionTokenizer, Tokenized
from llm2clip.teacher.llm import add_lora, load_llm
from llm2clip.teacher.pooling import POOLINGS

__all__ = [
    'TextEncoder', 'encode_texts', 'encode_tokens', 'load_caption_tokenizer', 'load_text_encoder',
    'text_encoder_from_config', 'token_batches',
]


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

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """With `fsdp.activation_checkpointing`, recompute every decoder layer on its own."""
        return self.fsdp_wrap_fn(module)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, embed_mask: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """``(B, T)`` tokens -> ``(B, llm_embed_dim)`` vectors in float32, not normalised.

        Without `embed_mask`, the tokens' states ``(B, T, llm_embed_dim)``.
        """
        mask = self._every_token_sees_every_token(attention_mask) if self.config.bidirectional else attention_mask
        states = self.llm(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return states if embed_mask is None else self.pool(states, embed_mask)

    def _every_token_sees_every_token(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """``(B, 1, T, T)`` additive mask that hides padding only; transformers passes it on as it is, also to layers
        with a sliding window."""
        dtype = self.llm.dtype
        assert isinstance(dtype, torch.dtype)
        if torch.is_autocast_enabled(attention_mask.device.type):
            dtype = torch.get_autocast_dtype(attention_mask.device.type)
        hidden = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
        hidden.masked_fill_(attention_mask == 0, torch.finfo(dtype).min)
        return hidden[:, None, None, :].expand(-1, 1, attention_mask.shape[1], -1)


def load_caption_tokenizer(config: TextEncoderConfig) -> CaptionTokenizer:
    """The tokenizer that comes with the LLM."""
    tokenizer = AutoTokenizer.from_pretrained(
        config.pretrained, gguf_file=config.gguf_file, trust_remote_code=config.trust_remote_code)
    return CaptionTokenizer(tokenizer, config)


def text_encoder_from_config(
    config: TextEncoderConfig, lora: Optional[LoraConfig] = None, on_meta: bool = False
) -> tuple[TextEncoder, CaptionTokenizer]:
    """Load an LLM and its tokenizer.

    Args:
        config: What to load.
        lora: Freeze the LLM and add trainable LoRA weights to it.
        on_meta: As for `load_llm`.
    """
    llm = load_llm(config, on_meta)
    return TextEncoder(llm if lora is None else add_lora(llm, lora), config), load_caption_tokenizer(config)


def load_text_encoder(config: TextEncoderConfig) -> tuple[TextEncoder, CaptionTokenizer]:
    """A frozen encoder in evaluation mode."""
    encoder, tokenizer = text_encoder_from_config(config)
    return encoder.eval().requires_grad_(False), tokenizer


def token_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices, longest text first, grouped so that a padded batch holds at most `batch_tokens` tokens.

    No text is shorter than nine tenths of the longest in its batch, which keeps padding near 4 % also when there are
    few texts.  The largest batch of a job is its first one, so that one that does not fit in memory fails at once.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[batch[0]] if batch else 0
        if batch and ((len(batch) + 1) * longest > batch_tokens or 10 * lengths[index] < 9 * longest):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def encode_tokens(
    encoder: TextEncoder,
    tokenizer: CaptionTokenizer,
    tokens: Sequence[Tokenized],
    batch_tokens: int = 4096,
    precision: str = 'fp32',
    sharded: bool = False,
    on_batch: Callable[[int], object] = lambda texts: None,
) -> torch.Tensor:
    """Embed tokenised texts in batches of similar length.

    Args:
        encoder: In evaluation mode, on its device.
        tokenizer: The encoder's.
        tokens: N texts.
        batch_tokens: Tokens per forward pass, padding included.
        precision: ``fp32``, or ``amp_bf16`` for autocast.
        sharded: The encoder is spread over the ranks: all run it equally often, since each takes part in gathering its
            weights; one with fewer batches repeats its last.
        on_batch: Is told how many texts each batch had.

    Returns:
        ``(N, llm_embed_dim)`` in float32 on the CPU, in the order of `tokens`.
    """
    device = next(encoder.parameters()).device
    result = torch.empty(len(tokens), encoder.llm_embed_dim, device=device)
    batches = list(token_batches([len(text.ids) for text in tokens], batch_tokens))
    if sharded:
        most = torch.tensor(len(batches), device=device)
        dist.all_reduce(most, reduce_operation='MAX')
        batches += [batches[-1]] * (int(most) - len(batches))
    for batch in batches:
        inputs = {k: v.to(device, non_blocking=True) for k, v in tokenizer.pad([tokens[i] for i in batch]).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == 'amp_bf16'):
            result[batch] = encoder(**inputs).float()
        on_batch(len(batch))
    return result.cpu()


def encode_texts(
    encoder: TextEncoder,
    tokenizer: CaptionTokenizer,
    texts: Sequence[str],
    batch_tokens: int = 4096,
    precision: str = 'fp32',
    instruction: str = '',
) -> torch.Tensor:
    """`encode_tokens` of texts, each after an instruction that is not pooled."""
    return encode_tokens(encoder, tokenizer, tokenizer.tokenize(texts, instruction), batch_tokens, precision)
