# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Draw docs/figures/retrieval.png from the quickstart's model: python docs/retrieval.py [runs/quickstart]

Ten queries are drawn at random from the captions of the emoji style that was not trained on; a frame marks
the right image among the first six.  The PNG's description names commit, queries and ranks.
"""

import io
import random
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from transformers import AutoImageProcessor, AutoModel

import llm2clip.export.hf  # noqa: F401  registers the model
from llm2clip.data.schema import read_samples

OUT = Path(__file__).parent / 'figures/retrieval.png'
QUERIES, TOP, COLUMNS, SEED = 10, 6, 2, 0
SIDE, GAP, TEXT = 84, 8, 230


@torch.no_grad()
def main(run: Path) -> None:
    samples = read_samples(run / 'data/emoji/unseen_style')
    captions = [sample['caption.short'] for sample in samples]
    images = [Image.open(io.BytesIO(sample['image'])).convert('RGB') for sample in samples]
    model = AutoModel.from_pretrained(run / 'export/llm2clip').eval()
    processor = AutoImageProcessor.from_pretrained(run / 'export/llm2clip')
    features = []
    for start in range(0, len(images), 64):
        features.append(model.get_image_features(**processor(images[start:start + 64], return_tensors='pt')))
    queries = random.Random(SEED).sample(range(len(samples)), QUERIES)
    similarities = model.get_text_features([captions[i] for i in queries]) @ torch.cat(features).T
    order = similarities.argsort(dim=1, descending=True)
    ranks = [1 + order[row].tolist().index(i) for row, i in enumerate(queries)]

    rows = QUERIES // COLUMNS
    width = TEXT + TOP * (SIDE + GAP)
    canvas = Image.new('RGB', (COLUMNS * width, rows * (SIDE + GAP) + GAP), 'white')
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(17)
    for number, query in enumerate(queries):
        column, row = divmod(number, rows)
        left, top = column * width, GAP + row * (SIDE + GAP)
        draw.text((left + TEXT - 14, top + SIDE / 2), captions[query], 'black', font, anchor='rm')
        for place, i in enumerate(order[number, :TOP].tolist()):
            x = left + TEXT + place * (SIDE + GAP)
            canvas.paste(images[i].resize((SIDE, SIDE)), (x, top))
            if i == query:
                frame = (x - 4, top - 4, x + SIDE + 3, top + SIDE + 3)
                draw.rounded_rectangle(frame, 8, outline='#1a7f37', width=3)

    card = Image.new('L', canvas.size)  # rounded corners look right on a dark page too
    ImageDraw.Draw(card).rounded_rectangle((0, 0, canvas.width - 1, canvas.height - 1), 16, fill=255)
    canvas.putalpha(card)

    commit = subprocess.check_output(['git', 'rev-parse', '--short', 'HEAD'], text=True).strip()
    query_ranks = ', '.join(f'{captions[i]} {rank}' for i, rank in zip(queries, ranks))
    record = f'commit {commit}, seed {SEED}, {len(samples)} images; ranks of the right image: {query_ranks}'
    description = PngInfo()
    description.add_text('Description', record)
    canvas.save(OUT, pnginfo=description, optimize=True)
    print(f'{OUT}: {record}')


if __name__ == '__main__':
    main(Path(*sys.argv[1:] or ['runs/quickstart']))
