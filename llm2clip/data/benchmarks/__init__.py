# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Evaluation sets, read from the files in which they are published.

Each loader's docstring says where its set comes from and how to lay it out.  Whatever is missing or wrong in the files
is found when a set is opened, not in the middle of an evaluation.
"""

from collections.abc import Callable

from llm2clip.data.benchmarks.base import ClassificationSet, RetrievalSet
from llm2clip.data.benchmarks.chinese import coco_cn, flickr_cn
from llm2clip.data.benchmarks.classification import imagenet_folder
from llm2clip.data.benchmarks.generic import image_folder, mds
from llm2clip.data.benchmarks.karpathy import coco, flickr30k
from llm2clip.data.benchmarks.long_captions import docci, sharegpt4v, urban1k
from llm2clip.data.benchmarks.xm3600 import xm3600

__all__ = ['CLASSIFICATION_SETS', 'ClassificationSet', 'RETRIEVAL_SETS', 'RetrievalSet']

RETRIEVAL_SETS: dict[str, Callable[..., RetrievalSet]] = {
    'coco': coco,
    'coco_cn': coco_cn,
    'docci': docci,
    'flickr30k': flickr30k,
    'flickr_cn': flickr_cn,
    'image_folder': image_folder,
    'mds': mds,
    'sharegpt4v': sharegpt4v,
    'urban1k': urban1k,
    'xm3600': xm3600,
}

CLASSIFICATION_SETS: dict[str, Callable[..., ClassificationSet]] = {
    'imagenet_folder': imagenet_folder,
}
