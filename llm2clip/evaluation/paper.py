# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What papers report, in percent, to stand beside our own numbers.

Of LLM2CLIP (arXiv 2411.04997 v6): table 1's 18 rows of CLIP, EVA02 and SigLIP2 before and after, tables 2, 3 and A1,
and the ablations of tables A3 to A8, of which tables 6 to 9 have the means.  Not here: table 1's other models, table 4
(segmentation and detection) and table 5 (LLaVA).  Of ProCLIP (arXiv 2510.18795): the means of table 2.

Means over the five sets are computed from the numbers of the sets.  They are the paper's own but for rounding, except
for three rows of table 1 at 336 pixels: CLIP 60M, where the paper has 91.1/84.5, EVA02 15M (88.0/84.8) and EVA02 60M
(91.0/86.8).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

__all__ = [
    'RECALLS', 'Reported', 'reported_accuracy', 'reported_average', 'reported_cra', 'reported_recalls',
]

_LLM2CLIP, _PROCLIP = 'arXiv 2411.04997 v6', 'arXiv 2510.18795'

# Metric -> percent.
Numbers = dict[str, float]
# Benchmark -> model -> metric -> percent.
Rows = dict[str, dict[str, Numbers]]

_FIVE = ('flickr30k', 'coco', 'sharegpt4v', 'urban1k', 'docci')


def _recalls(cell: str) -> Numbers:
    """Of `image→text/text→image`."""
    return dict(zip(('text_retrieval_recall@1', 'image_retrieval_recall@1'), map(float, cell.split('/'))))


def _retrieval(rows: Mapping[str, str], sets: Sequence[str] = _FIVE) -> Rows:
    """Of lines with a cell for each set."""
    return {name: {model: _recalls(cells.split()[i]) for model, cells in rows.items()} for i, name in enumerate(sets)}


_TABLE_1 = _retrieval({
    'CLIP B/16': '82.3/62.2 52.4/33.1 84.5/79.8 67.5/53.1 60.7/57.1',
    'CLIP B/16 + LLM2CLIP 15M': '91.8/80.7 64.8/52.4 97.8/97.6 90.1/92.1 86.1/86.9',
    'EVA02 B/16': '86.2/71.5 58.7/42.1 90.5/85.5 67.0/60.8 67.7/68.0',
    'EVA02 B/16 + LLM2CLIP 15M': '91.2/81.4 66.0/53.9 98.5/98.5 88.2/91.3 86.8/88.5',
    'CLIP L/14-224': '85.2/65.0 56.3/36.5 84.2/83.6 68.3/55.6 63.1/65.8',
    'CLIP L/14-224 + LLM2CLIP 15M': '93.0/83.5 67.4/56.4 98.7/98.6 91.5/94.1 88.3/90.4',
    'EVA02 L/14-224': '89.7/77.3 63.7/47.5 91.9/89.3 73.3/68.5 73.5/75.0',
    'EVA02 L/14-224 + LLM2CLIP 3M': '94.3/84.3 65.2/56.0 98.0/98.0 91.0/94.7 87.8/90.7',
    'EVA02 L/14-224 + LLM2CLIP 15M': '94.6/85.0 69.5/58.3 98.9/99.1 93.6/95.7 89.8/91.2',
    'EVA02 L/14-224 + LLM2CLIP 60M': '95.9/85.1 71.7/58.5 99.2/99.2 95.2/97.0 90.1/92.0',
    'CLIP L/14-336': '87.7/67.0 58.0/37.1 86.2/84.0 72.8/57.0 67.4/65.7',
    'CLIP L/14-336 + LLM2CLIP 15M': '91.2/82.1 65.5/53.6 98.1/98.4 90.3/93.2 87.7/89.0',
    'CLIP L/14-336 + LLM2CLIP 60M': '93.9/84.3 68.5/54.8 98.9/99.1 96.6/97.9 89.6/91.6',
    'EVA02 L/14-336': '89.6/78.0 64.2/47.9 91.5/89.4 76.6/70.0 74.7/76.4',
    'EVA02 L/14-336 + LLM2CLIP 15M': '94.7/85.1 69.7/58.5 98.8/99.2 93.5/96.2 89.2/91.3',
    'EVA02 L/14-336 + LLM2CLIP 60M': '95.9/85.4 72.4/58.8 98.8/99.2 95.5/97.3 90.7/92.6',
    'SigLIP2 SO/14-224': '93.9/82.9 72.0/55.5 90.2/87.2 75.7/74.5 77.0/78.9',
    'SigLIP2 SO/14-224 + LLM2CLIP 60M': '95.2/84.6 73.7/57.6 99.4/99.4 96.2/97.3 91.5/92.9',
})

_TABLE_2 = _retrieval({
    'CN-CLIP': '80.2/68.0 63.4/64.0',
    'EVA02 L/14-224': '4.4/0.9 2.6/1.0',
    'EVA02 L/14-224 + LLM2CLIP': '90.6/75.6 72.0/70.1',
    'SigLIP2': '79.2/56.9 55.3/51.7',
    'SigLIP2 + LLM2CLIP': '90.0/76.1 70.8/70.2',
}, ('flickr_cn', 'coco_cn'))

# Of table 2, too: the mean of Crossmodal-3600's 36 languages.
_LANGUAGES = 36
_XM3600 = {
    'EVA02 L/14-224': _recalls('14.0/8.0'), 'EVA02 L/14-224 + LLM2CLIP': _recalls('68.3/56.0'),
    'SigLIP2': _recalls('59.7/48.2'), 'SigLIP2 + LLM2CLIP': _recalls('69.1/56.3'),
}

# Table 3, top-1 accuracy, by the names that `yamls/eval/sets/` gives the benchmarks.
_ACCURACY = {
    'zeroshot.imagenet_one_prompt': {'CLIP L/14-336': 74.9, 'CLIP L/14-336 + LLM2CLIP': 74.6, 'CLIP L/14-224': 73.7,
                                     'CLIP L/14-224 + LLM2CLIP': 73.2},
    'zeroshot.imagenet_80_prompts': {'CLIP L/14-336': 76.6, 'CLIP L/14-336 + LLM2CLIP': 75.8, 'CLIP L/14-224': 75.5,
                                     'CLIP L/14-224 + LLM2CLIP': 74.3},
    'linear_probe.imagenet': {'CLIP L/14-336': 84.8, 'CLIP L/14-336 + LLM2CLIP': 85.2, 'CLIP L/14-224': 83.9,
                              'CLIP L/14-224 + LLM2CLIP': 84.4},
}

# Table A1, of COCO's 5,000.
_CRA = {'CLIP L/14': 25.2, 'EVA02 L/14': 27.1, 'Llama 3 8B': 5.2, 'Llama 3.2 1B': 5.6, 'Llama 3 8B after stage 1': 29.5,
        'Llama 3.2 1B after stage 1': 29.4}

# The paper has two rows of this name and these losses, and does not say what differs.
_DIRECTLY = {
    'CLIP fine-tuned directly': '89.6/77.8 59.4/48.6 88.1/87.7 68.0/74.8 67.0/71.3',
    'CLIP fine-tuned directly, second row': '89.3/77.8 59.3/48.5 88.3/88.2 68.5/76.0 67.2/71.2',
}

_ABLATIONS = {
    'A3': {
        **_DIRECTLY,
        '100 % dense captions': '89.2/77.2 55.6/47.6 97.6/98.0 88.5/92.5 82.6/86.9',
        '75 % dense captions': '92.0/81.3 61.5/52.0 97.7/97.8 85.1/92.2 84.0/87.7',
        '50 % dense captions': '91.9/81.7 62.0/52.7 97.2/97.6 84.6/91.3 83.7/87.3',
        '25 % dense captions': '91.1/81.8 61.8/53.0 97.3/97.2 83.4/90.6 83.9/86.9',
        '0 % dense captions': '91.1/81.5 60.9/53.0 96.0/94.4 72.0/85.6 82.6/85.6',
    },
    'A4': {
        'LLM without stage 1, LoRA, batch 768': '90.0/80.9 60.9/50.6 97.5/96.9 88.9/90.8 82.0/84.3',
        'LLM without stage 1, precomputed, batch 16384': '85.2/74.6 52.3/40.8 87.7/89.6 57.5/59.2 49.9/48.3',
        'LoRA, batch 704': '90.5/81.8 61.5/52.4 98.1/98.2 91.0/92.8 85.7/87.4',
        'frozen, batch 4096': '91.9/81.7 62.0/52.7 97.2/97.6 84.6/91.3 83.7/87.3',
        'precomputed, batch 16384': '93.2/82.2 64.2/54.0 98.2/98.3 87.8/93.1 86.2/88.8',
    },
    'A5': {
        'LoRA, mean, bidirectional, supervised': '88.9/78.8 59.8/49.1 96.3/95.6 80.1/85.1 77.0/80.8',
        'unsupervised': '77.2/66.0 48.8/38.2 80.2/86.2 47.7/53.5 41.9/44.7',
        'MNTP alone': '82.0/71.7 51.2/43.1 92.0/91.9 67.0/70.3 58.4/58.2',
        'MNTP and supervised': '88.2/78.3 59.6/48.9 95.5/95.1 79.7/86.1 75.3/77.7',
        'causal': '89.4/78.7 59.9/49.0 95.4/95.7 79.9/84.9 75.3/79.1',
        'end token': '89.6/78.6 59.4/48.5 95.3/95.4 79.8/83.8 76.0/80.0',
        'frozen LLM, linear adapter': '85.5/75.5 54.1/45.3 92.0/93.5 72.3/75.5 66.4/66.9',
    },
    'A6': {
        **_DIRECTLY,
        'bge-en-icl': '89.1/78.5 58.8/49.7 95.0/95.7 77.9/87.7 73.5/79.4',
        'LLM2Vec Llama 3 8B': '91.1/81.4 61.5/51.9 94.5/96.4 82.1/88.6 77.7/82.6',
        'NV-Embed-v2': '90.4/80.0 60.5/51.6 94.5/95.7 83.3/90.0 78.3/82.1',
        'bge-m3': '80.7/70.3 51.4/42.0 84.5/86.5 56.8/63.4 51.7/55.9',
        'jina-v3': '84.4/73.7 56.3/45.6 90.0/90.9 70.8/74.1 66.7/70.6',
        'e5': '86.4/75.3 56.4/46.2 88.4/88.5 71.1/77.3 67.5/71.2',
        'VLM2Vec alone': '91.6/79.8 61.3/51.5 93.9/91.0 90.9/92.0 80.5/86.0',
        'VLM2Vec': '90.2/79.3 60.0/50.1 89.8/91.4 76.9/85.8 74.1/78.7',
        'Qwen2.5 0.5B after stage 1': '86.2/74.9 56.0/45.1 92.6/93.2 73.7/79.0 69.5/73.0',
        'Llama 3.2 1B after stage 1': '88.9/78.8 59.8/49.1 96.3/95.6 80.1/85.1 77.0/80.8',
        'Llama 3 8B after stage 1': '90.4/80.7 62.7/51.9 96.5/96.2 84.2/89.5 83.3/86.4',
        'DeepSeek R1 Distill Llama 8B after stage 1': '91.7/80.9 62.2/51.9 96.7/96.3 84.3/88.3 82.5/85.2',
        'Llama 3.1 8B after stage 1': '92.2/81.5 63.5/52.3 97.1/96.2 86.5/89.3 84.7/85.9',
        'Llama 3.1 8B without stage 1': '85.2/74.6 52.3/40.8 87.7/89.6 57.5/59.2 49.9/48.3',
    },
    'A7': {
        'no adapter': '89.2/77.7 59.0/47.3 94.3/94.3 75.0/80.5 74.0/77.5',
        'linear × 1 in stage 2': '88.5/77.5 59.8/48.4 95.1/94.5 77.2/84.4 75.3/78.7',
        'linear × 2 in stage 2': '89.6/78.1 59.6/48.5 95.5/94.7 79.7/84.0 76.1/79.0',
        'linear × 4 in stage 2': '88.9/78.8 59.8/49.1 96.3/95.6 80.1/85.1 77.0/80.8',
        'linear × 4 in both': '89.9/78.8 59.7/48.9 95.1/95.6 79.9/84.9 78.0/80.4',
        'transformer × 1 in stage 2': '88.6/78.7 59.9/48.6 95.8/95.1 79.5/84.5 77.0/79.8',
        'transformer × 1 in both': '89.8/78.6 58.1/49.0 96.1/95.4 81.9/85.6 76.5/78.1',
    },
    'A8': {
        **_DIRECTLY,
        'a, by the LLM': '91.9/81.7 62.0/52.7 97.2/97.6 84.6/91.3 83.7/87.3',
        "b, by CLIP's text tower": '89.6/77.8 59.4/48.6 88.1/87.7 68.0/74.8 67.0/71.3',
        'b, by the LLM': '90.1/81.3 61.3/52.4 97.1/97.4 85.6/91.1 83.8/86.9',
        "c, by CLIP's text tower": '89.0/77.9 58.5/47.7 89.1/88.8 67.0/75.5 66.3/70.7',
        'c, by the LLM': '90.8/80.5 61.5/51.8 97.1/97.7 85.9/90.3 83.4/86.7',
        "d, by CLIP's text tower": '89.6/77.9 59.1/48.1 89.4/87.5 69.1/72.5 67.0/70.6',
        'd, by the LLM': '90.7/81.4 61.3/52.3 97.5/97.9 85.5/92.5 83.9/87.5',
        'd, by both': '91.3/82.4 62.9/53.3 97.8/97.4 86.6/92.9 84.9/88.2',
    },
}

RECALLS = {'1': _TABLE_1, '2': _TABLE_2, **{
    table: _retrieval({f'{table}: {variant}': cells for variant, cells in rows.items()})
    for table, rows in _ABLATIONS.items()}}
"""Table of LLM2CLIP's paper -> recall@1: tables 1 and 2, and the ablations.

A3: share of dense captions; A4: what is trained of the LLM, with the largest batch that two nodes of 8 A100 40 GB hold;
A5: training of stage 1; A6: text encoders; A7: adapters; A8: losses beside CLIP's own text tower, and by which text
encoder the test embeds captions.  A5 and A7 are of Llama 3.2 1B, CLIP L/14-224 and CC3M."""

# Mean accuracy on the sets of `yamls/eval/sets/proclip11.yaml`; the table is also in
# https://github.com/VisionXLab/ProCLIP as assets/classification.png.
_PROCLIP_SETS = ('food101', 'vtab-cifar10', 'vtab-cifar100', 'sun397', 'cars', 'fgvc_aircraft', 'vtab-dtd', 'vtab-pets',
                 'vtab-caltech101', 'vtab-flowers', 'imagenet1k')
_PROCLIP_MEANS = {
    'CLIP B/16': 68.3, 'CLIP B/16 + LLM2CLIP 30M': 53.0, 'CLIP B/16 + ProCLIP 30M': 63.0,
    'CLIP L/14': 75.7, 'CLIP L/14 + LLM2CLIP 30M': 57.5, 'CLIP L/14 + ProCLIP 30M': 71.0,
    'EVA02 L/14': 80.3, 'EVA02 L/14 + LLM2CLIP 3M': 57.5, 'EVA02 L/14 + ProCLIP 3M': 68.5,
}


class Reported(NamedTuple):
    """What a paper has beside a benchmark or an average."""

    rows: Mapping[str, Numbers]
    """Model -> metric -> percent; none where it has nothing."""
    source: str = ''
    """Paper and tables."""


def _tables(ablations: Sequence[str]) -> dict[str, Rows]:
    return {table: RECALLS[table] for table in ('1', '2', *ablations)}


def _llm2clip(rows: Mapping[str, Mapping[str, Numbers]]) -> Reported:
    """Of table -> rows."""
    found = {model: numbers for of_table in rows.values() for model, numbers in of_table.items()}
    return Reported(found, f'{_LLM2CLIP}, table{"s" if len(rows) > 1 else ""} {", ".join(rows)}' if rows else '')


def reported_recalls(benchmark: str, ablations: Sequence[str] = ()) -> Reported:
    """Recall@1 of both directions.

    Args:
        benchmark: Name of a source of retrieval benchmarks, such as `coco`.
        ablations: Tables that are wanted besides 1 and 2.
    """
    return _llm2clip({table: rows[benchmark] for table, rows in _tables(ablations).items() if benchmark in rows})


def reported_accuracy(kind: str, name: str) -> Reported:
    """Top-1 accuracy of a `zeroshot` or `linear_probe` benchmark, by its name in the configuration."""
    rows = {model: {f'{kind}_top1': number} for model, number in _ACCURACY.get(f'{kind}.{name}', {}).items()}
    return _llm2clip({'3': rows} if rows else {})


def reported_cra(name: Optional[str]) -> Reported:
    """`CRA`, caption retrieval accuracy, on pairs of that name."""
    return _llm2clip({'A1': {model: {'CRA': number} for model, number in _CRA.items()}} if name == 'coco' else {})


def reported_average(benchmarks: Sequence[str], results: Mapping[str, Any], ablations: Sequence[str] = ()) -> Reported:
    """Means over benchmarks, as `mean` of accuracies and as recall@1 of each direction.

    Args:
        benchmarks: `zeroshot.food101` with the name that it has there, all of one kind.
        results: `results.json`.
        ablations: Tables that are wanted besides 1 and 2.
    """
    kind, names = benchmarks[0].partition('.')[0], [benchmark.partition('.')[2] for benchmark in benchmarks]
    if kind == 'zeroshot' and sorted(names) == sorted(_PROCLIP_SETS):
        return Reported({model: {'mean': mean} for model, mean in _PROCLIP_MEANS.items()}, f'{_PROCLIP}, table 2')
    if kind != 'retrieval':
        return Reported({})
    sets = [results[kind][name]['benchmark'] for name in names]
    if sets == ['xm3600'] * _LANGUAGES:
        return _llm2clip({'2': _XM3600})
    return _llm2clip({table: _means([rows[name] for name in sets]) for table, rows in _tables(ablations).items()
                      if all(name in rows for name in sets)})


def _means(rows: Sequence[Mapping[str, Numbers]]) -> dict[str, Numbers]:
    """Model -> metric -> mean over sets."""
    return {model: {metric: sum(of_set[model][metric] for of_set in rows) / len(rows) for metric in numbers}
            for model, numbers in rows[0].items()}
