# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Measure what the size of a dataset costs, up to a billion samples: python -m recipes.benchmarks.growth

Records of converted tars and an index of text embeddings stand for the data, without images or vectors.  Each
task runs in a process of its own, of which CPU seconds and the peak memory above the imports are measured."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

from PIL import Image
from streaming.base.batching import generate_work
from streaming.base.world import World

from llm2clip.config import DatasetConfig, ExtractConfig, LoaderConfig, WriterConfig
from llm2clip.data.convert.samples import Dropped, Part, Sample
from llm2clip.data.convert.writer import is_written, write_splits
from llm2clip.data.images import encode_image
from llm2clip.data.schema import (
    CAPTION,
    EMBEDDING,
    IMAGE,
    INDEX,
    TEACHER_FILE,
    dataset_fingerprint,
    read_index,
)
from llm2clip.data.streams.paired_stream import PairedStream
from llm2clip.data.streams.safe_dataset import SafeDataset
from llm2clip.io.files import read_json, write_json
from llm2clip.io.remotes import OutputFolder
from llm2clip.planning.datasets import add_all
from llm2clip.planning.plan import Plan
from recipes.benchmarks.measuring import BENCH_FOLDER, describe, peak_mb, run_alone
from recipes.benchmarks.random_data import write_vectors

FOLDER = BENCH_FOLDER / 'growth'
TABLES, TARS, IMAGES, VECTORS = FOLDER / 'tables.json', FOLDER / 'tars', FOLDER / 'images', FOLDER / 'vectors'
SIZES = (1_000, 10_000, 100_000, 124_000)  # tars
SAMPLES, LEFT_OUT, SHARD_BYTES = 8_065, 40, 240_000_000  # per tar
RANKS, WORKERS, BATCH = 8, 8, 4_096
ORDERED = 12_400  # tars, beyond which the order of an epoch does not fit the memory of this machine
# Orders of an epoch: position in it, and the divisor of its size.
DRAWN = {'order': (0.0, None), 'resume': (0.9, None), 'shortened': (0.0, 10)}


def parts(numbers: Sequence[int]) -> dict[str, list[Part]]:
    """Return one part per tar; captions come from tables, whose index every part names."""
    def read(dropped: Dropped) -> list[Sample]:
        dropped.add('no image', *(f'{number:09}' for number in range(LEFT_OUT)))
        image = encode_image(Image.new('RGB', (8, 8)), 'JPEG')
        return [Sample(f'{i:09}', {'short': 'word ' * (5 + i % 20), 'long': 'word ' * (30 + i % 90)}, image)
                for i in range(200)]

    return {'train': [Part(f'{i:06}', read, [f'{TARS}/{i:06}.tar', f'{TABLES}']) for i in numbers]}


def write_data(tars: int) -> None:
    """Write the records of converted tars, as of one that is converted here, and an embeddings dataset."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    TARS.mkdir(parents=True)
    write_json(TABLES, {'tables': [[f'{i:04}.parquet', 10**8, 10**18] for i in range(1_000)]})
    for i in range(tars):
        Path(f'{TARS}/{i:06}.tar').touch()
    template = FOLDER / 'template'
    write_splits(parts([0]), Dropped(), template, WriterConfig(max_dropped=1))
    record = read_json(template / 'train/part-000000/part.json', dict)
    record['samples'] = record['shards'][0]['samples'] = SAMPLES
    record['shards'][0]['raw_data']['bytes'] = SHARD_BYTES
    text = json.dumps(record)
    for i in range(tars):
        part = IMAGES / f'train/part-{i:06}'
        part.mkdir(parents=True)
        (part / 'part.json').write_text(text.replace('000000.tar', f'{i:06}.tar'))
    write_vectors(template / 'train', FOLDER / 'template_vectors', 1_024)


def write_embeddings() -> None:
    """Write an embeddings dataset of the images, with an entry of each shard in a file."""
    index = read_index(IMAGES / 'train')
    template = read_index(FOLDER / 'template_vectors')['shards'][0]
    entries = []
    VECTORS.mkdir()
    for k, shard in enumerate(index['shards']):
        data = template['raw_data'] | {'basename': f'shard.{k:05}.mds'}
        entries.append(template | {'samples': shard['samples'], 'raw_data': data})
        (VECTORS / f'shard.{k:05}.json').write_text(json.dumps(entries[-1]))
    write_json(VECTORS / TEACHER_FILE, {'dataset': dataset_fingerprint(index)})
    (VECTORS / INDEX).write_text(json.dumps({'version': 2, 'shards': entries}))


def convert(tars: int, num_shards: int = 1) -> None:
    write_splits(parts(range(tars)), Dropped(), IMAGES, WriterConfig(num_shards=num_shards))


def repeat(tars: int) -> None:
    assert is_written(OutputFolder(IMAGES), {}, WriterConfig())


def end_share(tars: int) -> None:
    """End the share of the first of 16 machines, before the last machine has converted its last tar."""
    last = sorted((IMAGES / 'train').glob('part-*/part.json'))[-1]
    last.rename(f'{last}.later')
    convert(tars, num_shards=16)
    Path(f'{last}.later').rename(last)


def find_missing(tars: int) -> None:
    names = [f'shard.{k:05}.json' for k in range(tars)]
    assert len(OutputFolder(VECTORS).existing(names)) == tars


def plan(tars: int) -> None:
    images = Plan(ExtractConfig(), RANKS)
    add_all(images, {'images': DatasetConfig(f'{IMAGES}/train')})
    assert images.datasets[0].samples == SAMPLES * tars


def open_dataset(epoch_size: Optional[int] = None) -> SafeDataset:
    """Open the images with their embeddings, as one rank of stage 2, which has no shards yet."""
    cache = FOLDER / 'cache'
    stream = PairedStream(f'{cache}/images', [DatasetConfig(f'{cache}/vectors', f'{VECTORS}')],
                          [IMAGE, f'{CAPTION}short'], [f'{EMBEDDING}short'], remote=f'{IMAGES}/train')
    config = LoaderConfig(num_workers=WORKERS, epoch_size=epoch_size)
    return SafeDataset({'images': stream}, config, BATCH // RANKS, 0, train=True)


def order(dataset: SafeDataset, position: float) -> None:
    """Draw the order of an epoch from a position between 0 and 1, as the first rank of a node does."""
    dataset.shuffle_block_size = 1 << 18
    position = int(position * dataset.epoch_size)
    generate_work('random', dataset, World(1, RANKS, WORKERS, 0), epoch=0, sample_in_epoch=position)


def step(task: str, tars: int) -> Callable[[], object]:
    """Return the function of a task, after what it needs."""
    if task in DRAWN:
        position, share = DRAWN[task]
        return partial(order, open_dataset(epoch_size=share and SAMPLES * tars // share), position)
    return {'finish': partial(convert, tars), 'repeat': partial(repeat, tars),
            'share': partial(end_share, tars), 'missing': partial(find_missing, tars),
            'plan': partial(plan, tars), 'open': open_dataset}[task]


def measure(task: str, tars: int) -> dict[str, float]:
    function = step(task, tars)
    start = time.process_time()
    mib = peak_mb(function)
    return {'seconds': time.process_time() - start, 'gib': mib / 1024}


def main() -> None:
    os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the memory is that of the host
    runs: dict[str, Any] = {}
    for tars in SIZES:
        write_data(tars)
        for task in ('finish', 'repeat', 'share', 'missing', 'plan', 'open', *DRAWN):
            if task == 'repeat':
                write_embeddings()
            if tars <= ORDERED or task not in DRAWN:
                numbers = run_alone('recipes.benchmarks.growth', task, tars)
                runs.setdefault(task, {}).setdefault('-', {})[str(tars)] = numbers
                print(tars, task, numbers, flush=True)
        write_json(BENCH_FOLDER / 'growth.json', {'about': describe(), 'runs': runs})
    shutil.rmtree(FOLDER)


if __name__ == '__main__':
    if sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
