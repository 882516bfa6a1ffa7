# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Cases of `make bench-gpu`: YAML files of the paper with overrides.

All cases fit 80 GiB according to their plans.  A case that changes one setting of another is compared with
it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm2clip.config import ExtractConfig, Stage1Config, Stage2Config

OUT = Path('runs/bench_gpu')
SCHEMAS: dict[str, Any] = {
    'stage1': Stage1Config, 'stage2': Stage2Config, 'extraction': ExtractConfig}


@dataclass(frozen=True)
class Case:
    """One measurement: YAML files and overrides, warm-up steps and measured steps."""

    kind: Literal['stage1', 'stage2', 'extraction']
    args: tuple[str, ...]
    against: str = ''
    """Reference case for the ratio of rates, if there is one."""
    small: tuple[str, ...] = ()
    """Overrides of the dry run on a CPU, applied after `args`."""
    warm_up: int = 10  # compiles
    steps: int = 20


@dataclass(frozen=True)
class Sizes:
    """Sizes of the random data and of the LLM."""

    images: int
    pictures: int
    """Number of distinct pictures; the images are copies of them."""
    repeat: int
    """Repetitions of each image per epoch, so that a measurement ends within one epoch."""
    captions: int
    warm_up_captions: int
    teacher_dim: int
    llm: dict[str, Any] = field(default_factory=dict)
    """Changes to the configuration of Llama 3.1 8B."""


SIZES = {
    'gpu': Sizes(4096, 500, 32, 4096, 512, 4096),
    'cpu': Sizes(64, 8, 2, 64, 8, 64, {
        'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2, 'num_attention_heads': 4,
        'num_key_value_heads': 2, 'head_dim': 16, 'vocab_size': 2000}),
}

_STAGE2 = ('yamls/stage2/paper.yaml', 'global_train_batch_size=512', 'model.vision.pretrained=false')
_SMALL_TOWER = (
    'global_train_batch_size=8', 'model.embed_dim=32', 'model.adapter.depth=1', 'model.vision.image_size=112',
    *(f'model.vision.architecture.{key}={value}' for key, value in (
        ('image_size', 112), ('hidden_size', 32), ('intermediate_size', 64), ('num_hidden_layers', 2),
        ('num_attention_heads', 2))))
_SMALL_MICROBATCH = (*_SMALL_TOWER, 'device_train_microbatch_size=4')
_CACHE = 'algorithms.grad_cache={}'
_B16 = (*_STAGE2, 'yamls/parts/tower/clip_b16.yaml', 'model.vision.gradient_checkpointing=false')
_L14 = (*_STAGE2, 'yamls/parts/tower/clip_l14_336.yaml', 'model.vision.gradient_checkpointing=true')
_L14_WHOLE = (*_L14, 'model.vision.gradient_checkpointing=false')
_FSDP = ('yamls/stage2/fsdp.yaml', 'fsdp.activation_checkpointing=false')

# Pairs of two long captions of an image.  About half of the captions exceed max_length, the length that the
# plan assumes for all texts.
_LLM = (
    'yamls/stage1/paper.yaml', 'yamls/stage1/captions_only.yaml', 'yamls/parts/teacher/llama3.1_8b.yaml',
    'global_train_batch_size=64', 'scheduler.t_warmup=0ba', 'text_encoder.max_length=128',
    'train_data.pairs=[{query: [long], positive: [other]}]', 'train_data.num_workers=4')
_LORA = (*_LLM, 'fsdp=null', 'text_encoder.dtype=bfloat16', 'device_train_microbatch_size=16')
_LORA_FSDP = (*_LLM, 'fsdp.activation_checkpointing=true', 'device_train_microbatch_size=32')
_SMALL_TEXTS = ('global_train_batch_size=8', 'device_train_microbatch_size=4', 'train_data.num_workers=1')

CASES = {
    'b16': Case('stage2', _B16, small=_SMALL_TOWER),
    'b16_eager': Case('stage2', (*_B16, 'compile=null'), 'b16', _SMALL_TOWER),
    'b16_not_fused': Case('stage2', (*_B16, 'optimizer.fused=false'), 'b16', _SMALL_TOWER),
    'b16_checkpointing': Case('stage2', (*_B16, 'model.vision.gradient_checkpointing=true'), 'b16',
                              _SMALL_TOWER),
    'b16_grad_cache': Case('stage2', (*_B16, _CACHE, 'device_train_microbatch_size=128'), 'b16',
                           _SMALL_MICROBATCH),
    'b16_blockwise': Case('stage2', (*_B16, 'loss.block_size=128'), 'b16',
                          (*_SMALL_TOWER, 'loss.block_size=4')),
    'b16_large_batch': Case('stage2',
                            (*_B16, 'yamls/stage2/large_batch.yaml', 'global_train_batch_size=4096'), 'b16',
                            (*_SMALL_MICROBATCH, 'loss.block_size=4'), steps=10),
    'b16_fsdp': Case('stage2', (*_B16, *_FSDP), 'b16', _SMALL_TOWER),
    'l14_336': Case('stage2', _L14, small=_SMALL_TOWER),
    'l14_336_eager': Case('stage2', (*_L14, 'compile=null'), 'l14_336', _SMALL_TOWER),
    'l14_336_not_fused': Case('stage2', (*_L14, 'optimizer.fused=false'), 'l14_336', _SMALL_TOWER),
    'l14_336_no_checkpointing': Case('stage2', (*_L14_WHOLE, 'global_train_batch_size=80'), 'l14_336',
                                     _SMALL_TOWER),
    'l14_336_grad_cache': Case('stage2', (*_L14_WHOLE, _CACHE, 'device_train_microbatch_size=64'), 'l14_336',
                               _SMALL_MICROBATCH),
    '8b_extraction': Case('extraction', (
        'yamls/extract/paper.yaml', 'teacher.type=llm', 'teacher.dtype=bfloat16',
        'teacher.chat_template=false'),
        small=('batch_tokens=512', 'teacher.dtype=float32')),
    '8b_lora': Case('stage1', _LORA, small=_SMALL_TEXTS, steps=15),
    '8b_lora_eager': Case('stage1', (*_LORA, 'compile=null'), '8b_lora', _SMALL_TEXTS, steps=15),
    '8b_lora_fsdp': Case('stage1', _LORA_FSDP, '8b_lora', _SMALL_TEXTS, steps=15),
    '8b_lora_fsdp_eager': Case('stage1', (*_LORA_FSDP, 'compile=null'), '8b_lora_fsdp', _SMALL_TEXTS,
                               steps=15),
}
"""Name -> case."""


def window(name: str, device: str) -> tuple[int, int]:
    """Return the numbers of warm-up steps and of measured steps."""
    if device == 'cpu':
        return 2, 2
    return CASES[name].warm_up, CASES[name].steps


def arguments(name: str, device: str, run: Path) -> list[str]:
    """Return YAML files and overrides of a case that may write the folder `run`, on ``gpu``,
    or ``cpu`` (dry run)."""
    case = CASES[name]
    data = OUT / 'data' / device
    training = (f'save_folder={run}', 'run_name=bench', 'autoresume=false', 'progress_bar=false',
                f'max_duration={sum(window(name, device))}ba')
    by_kind = {
        'extraction': (f'teacher.pretrained={data}/llm', f'out={run}',
                       f'datasets.warm_up.local={data}/warm_up/train',
                       f'datasets.captions.local={data}/captions/train'),
        'stage1': (*training, f'text_encoder.pretrained={data}/llm', f'plan_llm={data}/llm',
                   'text_encoder.chat_template=false',
                   f'train_data.streams.captions.local={data}/captions/train'),
        'stage2': (*training, 'train_data.caption_weights={short: 0.5, long: 0.5}',
                   f'train_data.streams.images={{local: {data}/images/train, '
                   f'repeat: {SIZES[device].repeat}, embeddings: {{random: {{local: {data}/vectors}}}}}}'),
    }
    args = [*case.args, f'device={device}', *by_kind[case.kind]]
    if device == 'cpu':
        args += [*case.small, 'precision=fp32']
        if case.kind != 'extraction':
            args.append('compile=null')
    return args
