# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Choice of a sample's captions: a pure function of (seed, epoch, sample id)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import xxhash

from llm2clip.config import CaptionPairConfig
from llm2clip.data.schema import CAPTION, SAMPLE_ID, caption_keys


def sample_seed(seed: int, epoch: int, sample_id: str) -> int:
    """Return a 64-bit seed for all randomness of one sample in one epoch.

    It is independent of workers, ranks, batches and the position at which a run was resumed.
    """
    return xxhash.xxh64_intdigest(f'{epoch}/{sample_id}', seed=seed)


def draw(weights: Sequence[float], seed: int, purpose: str = 'caption') -> int:
    """Draw an index in proportion to `weights` above 0; the same `seed` and `purpose` give the same index."""
    point = xxhash.xxh64_intdigest(purpose, seed=seed) / 2**64 * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return len(weights) - 1  # after rounding errors


def draw_captions(
    sample: Mapping[str, Any], mix: Mapping[str, float], n: int, seed: int
) -> list[tuple[str, str]]:
    """Draw n captions of a sample by weight, without replacement, and return their keys and texts.

    A sample with fewer captions repeats one only after all are drawn.  The first does not depend on n.

    Raises:
        ValueError: The sample has none of the captions in `mix`.
    """
    texts = _existing_captions(sample, mix)
    remaining: list[str] = []
    drawn: list[tuple[str, str]] = []
    for i in range(n):
        remaining = remaining or list(texts)
        weights = [mix[key] for key in remaining]
        purpose = 'caption'
        if i:
            purpose += f' {i}'
        key = remaining.pop(draw(weights, seed, purpose))
        drawn.append((key, texts[key]))
    return drawn


def _existing_captions(sample: Mapping[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """Caption key -> text of the captions that the sample has; a missing one is stored as an empty text.  A
    sample that has none is a ValueError."""
    texts = {key: sample[CAPTION + key] for key in keys}
    existing = {key: text for key, text in texts.items() if text.strip()}
    if not existing:
        others = [key for key in caption_keys(sample) if sample[CAPTION + key].strip()]
        raise ValueError(
            f'sample {sample[SAMPLE_ID]!r} has none of the captions {", ".join(texts)}, but '
            f'{", ".join(others) or "no caption at all"}; draw from one that every sample has as well, or '
            f'leave such samples out by prepare_data with require_any_caption=[{",".join(texts)}]')
    return existing


class DrawnPair(NamedTuple):
    """Two captions of a sample, and the direction between them."""

    direction: CaptionPairConfig
    query: str
    positive: str
    positive_key: str


def draw_pair(sample: Mapping[str, Any], pairs: Sequence[CaptionPairConfig], seed: int) -> DrawnPair:
    """Draw a direction, a query and a positive; their keys differ unless the direction has no positive.

    `seed` decides among the directions for which the sample has both captions, and among these captions.  If
    there is no such direction, one caption is both query and positive, as in SimCSE (Gao et al. 2021).  The
    two then differ only by dropout and by the instruction of the query.

    Raises:
        ValueError: The sample has none of the directions' captions.
    """
    all_keys: dict[str, None] = {}
    for pair in pairs:
        all_keys.update(dict.fromkeys(pair.keys))
    texts = _existing_captions(sample, all_keys)
    # Each direction that the sample has captions for: query -> its possible positives.
    usable: list[tuple[CaptionPairConfig, dict[str, list[str]]]] = []
    for pair in pairs:
        positives = {query: _positives(query, pair, texts) for query in pair.query}
        positives = {query: keys for query, keys in positives.items() if keys}
        if positives:
            usable.append((pair, positives))
    if not usable:  # one caption is both
        for pair in pairs:
            own = {key: [key] for key in pair.keys if key in texts}
            if own:
                usable.append((pair, own))
    pair, positives = usable[draw([pair.weight for pair, _ in usable], seed)]
    queries = list(positives)
    query = queries[draw([1] * len(queries), seed, 'query')]
    keys = positives[query]
    positive = keys[draw([1] * len(keys), seed, 'positive')]
    return DrawnPair(pair, texts[query], texts[positive], positive)


def _positives(query: str, pair: CaptionPairConfig, texts: Mapping[str, str]) -> list[str]:
    """Keys of the possible positives of a query; none if the sample lacks the query."""
    if query not in texts:
        return []
    if pair.positive is None:
        return [query]
    positives: list[str] = []
    for key in pair.positive:
        if key != query and key in texts:
            positives.append(key)
    return positives


def text_id(text: str) -> int:
    """Return a 63-bit hash of a text; 0 only for a blank text, which stands for a missing one."""
    if not text.strip():
        return 0
    return (xxhash.xxh64_intdigest(text) >> 1) or 1
