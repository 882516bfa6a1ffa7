# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Recipes as a user calls them, but in the process of the tests."""

import atexit
import gc
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from composer.core import Engine
from streaming.base.shared import SharedMemory
from streaming.base.util import clean_stale_shared_memory
from torch.distributed.checkpoint.state_dict import _get_fqns

import llm2clip.config

ROOT = Path(__file__).parents[1]
# Recipe -> the type of its configuration.
SCHEMAS = {path.stem: getattr(llm2clip.config, re.findall(r'run_command\((\w+)', path.read_text())[0])
           for path in sorted((ROOT / 'recipes').glob('*.py'))}

TRAIN = ['run_name=r', 'save_folder=f', 'max_duration=1ep', 'global_train_batch_size=8', 'optimizer.lr=1e-3',
         'train_data.streams.s.local=d']
# Recipe -> the keys that it requires, with values.
REQUIRED = {
    'demo': ['model=m', 'index=o', 'images=i'],
    'evaluate': ['out=o', 'models.m.run=r', 'retrieval.r.local=d'],
    'export_hf': ['run=r', 'out=o'],
    'export_sentence_transformers': ['teacher=t', 'out=o'],
    'export_vision': ['run=r', 'out=o'],
    'extract_embeddings': ['out=o', 'datasets.d.local=d', 'teacher=t'],
    'extract_image_embeddings': ['out=o', 'datasets.d.local=d', 'vision.name=x'],
    'import_official': ['out=o', 'teacher=t'],
    'prepare_data': ['out=o', 'source.name=emoji'],
    'report': ['results=r', 'out=o', 'steps.a=b'],
    'run': ['steps={a: [prepare_data, out=o, source.name=emoji]}'],
    'search': ['model=m', 'index=o', 'images=i'],
    'train_inheritance': TRAIN,
    'train_stage1': [*TRAIN, 'text_encoder.pretrained=x'],
    'train_stage2': [*TRAIN, 'model.vision.name=x'],
}


def example_of_the_page(part: str) -> str:
    """The Python code of a page that has a part of the user."""
    pages = ''.join(page.read_text() for page in (ROOT / 'docs').rglob('*.md'))
    example, = (code for code in re.findall(r'```python\n(.*?)```', pages, re.S) if part in code)
    return example


def run_recipe(monkeypatch: pytest.MonkeyPatch, name: str, *args: str) -> None:
    monkeypatch.setenv('LLM2CLIP_TRACEBACK', '1')  # errors as they are raised
    monkeypatch.setattr(sys, 'argv', [f'recipes/{name}.py', *args])
    with as_if_a_process_ended():
        runpy.run_path(str(ROOT / 'recipes' / f'{name}.py'), run_name='__main__')


@contextmanager
def as_if_a_process_ended() -> Iterator[None]:
    """Let go of what is left for the end of Python, and with it of hundreds of open files.

    Until then, Composer keeps a closed trainer, Streaming its shared memory, and torch a model whose state it has read.
    """
    register, shared = atexit.register, []

    def note(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        if isinstance(getattr(function, '__self__', None), SharedMemory):
            shared.append(function)
        elif function is not Engine._close:
            register(function, *args, **kwargs)
        return function

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atexit, 'register', note)
        try:
            yield
        finally:
            getattr(_get_fqns, 'cache_clear', gc.collect)()  # torch 2.7 keeps models there
            gc.collect()
            for cleanup in shared:
                with suppress(BufferError):  # of a dataset that an exception still refers to
                    cleanup()
            clean_stale_shared_memory()
