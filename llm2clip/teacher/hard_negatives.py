# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Source of captions with hard negatives, which a text encoder finds among the captions of other images."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from tqdm import tqdm

from llm2clip.config.ranges import Natural, Share, Text
from llm2clip.data.convert.samples import Dropped, Part, Sample
from llm2clip.data.schema import CAPTION, INDEX, NEGATIVE, SAMPLE_ID, caption_keys, read_index, whole_shard
from llm2clip.device import open_device
from llm2clip.errors import ConfigError
from llm2clip.teacher.sources import LLMTeacher, TeacherFolder

_TEXTS = 1 << 16  # that are tokenised at once
_SCORES = 1 << 26  # similarities that are computed at once


def hard_negatives(
    dataset: Text, teacher: Text, range_min: Natural = 0, relative_margin: Optional[Share] = None
) -> tuple[dict[str, list[Part]], Dropped]:
    """The captions of a dataset, as the split ``train``, each with a hard negative: the most similar caption
    of another image, which `mine_hard_negatives` of sentence-transformers would find too.

    The negative of the caption ``short`` is the caption ``negative_of_short``, empty if there is none.  A
    text that several images have is no negative, and has none.

    Args:
        dataset: Folder of the dataset, with or without images.
        teacher: Folder of the text encoder, written by stage 1.  Its instruction precedes a caption whose
            negative is searched, as it precedes queries in training.
        range_min: Number of most similar captions to skip, since some describe the image too.
        relative_margin: Share by which a negative has to be less similar than every caption of the image.
    """
    if not Path(dataset, INDEX).is_file():
        raise ConfigError(f'source.dataset: there is no MDS dataset in {Path(dataset).absolute()}')
    source = TeacherFolder(teacher)
    source.check_encoding()
    files = sorted(path for path in Path(teacher).iterdir() if path.is_file())
    inputs = [str(path) for path in (Path(dataset, INDEX), *files)]
    part = Part('all', partial(_samples, dataset, source, range_min, relative_margin), inputs)
    return {'train': [part]}, Dropped()


def _samples(
    dataset: str, source: TeacherFolder, range_min: int, relative_margin: Optional[float], dropped: Dropped
) -> Iterator[Sample]:
    samples: list[Sample] = []
    for shard in read_index(dataset)['shards']:
        for row in whole_shard(dataset, shard):
            captions = {key: row[CAPTION + key] for key in caption_keys(row) if not key.startswith(NEGATIVE)}
            samples.append(Sample(row[SAMPLE_ID], captions))
    image_of_text = _captions_of_one_image(samples)

    teacher = source.load(open_device(None))
    assert isinstance(teacher, LLMTeacher)
    texts = list(image_of_text)
    vectors = _embed(teacher, texts, '')
    queries = vectors
    if teacher.tokenizer.instruction:
        queries = _embed(teacher, texts, teacher.tokenizer.instruction)
    images = torch.tensor(list(image_of_text.values())).to(vectors.device)
    nearest = _search(queries, vectors, images, range_min, relative_margin)
    negatives = {text: texts[i] for text, i in zip(texts, nearest) if i is not None}

    for sample in samples:
        captions = dict(sample.captions)
        for key, text in sample.captions.items():
            captions[NEGATIVE + key] = negatives.get(text, '')
        yield Sample(sample.sample_id, captions)


def _captions_of_one_image(samples: Sequence[Sample]) -> dict[str, int]:
    """Map each caption that a single image has to the index of this image."""
    first_image: dict[str, int] = {}
    shared: set[str] = set()
    for i, sample in enumerate(samples):
        for text in sample.captions.values():
            if first_image.setdefault(text, i) != i:
                shared.add(text)
    return {text: i for text, i in first_image.items() if text.strip() and text not in shared}


def _embed(teacher: LLMTeacher, texts: Sequence[str], instruction: str) -> torch.Tensor:
    """Embed N texts as ``(N, D)``, L2-normalised."""
    parts = []
    with tqdm(total=len(texts), desc='embed', unit=' captions') as bar:
        for start in range(0, len(texts), _TEXTS):
            tokens = teacher.tokenizer.tokenize(texts[start:start + _TEXTS], instruction)
            parts.append(F.normalize(teacher.embed_prepared(tokens, bar.update).vectors, dim=-1))
    return torch.cat(parts)


def _search(
    queries: torch.Tensor, vectors: torch.Tensor, images: torch.Tensor, range_min: int,
    relative_margin: Optional[float],
) -> Iterator[Optional[int]]:
    """Yield the index of the hard negative of each query ``(N, D)`` among `vectors` ``(N, D)``, None if it
    has none.  `images` ``(N,)`` are the images of the captions."""
    size = max(1, _SCORES // len(vectors))
    for start in tqdm(range(0, len(vectors), size), desc='search'):
        rows = slice(start, start + size)
        scores = queries[rows] @ vectors.T
        excluded = images[rows, None] == images
        if relative_margin is not None:
            lowest = scores.masked_fill(~excluded, torch.inf).amin(1, keepdim=True)
            excluded |= scores > lowest - relative_margin * lowest.abs()
        best = scores.masked_fill_(excluded, -torch.inf).topk(min(range_min + 1, len(vectors)))
        for i, score in zip(best.indices[:, -1].tolist(), best.values[:, -1].tolist()):
            yield i if score > -torch.inf else None
