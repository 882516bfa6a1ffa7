# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Every kind of image becomes upright RGB, the fast way and the plain one."""

import base64
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import CLIPImageProcessorFast

from llm2clip.data.images import decode_image, decode_pixels, pixels_needed, seeded, train_transform
from llm2clip.data.images import encode_image as encode
from llm2clip.modeling.image_processing_llm2clip import MAX_PIXELS, LLM2CLIPImageProcessor, normalize, resize_and_crop

MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.4, 0.5)


def photo(width: int = 160, height: int = 120) -> Image.Image:
    """Smooth colours with some edges, as photographs have."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(9 * x + k) * np.cos(7 * y - k) for k in range(3)]
    image = np.stack([127 + 100 * wave + 25 * ((x * 8).astype(int) % 2) for wave in waves], -1)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def both(data: bytes) -> np.ndarray:
    """The pixels, after checking that both ways give the same."""
    plain = np.asarray(decode_image(data, 's'))
    fast = decode_pixels(data, 's')
    assert fast.dtype == torch.uint8
    np.testing.assert_array_equal(fast.permute(1, 2, 0).numpy(), plain)
    return plain


@pytest.mark.parametrize('mode, kind, options', [
    *(('RGB', kind, {}) for kind in ('PNG', 'BMP', 'TIFF', 'PPM')),
    *(('RGB', kind, {'quality': 95}) for kind in ('JPEG', 'WEBP', 'AVIF')),
    ('RGB', 'JPEG', {'quality': 95, 'progressive': True}),
    ('RGB', 'PNG', {'save_all': True, 'append_images': [Image.new('RGB', (160, 120))]}),  # the first frame counts
    ('RGB', 'MPO', {'quality': 95, 'save_all': True, 'append_images': [photo(80, 60)]}),  # as phones take photographs
    *((mode, 'JPEG', {}) for mode in ('L', 'CMYK', 'YCbCr')), *((mode, 'PNG', {}) for mode in ('L', 'P', '1')),
])
def test_formats_and_colour_modes(mode: str, kind: str, options: dict[str, Any]) -> None:
    image = photo().convert(mode)
    found = both(encode(image, kind, **options))
    assert np.abs(found.astype(int) - np.asarray(image.convert('RGB'))).mean() < 3


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    found = both(encode(photo(), 'JPEG', exif=exif, quality=95))
    assert found.shape == ((120, 160, 3) if orientation < 5 else (160, 120, 3))
    upright = {1: lambda x: x, 3: lambda x: x[::-1, ::-1], 6: lambda x: np.rot90(x, -1), 8: np.rot90}.get(orientation)
    if upright is not None:
        assert np.abs(found.astype(int) - upright(np.asarray(photo()).astype(int))).mean() < 2


def test_transparent_parts_are_white() -> None:
    image = photo().convert('RGBA')
    image.paste((10, 20, 30, 0), (0, 0, 40, 40))
    image.paste((200, 0, 0, 128), (40, 0, 80, 40))
    found = both(encode(image, 'PNG'))
    assert (found[:40, :40] == 255).all() and (np.abs(found[:40, 40:80].astype(int) - [227, 127, 127]) <= 1).all()


@pytest.mark.parametrize('orientation', [1, 6])
def test_sixteen_bits_are_scaled_and_a_transparent_grey_is_white(orientation: int) -> None:
    ramp = np.array([[0, 1000, 40_000, 40_001, 65_535]], np.uint16)
    exif = Image.Exif()
    exif[0x112] = orientation
    grey = encode(Image.fromarray(ramp), 'PNG', exif=exif)
    assert both(grey)[..., 0].ravel().tolist() == [0, 3, 156, 156, 255]
    end_of_header = grey.index(b'IHDR') + 4 + 13 + 4
    found = both(grey[:end_of_header] + _chunk(b'tRNS', struct.pack('>H', 40_000)) + grey[end_of_header:])
    assert found[..., 0].ravel().tolist() == [0, 3, 255, 156, 255]


def _chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def _bomb() -> bytes:
    """A PNG whose header promises more pixels than may be decoded."""
    side = int((MAX_PIXELS * 1.2) ** 0.5)
    return b'\x89PNG\r\n\x1a\n' + b''.join(_chunk(kind, data) for kind, data in (
        (b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)), (b'IDAT', zlib.compress(b'')), (b'IEND', b'')))


def test_what_does_not_decode_names_its_sample(tmp_path: Path) -> None:
    jpeg, png, tiff = (encode(photo(), kind) for kind in ('JPEG', 'PNG', 'TIFF'))
    # Where the pixels begin becomes a fraction, for which Pillow raises a TypeError.
    wrong = tiff.replace(struct.pack('<HH', 273, 4), struct.pack('<HH', 273, 5))
    above_16_bits = encode(Image.fromarray(np.full((8, 8), 300_000, np.int32)), 'TIFF')
    size = jpeg.index(b'\xff\xc0') + 5
    header_of_98_million_pixels = jpeg[:size] + struct.pack('>HH', 9900, 9900) + jpeg[size + 4:]
    eps = encode(photo(), 'EPS')  # which starts another program
    damaged = [b'', b'nothing', jpeg[:len(jpeg) // 2], jpeg[:-100], png[:len(png) // 2], wrong, above_16_bits,
               header_of_98_million_pixels]
    refused = {**dict.fromkeys(damaged, ''), _bomb(): '.* more than 100,000,000 pixels', eps: 'expected JPEG, PNG, '}
    for decode in (decode_image, decode_pixels, lambda data, sample_id: decode_pixels(data, sample_id, 32)):
        for data, words in refused.items():
            with pytest.raises(ValueError, match=f"the image of sample 's7' cannot be decoded: {words}"):
                decode(data, 's7')
    with pytest.raises(ValueError, match='more than 100,000,000 pixels'):
        LLM2CLIPImageProcessor().preprocess(f'data:image/png;base64,{base64.b64encode(_bomb()).decode()}')
    (tmp_path / 'picture.png').write_bytes(eps)
    with pytest.raises(ValueError, match='picture.png: .*expected JPEG, PNG, '):
        LLM2CLIPImageProcessor().preprocess(str(tmp_path / 'picture.png'))


@pytest.mark.parametrize('size', [(64, 67), (135, 128), (97, 300), (40, 30)])
def test_evaluation_sees_what_transformers_gives(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    processor = CLIPImageProcessorFast(size={'shortest_edge': 64}, crop_size={'height': 64, 'width': 64},
                                       image_mean=list(MEAN), image_std=list(STD))
    expected = processor(Image.fromarray(noise), return_tensors='pt')['pixel_values'][0]
    found = normalize(resize_and_crop(pil_to_tensor(Image.fromarray(noise)), 64), MEAN, STD)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_large_jpegs_are_decoded_at_a_fraction() -> None:
    """The pixels of a crop are off by less than 2 of 255 in the mean."""
    data = encode(photo(1600, 1200), 'JPEG', quality=95)
    needed = pixels_needed(64, 0.9)
    assert needed == 135
    small, whole = decode_pixels(data, 's', needed), decode_pixels(data, 's')
    assert whole.shape == (3, 1200, 1600) and small.shape == (3, 150, 200)
    assert decode_pixels(encode(photo(260, 260), 'JPEG'), 's', needed).shape == (3, 260, 260)
    transform = train_transform(64, (0.9, 1.0))
    differences = [(seeded(transform, small, seed).float() - seeded(transform, whole, seed).float()).abs().mean()
                   for seed in range(32)]
    assert max(differences) < 2 and sum(differences) / 32 < 1


def test_flipped_images_are_mirrored() -> None:
    pixels = pil_to_tensor(photo())
    for seed in range(8):
        plain, mirrored = (seeded(train_transform(64, (0.5, 1.0), 0.4, horizontal_flip=share), pixels, seed)
                           for share in (0.0, 1.0))
        assert torch.equal(mirrored, plain.flip(-1)) and not torch.equal(mirrored, plain)


def test_wide_and_high_crops_are_equally_frequent() -> None:
    crop, = train_transform(240, (0.1, 0.2)).transforms
    torch.manual_seed(0)
    boxes = [crop.make_params([torch.empty(3, 1000, 1000)]) for _ in range(4000)]
    logarithms = [math.log(box['width'] / box['height']) for box in boxes]
    assert abs(sum(logarithms) / 4000) < 0.01  # 0.03, if the aspect were drawn linearly


def test_crops_keep_their_share_and_stay_inside() -> None:
    """On a ramp, where a crop begins and ends can be read from its corners."""
    ramp = torch.stack(torch.meshgrid(torch.arange(240.0), torch.arange(120.0), indexing='ij')).to(torch.uint8)
    ramp = torch.cat([ramp, ramp[:1]])
    transform = train_transform(240, (0.3, 0.6))
    shares, tops, corners = [], [], []
    for seed in range(200):
        crop = seeded(transform, ramp, seed)
        (top, left), (bottom, right) = crop[:2, 0, 0].tolist(), crop[:2, -1, -1].tolist()
        assert -1 <= top < bottom <= 240 and -1 <= left < right <= 120
        height, width = bottom - top + 1, right - left + 1
        assert 0.7 < width / height < 1.4
        shares.append(height * width / (240 * 120))
        tops.append(top / (240 - height))
        if width < 110:
            corners.append((top / (240 - height), left / (120 - width)))
    assert 0.27 < min(shares) < 0.33 and 0.5 < max(shares) < 0.63
    assert min(tops) < 0.05 and max(tops) > 0.95 and abs(sum(tops) / 200 - 0.5) < 0.1
    assert len(corners) > 50 and abs(np.corrcoef(corners, rowvar=False)[0, 1]) < 0.3  # drawn independently
