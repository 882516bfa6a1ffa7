# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Image search in a folder by text or image, and zero-shot classification; image features are kept in a file."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Union

import torch
import xxhash
from composer.devices import Device
from PIL import Image
from tqdm import tqdm

from llm2clip.config import ImageFolderConfig
from llm2clip.data.images import decode_pixels
from llm2clip.errors import ConfigError
from llm2clip.evaluation.evaluated_models import TrainedLLM2CLIP
from llm2clip.evaluation.image_features import encode_batches
from llm2clip.evaluation.sets.files import ImageFiles
from llm2clip.export.hf import LLM2CLIPModel, is_exported
from llm2clip.io.files import parse_json, printable, reading
from llm2clip.io.tensors import hash_tensors, read_safetensors, write_safetensors
from llm2clip.models.llm2clip import check_truncate_dim, truncate_dims

SUFFIXES = ('.avif', '.bmp', '.gif', '.jfif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
INDEX_FILE = 'images.safetensors'


def is_image(query: str) -> bool:
    """Whether a query ends with the suffix of an image file."""
    return query.lower().endswith(SUFFIXES)


def load_model(
    config: ImageFolderConfig, device: Device, queries: Sequence[str] = ()
) -> tuple[TrainedLLM2CLIP, str]:
    """Return an exported model, and a fingerprint of everything that determines its image features.

    Raises a ConfigError if the folder is not an export, `truncate_dim` exceeds the dimensions of the model, or
    the teacher is missing and a query is a text.
    """
    if not is_exported(config.model):
        raise ConfigError(f'model: {config.model} is not the folder llm2clip/ that recipes/export_hf.py wrote')
    teachers = LLM2CLIPModel.teacher_folders(Path(config.model))
    missing = [teacher for teacher in teachers if not teacher.is_dir()]
    if missing and not all(map(is_image, queries)):
        raise ConfigError(f'model: there is no {missing[0]}, which embeds texts; images as queries need none')
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
    """Path inside the folder -> size in bytes and modification time in ns, for images that are not hidden."""
    images = {}
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith('.')]
        for name in names:
            path = Path(parent, name)
            if is_image(name) and not name.startswith('.') and path.is_file():
                images[os.path.relpath(path, folder)] = [path.stat().st_size, path.stat().st_mtime_ns]
    if not images:
        raise ConfigError(f'images: there is no image in {folder}, expected files that end in '
                          f'{", ".join(SUFFIXES)}')
    return dict(sorted(images.items()))


def embed_images(
    config: ImageFolderConfig, model: TrainedLLM2CLIP, fingerprint: str
) -> tuple[list[str], torch.Tensor]:
    """Return the paths of N readable images and their features ``(N, D)``; only new or changed files are encoded.

    Raises:
        ConfigError: No image can be read, or `config.index` has features of another model or folder.
        FileError, LoadError: The file of the features is damaged.
    """
    states = find_images(config.images)
    path = Path(config.index, INDEX_FILE)
    metadata = {'model': fingerprint, 'images': json.dumps(os.path.abspath(config.images))}
    kept = _read_index(path, metadata) if path.is_file() else {}
    known = {name: row for name, (state, row) in kept.items() if state == states.get(name)}
    todo = [name for name in states if name not in known]
    images = ImageFiles(config.images, todo)
    try:
        with tqdm(total=len(todo), desc='embed', unit=' images') as progress:
            for batch in encode_batches(model, images, todo, range(len(todo)), config.batch_size,
                                        config.num_workers, keep_going=True):
                known.update(zip([todo[i] for i in batch.positions], batch.features.half()))
                for reason in batch.unreadable.values():
                    tqdm.write(f'unreadable: {printable(reason)}')
                progress.update(len(batch.positions) + len(batch.unreadable))
    finally:
        names = [name for name in states if name in known]
        if names and (todo or kept.keys() - states.keys()):
            files = json.dumps({name: states[name] for name in names}).encode()
            write_safetensors(path, {'files': torch.frombuffer(bytearray(files), dtype=torch.uint8),
                                     'features': torch.stack([known[name] for name in names])}, metadata)
    if not names:
        raise ConfigError(f'images: none in {config.images} can be read')
    features = torch.stack([known[name] for name in names])
    return [os.path.join(config.images, name) for name in names], features.float()


def _read_index(path: Path, metadata: dict[str, str]) -> dict[str, tuple[list[int], torch.Tensor]]:
    """Read image -> its entry of `find_images` and its features; refuse a file with other metadata."""
    expected = 'features of images; remove it to embed them again'
    tensors, written = read_safetensors(path, expected)
    with reading(path, expected):
        files = parse_json(tensors['files'].numpy().tobytes(), path, dict)
        rows = zip(files.items(), tensors['features'], strict=True)
        entries = {name: (state, row) for (name, state), row in rows}
    if written | metadata != written:
        raise ConfigError(f'index: {path} is of another model, precision or dim, or of images in another folder; '
                          'give another `index`, or remove that file')
    return entries


def embed_query(model: TrainedLLM2CLIP, query: Union[str, Path]) -> torch.Tensor:
    """Return the features ``(D,)`` of a text or, for a Path, of an image file.

    Raises:
        FileError, ValueError: The image cannot be read or decoded.
    """
    if isinstance(query, str):
        return model.text_features([query])[0][0]
    pixels = model.preprocess(ImageFiles('', [str(query)])(0), query.name)
    return model.image_features(pixels[None].to(model.device))[0][0].cpu()


def nearest(images: torch.Tensor, query: torch.Tensor, top: int) -> list[tuple[int, float]]:
    """Return positions and cosine similarities of the `top` images ``(N, D)`` nearest to a query ``(D,)``."""
    scores, best = (images @ query).sort(descending=True, stable=True)
    return [*zip(best.tolist(), scores.tolist())][:top]


def classify(model: TrainedLLM2CLIP, image: Path, labels: Sequence[str]) -> dict[str, float]:
    """Return label -> probability of an image file: the softmax of the model's logits."""
    similarities = model.text_features(labels)[0] @ embed_query(model, image)
    logits = model.model.logit_scale.exp().cpu() * similarities
    return dict(zip(labels, logits.softmax(0).tolist()))


def thumbnail(path: str, side: int) -> Image.Image:
    """Return an image file in RGB, reduced to at most `side` pixels in height and width."""
    pixels = decode_pixels(ImageFiles('', [path])(0), path, at_least=side)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((side, side))
    return image
