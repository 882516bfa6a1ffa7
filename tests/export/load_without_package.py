# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Run by test_without_package: load the exports in a folder where llm2clip cannot be imported, and write features."""

import json
import sys
from pathlib import Path
from typing import Optional

# timm would spend seconds on importing the last one.
ABSENT = ['llm2clip', 'composer', 'streaming', 'omegaconf', 'peft', 'wandb']
sys.modules.update(dict.fromkeys([*ABSENT, 'timm']))  # type: ignore[arg-type]  # importing one of them fails

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, pipeline  # noqa: E402

folder = Path(sys.argv[1])
texts, given = json.loads((folder / 'texts.json').read_text()), load_file(folder / 'given.safetensors')
found: dict[str, torch.Tensor] = {}


def whole(name: str, of: Optional[str] = None) -> None:
    pixels, vectors = given[f'{of or name}.pixels'], given[f'{of or name}.vectors']
    model = AutoModel.from_pretrained(folder / name, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(folder / name, trust_remote_code=True)
    assert not model.training and type(processor).__module__.endswith('image_processing_llm2clip')
    pictures = [Image.open(path) for path in sorted((folder / 'pictures').iterdir())]
    found[f'{name}.pictures'] = model.get_image_features(**processor(pictures, return_tensors='pt'))
    found[f'{name}.images'] = model.get_image_features(pixels)
    found[f'{name}.texts'] = model.get_text_features(texts)
    found[f'{name}.vectors'] = model.get_text_features(text_embedding=vectors)
    found[f'{name}.logits'] = model(pixels, vectors)['logits_per_image']
    for source in (name, f'{name}_again'):
        sentences = SentenceTransformer(str(folder / source), device='cpu', trust_remote_code=True)
        sentences.save(str(folder / f'{name}_again'))
    found[f'{name}.sentences'] = sentences.encode(texts, convert_to_tensor=True)
    found[f'{name}.sentence_images'] = sentences.encode([{'image': picture.filename} for picture in pictures],
                                                        convert_to_tensor=True)


with torch.no_grad():
    whole('clip')
    whole('siglip')
    siglip = pipeline('zero-shot-image-classification', str(folder / 'siglip'), trust_remote_code=True)
    picture = Image.open(folder / 'pictures/4').convert('RGB')
    inputs = AutoProcessor.from_pretrained(folder / 'siglip', trust_remote_code=True)(
        text=texts, images=picture, padding=True, return_tensors='pt')
    found['processor.logits'] = siglip.model(**inputs).logits_per_image
    scores = {one['label']: one['score'] for one in siglip(picture, texts, hypothesis_template='{}')}
    found['pipeline.scores'] = torch.tensor([[scores[text] for text in texts]])
    found['given.logits'] = siglip.model(inputs.pixel_values, siglip.model.embed_texts(texts)).logits_per_image
    sentences = SentenceTransformer(str(folder / 'sentences'), device='cpu', trust_remote_code=True)
    sentences.save(str(folder / 'sentences_again'))
    again = SentenceTransformer(str(folder / 'sentences_again'), device='cpu', trust_remote_code=True)
    assert sentences.encode(texts[0]).shape == (32,)
    found['sentences'] = sentences.encode(texts, convert_to_tensor=True)
    found['sentences_again'] = again.encode(texts, convert_to_tensor=True)
    try:
        whole('timm')
    except ImportError as error:
        assert error.name == 'timm'
    else:
        raise AssertionError('a timm tower without timm')

    del sys.modules['timm']
    whole('with_timm', of='timm')

assert not any(sys.modules[name] for name in ABSENT)
save_file({name: value.contiguous() for name, value in found.items()}, folder / 'found.safetensors')
