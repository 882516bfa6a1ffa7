# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Which caption of a sample is seen: a pure function of (seed, epoch, sample id)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import xxhash

from llm2clip.config import CaptionPairConfig
from llm2clip.data.schema import CAPTION, SAMPLE_ID, caption_keys

__all__ = ['draw', 'draw_captions', 'draw_pair', 'sample_seed', 'text_id']


def sample_seed(seed: int, epoch: int, sample_id: str) -> int:
    """A 64-bit seed for everything random about one sample in one epoch.

    It does not depend on workers, ranks, batches or on where a run was resumed.
    """
    return xxhash.xxh64_intdigest(f'{epoch}/{sample_id}', seed=seed)


def draw(weights: Sequence[float], seed: int, what: str = 'caption') -> int:
    """An index, drawn in proportion to `weights`, the same for the same seed and purpose."""
    point = xxhash.xxh64_intdigest(what, seed=seed) / 2**64 * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return max(index for index, weight in enumerate(weights) if weight > 0)


def draw_captions(sample: Mapping[str, Any], mix: Mapping[str, float], n: int, seed: int) -> list[tuple[str, str]]:
    """Keys and texts of n captions, drawn in proportion to the weights of those that the sample has and that were not
    drawn before.

    A sample that has fewer gives each of them once before it gives one again.  The first does not depend on n.

    Raises:
        ValueError: The sample has none of them.
    """
    texts = _captions_of(sample, mix)
    if not texts:
        raise _no_caption(sample, mix)
    left: list[str] = []
    drawn: list[tuple[str, str]] = []
    for i in range(n):
        left = left or list(texts)
        key = left.pop(draw([mix[key] for key in left], seed, f'caption {i}' if i else 'caption'))
        drawn.append((key, texts[key]))
    return drawn


def _captions_of(sample: Mapping[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """Caption key -> text of those that the sample has; one that is absent is an empty text."""
    texts = ((key, sample[CAPTION + key]) for key in keys)
    return {key: text for key, text in texts if text.strip()}


class DrawnPair(NamedTuple):
    """Two captions of a sample, and the direction between them."""

    direction: CaptionPairConfig
    query: str
    positive: str
    positive_key: str


def draw_pair(sample: Mapping[str, Any], pairs: Sequence[CaptionPairConfig], seed: int) -> DrawnPair:
    """A direction, and the texts of query and positive, which have different keys unless the direction has no positive.

    All three are drawn, as `seed` decides, among what the sample has: the directions for which it has the captions, and
    those captions.  Where it has no two captions for any direction, one caption is both query and positive, as in
    SimCSE (Gao et al. 2021): dropout, and the query's instruction, are then the only difference between the two.

    Raises:
        ValueError: It has none of the directions' captions.
    """
    every = dict.fromkeys(key for pair in pairs for key in pair.keys)
    texts = _captions_of(sample, every)
    if not texts:
        raise _no_caption(sample, every)
    queries = [[key for key in pair.query if _others(key, pair, texts)] for pair in pairs]
    single = not any(queries)
    if single:
        queries = [[key for key in pair.keys if key in texts] for pair in pairs]
    usable = [(pair, keys) for pair, keys in zip(pairs, queries) if keys]
    pair, keys = usable[draw([pair.weight for pair, _ in usable], seed)]
    query = keys[draw([1] * len(keys), seed, 'query')]
    others = [query] if single else _others(query, pair, texts)
    positive = others[draw([1] * len(others), seed, 'positive')]
    return DrawnPair(pair, texts[query], texts[positive], positive)


def _others(query: str, pair: CaptionPairConfig, texts: Mapping[str, str]) -> list[str]:
    """The keys that may stand beside a query which is there."""
    if query not in texts:
        return []
    return [query] if pair.positive is None else [key for key in pair.positive if key != query and key in texts]


def _no_caption(sample: Mapping[str, Any], keys: Iterable[str]) -> ValueError:
    """The error of a sample that has none of the captions which are drawn from."""
    wanted = list(keys)
    there = list(_captions_of(sample, caption_keys(sample)))
    return ValueError(f'sample {sample[SAMPLE_ID]!r} has none of the captions {", ".join(wanted)}, but '
                      f'{", ".join(there) or "no caption at all"}; draw from one that every sample has as well, or '
                      f'leave such samples out by prepare_data with require_any_caption=[{",".join(wanted)}]')


def text_id(text: Optional[str]) -> int:
    """A number that stands for the text, equal for equal texts; 0 for none."""
    return (xxhash.xxh64_intdigest(text) >> 1) or 1 if text else 0
