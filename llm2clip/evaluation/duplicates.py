# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Near-copies: of training images among themselves, and of evaluation sets' images among training images.

What is found is written to `duplicates.json`::

    {
      "images": {"cc3m": 2800000, "retrieval.flickr30k": 1000},
      "found_by": {"max_distance": 56, "parts": true, "min_cosine": null},
      "groups": [{"keep": ["cc3m", "12"], "copies": [["cc3m", "4711"], …]}, …],
      "sets": {"retrieval.flickr30k": {"fingerprint": "…", "images": 1000, "near_copies": {"36979.jpg": ["cc3m", "5"]}}}
    }

- ``groups``: training images that are near to each other, or to others of the group; which of them stays, unless it is
  near to an image of an evaluation set, and the rest.
- ``sets``: evaluation set -> its images that have a near copy in training, with the nearest; ``fingerprint`` is that of
  `llm2clip.evaluation.image_blocks.set_fingerprint`.

`leave_out/<dataset>.json` lists the ids of the training images that are copies within their group, or near to an image
of an evaluation set, for `leave_out` of `prepare_data`.
"""

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from llm2clip.config import ConfigError
from llm2clip.data.image_hashes import VIEWS, WORDS, mirrored
from llm2clip.data.near import HashIndex, groups_of
from llm2clip.evaluation.features import EvaluationSet
from llm2clip.evaluation.image_blocks import Block, Images, read_features, read_hashes, set_fingerprint
from llm2clip.files import read_json, reading, write_json

__all__ = ['DUPLICATES_FILE', 'Found', 'Member', 'NearCopies', 'find_near_copies', 'near_copies_of_sets',
           'write_near_copies']

DUPLICATES_FILE = 'duplicates.json'
# More pairs per image than this, found by features, are no near-copies.
_PAIRS_PER_IMAGE = 100


class Member(NamedTuple):
    """An image of a training dataset or of an evaluation set."""

    where: int
    """Number of the dataset or set, those of training first."""
    position: int
    """In it."""
    image_id: str


class Found(NamedTuple):
    """Two images that are near to each other, of which the first is a training image."""

    first: Member
    second: Member
    distance: Optional[int]
    """In bits, if hashes found them."""
    cosine: Optional[float]
    """Of the features, if these found them."""


class NearCopies(NamedTuple):
    """What is near to what."""

    pairs: list[Found]
    """The nearest first.  Training images of equal hashes are in a pair with the first of them alone."""
    groups: list[list[Member]]
    """Training images that belong together, the one that stays first."""
    nearest: dict[Member, Found]
    """Image of an evaluation set -> its pair with the nearest training image."""
    leave_out: list[Member]
    """Training images that do not stay."""


class _Pairs(NamedTuple):
    """K pairs of a training image and any other one, by their positions among all images, those of training first."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    near: NDArray[np.float64]
    """Distance in bits, or cosine."""


def find_near_copies(
    training: Sequence[Images], sets: Sequence[Images], folder: Path, max_distance: int,
    parts: bool = True, features: Optional[str] = None, min_cosine: float = 1.0,
    device: Union[str, torch.device] = 'cpu', num_workers: int = 0,
) -> NearCopies:
    """All near-copies within training data, and between these and evaluation sets.

    Two images are near if a part of one, or its mirror image, and the whole other one have hashes that differ in few
    bits, or if their features point nearly the same way.

    Args:
        training: Datasets.
        sets: Evaluation sets.
        folder: Where their hashes are kept, and their features.
        max_distance: Most bits that differ.
        parts: Compare parts of images, too.
        features: Name of a model, of which there are features; unset, hashes alone count.
        min_cosine: Least cosine between features.
        device: Where these are compared.
        num_workers: Threads that compare hashes; 0 is as 1.

    Raises:
        ConfigError: So many images have features that are near to each other that these cannot be copies.
    """
    images = [*training, *sets]
    n_training = sum(one.size for one in training)
    hashed, close = _near_by_hashes(images, n_training, folder, max_distance, parts, num_workers)
    found = [hashed]
    if features is not None:
        found.append(_near_by_features(images, n_training, folder, features, min_cosine, torch.device(device)))
        close[found[-1].a[found[-1].b >= n_training]] = True
    return _arranged(found, close, training, sets, folder)


def _near_by_hashes(
    images: Sequence[Images], n_training: int, folder: Path, max_distance: int, parts: bool, num_workers: int
) -> tuple[_Pairs, NDArray[np.bool_]]:
    """Pairs of which one is a training image, and which training images are near to an image of an evaluation set.

    Of training images of equal hashes, of which there may be millions, each is in a pair with the first one alone.
    """
    blocks = [block for one in images for block in one.blocks]
    whole = np.concatenate([read_hashes(block, folder).hashes[:, 0].copy() for block in blocks])
    # Classes of equal hashes: which is first, and to which each image belongs.
    different, first, which = np.unique(whole, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    index, n_views = HashIndex(different, max_distance), len(VIEWS) if parts else 1

    def near(block: Block, start: int) -> NDArray[np.int64]:
        """``(K, 3)``: classes of images of a block, those that are near to them, and their distances."""
        own = which[start:start + block.size]
        rows = np.flatnonzero(first[own] == np.arange(start, start + block.size))
        views = read_hashes(block, folder).hashes[rows, :n_views]
        found = index.near(np.concatenate([views, mirrored(views)], axis=1).reshape(-1, WORDS))
        of = own[rows][found.queries // (2 * n_views)]
        return np.stack([of, found.found, found.distances], axis=1)[of != found.found]

    starts = np.cumsum([0, *(block.size for block in blocks)]).tolist()
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        found = list(tqdm(pool.map(near, blocks, starts), total=len(blocks), desc='compare hashes', unit=' blocks'))
    classes = _nearest_first(np.concatenate(found))
    both_ways = np.concatenate([classes, classes[:, [1, 0, 2]]])
    tested = np.zeros(len(different), bool)
    tested[which[n_training:]] = True
    close = tested.copy()
    close[both_ways[tested[both_ways[:, 1]], 0]] = True
    # An image of an evaluation set is in a pair with the first of its own class, and with those of all near ones.
    others = np.arange(len(which))
    equal = others[first[which] != others]
    pairs = [np.stack([first[which[equal]], equal, np.zeros_like(equal)], axis=1),
             np.stack([first[classes[:, 0]], first[classes[:, 1]], classes[:, 2]], axis=1)]
    order = np.argsort(both_ways[:, 0], kind='stable')
    begin, end = (np.searchsorted(both_ways[order, 0], which[n_training:], side) for side in ('left', 'right'))
    of = np.repeat(np.arange(n_training, len(which)), end - begin)
    rows = order[np.concatenate([np.arange(*ends) for ends in zip(begin, end)]).astype(int)] if len(of) else order[:0]
    pairs.append(np.stack([first[both_ways[rows, 1]], of, both_ways[rows, 2]], axis=1))
    a, b, distance = _nearest_first(np.concatenate(pairs)).T
    with_training = a < n_training
    return (_Pairs(a[with_training], b[with_training], distance[with_training].astype(float)),
            close[which[:n_training]])


def _nearest_first(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(K, 3)``: two positions, the smaller one first, and their distance -> each pair once, in its least distance."""
    pairs = np.column_stack([np.sort(pairs[:, :2], axis=1), pairs[:, 2]])
    pairs = pairs[np.lexsort(pairs.T[::-1])]
    kept = np.ones(len(pairs), bool)
    kept[1:] = (pairs[1:, :2] != pairs[:-1, :2]).any(axis=1)
    return pairs[kept]


def _near_by_features(
    images: Sequence[Images], n_training: int, folder: Path, model: str, min_cosine: float, device: torch.device
) -> _Pairs:
    """Pairs of which one is a training image; every image is compared with every other, block by block."""
    blocks = [block for one in images for block in one.blocks]
    starts = np.cumsum([0, *(block.size for block in blocks)])
    parts, count = [], 0
    limit = _PAIRS_PER_IMAGE * int(starts[-1])
    for i, block in enumerate(tqdm(blocks, desc='compare features', unit=' blocks')):
        if starts[i] >= n_training:
            break
        rows = read_features(block, folder, model).to(device).float()
        for k in range(i, len(blocks)):
            cosines = rows @ read_features(blocks[k], folder, model).to(device).float().T
            near = cosines >= min_cosine
            a, b = (near.triu(1) if i == k else near).nonzero(as_tuple=True)
            parts.append((a.cpu().numpy() + starts[i], b.cpu().numpy() + starts[k], cosines[a, b].cpu().numpy()))
            count += len(a)
            if count > limit:
                raise ConfigError(f'min_cosine: {min_cosine:g}, but more than {limit:,} pairs of the {starts[-1]:,} '
                                  'images have features that are as near, expected a cosine that only copies reach')
    return _Pairs(*(np.concatenate(column) for column in zip(*parts)))


def _arranged(
    found: Sequence[_Pairs], close: NDArray[np.bool_], training: Sequence[Images], sets: Sequence[Images], folder: Path
) -> NearCopies:
    """What is near to what, for people.

    Args:
        found: Pairs by their hashes and, if there are any, by their features.
        close: Of each training image, whether it is near to one of an evaluation set.
        training, sets: As for `find_near_copies`.
        folder: Where hashes are kept.
    """
    n_training = len(close)
    near: dict[tuple[int, int], list[Optional[float]]] = {}
    for i, pairs in enumerate(found):
        for a, b, value in zip(*(column.tolist() for column in pairs)):
            near.setdefault((a, b), [None, None])[i] = value
    label = groups_of(np.array([pair for pair in near if pair[1] < n_training], np.int64).reshape(-1, 2), n_training)
    grouped = np.flatnonzero(np.bincount(label)[label] > 1).tolist()
    close_ones = np.flatnonzero(close).tolist()
    member = _members({*itertools.chain.from_iterable(near), *grouped, *close_ones}, [*training, *sets], folder)
    groups: dict[int, list[int]] = {}
    for position in grouped:
        groups.setdefault(int(label[position]), []).append(position)
    # The smallest id stays, of those that are not left out in any case.
    ordered = [sorted(group, key=lambda position: (close[position], member[position].image_id, position))
               for group in groups.values()]
    left_out = {*close_ones, *(position for group in ordered for position in group[1:])}
    every = [Found(member[a], member[b], None if distance is None else int(distance), cosine)
             for (a, b), (distance, cosine) in near.items()]
    every.sort(key=lambda pair: (pair.distance is None, pair.distance or 0, -(pair.cosine or 0), pair.first,
                               pair.second))
    nearest: dict[Member, Found] = {}
    for pair in every:
        if pair.second.where >= len(training):
            nearest.setdefault(pair.second, pair)
    return NearCopies(every, [[member[position] for position in group] for group in ordered], nearest,
                      [member[position] for position in sorted(left_out)])


def _members(positions: Iterable[int], images: Sequence[Images], folder: Path) -> dict[int, Member]:
    """Position among all images -> image; ids are read of those blocks alone that have one."""
    wanted, start = np.array(sorted(positions), np.int64), 0
    members = {}
    for where, one in enumerate(images):
        first = start
        for block in one.blocks:
            here = wanted[np.searchsorted(wanted, start):np.searchsorted(wanted, start + block.size)].tolist()
            ids = read_hashes(block, folder).ids if here else []
            members.update({at: Member(where, at - first, ids[at - start]) for at in here})
            start += block.size
    return members


def write_near_copies(
    found: NearCopies, training: Sequence[Images], sets: Sequence[Images], found_by: dict[str, Any],
    out: Union[str, Path]
) -> None:
    """Write `duplicates.json`, and for each training dataset the ids to leave out.

    Args:
        found: What was found.
        training, sets: As for `find_near_copies`.
        found_by: The thresholds, for the file.
        out: The folder.
    """
    images = [*training, *sets]

    def name(one: Member) -> list[str]:
        return [images[one.where].name, one.image_id]

    near: dict[str, dict[str, list[str]]] = {one.name: {} for one in sets}
    for one, pair in found.nearest.items():
        near[images[one.where].name][one.image_id] = name(pair.first)
    Path(out, 'leave_out').mkdir(parents=True, exist_ok=True)
    for where, one in enumerate(training):
        write_json(Path(out, 'leave_out', f'{one.name}.json'),
                   [left.image_id for left in found.leave_out if left.where == where])
    write_json(Path(out, DUPLICATES_FILE), {
        'images': {one.name: one.size for one in images}, 'found_by': found_by,
        'groups': [{'keep': name(group[0]), 'copies': list(map(name, group[1:]))} for group in found.groups],
        'sets': {one.name: {'fingerprint': one.fingerprint, 'images': one.size, 'near_copies': near[one.name]}
                 for one in sets}})


def near_copies_of_sets(path: str, sets: dict[str, EvaluationSet]) -> dict[str, dict[str, Any]]:
    """How many images of evaluation sets have a near copy in training, by what `find_duplicates` wrote.

    Args:
        path: Its `duplicates.json`.
        sets: Kind and name of each set, ``retrieval.flickr30k``, that may be in the file.

    Returns:
        Set that is in the file -> ``n_images``, ``near_copies``.

    Raises:
        ConfigError: It is of other images of a set of that name, or has none of the sets.
        FileError: The file is missing or damaged.
    """
    content = read_json(path, dict)
    found = {}
    with reading(path, f'a {DUPLICATES_FILE} that find_duplicates wrote'):
        known = {name: (one['fingerprint'], one['images'], len(one['near_copies']))
                 for name, one in content['sets'].items()}
    for name, dataset in sets.items():
        if name in known:
            fingerprint, n_images, near = known[name]
            if fingerprint != set_fingerprint(dataset):
                raise ConfigError(f'duplicates: {path} is of other images of {name}, expected those that are '
                                  'evaluated; call find_duplicates again')
            found[name] = {'n_images': n_images, 'near_copies': near}
    if not found:
        raise ConfigError(f'duplicates: {path} has {", ".join(known) or "no evaluation set"}, expected one of those '
                          f'that are evaluated: {", ".join(sets)}')
    return found
