# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Teacher embeddings of an image dataset's captions: one sidecar shard for each of its shards."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

import xxhash
from composer.utils import dist
from streaming import MDSWriter
from streaming.base.format import reader_from_json
from tqdm import tqdm

from llm2clip.data.paired_stream import FINGERPRINT_FILE
from llm2clip.data.schema import (
    SAMPLE_ID,
    caption_column,
    caption_keys,
    check_dataset,
    dataset_fingerprint,
    embedding_column,
    embedding_encoding,
    read_index,
    to_float16,
)
from llm2clip.models.caption_tokenizer import CaptionTokenizer
from llm2clip.models.teacher import encoding, teacher_config
from llm2clip.models.text_encoder import TextEncoder, encode_texts

__all__ = ['extract_sidecar', 'teacher_fingerprint']


def teacher_fingerprint(folder: Union[str, Path]) -> dict[str, Any]:
    """What decides a teacher's embeddings: the hash of its weights and tokenizer, and how it encodes.

    Raises:
        ConfigError: The folder holds no teacher.
    """
    how = encoding(teacher_config(folder))
    digest = xxhash.xxh64()
    for path in sorted(Path(folder).glob('*')):
        if path.suffix in ('.safetensors', '.model') or path.name == 'tokenizer.json':
            with path.open('rb') as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    return {'weights': digest.hexdigest(), **how}


def extract_sidecar(
    dataset: Union[str, Path],
    out: Union[str, Path],
    encoder: TextEncoder,
    tokenizer: CaptionTokenizer,
    teacher: dict[str, Any],
    batch_tokens: int = 4096,
    precision: str = 'fp32',
) -> None:
    """Write the sidecar of one dataset; ranks share its shards, and finished shards are kept when it starts again.

    Args:
        dataset: Folder of the MDS dataset.
        out: Folder of the sidecar.
        encoder: The teacher.
        tokenizer: The teacher's.
        teacher: Its fingerprint, kept in the sidecar.
        batch_tokens: Tokens a forward pass, padding included.
        precision: ``fp32`` or ``amp_bf16``.

    Raises:
        FileNotFoundError: The dataset is missing.
        ValueError: It has no captions or an empty one, or `out` was begun for another dataset or teacher.
    """
    index = read_index(dataset)
    keys = caption_keys(check_dataset(dataset, [SAMPLE_ID]))
    if not keys:
        raise ValueError(f'the dataset in {dataset} has no caption columns')
    out = Path(out)
    fingerprint = {'dataset': dataset_fingerprint(index), 'teacher': teacher, 'caption_keys': keys}
    if dist.get_global_rank() == 0:
        _begin(out, fingerprint)
    dist.barrier()
    shards = range(dist.get_global_rank(), len(index['shards']), dist.get_world_size())
    todo = [k for k in shards if not _piece(out, k).is_file()]
    progress = tqdm(total=sum(index['shards'][k]['samples'] * len(keys) for k in todo),
                    desc=f'embed {Path(dataset).name}', unit=' captions', disable=dist.get_local_rank() != 0)
    for k in todo:
        _extract_shard(dataset, index['shards'][k], k, out, keys, encoder, tokenizer, batch_tokens, precision)
        progress.update(index['shards'][k]['samples'] * len(keys))
    progress.close()
    dist.barrier()
    if dist.get_global_rank() == 0:
        _finish(out, len(index['shards']))
    dist.barrier()


def _piece(out: Path, k: int) -> Path:
    """The index entry of a finished shard."""
    return out / f'shard.{k:05}.json'


def _begin(out: Path, fingerprint: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / FINGERPRINT_FILE
    if path.is_file() and json.loads(path.read_text()) != fingerprint:
        raise ValueError(f'{out} was begun for another dataset or teacher; remove it to extract again')
    path.write_text(json.dumps(fingerprint, indent=2) + '\n')


def _samples(dataset: Union[str, Path], shard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    reader = reader_from_json(str(dataset), '', shard)
    path = Path(dataset, shard['raw_data']['basename'])
    if not path.is_file():
        raise FileNotFoundError(f'the dataset in {dataset} has no shard {path.name}')
    if path.stat().st_size != shard['raw_data']['bytes']:
        raise ValueError(f'shard {path} is damaged: {path.stat().st_size} bytes, expected {shard["raw_data"]["bytes"]}')
    yield from reader


def _extract_shard(
    dataset: Union[str, Path],
    shard: dict[str, Any],
    k: int,
    out: Path,
    keys: list[str],
    encoder: TextEncoder,
    tokenizer: CaptionTokenizer,
    batch_tokens: int,
    precision: str,
) -> None:
    ids, texts = [], []
    for sample in _samples(dataset, shard):
        ids.append(sample[SAMPLE_ID])
        for key in keys:
            text = sample[caption_column(key)]
            if not text.strip():
                raise ValueError(f'caption {key!r} of sample {sample[SAMPLE_ID]!r} in {dataset} is empty')
            texts.append(text)
    vectors = to_float16(encode_texts(encoder, tokenizer, texts, batch_tokens, precision).numpy())
    vectors = vectors.reshape(len(ids), len(keys), -1)
    columns = {SAMPLE_ID: 'str',
               **{embedding_column(key): embedding_encoding(vectors.shape[-1]) for key in keys}}
    partial = out / f'shard.{k:05}.tmp.{os.getpid()}'
    with MDSWriter(out=str(partial), columns=columns, hashes=['xxh64'], size_limit=None) as writer:
        for sample_id, row in zip(ids, vectors):
            writer.write({SAMPLE_ID: sample_id, **{embedding_column(key): v for key, v in zip(keys, row)}})
    entry, = json.loads((partial / 'index.json').read_text())['shards']
    os.replace(partial / entry['raw_data']['basename'], out / f'shard.{k:05}.mds')
    entry['raw_data']['basename'] = f'shard.{k:05}.mds'
    (partial / 'index.json').write_text(json.dumps(entry))
    os.replace(partial / 'index.json', _piece(out, k))
    partial.rmdir()


def _finish(out: Path, n_shards: int) -> None:
    """Write the index, which makes the sidecar readable, from the shards' entries."""
    entries = [json.loads(_piece(out, k).read_text()) for k in range(n_shards)]
    partial = out / 'index.json.tmp'
    partial.write_text(json.dumps({'version': 2, 'shards': entries}, sort_keys=True))
    partial.replace(out / 'index.json')
