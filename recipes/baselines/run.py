# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Compare LLM2CLIP with open_clip and sentence-transformers on Flickr8k: python -m recipes.baselines.run

All of them train and embed the data of `make photographs` on the CPU.  `stage1.py`, `stage2.py` and `extraction.py`
describe the settings that they share.  The tables are written to `baselines.md` and the numbers to `baselines.json`.
Finished measurements are skipped; an interrupted one starts again.
"""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from llm2clip.files import write_json
from recipes.baselines import extraction, stage1, stage2
from recipes.baselines.setting import Setting, machine
from recipes.benchmarks.measuring import markdown_table


def to_markdown(found: Mapping[str, Any]) -> str:
    """Format the comparisons as three Markdown tables."""
    computer, setting, trained, embedded = (found[name] for name in ('machine', 'setting', 'stage2', 'extraction'))

    def recalls(row: Mapping[str, Any], way: str) -> str:
        return ' / '.join(f'{row["recalls"][f"{way}_retrieval_recall@{k}"]:.1f}' for k in (1, 5, 10))

    images, before = next(iter(trained['rows'].values()))['recalls'], trained['seconds_before']
    return '\n'.join([
        f'{computer["cpu"]}, {computer["threads"]} threads; '
        + ', '.join(f'{name} {version}' for name, version in computer['versions'].items())
        + '; seconds per epoch and per step are medians of short trainings that took turns', '',
        f'### Stage 2, {setting["epochs"]} epochs over the photographs, batch {setting["batch"]}', '',
        f'{images["n_images"]} other photographs with {images["n_texts"]} captions, recall in %. Once before it, '
        f'LLM2CLIP needs stage 1 ({before["stage1"]:.0f} s) and the vectors of the captions '
        f'({before["embeddings"]:.0f} s).', '',
        markdown_table(['', 'text → image, R@1 / 5 / 10', 'image → text', 'seconds per epoch', 'GiB'], [
            [name, recalls(row, 'image'), recalls(row, 'text'), f'{row["seconds_per_epoch"]:.1f}',
             f'{row["peak_gib"]:.2f}'] for name, row in trained['rows'].items()]),
        f'### Stage 1, {setting["steps"]} steps of {setting["pairs"]} pairs', '',
        markdown_table(['', 'caption retrieval accuracy, %', 'seconds per step', 'GiB'], [
            [name, f'{row["cra"]:.1f}', f'{row["seconds_per_step"]:.1f}', f'{row["peak_gib"]:.2f}']
            for name, row in found['stage1'].items()]),
        '### Extraction', '',
        f'Largest difference of two vectors of a caption, relative to their length: '
        f'{embedded["largest_difference"]:.1g}; LLM2CLIP stores them in float16.', '',
        markdown_table(['', 'captions', 'captions per second', 'GiB'], [
            [name, str(row['captions']), f'{row["captions_per_second"]:.1f}', f'{row["peak_gib"]:.2f}']
            for name, row in embedded['rows'].items()])])


def main(setting: Setting) -> None:
    if missing := [name for name in ('open_clip', 'sentence_transformers') if importlib.util.find_spec(name) is None]:
        raise SystemExit(f'{" and ".join(missing)} must be installed: uv sync --inexact --group baselines')
    os.environ.update({'OMP_NUM_THREADS': str(setting.threads), 'HF_HUB_OFFLINE': '1'})
    found = {
        'machine': machine(setting.threads),
        'setting': {name: getattr(setting, name) for name in ('epochs', 'batch', 'steps', 'pairs')},
        'stage2': stage2.compare(setting), 'stage1': stage1.compare(setting),
        'extraction': extraction.compare(setting)}
    write_json(setting.out / 'baselines.json', found)
    (setting.out / 'baselines.md').write_text(to_markdown(found))
    print(to_markdown(found))


if __name__ == '__main__':
    main(Setting())
