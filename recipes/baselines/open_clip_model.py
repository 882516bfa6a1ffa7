# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Make and evaluate the open_clip model of the comparison, as two commands of this module.

    make FOLDER
    recall FOLDER CHECKPOINT DATA OUT

`make` writes a folder for ``--model local-dir:FOLDER``.  The image tower is that of
`yamls/flickr8k/stage2.yaml`, with the same ImageNet weights.  The text tower is CLIP's, with 6 layers of
width 256 and random weights.  `recall` measures a checkpoint of `open_clip_train` on a dataset of photographs
and writes recalls in % to the JSON file OUT.
"""

import io
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip  # pyright: ignore[reportMissingImports]
import torch
from PIL import Image
from safetensors.torch import save_file

from llm2clip.config import Stage2Config
from llm2clip.config.loading import load_config
from llm2clip.data.schema import IMAGE, read_samples
from llm2clip.io.files import write_json
from llm2clip.models.towers import load_tower, tower_preprocessing
from recipes.baselines.run import SEED, SIZE, captions_of, recalls_of

BATCH = 128
TEXT = {'context_length': 64, 'width': 256, 'heads': 4, 'layers': 6}


def make(folder: str) -> None:
    config = load_config(Stage2Config,
                         ['yamls/flickr8k/stage2.yaml', f'model.vision.image_size={SIZE}']).model
    preprocessing = tower_preprocessing(config.vision)
    model_config = {'embed_dim': config.embed_dim, 'text_cfg': TEXT, 'vision_cfg': {
        'timm_model_name': config.vision.name, 'timm_pool': 'avg', 'timm_proj': 'linear',
        'image_size': preprocessing.image_size}}
    torch.manual_seed(SEED)
    model: Any = open_clip.CLIP(**model_config)
    model.visual.trunk.load_state_dict(load_tower(config.vision).trunk.state_dict())
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), Path(folder, 'open_clip_model.safetensors'))
    described = asdict(preprocessing)
    write_json(Path(folder, 'open_clip_config.json'), {'model_cfg': model_config, 'preprocess_cfg': {
        'mean': described['mean'], 'std': described['std'], 'interpolation': 'bicubic',
        'resize_mode': 'shortest'}})


@torch.no_grad()
def recall(folder: str, checkpoint: str, dataset: str, out: str) -> None:
    name = f'local-dir:{folder}'
    loaded: Any = open_clip.create_model_and_transforms(name)
    model, _, preprocess = loaded
    open_clip.load_checkpoint(model, checkpoint)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    samples = read_samples(dataset)
    captions = [captions_of(sample) for sample in samples]
    texts = list(itertools.chain.from_iterable(captions))
    images = [preprocess(Image.open(io.BytesIO(sample[IMAGE]))) for sample in samples]
    image_features = torch.cat([model.encode_image(torch.stack(images[i:i + BATCH]), normalize=True)
                                for i in range(0, len(images), BATCH)])
    text_features = torch.cat([model.encode_text(tokenizer(texts[i:i + BATCH]), normalize=True)
                               for i in range(0, len(texts), BATCH)])
    Path(out).write_text(json.dumps(recalls_of(image_features, text_features, captions)))


if __name__ == '__main__':
    {'make': make, 'recall': recall}[sys.argv[1]](*sys.argv[2:])
