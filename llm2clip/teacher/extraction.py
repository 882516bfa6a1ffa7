# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Teacher embeddings of an image dataset's captions: one sidecar shard for each of its shards."""

import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Optional, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from composer.utils import dist
from streaming import MDSWriter
from streaming.base.format.base.reader import Reader
from tqdm import tqdm

from llm2clip.config import ConfigError, DatasetConfig
from llm2clip.data.schema import (
    INDEX,
    SAMPLE_ID,
    TEACHER_FILE,
    caption_column,
    caption_keys,
    check_columns,
    check_shard,
    dataset_fingerprint,
    first_shards,
    read_index,
)
from llm2clip.data.streams.paired_stream import columns_of
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.data.vectors import STORAGES, vector_columns, vector_rows
from llm2clip.engine import Engine, Work
from llm2clip.files import read_json
from llm2clip.folders import OutputFolder
from llm2clip.teacher.blocks import Embedded, keep_block, load_block
from llm2clip.teacher.caption_teacher import CaptionTeacher
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord

__all__ = ['Sidecar', 'extract_by', 'extract_on_ranks', 'extract_sidecar']

T = TypeVar('T')

_COUNTED = ('shards', 'captions', 'tokens', 'truncated', 'left_out', 'absent')


@dataclass(frozen=True)
class Sidecar:
    """What is written for one dataset."""

    dataset: DatasetConfig
    """The image or caption dataset."""
    out: OutputFolder
    """Where the sidecar goes."""
    storage: str = 'float16'
    """``float16`` or ``int8``."""
    normalize: bool = False
    """Store vectors of length 1."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Facts about the vectors for the fingerprint, such as the precision."""

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.out.local.name


class _Source:
    """A dataset as it is read, shard by shard.

    Args:
        sidecar: What is written for it.

    Raises:
        ConfigError: Its storage is unknown.
        FileError, ShardError: The dataset is missing or damaged.
        ValueError: It has no captions.
    """

    def __init__(self, sidecar: Sidecar) -> None:
        if sidecar.storage not in STORAGES:
            raise ConfigError(f'storage: {sidecar.storage!r} is not one of {", ".join(STORAGES)}')
        self.sidecar = sidecar
        self.stream, self.shards = _open(sidecar.dataset)
        columns, local = columns_of(self.shards[0]), sidecar.dataset.local
        check_columns(columns, [SAMPLE_ID], local)
        self.keys = caption_keys(columns)
        if not self.keys:
            raise ValueError(f'the dataset in {local} has no caption columns')

    @property
    def index(self) -> dict[str, Any]:
        """The dataset's, as it is now."""
        return read_index(self.sidecar.dataset.local)

    def record(self, fingerprint: Fingerprint) -> TeacherRecord:
        """What the sidecar says about itself."""
        vectors = {'storage': self.sidecar.storage, 'normalized': self.sidecar.normalize, **self.sidecar.about}
        return TeacherRecord(fingerprint, {'dataset': dataset_fingerprint(self.index), 'caption_keys': self.keys,
                                           'vectors': vectors})

    def count(self, numbers: Iterable[int]) -> int:
        """Captions of some shards, those that samples do not have included."""
        return sum(len(self.shards[k]) for k in numbers) * len(self.keys)


@dataclass
class _Captions:
    """The captions of one shard, and their vectors as they come."""

    source: _Source
    number: int
    ids: list[str]
    texts: list[str]
    """Those of the first sample, key by key, then those of the second, and so on; empty where there is none."""
    vectors: torch.Tensor
    """One per caption, zero for an empty one."""
    done: Counter[str] = field(default_factory=lambda: _nothing())
    """What has been done for it."""

    @property
    def blocks_folder(self) -> Path:
        return self.source.sidecar.out.local / f'shard.{self.number:05}.blocks'


class _Block(NamedTuple):
    """Captions of one shard that are embedded, and kept, together."""

    shard: _Captions
    rows: list[int]
    """Which of the shard's captions they are."""
    tokens: Any
    """The teacher's, unless the vectors are known."""
    known: Optional[Embedded]
    """Their vectors, if a run before this one embedded them."""
    last: bool
    """Whether the shard has all its vectors then."""


def extract_sidecar(
    dataset: DatasetConfig,
    out: OutputFolder,
    teacher: CaptionTeacher,
    storage: str = 'float16',
    normalize: bool = False,
    about: Optional[Mapping[str, Any]] = None,
    block_tokens: int = 32768,
) -> dict[str, int]:
    """`extract_on_ranks`, of a `Sidecar` with these fields."""
    return extract_on_ranks(Sidecar(dataset, out, storage, normalize, about or {}), teacher, block_tokens)


def extract_on_ranks(sidecar: Sidecar, teacher: CaptionTeacher, block_tokens: int = 32768) -> dict[str, int]:
    """Write a sidecar.

    The ranks of all nodes share the shards that are not there yet, each of which one rank takes; a shard appears when
    it is complete, and the index, which makes the sidecar readable, when all are.  A rank that is killed in the middle
    of a shard goes on after the last block of captions that was kept.  Nodes that do not share `out` need a remote.

    The sidecar of a dataset that has grown since, by shards after those that it had, is extended by theirs; until it is
    complete again, no training reads it.

    While the teacher embeds a block, threads read the next shard, tokenise the next block and write what is done.

    The vector of a caption that a sample does not have, which is empty in the dataset, is zero, and so is that of one
    that the teacher leaves out.

    Args:
        sidecar: What is written.
        teacher: Embeds the captions.
        block_tokens: About how many tokens are embedded between two saves.

    Returns:
        What this call did, over all ranks: shards, captions, tokens, captions that were truncated, captions that were
        left out since the teacher cannot read them to their end, and captions that the samples do not have.

    Raises:
        ConfigError: The storage is unknown, or `out` holds a dataset that is no sidecar.
        FileError: An index, or what is in `out`, is damaged.
        FileNotFoundError: A shard was written on a machine that does not share `out`, which has no remote.
        ShardError: A shard of the dataset is missing or damaged.
        ValueError: The dataset has no captions, or `out` was begun for another teacher, or for a dataset that is not
            the beginning of this one.
    """
    source = _Source(sidecar)
    todo = _begin(sidecar.out, source.record(teacher.fingerprint), source.index)
    mine = todo[dist.get_global_rank()::dist.get_world_size()]
    done = _nothing()
    with tqdm(total=source.count(mine), unit=' captions', desc=f'embed {sidecar.name}',
              disable=dist.get_local_rank() != 0) as progress:
        _embed(((source, k) for k in mine), teacher, block_tokens, lambda shard: done.update(shard.done), progress)
    every = dist.all_gather_object(done)
    if dist.get_global_rank() == 0:
        _finish(sidecar.out, len(source.shards))
    dist.barrier()
    return {name: sum(rank[name] for rank in every) for name in _COUNTED}


def extract_by(
    engine: Engine, sidecars: Sequence[Sidecar], load: Callable[[], CaptionTeacher], fingerprint: Fingerprint,
    block_tokens: int = 32768,
) -> dict[str, dict[str, int]]:
    """Write sidecars by an engine's workers, each of which loads the teacher once and then takes shard after shard.

    Otherwise this is as `extract_on_ranks`, which may have begun them, or go on with them.

    Args:
        engine: The engine.
        sidecars: What is written, in folders of different names.
        load: Loads the teacher in a worker.
        fingerprint: Of the teacher.
        block_tokens: About how many tokens are embedded between two saves.

    Returns:
        Name of a sidecar -> what this call did.

    Raises:
        Exception: As of `extract_on_ranks`.
        ValueError: Also if a machine has another teacher.
    """
    sources = {sidecar.name: _Source(sidecar) for sidecar in sidecars}
    todo = {name: _begin(source.sidecar.out, source.record(fingerprint), source.index)
            for name, source in sources.items()}
    captions = {name: source.count(todo[name]) for name, source in sources.items()}
    for name, source in sources.items():
        print(f'{name}: {captions[name]:,} captions in {len(todo[name])} of {len(source.shards)} shards are to be '
              f'embedded, by {engine}', flush=True)
    done = {name: _nothing() for name in sources}

    def finish(name: str) -> None:
        if done[name]['shards'] == len(todo[name]):
            _finish(sources[name].sidecar.out, len(sources[name].shards))

    for name in sources:
        finish(name)  # if there is nothing to do for it
    with tqdm(total=sum(captions.values()), unit=' captions', desc='embed') as progress:

        def count(result: tuple[str, Counter[str]]) -> None:
            name, shard = result
            done[name].update(shard)
            progress.update(shard['captions'] + shard['absent'])
            _describe(progress, sum(done.values(), _nothing()))
            finish(name)

        tasks = {f'{name} shard {k}': (name, k) for name, numbers in todo.items() for k in numbers}
        engine.run(tasks, partial(_embedding, sidecars, load, fingerprint, block_tokens), count)
    return {name: dict(counts) for name, counts in done.items()}


def _embedding(
    sidecars: Sequence[Sidecar], load: Callable[[], CaptionTeacher], fingerprint: Fingerprint, block_tokens: int
) -> Work[tuple[str, int], tuple[str, Counter[str]]]:
    """Embed shards, by the name of their sidecar and their number, and tell that name and what was done."""
    teacher = load()
    teacher.fingerprint.check(fingerprint, 'what this machine has', 'the one of the machine that began')
    known = {sidecar.name: sidecar for sidecar in sidecars}
    source = cache(lambda name: _Source(known[name]))

    def work(
        tasks: Iterable[tuple[str, int]], done: Callable[[tuple[str, Counter[str]]], object]
    ) -> None:
        _embed(((source(name), k) for name, k in tasks), teacher, block_tokens,
               lambda shard: done((shard.source.sidecar.name, shard.done)), tqdm(disable=True))

    return work


def _embed(
    shards: Iterable[tuple[_Source, int]], teacher: CaptionTeacher, block_tokens: int,
    done: Callable[[_Captions], object], progress: tqdm,
) -> None:
    """Embed shards, by their numbers, and write them; `done` is told of each that is written, by another thread."""
    total = Counter[str]()

    def finish(shard: _Captions) -> None:
        sidecar, keys = shard.source.sidecar, shard.source.keys
        vectors = F.normalize(shard.vectors, dim=-1) if sidecar.normalize else shard.vectors
        rows = vector_rows(shard.ids, keys, vectors.numpy().reshape(len(shard.ids), len(keys), -1), sidecar.storage)
        _write(sidecar.out, shard.number, rows, vector_columns(keys, vectors.shape[-1], sidecar.storage))
        shutil.rmtree(shard.blocks_folder, ignore_errors=True)
        shard.done['shards'] += 1
        done(shard)

    read = _ahead(_read(source, k, teacher.llm_embed_dim) for source, k in shards)
    with _Behind() as behind:
        for block in _ahead(_tokenized(read, teacher, block_tokens)):
            shard, before = block.shard, progress.n
            with _naming(shard):
                embedded = block.known or teacher.embed_tokens(block.tokens, on_batch=progress.update).cpu()
            shard.vectors[block.rows] = embedded.vectors
            counts = _counts(block, embedded)
            shard.done.update(counts)
            total.update(counts)
            progress.update(before + counts['captions'] + counts['absent'] - progress.n)  # batches have moved it
            _describe(progress, total)
            if block.known is None:
                texts = [shard.texts[i] for i in block.rows]
                behind(shard, keep_block, shard.blocks_folder, texts, embedded)
            if block.last:
                behind(shard, finish, shard)


def _nothing() -> Counter[str]:
    """What has been done at the beginning."""
    return Counter(dict.fromkeys(_COUNTED, 0))


def _counts(block: _Block, embedded: Embedded) -> dict[str, int]:
    """What was done with a block."""
    return {'captions': len(block.rows), 'tokens': embedded.tokens, 'truncated': embedded.truncated,
            'left_out': embedded.left_out,
            'absent': sum(not text.strip() for text in block.shard.texts) if block.last else 0}


def _describe(progress: tqdm, total: Mapping[str, int]) -> None:
    progress.set_postfix({'tokens/s': f'{total["tokens"] / max(progress.format_dict["elapsed"], 1e-9):,.0f}',
                          'truncated': total['truncated'],
                          **({'left out': total['left_out']} if total['left_out'] else {})})


def _tokenized(
    shards: Iterable[_Captions], teacher: CaptionTeacher, block_tokens: int
) -> Iterator[_Block]:
    """The blocks of all shards, tokenised if their vectors are not known; at least one per shard."""
    for shard in shards:
        blocks = list(_blocks(shard.texts, block_tokens)) or [[]]
        for rows in blocks:
            texts = [shard.texts[i] for i in rows]
            with _naming(shard):
                known = load_block(shard.blocks_folder, texts) if texts else \
                    Embedded(shard.vectors[rows], 0, 0)
                tokens = teacher.tokenize(texts) if known is None else None
            yield _Block(shard, rows, tokens, known, rows is blocks[-1])


def _blocks(texts: Sequence[str], block_tokens: int) -> Iterator[list[int]]:
    """Captions that are not empty, in blocks of about `block_tokens` tokens, by four characters per token."""
    block: list[int] = []
    size = 0
    for i, text in enumerate(texts):
        if text.strip():
            block.append(i)
            size += len(text)
        if size >= 4 * block_tokens:
            yield block
            block, size = [], 0
    if block:
        yield block


def _open(dataset: DatasetConfig) -> tuple[VerifiedStream, Sequence[Reader]]:
    stream = VerifiedStream(local=dataset.local, remote=dataset.remote)
    shards = stream.open()
    if dist.get_local_rank() == 0:
        stream.set_up_local(shards, np.zeros(len(shards), np.int64))
    dist.barrier()
    return stream, shards


def _piece(k: int) -> str:
    """The index entry of a finished shard."""
    return f'shard.{k:05}.json'


def _begin(out: OutputFolder, record: TeacherRecord, index: dict[str, Any]) -> list[int]:
    """Claim the folder for this dataset and teacher; returns the shards that are not there yet.

    What it was claimed for may be the beginning of this dataset: the shards that are there then are those of its first
    ones, and the others come after them.
    """
    todo: list[list[int]] = [[]]
    if dist.get_global_rank() == 0:
        out.local.mkdir(parents=True, exist_ok=True)
        if not out.fetch(TEACHER_FILE):
            if out.fetch(INDEX):
                raise ConfigError(f'out: {out.local} holds a dataset that is no sidecar, expected an empty folder or a '
                                  'sidecar')
            out.commit(TEACHER_FILE, record.to_text())
        else:
            found = TeacherRecord.read(out.local)
            covered = first_shards(index, found.about.get('dataset'))
            if covered is not None:
                found.about['dataset'] = record.about['dataset']
            if (differing := found.difference(record)) is not None:
                raise ValueError(f'{out.local} was begun for another dataset or teacher: {differing}; remove it to '
                                 'extract again')
            if covered is not None and covered < len(index['shards']):
                out.commit(TEACHER_FILE, record.to_text())
        todo = [[k for k in range(len(index['shards'])) if not out.fetch(_piece(k))]]
    dist.broadcast_object_list(todo)
    out.local.mkdir(parents=True, exist_ok=True)
    return todo[0]


def _read(source: _Source, k: int, llm_embed_dim: int) -> _Captions:
    stream, shard = source.stream, source.shards[k]
    stream.prepare_shard(shard)
    if stream.discard_damaged(shard):
        stream.prepare_shard(shard)
    ids, texts = [], []
    for i in range(len(shard)):
        sample = shard[i]
        ids.append(sample[SAMPLE_ID])
        for key in source.keys:
            texts.append(sample[caption_column(key)])
    if source.sidecar.dataset.remote is not None:
        shard.evict()
    return _Captions(source, k, ids, texts, torch.zeros(len(texts), llm_embed_dim))


@contextmanager
def _naming(shard: _Captions) -> Iterator[None]:
    """Note in an error which shard it is about."""
    try:
        yield
    except Exception as error:
        error.add_note(f'while shard {shard.number} was embedded')
        raise


def _ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, the next of which is made in a thread while the last is used; None is no item."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, iterator, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, iterator, None)
            yield item


class _Behind:
    """A thread that writes what is done, in order, while its user goes on; two calls at most wait for it.

    What it raises is raised by the next call, and nothing is written after that.  When the block ends, by an exception
    as well, everything that was asked for has been written.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self._error: Optional[Exception] = None

    def __enter__(self) -> '_Behind':
        return self

    def __exit__(self, kind: Optional[type[BaseException]], *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self._check()

    def __call__(self, shard: _Captions, function: Callable[..., None], *args: Any) -> None:
        self._check()
        while len(self._waiting) > 1:
            self._waiting.popleft().result()
            self._check()
        self._waiting.append(self._pool.submit(self._run, shard, function, *args))

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, shard: _Captions, function: Callable[..., None], *args: Any) -> None:
        if self._error is None:
            try:
                with _naming(shard):
                    function(*args)
            except Exception as error:
                self._error = error


def _write(out: OutputFolder, k: int, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Write one shard; its index entry, which says that it is done, comes last."""
    name = f'shard.{k:05}.mds'
    partial = out.local / f'{name}.tmp.{os.getpid()}'
    with MDSWriter(out=str(partial), columns=columns, hashes=['xxh64'], size_limit=None) as writer:
        for row in rows:
            writer.write(row)
    entry, = read_json(partial / INDEX, dict)['shards']
    os.replace(partial / entry['raw_data']['basename'], out.local / name)
    entry['raw_data']['basename'] = name
    shutil.rmtree(partial)
    out.publish(name)
    out.commit(_piece(k), json.dumps(entry))


def _finish(out: OutputFolder, n_shards: int) -> None:
    """Write the index from the shards' entries."""
    for k in range(n_shards):
        if not out.fetch(_piece(k)):
            raise FileNotFoundError(f'{Path(out.local, _piece(k))}, which another machine has written, is not here: '
                                    'machines that do not share the folder need out_remote')
    entries = [read_json(out.local / _piece(k), dict) for k in range(n_shards)]
    for k, entry in enumerate(entries):
        check_shard(entry, f'{out.local / _piece(k)}')
    out.commit(INDEX, json.dumps({'version': 2, 'shards': entries}, sort_keys=True))
