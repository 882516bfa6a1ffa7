# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What the paper reports (arXiv 2411.04997 v5, table 1), to stand beside our own numbers."""

__all__ = ['PAPER']

_COLUMNS = ('flickr30k', 'coco', 'sharegpt4v', 'urban1k', 'docci')
_ROWS = {
    'CLIP L/14-224': '85.2/65.0 56.3/36.5 84.2/83.6 68.3/55.6 63.1/65.8',
    'CLIP L/14-224 + LLM2CLIP 15M': '93.0/83.5 67.4/56.4 98.7/98.6 91.5/94.1 88.3/90.4',
    'CLIP L/14-336': '87.7/67.0 58.0/37.1 86.2/84.0 72.8/57.0 67.4/65.7',
    'CLIP L/14-336 + LLM2CLIP 15M': '91.2/82.1 65.5/53.6 98.1/98.4 90.3/93.2 87.7/89.0',
    'EVA02 L/14-224': '89.7/77.3 63.7/47.5 91.9/89.3 73.3/68.5 73.5/75.0',
    'EVA02 L/14-224 + LLM2CLIP 3M': '94.3/84.3 65.2/56.0 98.0/98.0 91.0/94.7 87.8/90.7',
    'EVA02 L/14-224 + LLM2CLIP 15M': '94.6/85.0 69.5/58.3 98.9/99.1 93.6/95.7 89.8/91.2',
    'EVA02 L/14-224 + LLM2CLIP 60M': '95.9/85.1 71.7/58.5 99.2/99.2 95.2/97.0 90.1/92.0',
    'SigLIP2 SO/14-224': '93.9/82.9 72.0/55.5 90.2/87.2 75.7/74.5 77.0/78.9',
    'SigLIP2 SO/14-224 + LLM2CLIP 60M': '95.2/84.6 73.7/57.6 99.4/99.4 96.2/97.3 91.5/92.9',
}

PAPER: dict[str, dict[str, dict[str, float]]] = {
    column: {
        name: dict(zip(('text_retrieval_recall@1', 'image_retrieval_recall@1'),
                       map(float, cells.split()[i].split('/'))))
        for name, cells in _ROWS.items()}
    for i, column in enumerate(_COLUMNS)}
"""Benchmark -> model -> recall@1, image to text and text to image, in percent."""
