# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""LLMs as text encoders: architectures, weights, LoRA adapters, and the teacher folder of stage 1."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.nn as nn
import xxhash
from peft import LoraConfig as PeftLoraConfig
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from llm2clip.config import LoraConfig, TextEncoderConfig
from llm2clip.config.loading import check_values
from llm2clip.errors import ConfigError, FileError, under
from llm2clip.io.files import read_json, reading, write_json, write_text
from llm2clip.io.folders import atomic_folder
from llm2clip.io.tensors import open_weights, read_safetensors, write_safetensors
from llm2clip.modeling.loaders import (
    check_finite,
    keep_readable,
    load_checked,
    load_config,
    load_tokenizer,
    read_encoding,
)
from llm2clip.modeling.text_encoder import CaptionTokenizer, TextEncoder, save_llm
from llm2clip.ranks import dist, is_first
from llm2clip.teacher.fingerprint import Fingerprint, hash_files
from llm2clip.teacher.lora import compute_in_input_dtype

KIND, LORA_KIND = 'teacher of captions', 'LoRA adapter'
BASE_FILE = 'base_model.json'
ENCODER_FILE = 'text_encoder.json'
LORA_FILE = 'lora.safetensors'
# Architectures that use a 4-D mask unchanged in every layer, so that it can make attention bidirectional.
ARCHITECTURES = ('gemma2', 'gemma3', 'gemma3_text', 'granite', 'llama', 'mistral', 'olmo2', 'phi3', 'qwen2',
                 'qwen3', 'smollm3')
_POOLING = {
    'mean': 'vectors = (states * mask).sum(1) / mask.sum(1)',
    'weighted_mean': 'mask = mask * mask.cumsum(1)\nvectors = (states * mask).sum(1) / mask.sum(1)',
    'last': 'vectors = states[torch.arange(len(states)), tokens.attention_mask.sum(1) - 1]'}
_CARD = """---
library_name: transformers
pipeline_tag: feature-extraction
license: other
tags: [llm2clip]
---

# Text encoder of LLM2CLIP

A language model that embeds a text as a vector of {width} numbers. The tokenizer adds the tokens that
training put around a text, and truncates to {max_length} tokens. {notes}

```python
import torch
from transformers import AutoModel, AutoTokenizer

folder = '.'  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder{attention})
tokens = tokenizer(['a photo of a dog', 'a cat'], padding=True, truncation=True, return_tensors='pt')
with torch.no_grad():
    states = model(**tokens).last_hidden_state
mask = tokens.attention_mask[..., None].clone()
mask[:, :{header}] = 0  # the tokens before the text
{pooling}
```

The licence of the language model holds for these weights.
"""


def _load(auto: Any, config: TextEncoderConfig, on_meta: bool) -> PreTrainedModel:
    folder = config.pretrained
    key = f'{config.key}.pretrained'
    hf_config = load_config(folder, f'{key}: {folder}', gguf_file=config.gguf_file)
    if hf_config.model_type not in ARCHITECTURES:
        raise ConfigError(f'{folder} is a {hf_config.model_type!r} model; the architectures that work as '
                          f'text encoders are {", ".join(ARCHITECTURES)}', key, is_absolute=True)
    has_softcap = getattr(hf_config, 'attn_logit_softcapping', None) is not None
    attention = config.attn_implementation or ('eager' if has_softcap else 'sdpa')
    if has_softcap and attention != 'eager':
        raise ConfigError(f'{attention!r} does not compute the attention of a {hf_config.model_type!r} '
                          'model; expected eager', f'{config.key}.attn_implementation', is_absolute=True)
    # Adapters are merged in float32: in bfloat16, rounding would lose part of them.
    dtype = 'float32' if config.adapters else config.dtype
    options: dict[str, Any] = {'dtype': getattr(torch, dtype), 'attn_implementation': attention}
    if on_meta:
        with torch.device('meta'):
            return auto.from_config(hf_config, **options)
    # Only the language-model head may be missing or unexpected.
    llm, _ = load_checked(
        auto.from_pretrained, folder, where=f'{key}: {folder}', optional='lm_head.', config=hf_config,
        gguf_file=config.gguf_file, trust_remote_code=False, **options)
    return llm


def load_llm(config: TextEncoderConfig, on_meta: bool = False) -> PreTrainedModel:
    """Load the decoder without its language-model head, and merge `config.adapters`.

    With `on_meta`, weights use no memory and adapters are not merged.  Under FSDP all ranks but the first do
    this and receive their shards from the first: a large LLM is in memory once, not once per rank.

    Raises:
        ConfigError: The folder is missing, the architecture is not supported, or an adapter does not fit.
        FileError, LoadError: The LLM or an adapter is damaged.
    """
    return _merge_adapters(_load(AutoModel, config, on_meta), config, on_meta)


def load_llm_and_head(config: TextEncoderConfig, on_meta: bool = False) -> tuple[PreTrainedModel, nn.Linear]:
    """Call `load_llm`, and copy the frozen language-model head, since FSDP cannot shard tied weights."""
    full = _load(AutoModelForCausalLM, config, on_meta)
    tied: Any = full.get_output_embeddings()
    head = nn.Linear(tied.in_features, tied.out_features, bias=False, device='meta')
    weight = tied.weight.detach().to(getattr(torch, config.dtype), copy=True)
    head.weight = nn.Parameter(weight, requires_grad=False)
    return _merge_adapters(full.get_decoder(), config, on_meta), head


def _merge_adapters(model: PreTrainedModel, config: TextEncoderConfig, on_meta: bool) -> PreTrainedModel:
    # Gemma 3 from 4B on has a vision tower, which is dropped.
    llm = getattr(model, 'language_model', model)
    llm.config.use_cache = False
    if not on_meta:
        with under(f'{config.key}.adapters'):
            for folder in config.adapters:
                llm = _merge_adapter(llm, folder)
    cast_weights(llm, getattr(torch, config.dtype))
    return llm


def cast_weights(llm: nn.Module, dtype: torch.dtype) -> None:
    """Cast the LLM's own weights to `dtype`, but not LoRA weights and buffers (rotary frequencies)."""
    for name, parameter in llm.named_parameters():
        if 'lora_' not in name:
            parameter.data = parameter.data.to(dtype)


def set_attention_dropout(llm: nn.Module, probability: float) -> None:
    """Set the dropout of attention weights in every layer; the LLM's saved configuration does not change."""
    layer: Any
    for layer in llm.modules():
        if hasattr(layer, 'attention_dropout'):
            layer.attention_dropout = probability


def add_lora(llm: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Freeze the LLM and add trainable LoRA weights, in float32, to its projections; a ConfigError if it has
    no projection with a configured name."""
    arguments = dataclasses.asdict(config)
    linear = {name.rsplit('.', 1)[-1] for name, module in llm.named_modules()
              if isinstance(module, nn.Linear)}
    names = arguments.pop('target_modules') or linear
    unknown = sorted(set(names) - linear)
    if unknown:
        raise ConfigError(f'a {llm.config.model_type!r} model has no projection called {", ".join(unknown)}; '
                          f'it has {", ".join(sorted(linear))}', key='target_modules')
    with next(llm.parameters()).device:
        peft_config = PeftLoraConfig(bias='none', target_modules=sorted(names), **arguments)
        model: Any = get_peft_model(llm, peft_config)
    compute_in_input_dtype(model)
    return model


def _merge_adapter(llm: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Merge a LoRA adapter, from this project or another one, into the weights that it was trained on."""
    with reading(folder, 'a LoRA adapter'):
        peft_config = PeftConfig.from_pretrained(folder)
        megatron_config = getattr(peft_config, 'megatron_config', None)
        if peft_config.peft_type != PeftType.LORA or megatron_config:
            # peft would import the module that `megatron_core` names.
            raise FileError(f'its adapter_config.json is of the type {peft_config.peft_type} and has the '
                            f'megatron_config {megatron_config}, expected LORA and none', folder)
        # Adapters that were trained with a language-model head name the layers one level deeper.
        weights = load_peft_weights(folder, device='cpu')
        state = {name.replace('base_model.model.model.', 'base_model.model.'): weight
                 for name, weight in weights.items()}
    check_finite(state, folder)
    peft_config.task_type = None
    base = Path(folder, BASE_FILE)
    if base.is_file():
        record = read_json(base, dict)
        if record.get('fingerprint') != _weights_fingerprint(llm):
            raise ConfigError(f'{folder} was trained on another LLM, {record.get("pretrained")}')
    try:
        model = get_peft_model(llm, peft_config)
        _set_lora(model, state, folder)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f'{folder} does not fit a {llm.config.model_type!r} model of width '
                          f'{llm.config.hidden_size}: {str(error).splitlines()[0]}') from None
    merged: Any = model.merge_and_unload(safe_merge=True)
    return merged


def _set_lora(model: PeftModel, state: dict[str, torch.Tensor], path: Union[str, Path]) -> None:
    result: Any = set_peft_model_state_dict(model, state)
    missing = [name for name in result.missing_keys if 'lora_' in name]
    if missing or result.unexpected_keys:
        raise FileError(f'not the LoRA weights of this LLM, they lack {missing[:3]} and have '
                        f'{result.unexpected_keys[:3]} besides', path)


def save_adapter(model: PeftModel, pretrained: str, folder: Path) -> None:
    """Write the LoRA weights alone, in peft format, with the name `pretrained` and a hash of their LLM."""
    # save_embedding_layers: 'auto' would query the Hub.
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / 'README.md').unlink()  # an empty model card
    write_json(folder / BASE_FILE, {'pretrained': pretrained, 'fingerprint': _weights_fingerprint(model)})


def save_lora(model: PeftModel, config: LoraConfig, path: Path) -> None:
    """Write the LoRA weights beside the LLM that they are merged into, for `apply_lora_apart`."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    write_safetensors(path, state, {'lora': json.dumps(dataclasses.asdict(config))})


def apply_lora_apart(llm: PreTrainedModel, folder: Union[str, Path], path: Path) -> PeftModel:
    """Subtract merged LoRA weights from an LLM in low precision, and apply them in separate layers.

    Adding a LoRA update to a bfloat16 weight rounds the sum to 8 significant bits; a separate layer keeps the
    update.  So `folder` holds the merged weights in float32.  Each weight is read, its update subtracted, and
    the result rounded, one at a time: the full LLM is never in memory in float32.

    The `llm` is loaded from `folder`, in the dtype of the result; `save_lora` wrote the file `path`.
    """
    expected = 'the LoRA weights of this LLM'
    state, metadata = read_safetensors(path, expected)
    with reading(path, expected):
        config = LoraConfig(**json.loads(metadata['lora']))
        config.lora_dropout = 0.0
        model = add_lora(llm, config)
        _set_lora(model, state, path)
    with torch.no_grad(), open_weights(folder) as merged:
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                layer: Any = module
                layer.get_base_layer().weight.copy_(merged(f'{name}.weight') -
                                                    layer.get_delta_weight('default'))
    return model


def _weights_fingerprint(llm: nn.Module) -> str:
    """Hash weights that LoRA does not change; it identifies an LLM of a known architecture, with or without
    adapters."""
    digest = xxhash.xxh64()
    for name, weight in sorted(llm.named_parameters()):
        if 'lora_' not in name and (weight.ndim == 1 or name.endswith('embed_tokens.weight')):
            digest.update(weight.detach()[:64].to('cpu', torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def load_caption_tokenizer(config: TextEncoderConfig) -> CaptionTokenizer:
    """Load the tokenizer that comes with the LLM."""
    tokenizer = load_tokenizer(config.pretrained, config.trust_remote_code, gguf_file=config.gguf_file)
    return CaptionTokenizer(tokenizer, config)


def build_text_encoder(
    config: TextEncoderConfig, lora: Optional[LoraConfig] = None, on_meta: bool = False
) -> TextEncoder:
    """Build a text encoder from an LLM; with `lora`, freeze it and add trainable LoRA weights."""
    llm = load_llm(config, on_meta)
    if lora is None:
        return TextEncoder(llm, config)
    with under('lora'):
        return TextEncoder(add_lora(llm, lora), config)


def load_text_encoder(config: TextEncoderConfig) -> tuple[TextEncoder, CaptionTokenizer]:
    """Load a frozen encoder in evaluation mode, and its tokenizer."""
    return build_text_encoder(config).eval().requires_grad_(False), load_caption_tokenizer(config)


def shard_encoder(encoder: TextEncoder, mesh: DeviceMesh) -> None:
    """Shard a frozen encoder over the ranks of a mesh with FSDP2, one decoder layer at a time."""
    for module in encoder.modules():
        if encoder.fsdp_wrap_fn(module):
            fully_shard(module, mesh=mesh)
    fully_shard(encoder, mesh=mesh)


def save_teacher(
    encoder: TextEncoder, tokenizer: CaptionTokenizer, lora: Optional[LoraConfig], folder: Union[str, Path],
    lora_folder: Union[str, Path, None] = None,
) -> None:
    """Write an encoder, sharded or not, as a Hugging Face folder with its encoding in ``text_encoder.json``.

    LoRA is merged and saved in float32, since a narrower dtype would round part of it away.  The LoRA weights
    are also saved beside the LLM, so that `load_teacher` can hold the LLM in a narrower dtype.  Every rank
    must call this; rank 0 writes each folder atomically.

    Args:
        encoder, tokenizer: Encoder to save, and its tokenizer.
        lora: LoRA configuration that the encoder was built with.
        folder: Output folder.
        lora_folder: With `lora`, an output folder for the LoRA weights alone, in peft format, for the LLM
            with its `adapters`.
    """
    state = get_model_state_dict(encoder, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_first():
        # peft cannot merge shards, so an unsharded model adopts the gathered weights without a copy.
        whole = build_text_encoder(encoder.config, lora, on_meta=True)
        whole.load_state_dict(state, assign=True)
        llm: Any = whole.llm  # a PeftModel with `lora`
        if lora_folder is not None:
            with atomic_folder(lora_folder, LORA_KIND) as out:
                save_adapter(llm, encoder.config.pretrained, out)
        with atomic_folder(folder, KIND) as out:
            if lora is not None:
                save_lora(llm, lora, out / LORA_FILE)
                cast_weights(llm, torch.float32)
                # safe_merge works on copies: on a CPU, the gathered weights are still those of the encoder.
                llm = llm.merge_and_unload(safe_merge=True)
            save_llm(llm, encoder.config.bidirectional, out)
            tokenizer.save(out)
            keep_readable(out)
            write_json(out / ENCODER_FILE, encoding(encoder.config))
            write_text(out / 'README.md', _teacher_card(llm.config, encoder.config, len(tokenizer.header)))
    dist.barrier()


def _teacher_card(llm: Any, config: TextEncoderConfig, header: int) -> str:
    """Return a model card that says how transformers alone computes the teacher's vectors."""
    notes = ''
    if config.bidirectional:
        notes = ('Attention is bidirectional (`"is_causal": false` in `config.json`). transformers before '
                 '5.2 ignores this and computes wrong vectors. transformers also keeps the sliding window '
                 'of a model that has one, and training did not: vectors of longer texts differ.')
    attention = ''
    if getattr(llm, 'attn_logit_softcapping', None) is not None:
        attention = ", attn_implementation='eager'"
    return _CARD.format(notes=notes, attention=attention, header=header, width=llm.hidden_size,
                        pooling=_POOLING[config.pooling], max_length=config.max_length)


def encoding(config: TextEncoderConfig) -> dict[str, Any]:
    """Return the settings that decide how an encoder embeds captions, without the location of its weights."""
    excluded = ['pretrained', 'gguf_file', 'adapters', 'attn_implementation', 'trust_remote_code', 'type']
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in excluded}


def teacher_config(folder: Union[str, Path]) -> TextEncoderConfig:
    """Read how the teacher in `folder` encodes captions.

    Raises:
        ConfigError: `save_teacher` did not write the folder.
        FileError: A value is out of range.
        LoadError: ``text_encoder.json`` is damaged, or its keys are not the expected ones.
    """
    path = Path(folder) / ENCODER_FILE
    if not path.is_file():
        raise ConfigError(f'{folder} is not a teacher: it has no {ENCODER_FILE} (stage 1 writes it when it '
                          'ends)')
    config = TextEncoderConfig(pretrained=str(folder), **read_encoding(path))
    try:
        check_values(TextEncoderConfig, dataclasses.asdict(config))
    except ConfigError as error:
        raise FileError(str(error), path) from None
    return config


def teacher_fingerprint(folder: Union[str, Path]) -> Fingerprint:
    """Return the fingerprint of the teacher in `folder`, after reading its weights."""
    return Fingerprint.of(hash_files(folder, exclude=ENCODER_FILE), encoding(teacher_config(folder)))


def load_teacher(
    folder: Union[str, Path], in_float32: bool = False
) -> tuple[TextEncoder, CaptionTokenizer]:
    """Load the frozen encoder that `save_teacher` wrote, with weights in the dtype of training or in float32.

    In a dtype narrower than float32, LoRA is applied in separate layers, as in training.
    """
    config = teacher_config(folder)
    if in_float32:
        config.dtype = 'float32'
    lora = Path(folder, LORA_FILE)
    if config.dtype == 'float32' or not lora.is_file():
        return load_text_encoder(config)
    llm = apply_lora_apart(load_llm(config), folder, lora)
    return TextEncoder(llm, config).eval().requires_grad_(False), load_caption_tokenizer(config)
