# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Exports in an environment of their own, with today's transformers and sentence-transformers but not this package."""

import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from llms import CONFIGS, save_llm
from parts import text_encoder_from_config
from safetensors.torch import load_file
from trained import trained

from llm2clip.config import LoraConfig, TextEncoderConfig
from llm2clip.export.hf import export_folder
from llm2clip.export.sentence_model import export_sentence_transformers
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.teacher.llm import save_teacher

UV = Path(__file__).parents[2] / '.uv/bin/uv'
TEXTS = ['a red square', 'a', 'a purple stripe ' * 9]
PACKAGES = ['torch', 'transformers', 'sentence-transformers', 'timm', 'pillow']
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


@pytest.mark.slow
@torch.no_grad()
def test_exports_work_without_this_package(llm_folder: Path, teacher_folder: Path, tmp_path: Path) -> None:
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

    python = tmp_path / 'bare/bin/python'
    packages = [f'{package}=={version(package)}' for package in PACKAGES]
    subprocess.run([UV, 'venv', '--quiet', '--python', '3.11', tmp_path / 'bare'], check=True)
    subprocess.run([UV, 'pip', 'install', '--quiet', '--python', python, *packages], check=True)
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    environment |= {'HF_HOME': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '1'}
    subprocess.run([python, '-c', SCRIPT, *CONFIGS], check=True, cwd=tmp_path, env=environment)
    vectors = load_file(tmp_path / 'vectors.safetensors')
    assert vectors.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(vectors[name], value, rtol=1e-5, atol=1e-5, msg=lambda text: f'{name}: {text}')
