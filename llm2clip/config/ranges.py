# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Types with the range of their values, for the fields of the configuration and the arguments of parts.

`llm2clip.config.files.check_values` compares values with them, and raises a ConfigError.
"""

import os
import re
from typing import Annotated, Any, Literal, TypeVar, Union
from urllib.parse import urlparse

from pydantic import AfterValidator, Field, ValidationInfo

__all__ = [
    'AccuracyMetric', 'CheckpointsKept', 'Component', 'ConfigError', 'Count', 'CropScale', 'DeviceName',
    'Dims', 'Duration', 'EngineName', 'Finite', 'FolderName', 'HeldOut', 'HeldOutShare', 'Mix', 'Natural',
    'Positive', 'Remote', 'RunWeights', 'SampleCount', 'Seed', 'Share', 'Size',
    'TeacherPrecision', 'Text', 'Texts', 'Time', 'VisualProjection', 'Weight', 'WeightType',
]

T = TypeVar('T')


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its origin and what was expected."""


def _expect(allowed: bool, value: T, expected: str) -> T:
    if not allowed:
        raise ValueError(expected)
    return value


_TIME = re.compile(r'(\d+(?:\.\d+)?(?:e\d+)?)(iter|ep|ba|sp|tok|sec|dur)')


def _time(value: str) -> str:
    match = _TIME.fullmatch(value)
    number, unit = (float(match[1]), match[2]) if match else (0.0, '')
    allowed = number <= 1 if unit == 'dur' else number == int(number)
    return _expect(number > 0 and allowed, value,
                   'a time above 0, such as 1ep (epochs), 20ba (batches), 3e4sp (samples) or 0.1dur (of max_duration)')


def _duration(value: str) -> str:
    length = 'a length above 0, such as 4ep (epochs), 1000ba (batches) or 3e6sp (samples)'
    try:
        return _expect(not _time(value).endswith('dur'), value, length)
    except ValueError:
        raise ValueError(length) from None


def _size(value: str) -> str:
    return _expect(re.fullmatch(r'\d*\.?\d*[1-9]\d*\.?\d*([kmgtpezy]?b)?', value.strip().lower()) is not None, value,
                   'a size above 0, such as 64mb or 200gb')


# What file systems allow, less what is added to the name of what is not complete.
_LONGEST_NAME = 200


def _folder_name(value: str) -> str:
    allowed = value.isprintable() and value[:1] not in ('', '.') and '/' not in value
    return _expect(allowed and len(value.encode()) <= _LONGEST_NAME, value,
                   'the name of a folder, which neither begins with a dot nor holds a slash, of at most '
                   f'{_LONGEST_NAME} bytes')


def _elsewhere(remote: str, info: ValidationInfo) -> str:
    """A remote that is not its own local copy, of which shards are removed once the remote has them."""
    key = 'local' if 'local' in info.data else 'out'
    folder, place = info.data.get(key, ''), urlparse(remote)
    path = place.path if place.scheme == 'file' else remote
    same = place.scheme in ('', 'file') and (os.path.realpath(path) == os.path.realpath(folder) or (
        os.path.exists(path) and os.path.exists(folder) and os.path.samefile(path, folder)))
    return _expect(not same, remote, f'another place than {key}, {folder}')


def _drawable(weights: dict[str, float]) -> dict[str, float]:
    return _expect(not weights or sum(weights.values()) > 0, weights, 'one weight above 0 at least')


def _checkpoints_kept(value: int) -> int:
    return _expect(value > 0 or value == -1, value, 'at least 1, or -1 to keep all')


def _ascending(values: list[float]) -> list[float]:
    return _expect(values == sorted(values), values, 'the smaller value first')


def _increasing(values: list[int]) -> list[int]:
    return _expect(values == sorted({*values}), values, 'each value larger than the one before')


def _different(values: list[str]) -> list[str]:
    return _expect(len({*values}) == len(values), values, 'different values')


# A part that is chosen by name: that name, mostly, and its arguments.
Component = dict[str, Any]
# A text that is not empty, such as a name or a path.
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1), AfterValidator(_different)]
FolderName = Annotated[str, AfterValidator(_folder_name)]
# Beside `local` or `out`, which stands before it.
Remote = Annotated[Text, AfterValidator(_elsewhere)]
Count = Annotated[int, Field(ge=1)]
Dims = Annotated[list[Count], AfterValidator(_increasing)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# `15e6` is a float.
SampleCount = Annotated[float, Field(ge=1, multiple_of=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
HeldOutShare = Annotated[float, Field(ge=0, lt=1)]
# A number or a share of the images, or split -> number of images.
HeldOut = Union[Weight, Annotated[dict[FolderName, Count], Field(min_length=1)]]
CropScale = Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2),
                      AfterValidator(_ascending)]
CheckpointsKept = Annotated[int, AfterValidator(_checkpoints_kept)]
# Name -> how often it is drawn.
Mix = Annotated[dict[Text, Weight], AfterValidator(_drawable)]
# As Composer and Streaming write them.
Time = Annotated[str, AfterValidator(_time)]
Duration = Annotated[str, AfterValidator(_duration)]
Size = Annotated[str, AfterValidator(_size)]
AccuracyMetric = Literal['top1', 'mean_per_class']
DeviceName = Literal['gpu', 'cpu']
EngineName = Literal['local', 'ray']
WeightType = Literal['float32', 'bfloat16', 'float16']
VisualProjection = Literal['linear', 'affine', 'identity', 'pretrained']
TeacherPrecision = Literal['fp32', 'amp_bf16']
RunWeights = Literal['latest', 'best']
