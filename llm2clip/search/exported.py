# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""An exported model that turns image files and texts into vectors, loaded as far as it is needed."""

import json
import re
import signal
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
import xxhash
from composer.utils import get_device
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel

from llm2clip.config import ConfigError
from llm2clip.data.image_processing_llm2clip import normalize, resize_and_crop
from llm2clip.data.images import decode_pixels
from llm2clip.export.hf import TEACHER_FOLDER, LLM2CLIPConfig, LLM2CLIPModel, teacher_folders
from llm2clip.teacher.folder import teacher_config

__all__ = ['PRECISIONS', 'ExportedModel', 'ImageBatch', 'Unreadable']

PRECISIONS = ('fp32', 'amp_bf16')


class Unreadable(NamedTuple):
    """Why an image has no vector."""

    reason: str
    lasting: bool
    """Reading the same bytes again will not help."""


class ImageBatch(NamedTuple):
    """Some of the images that were asked for, by their places."""

    places: list[int]
    vectors: np.ndarray
    """``(len(places), D)`` in float32, of length 1."""
    unreadable: dict[int, Unreadable]


class ExportedModel:
    """A folder that `export_hf` wrote.  Weights are loaded when the first image or text asks for them.

    Args:
        folder: The folder.
        device: As Composer names it; unset, a GPU if there is one.

    Raises:
        ConfigError: The folder is none that `export_hf` wrote.
    """

    def __init__(self, folder: Union[str, Path], device: Optional[str] = None) -> None:
        self.folder = Path(folder)
        self._device = get_device(device)
        if (fault := _fault(self.folder)) is not None:
            inside = self.folder / 'llm2clip'
            hint = f'; did you mean model={inside}?' if inside.is_dir() else ''
            raise ConfigError(f'model: {folder} is no folder that recipes/export_hf.py wrote: {fault}{hint}')

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what decides the vectors: weights, architecture, preprocessing, and the teacher's own fingerprint."""
        config = json.loads((self.folder / 'config.json').read_text())
        how = {name: config.get(name) for name in ('model', 'llm_embed_dim', 'teacher')}
        digest = xxhash.xxh64(json.dumps(how, sort_keys=True))
        for path in sorted([*self.folder.glob('*.safetensors'), self.folder / 'preprocessor_config.json']):
            with path.open('rb') as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()

    @cached_property
    def _model(self) -> LLM2CLIPModel:
        return self._device.module_to_device(AutoModel.from_pretrained(self.folder))

    def check_teacher(self) -> None:
        """Make sure that texts can be embedded.

        Raises:
            ConfigError: The teacher is not in the folder.
        """
        try:
            for folder in teacher_folders(self.folder):
                teacher_config(folder)
        except ConfigError:
            raise ConfigError(f'model: {self.folder} has no {TEACHER_FOLDER}/, the LLM that embeds texts; images as '
                              'queries need none') from None

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """``(N, D)`` in float32, of length 1."""
        self.check_teacher()
        return self._model.get_text_features(list(texts)).float().cpu().numpy()

    @torch.no_grad()
    def embed_images(
        self, folder: Union[str, Path], paths: Sequence[str], precision: str = 'fp32', batch_size: int = 64,
        num_workers: int = 0,
    ) -> Iterator[ImageBatch]:
        """Vectors of image files, a batch at a time, in order.

        Args:
            folder: Where they are.
            paths: Inside the folder.
            precision: ``fp32``, or ``amp_bf16`` for autocast.
            batch_size: Images per forward pass.
            num_workers: Processes that read and decode.
        """
        model = self._model
        preprocessing = model.model.vision_encoder.preprocessing
        loader = DataLoader(_Pixels(folder, paths, preprocessing.image_size), batch_size, num_workers=num_workers,
                            collate_fn=_collate, worker_init_fn=_ignore_interrupts)
        device = next(model.parameters()).device
        for places, pixels, unreadable in loader:
            vectors = np.empty((0, 0), np.float32)
            if places:
                values = normalize(pixels.to(device), preprocessing.mean, preprocessing.std)
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == 'amp_bf16'):
                    vectors = model.get_image_features(values).float().cpu().numpy()
            yield ImageBatch(places, vectors, unreadable)


class _Pixels(Dataset[Any]):
    """Image files as the model sees them, but for the scale of their values: a quarter of the bytes to hand over."""

    def __init__(self, folder: Union[str, Path], paths: Sequence[str], image_size: int) -> None:
        self.folder = folder
        self.paths = paths
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> tuple[int, Union[torch.Tensor, Unreadable]]:
        path = self.paths[place]
        try:
            data = Path(self.folder, path).read_bytes()
        except OSError as error:
            return place, Unreadable(error.strerror or str(error), lasting=False)
        try:
            return place, resize_and_crop(decode_pixels(data, path), self.image_size)
        except Exception as error:  # whatever a decoder raises, it is about this file, and the others go on
            return place, Unreadable(_reason(error, path), lasting=True)


def _reason(error: Exception, path: str) -> str:
    if not isinstance(error, ValueError):
        return f'cannot be decoded: {type(error).__name__}: {error}'
    text = str(error).removeprefix(f'the image of sample {path!r} ')
    return re.sub(r' <_io.BytesIO object at \w+>', '', text)


def _collate(
    samples: list[tuple[int, Union[torch.Tensor, Unreadable]]]
) -> tuple[list[int], Optional[torch.Tensor], dict[int, Unreadable]]:
    read = [(place, value) for place, value in samples if isinstance(value, torch.Tensor)]
    unreadable = {place: value for place, value in samples if isinstance(value, Unreadable)}
    return [place for place, _ in read], torch.stack([value for _, value in read]) if read else None, unreadable


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the workers too; the main process ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _fault(folder: Path) -> Optional[str]:
    """Why a folder is no exported model."""
    if not folder.is_dir():
        return 'there is no such folder'
    for name in ('config.json', 'preprocessor_config.json'):
        if not (folder / name).is_file():
            return f'it has no {name}'
    try:
        kind = json.loads((folder / 'config.json').read_text()).get('model_type')
    except (ValueError, AttributeError):
        return 'its config.json is damaged'
    if kind != LLM2CLIPConfig.model_type:
        return f'its config.json is of a {kind!r} model'
    return None if any(folder.glob('*.safetensors')) else 'it has no *.safetensors'
