# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Image search in a folder by text or image, and zero-shot classification; a file keeps image features."""

import json
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Union

import torch
import xxhash
from PIL import Image
from tqdm import tqdm

from llm2clip.config import ImageFolderConfig
from llm2clip.data.images import ImageFiles, decode_pixels, read_image_file
from llm2clip.device import Device
from llm2clip.errors import ConfigError
from llm2clip.evaluation.evaluated_models import TrainedLLM2CLIP
from llm2clip.evaluation.image_features import encode_batches
from llm2clip.export.hf import LLM2CLIPModel, is_exported
from llm2clip.io.files import parse_json, printable, reading
from llm2clip.io.tensors import hash_tensors, read_safetensors, write_safetensors
from llm2clip.models.llm2clip import check_truncate_dim, truncate_dims

SUFFIXES = ('.avif', '.bmp', '.gif', '.jfif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
INDEX_FILE = 'images.safetensors'
_BLOCK = 2048  # images


def is_image(query: str) -> bool:
    """Whether a query ends with the suffix of an image file."""
    return query.lower().endswith(SUFFIXES)


def load_model(
    config: ImageFolderConfig, device: Device, queries: Sequence[str] = ()
) -> tuple[TrainedLLM2CLIP, str]:
    """Return an exported model, and a fingerprint of everything that determines its image features.

    Raises a ConfigError if the folder is not an export, `truncate_dim` exceeds the dimensions of the model,
    or the teacher is missing and a query is a text.
    """
    if not is_exported(config.model):
        raise ConfigError(f'{config.model} is not the folder llm2clip/ that recipes/export_hf.py wrote',
                          key='model')
    teachers = LLM2CLIPModel.teacher_folders(Path(config.model))
    missing = [teacher for teacher in teachers if not teacher.is_dir()]
    if missing and not all(map(is_image, queries)):
        raise ConfigError(f'there is no {missing[0]}, which embeds texts; images as queries need none',
                          key='model')
    exported = LLM2CLIPModel.from_pretrained(config.model, trust_remote_code=config.trust_remote_code).eval()
    exported.teacher_precision = config.precision
    check_truncate_dim(config.truncate_dim, exported.config.model_config())
    truncate_dims(exported.model, exported.config.model_config(), config.truncate_dim)
    settings = [exported.config.model, exported.config.teacher, config.precision]
    digest = xxhash.xxh64(json.dumps(settings, sort_keys=True))
    hash_tensors(exported.model.state_dict(), digest)
    device.module_to_device(exported)

    def teacher(texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        return exported.embed_texts(texts).cpu(), 0

    return TrainedLLM2CLIP(exported.model, teacher, config.precision), digest.hexdigest()


def find_images(folder: str) -> dict[str, list[int]]:
    """Return path inside the folder -> size in bytes and modification time in ns, for images not hidden."""
    images = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith('.')]
        inside = parent[len(folder):].lstrip('/')
        for name in names:
            if not is_image(name) or name.startswith('.'):
                continue
            with suppress(OSError):  # a broken link
                state = os.stat(os.path.join(parent, name))
                if stat.S_ISREG(state.st_mode):
                    images[os.path.join(inside, name)] = [state.st_size, state.st_mtime_ns]
    if not images:
        raise ConfigError(f'there is no image in {folder}, expected files that end in {", ".join(SUFFIXES)}',
                          key='images')
    return dict(sorted(images.items()))


def embed_images(
    config: ImageFolderConfig, model: TrainedLLM2CLIP, fingerprint: str
) -> tuple[list[str], torch.Tensor]:
    """Return the paths of N readable images and their features ``(N, D)`` in float16, mapped from the file if
    it has all of them; encodes only new or changed files.

    Raises:
        ConfigError: No image can be read, or `config.index` has features of another model or folder.
        FileError, LoadError: The file of the features is damaged.
    """
    files = find_images(config.images)
    path = Path(config.index, INDEX_FILE)
    metadata = {'model': fingerprint, 'images': json.dumps(os.path.abspath(config.images))}
    states, stored = _stored_features(path, metadata, files)
    if states == files:
        return _paths(config, states), stored
    position = {name: i for i, name in enumerate(states) if states[name] == files.get(name)}
    encoded: dict[str, torch.Tensor] = {}
    names = [*states]
    features = stored
    try:
        _encode_images(config, model, [name for name in files if name not in position], encoded)
    finally:  # an interruption loses no features
        if encoded or len(position) < len(states):
            rows = {name: stored[i] for name, i in position.items()} | encoded
            names = sorted(rows)
            if names:
                features = torch.stack([rows[name] for name in names])
                content = bytearray(json.dumps({name: files[name] for name in names}).encode())
                write_safetensors(path, {'files': torch.frombuffer(content, dtype=torch.uint8),
                                         'features': features}, metadata)
    if not names:
        raise ConfigError(f'none in {config.images} can be read', key='images')
    return _paths(config, names), features


def _stored_features(
    path: Path, metadata: dict[str, str], files: dict[str, list[int]]
) -> tuple[dict[str, list[int]], torch.Tensor]:
    """Return the images of a file of features with their states, as `find_images` does, and the features;
    none if there is no file.

    Raises:
        ConfigError: The metadata differ.
        FileError, LoadError: The file is damaged.
    """
    if not path.is_file():
        return {}, torch.empty(0)
    expected = 'features of images; remove it to embed them again'
    tensors, written = read_safetensors(path, expected)
    with reading(path, expected):
        text = tensors['files'].numpy().tobytes()
        features = tensors['features']
        states = files
        if text != json.dumps(files).encode():  # writing is faster than parsing
            states = parse_json(text, path, dict)
        if len(features) != len(states):
            raise ValueError(f'{len(states)} files and {len(features)} features')
    if written | metadata != written:
        raise ConfigError(f'{path} is of another model, precision or dim, or of images in another '
                          'folder; give another `index`, or remove that file', key='index')
    return states, features


def _paths(config: ImageFolderConfig, names: Iterable[str]) -> list[str]:
    return [os.path.join(config.images, name) for name in names]


def _encode_images(
    config: ImageFolderConfig, model: TrainedLLM2CLIP, names: list[str], features: dict[str, torch.Tensor]
) -> None:
    """Add the float16 features ``(D,)`` of readable images to `features`, and print which are unreadable."""
    batches = encode_batches(model, ImageFiles(config.images, names), names, range(len(names)),
                             config.batch_size, config.num_workers, keep_going=True)
    with tqdm(total=len(names), desc='embed', unit=' images') as progress:
        for batch in batches:
            for position, row in zip(batch.positions, batch.features.half()):
                features[names[position]] = row
            for reason in batch.unreadable.values():
                tqdm.write(f'unreadable: {printable(reason)}')
            progress.update(len(batch.positions) + len(batch.unreadable))


def embed_query(model: TrainedLLM2CLIP, query: Union[str, Path]) -> torch.Tensor:
    """Return the features ``(D,)`` of a text or, for a Path, of an image file.

    Raises:
        FileError, ValueError: The image cannot be read or decoded.
    """
    if isinstance(query, str):
        return model.text_features([query])[0][0]
    pixels = model.preprocess(read_image_file(query), query.name)
    return model.image_features(pixels[None].to(model.device))[0][0].cpu()


def nearest(images: torch.Tensor, query: torch.Tensor, top: int) -> list[tuple[int, float]]:
    """Return positions and cosine similarities of the `top` images ``(N, D)`` nearest to a query ``(D,)``, of
    equal ones the first."""
    # In blocks that fit the cache, since all images in float32 would need twice their memory.
    scores = torch.cat([block.float() @ query for block in images.split(_BLOCK)])
    least = scores.topk(min(top, len(scores))).values[-1]
    candidates = (~(scores < least)).nonzero()[:, 0]
    values, order = scores[candidates].sort(descending=True, stable=True)
    return [*zip(candidates[order].tolist(), values.tolist())][:top]


def classify(model: TrainedLLM2CLIP, image: Path, labels: Sequence[str]) -> dict[str, float]:
    """Return label -> probability of an image file: the softmax of the model's logits."""
    similarities = model.text_features(labels)[0] @ embed_query(model, image)
    logits = model.model.logit_scale.exp().cpu() * similarities
    return dict(zip(labels, logits.softmax(0).tolist()))


def thumbnail(path: str, side: int) -> Image.Image:
    """Return an image file in RGB, reduced to at most `side` pixels in height and width."""
    pixels = decode_pixels(read_image_file(path), path, at_least=side)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((side, side))
    return image
