# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Types with value ranges, for fields of the configuration and arguments of parts.

`llm2clip.config.loading.check_values` checks values against them, and raises a ConfigError.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union
from urllib.parse import urlparse

from pydantic import AfterValidator, Field, ValidationInfo

T = TypeVar('T')


def _must(allowed: Callable[[Any], object], expected: str) -> AfterValidator:
    def check(value: T) -> T:
        if not allowed(value):
            raise ValueError(expected)
        return value

    return AfterValidator(check)


def _is_time(value: str) -> bool:
    match = re.fullmatch(r'(\d+(?:\.\d+)?(?:e\d+)?)(iter|ep|ba|sp|tok|sec|dur)', value)
    if match is None:
        return False
    number = float(match[1])
    if match[2] == 'dur':
        return 0 < number <= 1
    return 0 < number <= 1e15 and number.is_integer()


def _is_folder_name(value: str) -> bool:
    # File systems allow 255 bytes; 200 leave room for the suffixes of temporary names.
    return bool(re.fullmatch('[^./][^/]*', value)) and value.isprintable() and len(value.encode()) <= 200


def _elsewhere(remote: str, info: ValidationInfo) -> str:
    """Return a remote; raise a ValueError if it is the local folder, where uploaded shards may be deleted."""
    key = 'local' if 'local' in info.data else 'out'
    folder = info.data.get(key, '')
    if os.path.realpath(remote.removeprefix('file://')) == os.path.realpath(folder):
        raise ValueError(f'another place than {key}, {folder}')
    return remote


# Schemes that Streaming reads from, and those of Composer's checkpoints.  Streaming also writes to the
# first ones; its uploader for `azure` writes to another container than its downloader reads from.
_WRITABLE_SCHEMES = ('s3', 'gs', 'oci', 'azure-dl', 'dbfs', 'alipan')
_READABLE_SCHEMES = (*_WRITABLE_SCHEMES, 'azure', 'hf', 'sftp')
_CHECKPOINT_SCHEMES = ('s3', 'gs', 'oci', 'azure', 'dbfs')


def _path_or(schemes: Sequence[str]) -> AfterValidator:
    """A path, or a URL of one of the schemes without ``#`` and ``?``, where Streaming would cut it off."""
    def is_usable(place: str) -> bool:
        scheme = urlparse(place).scheme
        return scheme == '' or scheme in schemes and not {'#', '?'} & {*place}

    return _must(is_usable, f'a path, or a URL of {", ".join(schemes)} without # and ?')


# A part that is chosen by name: usually `name` and its arguments.
Component = dict[str, Any]
# A non-empty string, such as a name or a path.
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1),
                  _must(lambda texts: len({*texts}) == len(texts), 'different values')]
FolderName = Annotated[str, _must(_is_folder_name, 'the name of a folder, which neither begins with a dot '
                                  'nor holds a slash, of at most 200 bytes')]
# pydantic checks fields in order, so a dataclass has to declare `local` or `out` before its remote.
Remote = Annotated[Text, AfterValidator(_elsewhere), _path_or(_READABLE_SCHEMES)]
OutRemote = Annotated[Text, AfterValidator(_elsewhere), _path_or(_WRITABLE_SCHEMES)]
CheckpointFolder = Annotated[Text, _path_or(_CHECKPOINT_SCHEMES)]
RunFolder = Annotated[Text, _must(lambda path: '://' not in path, 'a folder on a disk; checkpoint_folder may '
                                  'be s3://…')]
# Upper ends are far above any use.  Machines, processes, captions of an image, features,
# or pixels along a side.
SmallCount = Annotated[int, Field(ge=1, le=2**16)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Dims = Annotated[list[Count],
                 _must(lambda dims: dims == sorted({*dims}), 'each value larger than the one before')]
Natural = Annotated[int, Field(ge=0, le=10**6)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# A float, because YAML reads `15e6` as one.
SampleCount = Annotated[float, Field(ge=1, le=1e11, multiple_of=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
HoldoutShare = Annotated[float, Field(ge=0, lt=1)]
# Caption key -> column or field.
CaptionColumns = Annotated[dict[Text, Text], Field(min_length=1)]
SampleShare = Annotated[float, Field(gt=0, le=1)]
# Number or share of images, or split -> number of images.
Holdout = Union[Weight, Annotated[dict[FolderName, Count], Field(min_length=1)]]
CropScale = Annotated[list[SampleShare], Field(min_length=2, max_length=2),
                      _must(lambda values: values == sorted(values), 'the smaller value first')]
CheckpointsKept = Annotated[int, _must(lambda n: n > 0 or n == -1, 'at least 1, or -1 to keep all')]
# Name -> sampling weight.
Mix = Annotated[dict[Text, Weight], _must(lambda weights: max(weights.values(), default=1) > 0,
                                          'one weight above 0 at least')]
# Times of Composer and sizes of Streaming, in their notation.
Time = Annotated[str, _must(_is_time, 'a time above 0, such as 1ep (epochs), 20ba (batches), 3e4sp (samples) '
                            'or 0.1dur (of max_duration)')]
TimeOrZero = Annotated[str, _must(lambda value: _is_time(value) or re.fullmatch('0(ep|ba|sp|tok|dur)', value),
                                  'a time, such as 1ep, 20ba or 0.1dur (of max_duration)')]
Duration = Annotated[str, _must(lambda value: _is_time(value) and not value.endswith('dur'),
                                'a length above 0, such as 4ep (epochs), 1000ba (batches) or '
                                '3e6sp (samples)')]
Size = Annotated[str, _must(
    lambda value: re.fullmatch(r'(?i)\s*\d*\.?\d*[1-9]\d*\.?\d*([kmgtpezy]?b)?\s*', value),
    'a size above 0, such as 64mb or 200gb')]
LossName = Annotated[str, _must(lambda name: re.fullmatch(r'clip|siglip|\w[\w.]*:\w+', name),
                                'clip, siglip or module:class')]
AccuracyMetric = Literal['top1', 'mean_per_class']
DeviceName = Literal['gpu', 'cpu']
WeightType = Literal['float32', 'bfloat16', 'float16']
VisualProjection = Literal['linear', 'affine', 'mlp', 'glu', 'identity', 'pretrained']
Storage = Literal['float16', 'float32', 'int8']
TeacherPrecision = Literal['fp32', 'amp_bf16']
RunWeights = Literal['latest', 'best']
