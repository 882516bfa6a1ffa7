# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The field's terms are used, and no words of our own for the same things."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What is said instead: text embeddings, exclude_ids, logit_scale, learn_logit_scale, freeze_blocks, caption_weights,
# trainable_text, holdout or val, upcast, fake, dry run, GradCache, llama3.1_8b.
FORMER = re.compile(
    r'sidecar|leave_out|loss_scale|learn_scale|lock_blocks|caption_mix|trained_text|heldout|\bwiden|pretended|rehears|'
    r'gradient cache|complete_f(ile|older)|llama31|llama32|qwen25|laptop\.yaml', re.IGNORECASE)
FOLDERS = ('llm2clip', 'recipes', 'yamls', 'tests', 'docs', '.github')


def test_no_former_word_comes_back() -> None:
    files = [ROOT / name for name in ('README.md', 'Makefile', 'pyproject.toml', 'Dockerfile')]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob('*')
              if path.suffix in ('.py', '.yaml', '.md', '.j2', '.sbatch', '.txt') and path != Path(__file__)]
    found = [f'{path.relative_to(ROOT)}:{i}: {word.group()}' for path in files
             for i, line in enumerate(path.read_text().splitlines(), 1) for word in FORMER.finditer(line)]
    assert not found, '\n'.join(found)
