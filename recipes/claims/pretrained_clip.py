# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A small CLIP with its own text tower, to be post-trained: pretrained_clip.py OUT A.yaml … -- EVALUATE.yaml …

It is trained as `clip_text_tower.py` does it, and published as one would find it: `OUT/tower` is its vision tower as
timm loads it, whose classifier is the projection, `OUT/text` its text tower as transformers loads it.
"""

import shutil
import sys
from pathlib import Path

from clip_text_tower import measure, train

from llm2clip.config import Stage2Config
from llm2clip.config.files import load_config
from llm2clip.export.vision import export_vision
from llm2clip.training.runs import CLIP_TEXT_FOLDER, load_stage2


def publish(run: str, out: Path) -> None:
    """Both towers of a run that has ended."""
    model, config, record = load_stage2(run)
    export_vision(model, config.model, record, out / 'tower')
    shutil.copytree(Path(run, CLIP_TEXT_FOLDER), out / 'text', dirs_exist_ok=True)


if __name__ == '__main__':
    split = sys.argv.index('--')
    training = load_config(Stage2Config, sys.argv[2:split])
    train(training)
    publish(training.save_folder, Path(sys.argv[1]))
    measure(training.save_folder, sys.argv[split + 1:])
