# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Samples per second of stage 2's loader, in one run with the same images and workers:

against the same loader without text embeddings, and against a webdataset pipeline that does what the official code's
does (tars with the text vector in float32, Pillow's decoder, open_clip's transform).  And the bytes of both ways to
store the vectors.
"""

import random
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms as v1
import webdataset
from streaming import StreamingDataset
from torch.utils.data import DataLoader

from llm2clip.config import DatasetConfig, ImageDataConfig, ImageStreamConfig
from llm2clip.data.image_embeddings import build_image_loader
from llm2clip.data.schema import IMAGE, SAMPLE_ID
from recipes.benchmarks.measuring import write_result
from recipes.benchmarks.random_data import write_images, write_vectors

SAMPLES, DIM, SIZE, BATCH, WORKERS, ROUNDS = 2000, 4096, 224, 32, 2, 15
KEYS, MEAN = ['short', 'long'], (0.5, 0.5, 0.5)

wds: Any = webdataset  # it names its parts by a lazy __getattr__


def write_tars(folder: Path) -> int:
    """The same samples as tars; returns the bytes of the vectors' members."""
    rng, size = np.random.default_rng(0), 0
    reader = StreamingDataset(local=str(folder / 'images/train'), batch_size=1)
    with wds.ShardWriter(str(folder / '%03d.tar'), maxcount=SAMPLES // 8, verbose=0) as writer:
        for sample in reader:
            vectors = {f'{key}.npy': rng.standard_normal(DIM).astype(np.float32) for key in KEYS}
            writer.write({'__key__': sample[SAMPLE_ID], 'jpg': sample[IMAGE], **vectors})
    for path in sorted(folder.glob('*.tar')):
        with tarfile.open(path) as tar:
            # Of a member: its header, its content, and what fills the last block.
            size += sum(512 + -(-member.size // 512) * 512 for member in tar if member.name.endswith('.npy'))
    return size


def webdataset_loader(urls: list[str]) -> DataLoader:
    transform = v1.Compose([
        v1.RandomResizedCrop(SIZE, scale=(0.9, 1.0), interpolation=v1.InterpolationMode.BICUBIC),
        lambda image: image.convert('RGB'), v1.ToTensor(), v1.Normalize(MEAN, MEAN)])

    def choose(sample: dict[str, Any]) -> dict[str, Any]:
        return {'index': sample['__key__'], 'pixel_values': transform(sample['jpg']),
                'text_embedding': torch.from_numpy(sample[f'{random.choice(KEYS)}.npy'])}

    dataset = wds.WebDataset(urls, shardshuffle=False).shuffle(500).decode('pil').map(choose)
    return DataLoader(dataset, BATCH, num_workers=WORKERS, drop_last=True, persistent_workers=True)


def our_loader(images: Path, vectors: Path, without_vectors: bool) -> Any:
    stream = ImageStreamConfig(str(images), embeddings={'teacher': DatasetConfig(local=str(vectors))})
    config = ImageDataConfig(streams={'s': stream}, num_workers=WORKERS, num_canonical_nodes=8)
    return build_image_loader(config, SIZE, BATCH, 0, True, 'bench', without_vectors).dataloader


def rate(loader: DataLoader) -> float:
    start = time.perf_counter()
    seen = sum(len(batch['index']) for batch in loader)
    return seen / (time.perf_counter() - start)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(SAMPLES, folder / 'images', SAMPLES, (256, 256))
        write_vectors(folder / 'images/train', folder / 'vectors', DIM)
        tar_bytes = write_tars(folder)
        # Streaming keeps one dataset per folder: the other reads the same files under another name.
        (folder / 'alone').symlink_to(folder / 'images/train')
        loaders = {'joined': our_loader(folder / 'images/train', folder / 'vectors', False),
                   'alone': our_loader(folder / 'alone', folder / 'vectors', True),
                   'webdataset': webdataset_loader(sorted(map(str, folder.glob('*.tar'))))}
        for loader in loaders.values():
            rate(loader)  # starts its workers, which stay
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for turn in range(ROUNDS):
            for name in sorted(loaders, reverse=turn % 2 == 0):
                rates[name].append(rate(loaders[name]))
        stored = {'embeddings': sum(path.stat().st_size for path in (folder / 'vectors').glob('*.mds')) / SAMPLES,
                  'tars': tar_bytes / SAMPLES}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    # Each round's ratio, since the machine's speed drifts.
    ratio = statistics.median(joined / alone for joined, alone in zip(rates['joined'], rates['alone']))
    write_result('joined_loader', 'samples/s, images joined with text embeddings', 'the same loader without them',
                 ratio, medians, at_least=0.95)
    write_result('webdataset_loader', 'samples/s, images joined with text embeddings',
                 'webdataset as in the official code', medians['joined'] / medians['webdataset'], medians, at_least=1.3)
    write_result('embeddings_bytes', 'bytes per sample of text embeddings in int8', 'float32 in tars',
                 stored['embeddings'] / stored['tars'], stored, at_most=0.26)


if __name__ == '__main__':
    main()
