# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""LLM2CLIP as a MosaicML Composer training recipe.

After ``import llm2clip.export.hf``, ``AutoModel.from_pretrained`` loads the folders that
`recipes/export_hf.py` writes. This module imports neither PyTorch nor transformers,
so that a recipe can check its configuration first.
"""

__version__ = '0.2.0'
