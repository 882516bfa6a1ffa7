# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Caption retrieval accuracy of text encoders: do two captions of one image find each other?"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from composer.devices import Device

from llm2clip.config import ConfigError, CRAConfig
from llm2clip.data.schema import CAPTION, SAMPLE_ID, read_columns, read_samples
from llm2clip.evaluation.images import finite
from llm2clip.metrics.retrieval import caption_retrieval_accuracy
from llm2clip.ranks import is_first, round_robin, rows
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.teacher.sources import teacher_source

__all__ = ['check_cra', 'evaluate_cra']

_Encode = Callable[[Sequence[str]], torch.Tensor]
# Texts that are embedded together: enough to sort by length, few enough for several ranks to share.
_BLOCK = 1024


def check_cra(config: CRAConfig) -> None:
    """Raise a ConfigError that names the key if the pairs or the encoders' folders are wrong; loads no encoder."""
    for key, columns in (('captions', [SAMPLE_ID]), ('caption_keys', [CAPTION + key for key in config.caption_keys])):
        try:
            read_columns(config.captions, columns)
        except (OSError, ValueError) as error:
            raise ConfigError(f'cra.{key}: {error}') from None
    for name, encoder in config.teachers.items():
        try:
            teacher_source(encoder).check_encoding(None, '')
        except ValueError as error:
            raise ConfigError(f'cra.teachers.{name}: {error}') from None


def evaluate_cra(config: CRAConfig, device: Device) -> tuple[dict[str, float], int]:
    """Caption retrieval accuracy of each encoder on the same pairs, in percent, and how many pairs there are.

    Samples that lack one of the two captions are no pairs; without any, this is a ValueError.  Every rank calls this.
    They share the texts, and the first has the numbers.
    """
    columns = [CAPTION + key for key in config.caption_keys]
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
            return rows(round_robin(blocks, partial(map, encode)))

        vectors = [finite(encode_all(texts), f'{name}: vectors of captions') for texts in (first, second)]
        if is_first():
            result[name] = round(caption_retrieval_accuracy(*vectors), 3)
            print(f'{name}: {result[name]:.1f} % of {len(pairs)} pairs', flush=True)
    return result, len(pairs)


def _encoders(config: CRAConfig, device: Device) -> Iterator[tuple[str, _Encode]]:
    """One after the other."""
    for name, encoder in config.teachers.items():
        # Nobody asks for its fingerprint, for which all weights would be read once more.
        teacher = teacher_source(encoder, cut=True).load(
            device, config.batch_tokens, config.precision, fingerprint=Fingerprint(()))
        yield name, lambda texts, teacher=teacher: teacher.embed(texts).vectors
