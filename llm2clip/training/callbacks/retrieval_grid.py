# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A picture of what the model finds, for the loggers that show pictures."""

import textwrap

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torchmetrics.utilities import dim_zero_cat

from llm2clip.config.ranges import Count
from llm2clip.data.image_embeddings import EvalImageDataset
from llm2clip.drawing import drawable, drawing
from llm2clip.metrics.retrieval import RetrievalRecall

__all__ = ['RetrievalGrid']


class RetrievalGrid(Callback):
    """After every evaluation, log some captions with the images that rank 0 finds best for them among its own.

    Args:
        captions: Rows of the picture, always the same samples.
        images: Columns.
    """

    def __init__(self, captions: Count = 6, images: Count = 6) -> None:
        self.captions, self.images = captions, images

    def eval_end(self, state: State, logger: Logger) -> None:
        dataset = getattr(state.dataloader, 'dataset', None)
        label = state.dataloader_label
        if label is None or not isinstance(dataset, EvalImageDataset):
            return
        metric = next(m for m in state.eval_metrics[label].values() if isinstance(m, RetrievalRecall))
        if dist.get_global_rank() == 0:
            name = f'retrieval/{label}'
            with drawing(name):
                logger.log_images([self._draw(dataset, metric)], name=name, channels_last=True, use_table=False)

    def _draw(self, dataset: EvalImageDataset, metric: RetrievalRecall) -> np.ndarray:
        image, text, text_id, index = (dim_zero_cat(getattr(metric, name)).cpu()
                                       for name in ('image_features', 'text_features', 'text_id', 'index'))
        there = text_id != 0
        order = index.argsort()
        order = order[there.any(1)[order]]
        image, index = image[order], index[order]
        text = text[order, there[order].int().argmax(1)]  # of each image, the first caption that there is
        rows = torch.linspace(0, len(index) - 1, min(self.captions, len(index))).long()
        figure = Figure((1.3 * (self.images + 2), 1.3 * len(rows)), dpi=80)
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(len(rows), self.images + 1, squeeze=False, width_ratios=[2, *[1] * self.images])
        for row, line in zip(rows.tolist(), axes):
            caption, _ = dataset.caption_and_pixels(int(index[row]))
            line[0].text(0, 0.5, textwrap.fill(drawable(caption)[:120], 28), va='center', fontsize=7)
            best = (text[row] @ image.T).topk(min(self.images, len(index))).indices.tolist()
            for cell, hit in zip(line[1:], best):
                _, pixels = dataset.caption_and_pixels(int(index[hit]))
                cell.imshow(pixels.permute(1, 2, 0).numpy())
                if hit == row:
                    width, height = pixels.shape[2], pixels.shape[1]
                    cell.add_patch(Rectangle((0, 0), width - 1, height - 1, fill=False, edgecolor='green', linewidth=4))
            for cell in line:
                cell.axis('off')
        figure.tight_layout(pad=0.2)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
