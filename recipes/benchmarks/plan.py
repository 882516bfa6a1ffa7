# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The peak memory that `plan=true` foretells against that of the training itself, on the CPU, for two towers."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_result import write_result
from loaders import write_data

RECIPE = str(Path(__file__).parents[1] / 'train_stage2.py')
YAML = str(Path(__file__).parents[2] / 'yamls/stage2/paper.yaml')
TOWERS = {'vit_base_patch16_224': 24, 'convnext_tiny': 32}
# The recipe, and then the most memory that its process had, less what it had when all was imported.
MEASURED = """
import resource, runpy, sys
import composer, timm, transformers, wandb
from llm2clip.training import trainer
from llm2clip.models import llm2clip
build = llm2clip.LLM2CLIP.__init__
def first(*args, **kwargs):
    print('before:', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
    build(*args, **kwargs)
llm2clip.LLM2CLIP.__init__ = first
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
print('after:', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""


def main() -> None:
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        stream = f'{{local: {folder}/images/train, embeddings: {{bench: {{local: {folder}/sidecar}}}}}}'
        for tower, batch in TOWERS.items():
            args = [RECIPE, YAML, f'model.vision.name={tower}', 'model.vision.gradient_checkpointing=false',
                    'device=cpu', 'precision=fp32', f'global_train_batch_size={batch}', 'max_duration=4ba',
                    f'save_folder={folder}/{tower}', 'run_name=bench', f'train_data.streams.bench={stream}',
                    'train_data.caption_mix={short: 0.5, long: 0.5}', 'train_data.num_workers=1', 'progress_bar=false']
            plan = _run([*args, 'plan=true'])
            match = re.search(r'peak.* ([\d.]+)\n', plan)
            assert match, plan
            run = dict(re.findall(r'(before|after): (\d+)', _run(['-c', MEASURED, *args])))
            found[tower] = {'planned_gib': float(match[1]),
                            'measured_gib': (int(run['after']) - int(run['before'])) / 2**20}
    ratios = [values['planned_gib'] / values['measured_gib'] for values in found.values()]
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    write_result('plan', 'peak memory as planned', 'as measured in a training on the CPU', worst, 0.8,
                 0.8 <= worst <= 1.2, found)


def _run(args: list[str]) -> str:
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


if __name__ == '__main__':
    main()
