# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The picture of an evaluation shows captions that there are, with what is found for them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm2clip.metrics.retrieval import RetrievalRecall
from llm2clip.training.callbacks import retrieval_grid
from llm2clip.training.callbacks.retrieval_grid import RetrievalGrid


class _Dataset:
    """Notes which samples are looked at."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def caption_and_pixels(self, at: int) -> tuple[str, torch.Tensor]:
        self.seen.append(at)
        return f'caption {at}', torch.zeros(3, 8, 8, dtype=torch.uint8)


def test_the_first_caption_that_there_is_stands_for_an_image() -> None:
    metric, dataset = RetrievalRecall(), _Dataset()
    images = torch.eye(4)
    # Of the first image the second caption is there, of the third none.
    texts = torch.stack([images.flip(0), images], dim=1)
    texts[1] = texts[1].flip(0)
    text_id = torch.tensor([[0, 1], [2, 0], [0, 0], [0, 3]])
    metric.update(images, texts, torch.tensor([10, 11, 12, 13]), text_id)
    picture: Any = RetrievalGrid(captions=6, images=1)._draw(dataset, metric)  # type: ignore[arg-type]
    assert picture.ndim == 3
    # Each caption, then the image that is found for it.
    assert dataset.seen == [10, 10, 11, 11, 13, 13]


def test_a_formula_or_a_damaged_image_does_not_end_a_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metric, logged = RetrievalRecall(), []
    metric.update(torch.eye(2), torch.eye(2)[:, None], torch.arange(2), torch.ones(2, 1, dtype=torch.long))
    state: Any = SimpleNamespace(dataloader=SimpleNamespace(dataset=_Dataset()), dataloader_label='photos',
                                 eval_metrics={'photos': {'recall': metric}})
    logger: Any = SimpleNamespace(log_images=lambda images, **_: logged.extend(images))
    monkeypatch.setattr(retrieval_grid, 'EvalImageDataset', _Dataset)
    for caption in ('$_$', None):  # None has no length, so that drawing fails
        monkeypatch.setattr(_Dataset, 'caption_and_pixels',
                            lambda *_, caption=caption: (caption, torch.zeros(3, 8, 8, dtype=torch.uint8)))
        RetrievalGrid(images=1).eval_end(state, logger)
    assert len(logged) == 1
    assert 'retrieval/photos was not drawn' in capsys.readouterr().out
