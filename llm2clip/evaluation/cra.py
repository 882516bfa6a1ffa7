# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Caption retrieval accuracy of text encoders: do two captions of one image find each other?"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from composer.devices import Device

from llm2clip.config import ConfigError, CRAConfig
from llm2clip.data.schema import SAMPLE_ID, caption_column, check_dataset, read_samples
from llm2clip.evaluation.images import finite
from llm2clip.metrics.retrieval import caption_retrieval_accuracy
from llm2clip.ranks import in_turns, is_first, rows
from llm2clip.remote_code.checks_llm2clip import LoadError, load_config
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer, TextEncoder, encode_texts
from llm2clip.teacher.clip_text import ClipTextTeacher
from llm2clip.teacher.folder import load_teacher, teacher_config
from llm2clip.teacher.llm import widen_where_slow
from llm2clip.teacher.text_encoder import load_text_encoder

__all__ = ['check_cra', 'evaluate_cra']

_Encode = Callable[[Sequence[str]], torch.Tensor]
# Texts that are embedded together: enough to sort by length, few enough for several ranks to share.
_BLOCK = 1024


def check_cra(config: CRAConfig) -> None:
    """Raise a ConfigError that names the key if the pairs or the encoders' folders are wrong; loads no encoder."""
    for key, columns in (('captions', [SAMPLE_ID]), ('caption_keys', list(map(caption_column, config.caption_keys)))):
        try:
            check_dataset(config.captions, columns)
        except (OSError, ValueError) as error:
            raise ConfigError(f'cra.{key}: {error}') from None
    for name, folder in config.teachers.items():
        try:
            teacher_config(folder)
        except ConfigError as error:
            raise ConfigError(f'cra.teachers.{name}: {error}') from None
    for name, encoder in config.encoders.items():
        file = Path(encoder.pretrained, encoder.gguf_file or '')
        if Path(encoder.pretrained).is_dir() and not file.exists():
            raise ConfigError(f'cra.encoders.{name}.gguf_file: there is no {file}')
    for name, clip in config.clip_text.items():
        try:
            load_config(clip)
        except LoadError as error:
            raise ConfigError(f'cra.clip_text.{name}: {error}') from None


def evaluate_cra(config: CRAConfig, device: Device) -> tuple[dict[str, float], int]:
    """Caption retrieval accuracy of each encoder on the same pairs, in percent, and how many pairs there are.

    Samples that lack one of the two captions are no pairs; without any, this is a ValueError.  Every rank calls this.
    They share the texts, and the first has the numbers.
    """
    columns = [caption_column(key) for key in config.caption_keys]
    samples = read_samples(config.captions)
    pairs = [tuple(sample[name] for name in columns) for sample in samples]
    pairs = [pair for pair in pairs if all(text.strip() for text in pair)]
    if not pairs:
        raise ValueError(f'cra.caption_keys: no sample of {config.captions} has all of {config.caption_keys}')
    if len(pairs) < len(samples) and is_first():
        print(f'{len(samples) - len(pairs)} of {len(samples)} samples of {config.captions} lack one of '
              f'{config.caption_keys}', flush=True)
    pairs = pairs[:config.limit]
    first, second = ([pair[side] for pair in pairs] for side in range(2))
    result = {}
    for name, encode in _encoders(config, device):
        def encode_all(texts: list[str], encode: _Encode = encode) -> torch.Tensor:
            blocks = [texts[start:start + _BLOCK] for start in range(0, len(texts), _BLOCK)]
            return rows(in_turns(blocks, partial(map, encode)))

        vectors = [finite(encode_all(texts), f'{name}: vectors of captions') for texts in (first, second)]
        if is_first():
            result[name] = round(caption_retrieval_accuracy(*vectors), 3)
            print(f'{name}: {result[name]:.1f} % of {len(pairs)} pairs', flush=True)
    return result, len(pairs)


def _encoders(config: CRAConfig, device: Device) -> Iterator[tuple[str, _Encode]]:
    """One after the other; LLMs that follow each other and are the same one are loaded once."""
    llm_of = attrgetter('pretrained', 'gguf_file', 'adapters', 'dtype', 'attn_implementation', 'trust_remote_code')

    def with_llm(encoder: TextEncoder, tokenizer: CaptionTokenizer) -> _Encode:
        widen_where_slow(encoder.llm)
        device.module_to_device(encoder)
        return partial(encode_texts, encoder, tokenizer, batch_tokens=config.batch_tokens, precision=config.precision)

    before = None
    for name, how in config.encoders.items():
        if before is not None and llm_of(before[0].config) == llm_of(how):
            before = TextEncoder(before[0].llm, how).eval(), CaptionTokenizer(before[1].tokenizer, how)
        else:
            before = load_text_encoder(how)
        yield name, with_llm(*before)
    before = None  # no longer in memory beside the others
    for name, folder in config.teachers.items():
        yield name, with_llm(*load_teacher(folder))
    for name, clip in config.clip_text.items():
        teacher = ClipTextTeacher(clip, config.batch_tokens, config.precision, cut=True)
        device.module_to_device(teacher.model)
        yield name, lambda texts, teacher=teacher: teacher.embed(texts).vectors
