# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""One rank that reads batches as a training does, notes what it got, and goes on where it was: soak_rank.py FOLDER URL
WORKERS BATCH."""

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed
from composer.utils import dist
from streaming import StreamingDataLoader

from llm2clip.config import DatasetConfig, ImageDataConfig, ImageStreamConfig
from llm2clip.data.image_embeddings import build_image_loader

SAVE_EVERY = 5


def main(folder: Path, remote: str, workers: int, batch_size: int) -> None:
    dist.initialize_dist('cpu', timeout=300)
    sidecar = DatasetConfig(local=str(folder / 'cache/embeddings'), remote=f'{remote}/embeddings')
    stream = ImageStreamConfig(local=str(folder / 'cache/images'), remote=f'{remote}/train', embeddings={'t': sidecar})
    config = ImageDataConfig(streams={'s': stream}, num_workers=workers, num_canonical_nodes=8, cache_limit='1500kb',
                             caption_mix={'short': 1.0}, download_timeout=20)
    loader = build_image_loader(config, 32, batch_size, 5, True, 'train_data').dataloader
    assert isinstance(loader, StreamingDataLoader)
    saved, epoch, done = folder / 'state.json', 0, 0
    if saved.is_file():
        epoch, done, state = json.loads(saved.read_text())
        loader.load_state_dict(state)
    with (folder / f'rank{dist.get_global_rank()}.jsonl').open('a', buffering=1) as log:
        while True:
            for batch in loader:
                log.write(json.dumps([epoch, done, time.time(), batch['index'].tolist()]) + '\n')
                done += 1
                torch.distributed.barrier()
                if done % SAVE_EVERY == 0 and dist.get_global_rank() == 0:
                    saved.with_suffix('.new').write_text(json.dumps([epoch, done, loader.state_dict()]))
                    os.replace(saved.with_suffix('.new'), saved)
            epoch, done = epoch + 1, 0


if __name__ == '__main__':
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
