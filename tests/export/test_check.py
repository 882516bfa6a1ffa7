# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Whatever leaves the project sees a picture as training did, whatever its mode and orientation."""

import io
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from trained import trained
from transformers import AutoImageProcessor

from llm2clip.data.images import Preprocessing, decode_image, decode_pixels, encode_image
from llm2clip.errors import ConfigError
from llm2clip.export import vision as vision_export
from llm2clip.export.check import check_pictures, pictures, training_pixels
from llm2clip.export.hf import export_folder
from llm2clip.export.vision import export_vision
from llm2clip.modeling import image_processing_llm2clip
from llm2clip.modeling.image_processing_llm2clip import LLM2CLIPImageProcessor, upright_rgb

PIXELS = Preprocessing(32, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.fixture(scope='module')
def folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('pixels') / 'model'
    export_folder(*trained('clip_vision_model', [teacher_folder]), out)
    return out


def test_the_exported_processor_gives_the_pixels_of_training(folder: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(folder)
    given = pictures(32)
    expected = torch.stack([training_pixels(data, preprocessing=PIXELS) for data in given.values()])
    # A list of pictures of two sizes; they stay as they were.
    images = [opened(data) for data in given.values()]
    sizes = [image.size for image in images]
    assert torch.equal(processor(images, return_tensors='pt')['pixel_values'], expected)
    assert [image.size for image in images] == sizes and images[1].getexif()[0x0112] == 6
    array = np.asarray(upright_rgb(images[0]))
    for values in (array, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        assert torch.equal(processor(values, return_tensors='pt')['pixel_values'], expected[:1])


def _exif(*entries: tuple[int, int, int]) -> bytes:
    """Pack tags, types and values in little endian, one value each."""
    packed = b''.join(struct.pack('<HHII', tag, kind, 1, value) for tag, kind, value in entries)
    return b'Exif\0\0II*\0' + struct.pack('<IH', 8, len(entries)) + packed + bytes(4)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
BYTE, SHORT, LONG, RATIONAL = 1, 3, 4, 5


@pytest.mark.parametrize('options, turned', [
    ({'exif': _exif((0x0112, SHORT, 6))}, True), ({'exif': _exif((0x0112, LONG, 6))}, True),
    ({'exif': _exif((0x0112, SHORT, 1)), 'xmp': XMP}, False), ({'exif': b'Exif\0\0no EXIF'}, False),
    # Damaged beside the orientation: Pillow cannot write it again.
    ({'exif': _exif((0x010F, RATIONAL, 0), (0x0112, SHORT, 6))}, True),
])
def test_orientation_is_read_alike_everywhere(options: dict[str, bytes], turned: bool) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    processor = LLM2CLIPImageProcessor(32, PIXELS.mean, PIXELS.std)
    for kind in ('JPEG', 'WEBP'):
        data = encode_image(photo, kind, **options)
        upright = decode_image(data, 's')
        size = (32, 48) if turned else (48, 32)
        assert upright.size == decode_pixels(data, 's').shape[:0:-1] == size
        expected = training_pixels(data, preprocessing=PIXELS)[None]
        for image in (opened(data), upright):  # once upright, it stays so
            assert torch.equal(processor(image, return_tensors='pt')['pixel_values'], expected)


@pytest.mark.parametrize('given, got', [
    (7, 'int'), (np.zeros((8, 8, 4), np.uint8), r'uint8 values of shape \(8, 8, 4\)'),
    (np.zeros((8, 8, 3), np.float32), 'float32 values of shape')])
def test_what_is_no_picture_is_refused(given: Any, got: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f'expected pictures as PIL.Image.open gives them, .*; got .*{got}'):
        AutoImageProcessor.from_pretrained(folder)(given)


def _wrong(mode: str, read: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image], Image.Image]:
    """Upright RGB, but for pictures of a mode."""
    return lambda image: read(image) if mode in (image.mode, image.getexif() and 'EXIF') else upright_rgb(image)


_on_black = _wrong('RGBA', lambda image: image.convert('RGB'))


@pytest.mark.parametrize('wrong, kind', [
    (_on_black, 'a transparent picture'), (_wrong('EXIF', lambda image: image.convert('RGB')), 'a picture turned by'),
    (_wrong('P', lambda image: image.convert('RGB')), 'a palette with transparency'),
    (_wrong('I;16', lambda image: image.convert('RGB')), 'a 16-bit grey picture'),
    (_wrong('CMYK', lambda image: ImageOps.invert(upright_rgb(image))), 'a CMYK picture')])
def test_the_check_notices_each_kind_of_picture(
    wrong: Callable[[Image.Image], Image.Image], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = LLM2CLIPImageProcessor(32, PIXELS.mean, PIXELS.std)

    def found(image: Image.Image) -> torch.Tensor:
        return processor(image)['pixel_values'].flatten(1)

    check_pictures(found, lambda pixels: pixels.flatten(1), PIXELS, 'pixels')
    monkeypatch.setattr(image_processing_llm2clip, 'upright_rgb', wrong)
    with pytest.raises(ConfigError, match=f'{kind}.*: the features differ from those of the checkpoint'):
        check_pictures(found, lambda pixels: pixels.flatten(1), PIXELS, 'pixels')


def test_an_export_that_sees_other_pixels_is_refused(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_run, of_timm = (trained(tower, [teacher_folder]) for tower in ('clip_vision_model', 'timm:test_efficientnet'))
    monkeypatch.setattr(image_processing_llm2clip, 'upright_rgb', _on_black)
    monkeypatch.setattr(vision_export, 'upright_rgb', _on_black)
    for export in (lambda: export_folder(*of_run, tmp_path / 'model'),
                   lambda: export_vision(*of_run[:3], tmp_path / 'vision'),
                   lambda: export_vision(*of_timm[:3], tmp_path / 'vision')):
        with pytest.raises(ConfigError, match='a transparent picture'):
            export()
    assert not any(tmp_path.iterdir())


def _run_snippet(data: bytes) -> dict[str, Any]:
    """Run the code of the model card in this folder on a picture; return its names."""
    Path('picture.png').write_bytes(data)
    names: dict[str, Any] = {}
    exec(''.join(re.findall(r'```python\n(.*?)```', Path('README.md').read_text(), re.S)), names)
    return names


@torch.no_grad()
def test_the_snippet_of_a_models_card(folder: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    data = pictures(32)['a transparent picture']
    model = trained('clip_vision_model', [teacher_folder]).model
    expected = model.get_image_features(training_pixels(data, preprocessing=PIXELS)[None])
    torch.testing.assert_close(_run_snippet(data)['image'], expected)


@torch.no_grad()
@pytest.mark.parametrize('tower', ['clip_vision_model', 'vit', 'timm:test_vit'])
def test_the_snippet_of_a_vision_towers_card(
    tower: str, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config, record, _ = trained(tower, [teacher_folder])
    export_vision(model, config, record, tmp_path / 'tower')
    monkeypatch.chdir(tmp_path / 'tower')
    # timm resizes by Pillow.
    tolerance = {'rtol': 0, 'atol': 0.05} if 'timm' in tower else {}
    preprocessing = model.vision_encoder.preprocessing
    for kind, data in pictures(preprocessing.image_size, cropped=6).items():
        expected = model.vision_encoder(training_pixels(data, preprocessing=preprocessing)[None])
        if tower != 'vit':
            expected = model.visual_projection(expected)
        torch.testing.assert_close(_run_snippet(data)['features'], expected, msg=kind, **tolerance)
