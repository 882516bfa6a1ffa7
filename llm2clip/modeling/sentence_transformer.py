# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Frozen teachers from sentence-transformers: checked loading without running their code, and encoding.

Exported models contain a copy of this file.  It imports only torch, the files beside it and, for such a
teacher, sentence-transformers.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

# Relative, since the copies in an exported model are not part of a package `llm2clip`.
from .loaders import LoadError, check_finite, check_no_code, check_rope, loading

# Prefixes of the classes that a sentence-transformers folder may name: modules and activations.
_TRUSTED_CLASSES = ('sentence_transformers.', 'torch.nn.')
# Keys of a folder whose values sentence-transformers passes to transformers, in its old and its new terms.
_PASSED_ON = ('model_args', 'model_kwargs', 'config_args', 'config_kwargs')


def load_sentence_transformer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load the SentenceTransformer in a folder, frozen, in evaluation mode, on the CPU.

    `trust_remote_code` allows code that the folder holds or names; pickled weights never run code.

    Raises:
        LoadError: The model is missing, needs code that is not trusted, or has non-finite weights.
    """
    if not trust_remote_code:
        _refuse_foreign_classes(folder)
    # No `import`: transformers would require the package for every exported model.
    library: Any = importlib.import_module('sentence_transformers')
    with loading(folder, 'a sentence-transformers model'):
        # Otherwise, settings in the folder could allow pickled weights to run code.
        model = library.SentenceTransformer(str(folder), device='cpu', trust_remote_code=trust_remote_code,
                                            model_kwargs={'weights_only': True})
    check_finite(model.state_dict(), folder)
    for module in model.modules():
        check_rope(getattr(module, 'config', None), folder)
    return model.eval().requires_grad_(False)


def _refuse_foreign_classes(folder: Path) -> None:
    """Raise a LoadError if a local folder names custom classes or Hub kernels, which sentence-transformers
    runs even without trust."""
    for path in sorted(folder.rglob('*.json')):
        with loading(path, 'JSON'):
            content = json.loads(path.read_text(encoding='utf-8'))
        modules = [content]
        if isinstance(content, list):
            modules = content
        names: list[Any] = []
        for module in modules:
            if not isinstance(module, dict):
                continue
            names += [module.get(key) for key in ('type', 'activation_function', 'tokenizer_class')]
            types = module.get('types')
            if isinstance(types, dict):
                names += types.values()
            check_no_code({key: module.get(key) for key in _PASSED_ON}, path)
        for name in map(str, names):
            if '.' in name and not name.startswith(_TRUSTED_CLASSES):
                raise LoadError(f'{path}: names the class {name}, expected one of sentence-transformers; '
                                'trust_remote_code=true lets it run')
        if path.name == 'config.json' and isinstance(content, dict):
            check_no_code(content | {'auto_map': None}, path)


def padded_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, longest text first, each with at most `batch_tokens` padded tokens or one
    text."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start:start + size]
        start += size


def encode_sentences(
    model: Any, texts: Sequence[str], prompt: str = '', batch_tokens: int = 4096, precision: str = 'fp32',
    on_batch: Callable[[int], object] = lambda texts: None,
) -> tuple[torch.Tensor, int, int]:
    """Embed N texts with a SentenceTransformer's own `encode`.

    Args:
        model: From `load_sentence_transformer`, on its device.
        texts: N texts.
        prompt: Text before each; the model decides whether it is pooled.
        batch_tokens: Tokens per forward pass, with padding.
        precision: ``fp32``, or ``amp_bf16`` for autocast.
        on_batch: Called after each batch with its number of texts.

    Returns:
        Vectors ``(N, D)`` in float32 on the model's device, and the numbers of tokens, prompts included, and
        of truncated texts.
    """
    if not texts:
        return torch.empty(0, 0, device=model.device), 0, 0
    tokens = model.tokenizer([prompt + text for text in texts], truncation=False, verbose=False)
    lengths = [len(ids) for ids in tokens['input_ids']]
    limit = model.max_seq_length or max(lengths)
    num_tokens = [min(length, limit) for length in lengths]
    batches = list(padded_batches(num_tokens, batch_tokens))
    vectors = []
    for batch in batches:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == 'amp_bf16'):
            vectors.append(model.encode([texts[i] for i in batch], prompt=prompt, batch_size=len(batch),
                                        show_progress_bar=False, convert_to_tensor=True).float())
        on_batch(len(batch))
    order = torch.tensor(list(chain.from_iterable(batches)))
    # `encode` returns inference tensors, which autograd cannot save; the operations here return normal ones.
    in_order = torch.cat(vectors)[order.argsort().to(model.device, non_blocking=True)]
    return in_order, sum(num_tokens), sum(length > limit for length in lengths)
