# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Teacher embeddings of an image dataset's captions: one sidecar shard for each of its shards."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, Optional

import torch.nn.functional as F
from composer.utils import dist
from tqdm import tqdm

from llm2clip.config import DatasetConfig
from llm2clip.data.vectors import vector_columns, vector_rows
from llm2clip.engine import Engine, Work
from llm2clip.folders import OutputFolder
from llm2clip.teacher.blocks import Embedded, keep_block, load_block
from llm2clip.teacher.caption_shards import CaptionShard, CaptionSource
from llm2clip.teacher.caption_teacher import CaptionTeacher
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.teacher.sidecar_files import Sidecar, begin_sidecar, finish_sidecar, write_shard
from llm2clip.threads import Behind, ahead

__all__ = ['extract_by', 'extract_on_ranks', 'extract_sidecar']

_COUNTED = ('shards', 'captions', 'tokens', 'truncated', 'left_out', 'absent')


class _Block(NamedTuple):
    """Captions of one shard that are embedded, and kept, together."""

    shard: CaptionShard
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
    source = CaptionSource(sidecar)
    todo = begin_sidecar(sidecar.out, source.record(teacher.fingerprint), source.index)
    mine = todo[dist.get_global_rank()::dist.get_world_size()]
    done = _nothing()
    with tqdm(total=source.count(mine), unit=' captions', desc=f'embed {sidecar.name}',
              disable=dist.get_local_rank() != 0) as progress:
        _embed(((source, k) for k in mine), teacher, block_tokens, lambda shard: done.update(shard.done), progress)
    every = dist.all_gather_object(done)
    if dist.get_global_rank() == 0:
        finish_sidecar(sidecar.out, len(source.shards))
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
    sources = {sidecar.name: CaptionSource(sidecar) for sidecar in sidecars}
    todo = {name: begin_sidecar(source.sidecar.out, source.record(fingerprint), source.index)
            for name, source in sources.items()}
    captions = {name: source.count(todo[name]) for name, source in sources.items()}
    for name, source in sources.items():
        print(f'{name}: {captions[name]:,} captions in {len(todo[name])} of {len(source.shards)} shards are to be '
              f'embedded, by {engine}', flush=True)
    done = {name: _nothing() for name in sources}

    def finish(name: str) -> None:
        if done[name]['shards'] == len(todo[name]):
            finish_sidecar(sources[name].sidecar.out, len(sources[name].shards))

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
    source = cache(lambda name: CaptionSource(known[name]))

    def work(
        tasks: Iterable[tuple[str, int]], done: Callable[[tuple[str, Counter[str]]], object]
    ) -> None:
        _embed(((source(name), k) for name, k in tasks), teacher, block_tokens,
               lambda shard: done((shard.source.sidecar.name, shard.done)), tqdm(disable=True))

    return work


def _embed(
    shards: Iterable[tuple[CaptionSource, int]], teacher: CaptionTeacher, block_tokens: int,
    done: Callable[[CaptionShard], object], progress: tqdm,
) -> None:
    """Embed shards, by their numbers, and write them; `done` is told of each that is written, by another thread."""
    total = Counter[str]()

    def finish(shard: CaptionShard) -> None:
        sidecar, keys = shard.source.sidecar, shard.source.keys
        vectors = F.normalize(shard.vectors, dim=-1) if sidecar.normalize else shard.vectors
        rows = vector_rows(shard.ids, keys, vectors.numpy().reshape(len(shard.ids), len(keys), -1), sidecar.storage)
        write_shard(sidecar.out, shard.number, rows, vector_columns(keys, vectors.shape[-1], sidecar.storage))
        shutil.rmtree(shard.blocks_folder, ignore_errors=True)
        shard.done['shards'] += 1
        done(shard)

    read = ahead(source.read(k, teacher.llm_embed_dim) for source, k in shards)
    with Behind() as behind:
        for block in ahead(_tokenized(read, teacher, block_tokens)):
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
                behind(_naming(shard)(keep_block), shard.blocks_folder, texts, embedded)
            if block.last:
                behind(_naming(shard)(finish), shard)


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
    shards: Iterable[CaptionShard], teacher: CaptionTeacher, block_tokens: int
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


@contextmanager
def _naming(shard: CaptionShard) -> Iterator[None]:
    """Note in an error which shard it is about."""
    try:
        yield
    except Exception as error:
        error.add_note(f'while shard {shard.number} was embedded')
        raise
