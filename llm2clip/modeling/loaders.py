# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Checked loading of transformers models, configurations and tokenizers, without running code from them.

Exported models contain a copy of this file.  It imports only torch, transformers and the files beside it.
"""

import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig
from transformers.utils import logging

# Relative, since the copies in an exported model are not part of a package `llm2clip`.
from .text_encoder import TextEncoder

# Suffixes of files that decide a teacher's vectors: weights, tokenizer, chat template and configurations.
TEACHER_SUFFIXES = ('.safetensors', '.bin', '.model', '.json', '.jinja', '.txt')
_REASON = 300
# Options of `from_pretrained` with which transformers 5 fetches compiled code from the Hub.
_KERNEL_OPTIONS = ('use_kernels', 'kernel_config', 'allow_all_kernels', 'gguf_file')
_ENCODING = {'bidirectional', 'pooling', 'chat_template', 'instruction', 'max_length', 'dtype'}


class LoadError(ValueError):
    """Raised for weights or configurations that cannot be used;
    the message names them and the expected content."""


@contextmanager
def loading(where: Union[str, Path], expected: str) -> Iterator[None]:
    """Turn a library's error about a file or folder into a one-line LoadError that names it."""
    try:
        yield
    except Exception as error:
        # A missing package is not a fault of the folder, and errors of this project already name the cause.
        # They are recognised by package, since copies of this file in exported models define their own error
        # classes.
        if isinstance(error, ImportError) or type(error).__module__.split('.')[0] == __name__.split('.')[0]:
            raise
        reason = ' '.join(str(error).split())[:_REASON] or type(error).__name__
        raise LoadError(f'{where}: cannot be loaded ({reason}), expected {expected}') from error


def check_finite(state: Mapping[str, torch.Tensor], where: Union[str, Path]) -> None:
    """Raise a LoadError that names the first tensor with an infinite value or NaN.

    Tensors on the meta device and tensors without floating-point values are skipped.
    """
    for name, value in state.items():
        if value.is_floating_point() and value.numel() and not value.is_meta:
            if value.dtype.itemsize == 1:
                value = value.float()
            # aminmax propagates NaN and infinity, and is a hundred times as fast as torch.isfinite.
            if not torch.stack(torch.aminmax(value)).isfinite().all():
                raise LoadError(f'{where}: {name} holds values that are not finite, expected finite weights')


def check_keys(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: Union[str, Path]
) -> None:
    """Raise a LoadError that names the first weights that are missing, unexpected or of another shape."""
    _check_names(expected.keys() - state.keys(), state.keys() - expected.keys(), where)
    for name, value in expected.items():
        shape = state[name].shape
        if shape != value.shape:
            raise LoadError(f'{where}: {name} has the shape {tuple(shape)}, expected {tuple(value.shape)}')


def _check_names(missing: Collection[str], besides: Collection[str], where: Union[str, Path]) -> None:
    if missing or besides:
        raise LoadError(f'{where}: the weights lack {sorted(missing)[:3]} and have {sorted(besides)[:3]} '
                        'besides, expected all weights of this model in its shapes, and no others')


def load_checked(
    load: Callable[..., Any], name: Any, *args: Any, where: str = '', more: bool = False,
    optional: Union[str, tuple[str, ...]] = (), **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Call a `from_pretrained` of transformers and check the weights; return the model and its loading info.

    Transformers itself initialises missing weights, ignores unexpected ones,
    and accepts infinite values and NaN.

    Args:
        load: The `from_pretrained`, called with `name`, `args` and `options`.
        name: Folder or hub name.
        where: Name for messages; by default `name`.
        more: Accept any unexpected weights, for a model that is only a part of the checkpoint.
        optional: Prefixes of weights that may be missing or unexpected.

    Raises:
        LoadError: The model cannot be loaded, is an adapter to another model,
            or has wrong or non-finite weights.
    """
    where = where or str(name)
    # transformers would load the adapter's base model instead.
    adapter_error = LoadError(f'{where}: has an adapter_config.json, expected a whole model and no adapter '
                              'to one')
    if Path(str(name), 'adapter_config.json').is_file():
        raise adapter_error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no table of unexpected weights, which are checked below
    try:
        with loading(where, 'a model of transformers'):
            # Weights of another shape are reported below, too.
            options.update(output_loading_info=True, ignore_mismatched_sizes=True)
            model, info = load(name, *args, **options)
    finally:
        logging.set_verbosity(verbosity)
    if getattr(model, '_hf_peft_config_loaded', False):
        raise adapter_error
    missing = [*info['missing_keys'], *(key for key, *_ in info['mismatched_keys'])]
    unexpected = [] if more else info['unexpected_keys']
    _check_names([key for key in missing if not key.startswith(optional)],
                 [key for key in unexpected if not key.startswith(optional)], where)
    check_finite(model.state_dict(), where)
    return model, info


def check_no_code(fields: Mapping[str, Any], where: Union[str, Path]) -> None:
    """Raise a LoadError with the key of any code in a configuration: classes,
    Hub kernels or values to evaluate."""
    for key, value in fields.items():
        if isinstance(value, PretrainedConfig):
            value = vars(value)
        text = str(value)
        is_class = key == 'auto_map' and value
        is_kernel = key in _KERNEL_OPTIONS and value or 'attn_implementation' in str(key) and '/' in text
        is_computed = '${' in text
        if is_class or is_kernel or is_computed:
            raise LoadError(f'{where}: {key} names code, {text[:80]}, expected none: data does not decide '
                            'which code runs')
        parts = [value]
        if isinstance(value, (list, tuple)):
            parts = list(value)
        for part in parts:
            if isinstance(part, Mapping):
                check_no_code(part, f'{where}: {key}')


def load_config(name: Union[str, Path], where: str = '', **options: Any) -> PretrainedConfig:
    """Load the configuration of a model type that transformers knows;
    custom classes in the folder are not used.

    Raise a LoadError if it is missing, names other code, or cannot be read by this version of transformers.
    """
    where = where or str(name)
    with loading(where, 'a config.json that transformers knows'):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    for part in (config, getattr(config, 'text_config', None)):
        check_rope(part, where)
    # A saved copy must not ask for the custom classes either.
    vars(config).pop('auto_map', None)
    # A text encoder chooses its attention by its own setting; the key is for other programs.
    vars(config).pop('is_causal', None)
    check_no_code(vars(config), where)
    return config


def check_rope(config: Any, where: Union[str, Path]) -> None:
    """Raise a LoadError if transformers 4 runs and has ignored rotary frequencies that transformers 5
    wrote."""
    theta = getattr(config, 'rope_theta', None)
    rope = getattr(config, 'rope_parameters', None) or {}
    rope = rope.get('full_attention', rope)
    if not theta or not rope:
        return
    is_scaled = rope.get('rope_type', 'default') != 'default'
    if theta != rope.get('rope_theta') or (is_scaled and not config.rope_scaling):
        raise LoadError(f'{where}: was written by transformers 5, whose rope_parameters this version does '
                        'not read, expected rope_theta and rope_scaling, or transformers 5')


def keep_readable(folder: Path) -> None:
    """Make the LLM and tokenizer configurations of transformers 5 readable for 4.57.

    Version 4.57 would ignore `rope_parameters` and use its defaults, and it does not know the tokenizer's
    class.
    """
    for name, change in (('config.json', rope_of_4), ('tokenizer_config.json', _tokenizer_of_4)):
        path = folder / name
        if path.is_file():
            fields = json.loads(path.read_text(encoding='utf-8'))
            change(fields)
            path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def rope_of_4(config: dict[str, Any]) -> None:
    """Replace the `rope_parameters` of transformers 5, if any, by the fields of 4."""
    rope = config.pop('rope_parameters', None)
    if not rope:
        return
    scaling: Optional[dict[str, Any]] = dict(rope.get('full_attention', rope))
    config['rope_theta'] = scaling.pop('rope_theta')
    if 'partial_rotary_factor' in scaling:
        config['partial_rotary_factor'] = scaling.pop('partial_rotary_factor')
    kind = scaling['rope_type']
    if kind == 'longrope':  # Phi-3 accepts only these keys
        scaling = {'type': kind, 'short_factor': scaling['short_factor'],
                   'long_factor': scaling['long_factor']}
    elif kind == 'default':
        scaling = None
    config['rope_scaling'] = scaling
    if 'sliding_attention' in rope:
        config['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']


def _tokenizer_of_4(config: dict[str, Any]) -> None:
    if config.get('tokenizer_class') == 'TokenizersBackend':
        config['tokenizer_class'] = 'PreTrainedTokenizerFast'
    if isinstance(config.get('extra_special_tokens'), list):
        config['additional_special_tokens'] = config.pop('extra_special_tokens')


def load_tokenizer(name: Union[str, Path], trust_remote_code: bool = False, **options: Any) -> Any:
    """Load the tokenizer of a folder or hub name; run code that comes with it only with `trust_remote_code`.

    Raise a LoadError if there is none.
    """
    with loading(name, 'tokenizer.json or other files of a tokenizer that transformers knows'):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)


def read_encoding(path: Path) -> dict[str, Any]:
    """Read a teacher's ``text_encoder.json``, the settings that turn captions into vectors.

    The file can set nothing else; in particular, it cannot enable remote code.  Raise a LoadError if it is
    missing or not JSON, or has other keys.
    """
    with loading(path, 'how a teacher turns captions into vectors, as JSON'):
        encoding = dict(json.loads(path.read_text(encoding='utf-8')))
    differing = encoding.keys() ^ _ENCODING
    if differing:
        raise LoadError(f'{path}: expected the keys {", ".join(sorted(_ENCODING))}, no more and no less; '
                        f'not so: {", ".join(sorted(differing))}')
    return encoding


def load_encoder(folder: Path, encoding: Any) -> TextEncoder:
    """Load the frozen LLM of a teacher's folder with the settings `encoding`, in evaluation mode on the CPU.

    Raise a LoadError if the LLM is missing or damaged, or needs code.
    """
    config = load_config(folder)
    has_softcap = getattr(config, 'attn_logit_softcapping', None) is not None
    # A narrower dtype would round away part of the LoRA update that is merged into the weights.
    dtype = 'float32' if (folder / 'lora.safetensors').is_file() else encoding.dtype
    llm, _ = load_checked(AutoModel.from_pretrained, folder, config=config, trust_remote_code=False,
                          optional='lm_head.', dtype=getattr(torch, dtype),
                          attn_implementation='eager' if has_softcap else 'sdpa')
    return TextEncoder(getattr(llm, 'language_model', llm), encoding).eval().requires_grad_(False)


def teacher_files(folder: Path) -> list[Path]:
    """Return the files in a teacher's folder that decide its vectors, sorted by path."""
    return sorted(path for path in folder.rglob('*') if path.suffix in TEACHER_SUFFIXES)


def checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of each file in a teacher's folder that decides its vectors, by relative path."""
    return {path.relative_to(folder).as_posix(): checksum(path) for path in teacher_files(folder)}


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with path.open('rb') as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def check_weight_files(folder: Path) -> None:
    """Raise a LoadError if a weight file of an exported model does not match its checksum in config.json."""
    path = folder / 'config.json'
    with loading(path, 'the configuration of an exported model'):
        recorded = json.loads(path.read_text(encoding='utf-8')).get('weight_files', {}).items()
    for name, expected in recorded:
        if not (folder / name).is_file() or checksum(folder / name) != expected:
            raise LoadError(f'{folder / name}: is damaged or missing, expected the weights that were '
                            'exported')
