# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The README's adapter for CLIP_benchmark: the numbers are those of our own metric."""

import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import make_samples
from PIL import Image
from trained import trained

from llm2clip.export.check import pictures, training_pixels
from llm2clip.export.hf import export_folder
from llm2clip.metrics.retrieval import rank_both_ways

ROOT = Path(__file__).parents[2]


def noise_picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, 'PNG')
    return buffer.getvalue()


def test_the_readme_block_agrees_with_our_metric(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_run = trained('timm:test_vit', [teacher_folder])
    shutil.rmtree(tmp_path, ignore_errors=True)
    export_folder(*of_run, tmp_path / 'runs/quickstart/export/llm2clip')
    monkeypatch.chdir(tmp_path)

    # Pictures whose features are spread, so that some captions find theirs and some do not.
    kinds = [*pictures(64).values()]
    encoded = [kinds[i // 4] if i % 4 == 0 and i // 4 < len(kinds) else noise_picture(i) for i in range(24)]
    captions = [list(sample.captions.values()) for sample in make_samples(24, images=False)]
    images = [Image.open(io.BytesIO(data)) for data in encoded]
    batches = [(images[i:i + 8], captions[i:i + 8]) for i in range(0, 24, 8)]
    code = re.search(r'test_clip_benchmark.py runs this block -->\n```python\n(.*?)```',
                     (ROOT / 'recipes/README.md').read_text(), re.S)
    assert code is not None
    names: dict[str, Any] = {'batches': batches}
    exec(code[1], names)

    with torch.no_grad():
        text_features = of_run.model.get_text_features(of_run.vectors([text for own in captions for text in own]))
        preprocessing = of_run.model.vision_encoder.preprocessing
        pixels = torch.stack([training_pixels(data, preprocessing=preprocessing) for data in encoded])
        ours = rank_both_ways(of_run.model.get_image_features(pixels), text_features,
                              torch.arange(24).repeat_interleave(2)).recalls()
    theirs = names['metrics']
    assert len(theirs) == 6 and 0 < theirs['image_retrieval_recall@10'] < 1
    for name, value in theirs.items():
        assert 100 * value == pytest.approx(ours[name], abs=1e-4), name
