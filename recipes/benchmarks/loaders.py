# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Samples per second of stage 2's loader, in one run with the same images and workers:

against the same loader without the sidecar, against the same that normalises pixels in its workers, and against a
webdataset pipeline that does what the official code's does (tars with the text vector in float32, Pillow's decoder,
open_clip's transform).  And the bytes of both ways to store the vectors, and of both ways to deliver a batch.
"""

import io
import json
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
from bench_result import write_result
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from llm2clip.config import DatasetConfig, ImageStreamConfig, WriterConfig
from llm2clip.data.convert.samples import Dropped, Sample, one_part
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.image_embeddings import TrainImageDataset, paired_stream
from llm2clip.data.schema import (
    IMAGE,
    SAMPLE_ID,
    TEACHER_FILE,
    dataset_fingerprint,
    read_index,
)
from llm2clip.data.shared_memory import batch_bytes
from llm2clip.data.transforms import pixels_needed, train_transform
from llm2clip.data.vectors import vector_columns, vector_rows

SAMPLES, DIM, SIZE, BATCH, WORKERS, ROUNDS = 2000, 4096, 224, 32, 2, 15
KEYS, MEAN = ['short', 'long'], (0.5, 0.5, 0.5)
OPTIONS = {'seed': 0, 'batch_size': BATCH, 'shuffle': True, 'num_canonical_nodes': 8}

wds: Any = webdataset  # it names its parts by a lazy __getattr__


def write_data(folder: Path) -> None:
    rng = np.random.default_rng(0)

    def picture() -> bytes:
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(buffer, 'JPEG', quality=90)
        return buffer.getvalue()

    samples = [Sample(f'{i}', {'short': 'a', 'long': 'b'}, picture()) for i in range(SAMPLES)]
    write_splits({'train': one_part(samples)}, Dropped(), folder / 'images', WriterConfig(size_limit='8mb'))
    index = read_index(folder / 'images/train')
    columns = vector_columns(KEYS, DIM, 'int8')
    entries, start = [], 0
    for k, shard in enumerate(index['shards']):
        out = folder / f'part{k}'
        with MDSWriter(out=str(out), columns=columns, hashes=['xxh64'], size_limit=None) as writer:
            n = shard['samples']
            ids = [f'{i}' for i in range(start, start + n)]
            for row in vector_rows(ids, KEYS, rng.standard_normal((n, len(KEYS), DIM), np.float32), 'int8'):
                writer.write(row)
        start += shard['samples']
        entry, = read_index(out)['shards']
        (folder / 'sidecar').mkdir(exist_ok=True)
        (out / entry['raw_data']['basename']).rename(folder / f'sidecar/shard.{k:05}.mds')
        entry['raw_data']['basename'] = f'shard.{k:05}.mds'
        entries.append(entry)
    (folder / 'sidecar/index.json').write_text(json.dumps({'version': 2, 'shards': entries}))
    fingerprint = {'dataset': dataset_fingerprint(index), 'teacher': {}}
    (folder / 'sidecar' / TEACHER_FILE).write_text(json.dumps(fingerprint))


def write_tars(folder: Path, pattern: str) -> int:
    """The same samples as tars; returns the bytes of the vectors' members."""
    rng, size = np.random.default_rng(0), 0
    reader = StreamingDataset(local=str(folder / 'images/train'), batch_size=1)
    with wds.ShardWriter(pattern, maxcount=SAMPLES // 8, verbose=0) as writer:
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


def rate(loader: DataLoader) -> float:
    start = time.perf_counter()
    seen = sum(len(batch['index']) for batch in loader)
    return seen / (time.perf_counter() - start)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        tar_bytes = write_tars(folder, str(folder / '%03d.tar'))
        transform = train_transform(SIZE, (0.9, 1.0))
        to_floats = v2.Compose([*transform.transforms, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, MEAN)])
        # Streaming keeps one dataset per folder: the others read the same files under another name.
        for other in ('alone', 'floats', 'floats_sidecar'):
            (folder / other).symlink_to(folder / ('sidecar' if 'sidecar' in other else 'images/train'))

        def dataset(local: str, online: bool = False, sidecar: str = 'sidecar', transform: v2.Compose = transform
                    ) -> TrainImageDataset:
            config = ImageStreamConfig(local=str(folder / local),
                                       embeddings={'teacher': DatasetConfig(local=str(folder / sidecar))})
            stream = paired_stream('s', config, [], KEYS, 'bench', online, keep_open=True)
            return TrainImageDataset([stream], [dict.fromkeys(KEYS, 1)], transform, pixels_needed(SIZE, 0.9),
                                     **OPTIONS)

        datasets = {'joined': dataset('images/train'), 'alone': dataset('alone', online=True),
                    'floats': dataset('floats', sidecar='floats_sidecar', transform=to_floats)}
        loaders = {name: DataLoader(data, BATCH, num_workers=WORKERS, drop_last=True, persistent_workers=True)
                   for name, data in datasets.items()}
        loaders['webdataset'] = webdataset_loader(sorted(map(str, folder.glob('*.tar'))))
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for loader in loaders.values():
            rate(loader)  # starts its workers, which stay
        delivered = {name: batch_bytes(default_collate([datasets[name][i] for i in range(BATCH)])) / BATCH
                     for name in ('joined', 'floats')}
        for turn in range(ROUNDS):
            for name in sorted(loaders, reverse=turn % 2 == 0):
                rates[name].append(rate(loaders[name]))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        sidecar = [path.stat().st_size / SAMPLES for path in (folder / 'sidecar').glob('*.mds')]
    # Each round's own, since the machine's speed drifts.
    ratio = statistics.median(joined / alone for joined, alone in zip(rates['joined'], rates['alone']))
    write_result('joined_loader', 'samples/s, images joined with a sidecar', 'the same loader without the sidecar',
                 ratio, 0.95, ratio >= 0.95, medians)
    ratio = statistics.median(pixels / floats for pixels, floats in zip(rates['joined'], rates['floats']))
    write_result('uint8_loader', 'samples/s, pixels in uint8', 'normalised to float32 in the workers', ratio, 1.0,
                 ratio >= 1.0, medians)
    ratio = delivered['joined'] / delivered['floats']
    write_result('uint8_bytes', 'bytes per sample that workers deliver, pixels in uint8', 'float32', ratio, 0.26,
                 ratio <= 0.26, delivered)
    ratio = medians['joined'] / medians['webdataset']
    write_result('webdataset_loader', 'samples/s, images joined with a sidecar', 'webdataset as in the official code',
                 ratio, 1.3, ratio >= 1.3, medians)
    stored = {'sidecar': sum(sidecar), 'tars': tar_bytes / SAMPLES}
    ratio = stored['sidecar'] / stored['tars']
    write_result('sidecar_bytes', 'bytes per sample of an int8 sidecar', 'float32 in tars', ratio, 0.26, ratio <= 0.26,
                 stored)


if __name__ == '__main__':
    main()
