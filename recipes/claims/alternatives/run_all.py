# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""LLM2CLIP beside what one would use in its place, on photographs: run_all.py [--out FOLDER] [--photographs FOLDER] …

Trains and embeds with open_clip and sentence-transformers what `make photographs` prepared, each in the same way as
LLM2CLIP does, all else equal, on the CPU; `beside_*.py` say what is equal and what is not.  `FOLDER/alternatives.md`
has the tables and `FOLDER/alternatives.json` the numbers.  What is done is not done again; a measurement that was
interrupted begins anew.
"""

import argparse
import importlib.util
import os
from pathlib import Path

import beside_encode
import beside_open_clip
import beside_sentence_transformers
from alternatives_table import to_markdown
from setting import CAPTIONS, Setting, machine

from llm2clip.files import write_json


def parse() -> Setting:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('runs/photographs/alternatives'))
    parser.add_argument('--photographs', type=Path, default=Path('runs/photographs'),
                        help='with data/, stage1/teacher/ and embeddings/')
    parser.add_argument('--passes', type=int, default=5, help=f'of stage 2, a multiple of {CAPTIONS}')
    parser.add_argument('--batch', type=int, default=128, help='photographs per step of stage 2')
    parser.add_argument('--steps', type=int, default=150, help='of stage 1')
    parser.add_argument('--pairs', type=int, default=32, help='of captions per step of stage 1')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    setting = Setting(**vars(parser.parse_args()))
    if setting.passes < CAPTIONS or setting.passes % CAPTIONS:
        parser.error(f'--passes: {setting.passes} is no multiple of {CAPTIONS}')
    if not (setting.photographs / 'embeddings/config.yaml').is_file():
        parser.error(f'--photographs: there is no {setting.photographs}/embeddings/config.yaml, which '
                     '`make photographs` writes')
    missing = [name for name in ('open_clip', 'sentence_transformers') if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f'{" and ".join(missing)} must be installed: uv sync --inexact --group alternatives')
    return setting


def main(setting: Setting) -> None:
    os.environ.update({'OMP_NUM_THREADS': str(setting.threads), 'HF_HUB_OFFLINE': '1'})
    found = {
        'machine': machine(setting.threads),
        'setting': {name: getattr(setting, name) for name in ('passes', 'batch', 'steps', 'pairs')},
        'stage2': beside_open_clip.compare(setting),
        'stage1': beside_sentence_transformers.compare(setting),
        'extraction': beside_encode.compare(setting),
    }
    write_json(setting.out / 'alternatives.json', found)
    (setting.out / 'alternatives.md').write_text(to_markdown(found))
    print(to_markdown(found))


if __name__ == '__main__':
    main(parse())
