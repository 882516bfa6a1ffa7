# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Images of a folder, found by a text or by another image.

The index of a folder is one safetensors file, which is replaced as a whole.  Its tensors are ``features``, ``(N, D)``
in float16 and of length 1, or in int8 as `llm2clip.data.vectors` stores vectors, with ``scales`` ``(N,)`` in float32;
and ``files``, JSON as bytes: path -> size and time of the last change in ns of the N files.  Its metadata are the
folder of ``images``, the fingerprint of the ``model``, the fields of `IndexFormat`, and how many images were still
``missing``.

Several ranks share the images.  The first alone reads and writes the index, and answers.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import xxhash
from composer.devices import Device
from tqdm import tqdm

from llm2clip.config import ConfigError
from llm2clip.config.ranges import TeacherPrecision
from llm2clip.data.vectors import dequantize, quantize
from llm2clip.evaluation.images import encode_batches
from llm2clip.evaluation.models import TrainedLLM2CLIP
from llm2clip.evaluation.sets.files import ImageFiles
from llm2clip.export.hf import LLM2CLIPModel, is_exported, teacher_folders
from llm2clip.files import parse_json, reading
from llm2clip.models.first_dims import check_dim, keep_first_dims
from llm2clip.ranks import agreed, is_first, together
from llm2clip.weights import hash_tensors, read_safetensors, write_safetensors

__all__ = [
    'Entry', 'Index', 'IndexFormat', 'find_images', 'is_image', 'load_model', 'read_index', 'read_queries', 'search',
    'update_index',
]

IMAGE_SUFFIXES = ('.avif', '.bmp', '.gif', '.jfif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
INDEX_FILE = 'images.safetensors'
# How much work a kill may cost.
SAVE_SECONDS = 30.0


def load_model(
    folder: str, device: Device, texts: bool = True, precision: TeacherPrecision = 'fp32', dim: Optional[int] = None,
    trust_remote_code: bool = False,
) -> tuple[TrainedLLM2CLIP, str]:
    """An exported model as evaluation sees it, and a fingerprint of its weights and configuration, as they are there.

    Args:
        folder: The folder.
        device: Where it runs.
        texts: Whether it must have the teacher, which is loaded when the first text asks for it.
        precision: ``fp32``, or ``amp_bf16`` for autocast, of the teacher as well.
        dim: How many of the features' dimensions it gives, the first ones.  None: all.
        trust_remote_code: Run code that comes with a teacher of sentence-transformers.

    Raises:
        ConfigError: `export_hf` did not write the folder, the teacher is missing, or the model has fewer dimensions.
    """
    if not is_exported(folder):
        raise ConfigError(f'model: {folder} is not the folder llm2clip/ that recipes/export_hf.py wrote')
    missing = [teacher for teacher in teacher_folders(Path(folder)) if not teacher.is_dir()]
    if texts and missing:
        raise ConfigError(f'model: there is no {missing[0]}, the teacher that embeds texts; images as queries need '
                          'none')
    exported = LLM2CLIPModel.from_pretrained(folder, trust_remote_code=trust_remote_code).eval()
    exported.teacher_precision = precision
    digest = xxhash.xxh64(json.dumps([exported.config.model, exported.config.teacher], sort_keys=True))
    hash_tensors(exported.model.state_dict(), digest)
    model_config = exported.config.model_config()
    check_dim(dim, model_config, 'dim')
    keep_first_dims(exported.model, model_config, dim)
    device.module_to_device(exported)
    model = TrainedLLM2CLIP(exported.model, lambda asked: (exported.embed_texts(asked).cpu(), 0), precision)
    return model, digest.hexdigest()


class IndexFormat(NamedTuple):
    """How features are computed and stored."""

    precision: TeacherPrecision = 'fp32'
    """In which the model computes."""
    dim: Optional[int] = None
    """How many dimensions they have.  None: all those of the model."""
    storage: str = 'float16'
    """One of `llm2clip.data.vectors.STORAGES`."""

    def stored(self, features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """``(N, D)`` in float32 -> as they are stored, and a scale for each, ``(N,)``."""
        if self.storage == 'int8':
            return quantize(features.numpy())
        return features.numpy().astype(np.float16), np.ones(len(features), np.float32)

    def restored(self, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """The inverse of `stored`, up to what was rounded."""
        if self.storage == 'int8':
            return dequantize(torch.from_numpy(values), torch.from_numpy(scales)).numpy()
        return values.astype(np.float32)


_DEFAULT = IndexFormat()


class Entry(NamedTuple):
    """An image file as it was when it was read."""

    size: int
    mtime_ns: int
    feature: np.ndarray
    """``(D,)``, as it is stored."""
    scale: np.float32


@dataclass
class Index:
    """Features of the images of one folder, by one model."""

    file: Path
    model: str
    """Fingerprint of the model."""
    images: str
    """Absolute path of the folder."""
    how: IndexFormat = _DEFAULT
    missing: int = 0
    """Images that were not read yet when the index was written."""
    entries: dict[str, Entry] = field(default_factory=dict)
    """Path inside the folder -> what is known of the file."""

    def save(self) -> None:
        """Write the index; its file is replaced as a whole."""
        files = json.dumps({path: entry[:2] for path, entry in self.entries.items()}).encode()
        features, scales = self._columns(list(self.entries))
        tensors = {'files': torch.frombuffer(bytearray(files), dtype=torch.uint8),
                   'features': torch.from_numpy(features)}
        if self.how.storage == 'int8':
            tensors['scales'] = torch.from_numpy(scales)
        about = {'images': json.dumps(self.images), 'model': self.model, 'missing': str(self.missing),
                 **{name: str(value) for name, value in self.how._asdict().items() if value is not None}}
        write_safetensors(self.file, tensors, about)

    def features(self, paths: Sequence[str]) -> np.ndarray:
        """Those of some of the images, ``(N, D)`` in float32."""
        return self.how.restored(*self._columns(paths))

    def _columns(self, paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Stored features of some of the images, ``(N, D)``, and their scales ``(N,)``."""
        entries = [self.entries[path] for path in paths]
        return (np.array([entry.feature for entry in entries], self.how.storage),
                np.array([entry.scale for entry in entries], np.float32))


def read_index(folder: str, model: str, images: Optional[str] = None, how: IndexFormat = _DEFAULT) -> Index:
    """The index in a folder; if there is none, or on another rank than the first, an empty one for `images`.

    Every rank calls this.

    Args:
        folder: Of the index.
        model: Fingerprint of the model that it must have been made with.
        images: Folder of images that it must be of; unset, it may be of any.
        how: Its features must be computed and stored so.

    Raises:
        ConfigError: It is of another model or folder, or has features of another kind, or there is none and no `images`
            either.
        FileError, LoadError: It is damaged.
    """
    wanted = os.path.abspath(images) if images is not None else None
    empty = Index(Path(folder, INDEX_FILE), model, wanted or '', how)
    return together(lambda: _read_index(empty, wanted) if is_first() else empty)


def _read_index(empty: Index, wanted: Optional[str]) -> Index:
    path = empty.file
    if not path.is_file():
        if wanted is None:
            raise ConfigError(f'index: there is none in {path.parent}; give the folder of `images` to make one')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f'index: {error}') from None
        return empty
    expected = 'an index of images; remove it, and they are indexed again'
    tensors, about = read_safetensors(path, expected)
    with reading(path, expected):
        files, features = parse_json(tensors['files'].numpy().tobytes(), path, dict), tensors['features'].numpy()
        if features.ndim != 2 and files:
            raise ValueError(f'features have the shape {features.shape}')
        # Of earlier versions, it does not say what they had no choice of.
        known: dict[str, Any] = {name: about[name] for name in IndexFormat._fields if name in about}
        how = IndexFormat(**{**known, 'dim': int(known['dim']) if 'dim' in known else None})
        if features.dtype != how.storage:
            raise ValueError(f'features are {features.dtype}, not {how.storage}')
        scales = tensors['scales'].numpy() if how.storage == 'int8' else np.ones(len(features), np.float32)
        entries = {name: Entry(size, mtime_ns, feature, scale) for (name, (size, mtime_ns)), feature, scale
                   in zip(files.items(), features, scales, strict=True)}
        index = Index(path, about['model'], json.loads(about['images']), how, int(about['missing']), entries)
    difference = None
    if index.model != empty.model:
        difference = 'was made with another model'
    elif how != empty.how:
        name, found, expected = next(found for found in zip(how._fields, how, empty.how) if found[1] != found[2])
        difference = f'was made with {name}={found}, not {expected}'
    elif wanted not in (None, index.images):
        difference = f'is of the images in {index.images}, not of those in {wanted}'
    if difference is not None:
        raise ConfigError(f'index: {path} {difference}; give another `index`, or remove that file')
    return index


def find_images(folder: str) -> tuple[dict[str, tuple[int, int]], str]:
    """Every image file of a folder and those in it, by its suffix; hidden ones are left out, links are followed.

    Returns:
        Path inside the folder -> size and time of the last change in ns, sorted; and, for people, what else is there.

    Raises:
        ConfigError: There is no such folder, it has no images, or a folder in it cannot be read.
    """
    def unreadable(error: OSError) -> None:
        raise ConfigError(f'images: {error.filename}: {error.strerror}')

    images: dict[str, tuple[int, int]] = {}
    others: Counter[str] = Counter()
    seen = set()
    for where, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(where)) in seen:  # by a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith('.')]
        for path in (Path(where, name) for name in names if not name.startswith('.')):
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                stat = path.stat()
                images[os.path.relpath(path, folder)] = (stat.st_size, stat.st_mtime_ns)
            else:
                others[path.suffix.lower() or 'no suffix'] += 1
    left_out = ', '.join(f'{number:,} {suffix}' for suffix, number in others.most_common(5))
    if not images:
        raise ConfigError(f'images: no image in {folder} or the folders in it; expected files that end in '
                          f'{", ".join(IMAGE_SUFFIXES)}, found {left_out or "no file"}')
    return dict(sorted(images.items())), left_out


def update_index(index: Index, model: TrainedLLM2CLIP, batch_size: int = 64, num_workers: int = 2) -> str:
    """Embed the images that are new or have changed, and forget those that are gone.

    Every rank calls this.  The index, which the first has, is saved now and then and at the end, also if an exception
    is the end.

    Returns:
        What was found and done, for people; names all images that cannot be read.  Only the first rank knows.

    Raises:
        ConfigError: As `find_images`.
    """
    before = index.entries
    found: dict[str, tuple[int, int]] = {}
    left_out = ''

    def compare() -> list[str]:
        nonlocal found, left_out
        found, left_out = find_images(index.images)
        index.entries = {path: entry for path, entry in before.items() if entry[:2] == found.get(path)}
        return [path for path in found if path not in index.entries]

    todo = agreed(compare)
    batches = encode_batches(model, ImageFiles(index.images, todo), todo, batch_size, num_workers, keep_going=True)
    index.missing, saved, unreadable = len(todo), time.monotonic(), []
    try:
        with tqdm(total=len(found), initial=len(index.entries), desc='index', unit=' images',
                  disable=not is_first()) as progress:
            for batch in batches:
                for position, *stored in zip(batch.positions, *index.how.stored(batch.features)):
                    index.entries[todo[position]] = Entry(*found[todo[position]], *stored)
                unreadable += batch.unreadable.values()
                progress.update(done := len(batch.positions) + len(batch.unreadable))
                index.missing -= done
                if time.monotonic() - saved >= SAVE_SECONDS:
                    index.save()
                    saved = time.monotonic()
    finally:
        if is_first() and (todo or len(index.entries) < len(before)):
            index.save()
    lines = [f'{len(index.entries):,} images, {len(todo) - len(unreadable):,} of them new or changed; '
             f'{len(before.keys() - found.keys()):,} are gone', *(f'unreadable: {reason}' for reason in unreadable)]
    return '\n'.join([*lines, f'other files were left out: {left_out}'] if left_out else lines)


def read_queries(value: Any) -> list[str]:
    """The configuration's ``query``: nothing, a text, the path of an image file (by its suffix), or a list of them.

    Raises:
        ConfigError: There is no such image, a text is empty, or YAML has read something else than a text.
    """
    queries = value if isinstance(value, list) else [] if value is None else [value]
    for query in queries:
        if not isinstance(query, str) or not query.strip():
            raise ConfigError(f'query: expected texts, and YAML reads {query!r}; put quotes around a text')
        if is_image(query) and not os.path.isfile(query):
            raise ConfigError(f'query: there is no image file {query}')
    return queries


def is_image(query: str) -> bool:
    """Whether a query is the path of an image file."""
    return query.lower().endswith(IMAGE_SUFFIXES)


def search(index: Index, model: TrainedLLM2CLIP, queries: Sequence[str], top: int) -> list[list[tuple[str, float]]]:
    """The best `top` images for each query, best first, equally good ones in the order of their paths.

    Returns:
        For each query, absolute paths with the cosine of the angle between the features of image and query.

    Raises:
        ConfigError: The index has no image that could be read.
        ValueError: A query is an image that cannot be decoded; names it.
    """
    paths = sorted(index.entries)
    if not paths:
        raise ConfigError(f'index: {index.file} has no image that could be read')
    texts = [query for query in queries if not is_image(query)]
    pictures = [query for query in queries if is_image(query)]
    features = dict(zip(texts, model.text_features(texts)[0])) if texts else {}
    features.update((path, _features_of_image(model, path)) for path in pictures)
    images = index.features(paths)
    answers = []
    for query in queries:
        scores = images @ features[query].numpy()
        best = np.argsort(-scores, kind='stable')[:top]
        answers.append([(os.path.join(index.images, paths[i]), float(scores[i])) for i in best])
    return answers


def _features_of_image(model: TrainedLLM2CLIP, path: str) -> torch.Tensor:
    pixel_values = model.preprocess(ImageFiles('', [path])(0), path)
    return model.image_features(pixel_values[None].to(model.device))[0][0].cpu()
