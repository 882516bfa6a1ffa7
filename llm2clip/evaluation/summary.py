# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The numbers of a pipeline in one `results.json`, which stands beside its report.

::

    {
      "stage1":  {"cra_causal": 51.9, "cra_untrained": 24.8, "cra": 95.1},
      "stage2":  {"unseen_style": {"n_images": 1668, "image_retrieval_recall@10": 42.9, "chance@10": 0.6, …}, …},
      "seconds": {"prepare_emoji": 26.4, "stage1": 506.1, …}
    }

- ``stage1``: text encoder -> caption retrieval accuracy, in percent; the encoders have the names that the evaluation's
  configuration gives them.
- ``stage2``: evaluation set for retrieval -> its metrics, by the first model of the evaluation: ``n_images`` and
  ``n_texts``; ``image_retrieval_recall@k`` (text -> image) and ``text_retrieval_recall@k`` (image -> text) for k = 1, 5
  and 10, and ``chance@10`` (text -> image), in percent; ``image_retrieval_mean_rank`` and ``text_retrieval_mean_rank``,
  where 1 is the best; ``n_truncated`` texts that lost their end and ``n_without_caption`` images that were left out;
  ``intervals``: metric -> both ends of its 95 % bootstrap interval.
- ``seconds``: step of the pipeline -> how long it took, over all its starts.
- ``zeroshot`` and ``linear_probe``: as ``stage2``, of the sets for classification, if the evaluation has any.
- ``missing``: what has no numbers yet, if the evaluation did not come to its end.

Other models of the evaluation are in the `results.json` that `evaluate` wrote.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm2clip.command import SECONDS_FILE

__all__ = ['collect_seconds', 'summarize']


def summarize(results: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The contents of the file.

    Args:
        results: `results.json` of the evaluation.
        seconds: Step -> seconds.
    """
    summary = {'stage1': results.get('cra', {}), 'stage2': _first_model(results.get('retrieval', {})),
               'seconds': dict(seconds)}
    others = {kind: _first_model(results[kind]) for kind in ('zeroshot', 'linear_probe') if results.get(kind)}
    return {**summary, **others, **({'missing': results['missing']} if 'missing' in results else {})}


def _first_model(sets: Mapping[str, Any]) -> dict[str, Any]:
    """Set -> metrics."""
    return {name: next(iter(entry['models'].values())) for name, entry in sets.items()}


def collect_seconds(steps: Mapping[str, str]) -> dict[str, float]:
    """Step -> seconds that its folder has recorded."""
    seconds = {}
    for step, folder in steps.items():
        path = Path(folder, SECONDS_FILE)
        if path.is_file():
            seconds[step] = json.loads(path.read_text())['seconds']
    return seconds
