# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""An MDS dataset of photographs -> images as files, and three files of captions: photograph_captions.py DATASET FOLDER

- `joined.csv`: every caption, and besides, as longer ones, the first two of an image in one text and the next two.
- `half.csv` and `other_half.csv`: the captions of every second image, and of the others.
"""

import csv
import sys
from itertools import islice
from pathlib import Path

from llm2clip.data.schema import CAPTION, IMAGE, SAMPLE_ID, read_samples


def main(dataset: str, folder: str) -> None:
    images = Path(folder, 'images')
    images.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple[str, str]]] = {'joined': [], 'half': [], 'other_half': []}
    for i, sample in enumerate(read_samples(dataset)):
        name = sample[SAMPLE_ID]
        Path(images, name).write_bytes(sample[IMAGE])
        captions = [text for key, text in sample.items() if key.startswith(CAPTION) and text]
        rows['half' if i % 2 else 'other_half'] += [(name, text) for text in captions]
        pairs = islice(zip(captions[::2], captions[1::2]), 2)
        rows['joined'] += [(name, text) for text in (*captions, *map(' '.join, pairs))]
    for name, lines in rows.items():
        with Path(folder, f'{name}.csv').open('w', newline='') as file:
            csv.writer(file).writerows([('image', 'caption'), *lines])
    Path(folder, 'done').touch()


if __name__ == '__main__':
    main(*sys.argv[1:])
