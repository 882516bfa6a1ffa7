# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""LLM2CLIP as a MosaicML Composer training recipe.

After ``import llm2clip``, ``AutoModel.from_pretrained`` knows the folders that `recipes/export_hf.py` writes.  PyTorch
and transformers are imported only when they are needed, so that a recipe can first check its configuration.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from llm2clip.export.hf import LLM2CLIPConfig, LLM2CLIPModel

__all__ = ['LLM2CLIPConfig', 'LLM2CLIPModel']
__version__ = '0.1.0'


def _export() -> ModuleType:
    """The module that registers this project's classes with transformers."""
    return importlib.import_module('llm2clip.export.hf')


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(_export(), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def _export_first(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _export()
    return wrapped(*args, **kwargs)


# When one of these is called, and not when transformers is imported: Composer and peft do that while they are imported
# themselves, and the module that registers needs them whole.
for _name, _class in (('configuration_auto', 'AutoConfig'), ('image_processing_auto', 'AutoImageProcessor')):
    wrapt.register_post_import_hook(
        lambda module, method=f'{_class}.from_pretrained': wrapt.wrap_function_wrapper(module, method, _export_first),
        f'transformers.models.auto.{_name}')
