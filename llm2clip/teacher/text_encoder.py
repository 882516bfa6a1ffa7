# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Text encoders from a configuration."""

from typing import Optional

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from llm2clip.config import LoraConfig, TextEncoderConfig
from llm2clip.remote_code.checks_llm2clip import load_tokenizer
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer, TextEncoder
from llm2clip.teacher.llm import add_lora, load_llm

__all__ = ['build_text_encoder', 'load_caption_tokenizer', 'load_text_encoder', 'shard_encoder']


def load_caption_tokenizer(config: TextEncoderConfig) -> CaptionTokenizer:
    """The tokenizer that comes with the LLM."""
    tokenizer = load_tokenizer(config.pretrained, config.trust_remote_code, gguf_file=config.gguf_file)
    return CaptionTokenizer(tokenizer, config)


def build_text_encoder(
    config: TextEncoderConfig, lora: Optional[LoraConfig] = None, on_meta: bool = False, key: str = 'lora'
) -> TextEncoder:
    """Load an LLM.

    Args:
        config: What to load.
        lora: Freeze the LLM and add trainable LoRA weights to it.
        on_meta: As for `load_llm`.
        key: Where `lora` stands in the configuration.
    """
    llm = load_llm(config, on_meta)
    return TextEncoder(llm if lora is None else add_lora(llm, lora, key), config)


def load_text_encoder(config: TextEncoderConfig) -> tuple[TextEncoder, CaptionTokenizer]:
    """A frozen encoder in evaluation mode, and its tokenizer."""
    return build_text_encoder(config).eval().requires_grad_(False), load_caption_tokenizer(config)


def shard_encoder(encoder: TextEncoder, mesh: DeviceMesh) -> None:
    """Spread a frozen encoder over the ranks of a mesh with FSDP2, a decoder layer at a time."""
    for module in encoder.modules():
        if encoder.fsdp_wrap_fn(module):
            fully_shard(module, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
