# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Exports in an environment of their own, with today's transformers and sentence-transformers but not this package."""

import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from composer.devices import DeviceCPU
from llms import CONFIGS, save_llm
from parts import picture, text_encoder_from_config
from PIL import Image
from safetensors.torch import load_file
from trained import trained

from llm2clip.config import LoraConfig, SearchConfig, TextEncoderConfig
from llm2clip.export.hf import export_folder
from llm2clip.export.sentence_model import export_sentence_transformers
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.search import embed_images, embed_query, load_model, nearest
from llm2clip.teacher.llm import save_teacher

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
UV = ROOT / '.uv/bin/uv'
TEXTS = ['a red square', 'a', 'a purple stripe ' * 9]
PACKAGES = ['torch', 'transformers', 'sentence-transformers', 'timm', 'pillow']
GUIDE = (ROOT / 'docs/guides/search.md').read_text()
SCRIPT = f'''
import sys
from importlib.util import find_spec
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

assert find_spec('llm2clip') is None
texts, vectors = {TEXTS}, {{}}
for name in sys.argv[1:]:
    exec(open(f'{{name}}/readme.py').read())
    vectors[f'{{name}} by transformers'] = globals()['vectors_']
    model = SentenceTransformer(f'{{name}}/sentence_transformers', device='cpu')
    vectors[f'{{name}} by sentence-transformers'] = model.encode(texts, convert_to_tensor=True)
whole = AutoModel.from_pretrained('export', trust_remote_code=True)
vectors['texts'] = whole.encode_text(texts).detach()
vectors['images'] = whole.encode_image(torch.ones(1, 3, 64, 64)).detach()
save_file(vectors, 'vectors.safetensors')
'''


@pytest.fixture(scope='module')
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """(script, folder, arguments) -> None, in an environment without this package."""
    environment = tmp_path_factory.mktemp('bare')
    python = environment / 'bin/python'
    packages = [f'{package}=={version(package)}' for package in PACKAGES]
    subprocess.run([UV, 'venv', '--quiet', '--clear', '--python', '3.11', environment], check=True)
    subprocess.run([UV, 'pip', 'install', '--quiet', '--python', python, *packages, 'faiss-cpu', 'lancedb'], check=True)
    variables = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    variables |= {'HF_HOME': str(environment / 'cache'), 'HF_HUB_OFFLINE': '1'}

    def run(script: str, folder: Path, *arguments: str) -> None:
        subprocess.run([python, '-c', script, *arguments], check=True, cwd=folder, env=variables)

    return run


@torch.no_grad()
def test_exports_work_without_this_package(
    run_script: Callable[..., None], llm_folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    expected = {}
    for name in CONFIGS:
        save_llm(name, 4, llm_folder, tmp_path / 'llm')
        shutil.copy(llm_folder / 'chat_template.jinja', tmp_path / 'llm')
        config = TextEncoderConfig(str(tmp_path / 'llm'), chat_template=name in ('llama', 'qwen3'))
        config_file = tmp_path / 'llm/config.json'
        config_file.write_text(config_file.read_text().replace('"sliding_window": 4', '"sliding_window": 512'))
        encoder, tokenizer = text_encoder_from_config(config, LoraConfig(r=4), 0.1)
        save_teacher(encoder.eval(), tokenizer, LoraConfig(r=4), tmp_path / name)
        export_sentence_transformers(tmp_path / name, tmp_path / name / 'sentence_transformers')
        block, = re.findall(r'```python\n(.*?)```', (tmp_path / name / 'README.md').read_text(), re.S)
        block = block.replace("'.'", repr(name)).replace("['a photo of a dog', 'a cat']", 'texts')
        (tmp_path / name / 'readme.py').write_text(block.replace('vectors =', 'vectors_ ='))
        for library in ('transformers', 'sentence-transformers'):
            expected[f'{name} by {library}'] = encode_texts(encoder, tokenizer, TEXTS)
    run = trained('timm:test_vit', [teacher_folder])
    export_folder(*run, tmp_path / 'export')
    expected['texts'] = run.model.get_text_features(run.vectors(TEXTS))
    expected['images'] = run.model.get_image_features(torch.ones(1, 3, 64, 64))

    run_script(SCRIPT, tmp_path, *CONFIGS)
    vectors = load_file(tmp_path / 'vectors.safetensors')
    assert vectors.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(vectors[name], value, rtol=1e-5, atol=1e-5)


def test_the_guide_finds_what_search_finds(
    run_script: Callable[..., None], exported: tuple[LLM2CLIP, Path], tmp_path: Path
) -> None:
    shutil.copytree(exported[1], tmp_path / 'runs/custom/export/llm2clip')
    for i in range(30):
        path = tmp_path / f'photos/{i % 3}/{i}.jpg' if i else tmp_path / 'photos/dog.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(picture(i))).convert('RGB').save(path)
    blocks = re.findall(r'runs this block -->\n```python\n(.*?)```', GUIDE, re.S)
    assert len(blocks) == 3
    blocks.append('import json\njson.dump([faiss_results, lancedb_results], open("results.json", "w"))')
    run_script('\n'.join(blocks), tmp_path)
    config = SearchConfig(
        str(exported[1]), images=str(tmp_path / 'photos'), index=str(tmp_path / 'index'), num_workers=0)
    model, digest = load_model(config, DeviceCPU())
    paths, features = embed_images(config, model, digest)
    results = json.loads((tmp_path / 'results.json').read_text())
    for query, found_paths in zip(('a dog on the beach', tmp_path / 'photos/dog.jpg'), results, strict=True):
        expected = [paths[i] for i, _ in nearest(features, embed_query(model, query), 10)]
        assert [str(tmp_path / path) for path in found_paths] == expected
