# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""LLM2CLIP as a MosaicML Composer training recipe."""

from llm2clip.export.hf import LLM2CLIPConfig, LLM2CLIPModel

__all__ = ['LLM2CLIPConfig', 'LLM2CLIPModel']
__version__ = '0.1.0'
