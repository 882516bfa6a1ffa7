# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Extraction of embeddings of captions or images: one shard of embeddings for each shard of a dataset."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from streaming import MDSWriter
from tqdm import tqdm

from llm2clip.config import DatasetConfig, EmbedConfig
from llm2clip.config.loading import save_config
from llm2clip.data.schema import (
    CAPTION,
    IMAGE,
    INDEX,
    SAMPLE_ID,
    TEACHER_FILE,
    caption_keys,
    check_shard,
    columns_of,
    dataset_fingerprint,
    read_index,
    vector_columns,
    vector_rows,
)
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.device import Device, get_device, set_up_process
from llm2clip.errors import ConfigError
from llm2clip.io.files import durable_rename, read_json, remove_folder, writing
from llm2clip.io.remotes import OutputFolder
from llm2clip.ranks import broadcast_from_rank0, dist, initialize_gloo, is_first
from llm2clip.teacher.embedder import Embedder
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord

T = TypeVar('T')

# Bytes of the vectors of a shard: MDS has 32 bits for a position, and ids take some of them.
_LARGEST_SHARD = 2**32 - 2**28
_COUNTED = ('shards', 'captions', 'tokens', 'truncated', 'left_out', 'absent')


@dataclass(frozen=True)
class ExtractionTask:
    """Input, output and format of one embeddings dataset, of captions or of images."""

    dataset: DatasetConfig
    """Image or caption dataset to embed."""
    out: OutputFolder
    """Output folder of the embeddings dataset."""
    storage: str = 'float16'
    """``float16``, ``float32`` or ``int8``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the vectors to record in ``teacher.json``, such as the precision."""
    of_images: bool = False
    """Embed images instead of captions."""


class _Extraction:
    """The shards of a dataset, and the embeddings dataset that all ranks write together."""

    def __init__(self, task: ExtractionTask) -> None:
        self.task = task
        self.out = task.out
        local = task.dataset.local
        self.stream = VerifiedStream(local=local, remote=task.dataset.remote)
        self.shards = self.stream.open()
        self.pieces = [_piece(k) for k in range(len(self.shards))]
        if dist.get_local_rank() == 0:
            self.stream.set_up_local(self.shards, np.zeros(len(self.shards), np.int64))
        dist.barrier()
        if task.of_images:
            columns_of(self.shards[0], [IMAGE], local)
            self.keys = [IMAGE]
            return
        self.keys = caption_keys(columns_of(self.shards[0]))
        if not self.keys:
            raise ValueError(f'the dataset in {local} has no caption columns')

    def initialize(self, fingerprint: Fingerprint) -> list[int]:
        """Write or check the record of dataset and teacher; return the missing shards.
        Every rank calls this."""
        task = self.task
        # Earlier versions could store vectors of length 1, and recorded that.
        vectors = {'storage': task.storage, 'normalized': False} | dict(task.settings)
        dataset = dataset_fingerprint(read_index(task.dataset.local))
        facts = {'dataset': dataset, 'caption_keys': self.keys, 'vectors': vectors}
        if self.out.remote:
            facts['out_remote'] = self.out.remote
        missing_shards = broadcast_from_rank0(partial(self._begin, TeacherRecord(fingerprint, facts)))
        self.out.local.mkdir(parents=True, exist_ok=True)
        return missing_shards

    def _begin(self, record: TeacherRecord) -> list[int]:
        out = self.out
        if out.fetch(TEACHER_FILE):
            differing = TeacherRecord.read(out.local).difference(record)
            if differing is not None:
                raise ValueError(f'{out.local} was begun for another dataset or teacher: {differing}; '
                                 'remove it to extract again')
        elif out.fetch(INDEX):
            raise ConfigError(f'{out.local} holds a dataset that is no embeddings dataset, expected an empty '
                              'folder or an embeddings dataset', 'out')
        else:
            out.commit(TEACHER_FILE, record.to_text())
        for unfinished in out.local.glob('shard.*.tmp.*'):  # of a killed process: no rank has begun
            shutil.rmtree(unfinished, ignore_errors=True)
        finished = out.existing(self.pieces)
        return [k for k, piece in enumerate(self.pieces) if piece not in finished]

    def items(self, sample: Mapping[str, Any]) -> list[Any]:
        """Return what to embed of a sample, in the order of the keys: (image, sample id), or the captions, of
        which a missing one is empty."""
        if self.task.of_images:
            return [(sample[IMAGE], sample[SAMPLE_ID])]
        captions: list[str] = []
        for key in self.keys:
            caption = sample[CAPTION + key]
            captions.append(caption if caption.strip() else '')
        return captions

    def finish(self) -> None:
        """Write the index from the entries of all shards."""
        entries = []
        for piece, is_here in zip(self.pieces, self.out.fetch_all(self.pieces)):
            path = self.out.local / piece
            if not is_here:
                raise FileNotFoundError(f'{path}, which another machine has written, is not here: machines '
                                        'that do not share the folder need out_remote')
            entry = read_json(path, dict)
            check_shard(entry, f'{path}')
            entries.append(entry)
        self.out.commit(INDEX, json.dumps({'version': 2, 'shards': entries}, sort_keys=True))


def write_shard(out: OutputFolder, k: int, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Write one shard, and last its index entry, which marks the shard as finished."""
    name = f'shard.{k:05}.mds'
    size = len(rows) * sum(value.nbytes for value in rows[0].values() if isinstance(value, np.ndarray))
    if size > _LARGEST_SHARD:
        raise ConfigError(f'{out.local / name} would have {size:,} bytes of embeddings, expected less than '
                          f'{_LARGEST_SHARD:,}, since shards count bytes in 32 bits; write the dataset with '
                          'a smaller size_limit')
    partial = out.local / f'{name}.tmp.{os.getpid()}'
    # A restarted container has the same process ids.
    mds = MDSWriter(out=str(partial), columns=columns, hashes=['xxh64'], size_limit=None, exist_ok=True)
    with writing(out.local / name), mds as writer:
        for row in rows:
            writer.write(row)
    entry, = read_json(partial / INDEX, dict)['shards']
    durable_rename(partial / entry['raw_data']['basename'], out.local / name)
    entry['raw_data']['basename'] = name
    remove_folder(partial)
    out.publish(name)
    out.commit(_piece(k), json.dumps(entry))


def _piece(k: int) -> str:
    """File name of the index entry of a finished shard."""
    return f'shard.{k:05}.json'


class _Part(NamedTuple):
    """Part of shard `k`: `vectors` are those of the whole shard, zero for absent captions; `rows` are the
    indices of this part in them, and `inputs` are its items, prepared."""

    k: int
    ids: list[str]
    vectors: torch.Tensor
    rows: list[int]
    inputs: Any
    num_absent: int
    last: bool


def _parts(
    extraction: _Extraction, numbers: Iterable[int], embedder: Embedder, part_tokens: int
) -> Iterator[_Part]:
    """Yield the images or non-empty captions of shards, prepared; at least one part per shard.

    A part has about `part_tokens` tokens, at four characters per token; an image counts as one token.
    """
    for k in numbers:
        ids: list[str] = []
        items: list[Any] = []
        with extraction.stream.whole(extraction.shards[k]) as shard:
            for i in range(len(shard)):
                sample = shard[i]
                ids.append(sample[SAMPLE_ID])
                items += extraction.items(sample)
        parts: list[list[int]] = [[]]  # indices of the items of each part
        num_characters = num_absent = 0
        for i, item in enumerate(items):
            if not item:
                num_absent += 1
                continue
            if num_characters >= 4 * part_tokens:
                parts.append([])
                num_characters = 0
            parts[-1].append(i)
            num_characters += len(item) if isinstance(item, str) else 4
        vectors = torch.zeros(len(items), embedder.width)
        for rows in parts:
            inputs = None
            if rows:
                inputs = embedder.prepare([items[i] for i in rows])
            yield _Part(k, ids, vectors, rows, inputs, num_absent, last=rows is parts[-1])


def _ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield the same items; a thread computes the next item while the caller uses the current one."""
    iterator = iter(items)
    # With OpenMP threads of its own, it would have more of them than cores, and libgomp's then sleep.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        item = pool.submit(next, iterator, None).result()
        while item is not None:
            following = pool.submit(next, iterator, None)
            yield item
            item = following.result()


def run_extraction(
    config: EmbedConfig, load: Callable[[Device], Embedder], part_tokens: int, **options: Any
) -> None:
    """Write the embeddings datasets of a recipe; `options` are further fields of `ExtractionTask`."""
    device = get_device(config.device)
    set_up_process(device, config.precision)
    initialize_gloo()
    embedder = load(device)
    summaries: list[str] = []
    for name, dataset in config.datasets.items():
        remote = None if config.out_remote is None else os.path.join(config.out_remote, name)
        out = OutputFolder(f'{config.out}/{name}', remote)
        task = ExtractionTask(dataset, out, config.storage, **options)
        counts = write_embeddings(task, embedder, part_tokens)
        if task.of_images:
            counts = {'shards': counts['shards'], 'images': counts['captions']}
        summary = ', '.join(f'{number} {unit}' for unit, number in counts.items())
        summaries.append(f'{name}: {summary.replace("_", " ")}')
    if is_first():
        print('\n'.join(summaries))
        save_config(config, config.out)
        print(f'wrote {config.out}', flush=True)


def write_embeddings(
    task: ExtractionTask, embedder: Embedder, part_tokens: int = 32768
) -> dict[str, int]:
    """Write an embeddings dataset; the ranks of all nodes share the missing shards.

    Each shard is written atomically.  The index, which makes the dataset readable, follows when all shards
    are complete. Nodes that do not share `out` need a remote.  Captions that a sample lacks or the embedder
    leaves out get zero vectors.  `part_tokens` is the approximate number of tokens per call of the embedder.

    Returns:
        Counts of this call over all ranks: shards, captions, tokens, and captions that were truncated, left
        out, or absent from a sample.

    Raises:
        ValueError: The dataset has no captions or a damaged index.  Or `out` holds another dataset, or was
            begun for another dataset or teacher.
        ShardError: A shard of the dataset is missing or damaged.
        FileNotFoundError: A shard was written on a machine that does not share `out`,
            and `out` has no remote.
    """
    extraction = _Extraction(task)
    mine = extraction.initialize(embedder.fingerprint)[dist.get_global_rank()::dist.get_world_size()]
    counts: Counter[str] = Counter()
    num_items = sum(len(extraction.shards[k]) for k in mine) * len(extraction.keys)
    with tqdm(total=num_items, unit=' images' if task.of_images else ' captions',
              desc=f'embed {task.out.local.name}', disable=dist.get_local_rank() != 0) as progress:
        for part in _ahead(_parts(extraction, mine, embedder, part_tokens)):
            if part.rows:
                embedded = embedder.embed_prepared(part.inputs, on_batch=progress.update)
                part.vectors[part.rows] = embedded.vectors.cpu()
                counts.update(captions=len(part.rows), tokens=embedded.tokens, truncated=embedded.truncated,
                              left_out=embedded.left_out)
            if part.last:
                values = part.vectors.numpy().reshape(len(part.ids), len(extraction.keys), -1)
                write_shard(task.out, part.k,
                            vector_rows(part.ids, extraction.keys, values, task.storage),
                            vector_columns(extraction.keys, embedder.width, task.storage))
                counts.update(shards=1, absent=part.num_absent)
                progress.update(part.num_absent)
    total = sum(dist.all_gather_object(counts), Counter())
    if is_first():
        extraction.finish()
    dist.barrier()
    return {name: total[name] for name in _COUNTED}
