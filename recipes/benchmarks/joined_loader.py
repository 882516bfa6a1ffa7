# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Samples a second: the joined stream against the same loader without the sidecar, in one run."""

import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from streaming import MDSWriter
from torch.utils.data import DataLoader

from llm2clip.benchmark import write_result
from llm2clip.config import DatasetConfig, ImageStreamConfig, WriterConfig
from llm2clip.data.convert.samples import Dropped, Sample, one_part
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.image_embeddings import TrainImageDataset, paired_stream
from llm2clip.data.images import decode_pixels
from llm2clip.data.paired_stream import FINGERPRINT_FILE
from llm2clip.data.schema import (
    IMAGE,
    SAMPLE_ID,
    dataset_fingerprint,
    read_index,
)
from llm2clip.data.streaming import SeededDataset
from llm2clip.data.transforms import seeded, train_transform
from llm2clip.data.vectors import vector_columns
from llm2clip.data.verified_stream import VerifiedStream
from llm2clip.preprocessing import Preprocessing

SAMPLES, DIM, BATCH, ROUNDS = 2000, 4096, 32, 5
OPTIONS = {'seed': 0, 'batch_size': BATCH, 'shuffle': True, 'num_canonical_nodes': 8}


class ImagesOnly(SeededDataset):
    """What `TrainImageDataset` does, less the embedding."""

    def __init__(self, streams: list[VerifiedStream], transform: Any, **kwargs: Any) -> None:
        super().__init__(streams, **kwargs)
        self.transform = transform

    def __getitem__(self, at: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(at)
        image = decode_pixels(sample[IMAGE], sample[SAMPLE_ID])
        return {'index': at, 'pixel_values': seeded(self.transform, image, self.sample_seed(sample))}


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
    columns = vector_columns(['short', 'long'], DIM, 'float16')
    entries, start = [], 0
    for k, shard in enumerate(index['shards']):
        out = folder / f'part{k}'
        with MDSWriter(out=str(out), columns=columns, hashes=['xxh64'], size_limit=None) as writer:
            for i in range(start, start + shard['samples']):
                vectors = rng.standard_normal((2, DIM)).astype(np.float16)
                writer.write({SAMPLE_ID: f'{i}', **dict(zip(list(columns)[1:], vectors))})
        start += shard['samples']
        entry, = read_index(out)['shards']
        (folder / 'sidecar').mkdir(exist_ok=True)
        (out / entry['raw_data']['basename']).rename(folder / f'sidecar/shard.{k:05}.mds')
        entry['raw_data']['basename'] = f'shard.{k:05}.mds'
        entries.append(entry)
    (folder / 'sidecar/index.json').write_text(json.dumps({'version': 2, 'shards': entries}))
    fingerprint = {'dataset': dataset_fingerprint(index), 'teacher': {}}
    (folder / 'sidecar' / FINGERPRINT_FILE).write_text(json.dumps(fingerprint))


def rate(loader: DataLoader) -> float:
    start = time.perf_counter()
    seen = sum(len(batch['index']) for batch in loader)
    return seen / (time.perf_counter() - start)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        transform = train_transform(Preprocessing(224, (0.5,) * 3, (0.5,) * 3), (0.9, 1.0))
        config = ImageStreamConfig(local=str(folder / 'images/train'),
                                   embeddings={'teacher': DatasetConfig(local=str(folder / 'sidecar'))})
        joined = TrainImageDataset(
            [paired_stream('s', config, None, ['short', 'long'], 'bench')], {'short': 1, 'long': 1}, transform,
            **OPTIONS)
        # Streaming keeps one dataset a folder: the second reads the same files under another name.
        (folder / 'alone').symlink_to(folder / 'images/train')
        alone = ImagesOnly([VerifiedStream(local=str(folder / 'alone'))], transform, **OPTIONS)
        loaders = {name: DataLoader(data, BATCH, num_workers=2, drop_last=True)
                   for name, data in (('joined', joined), ('alone', alone))}
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(ROUNDS):
            for name, loader in loaders.items():
                rates[name].append(rate(loader))
        medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians['joined'] / medians['alone']
    write_result('joined_loader', 'samples/s, images joined with a sidecar', 'the same images alone', ratio, 0.95,
                 ratio >= 0.95, medians)


if __name__ == '__main__':
    main()
