# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Zero-shot accuracy of classes that score the same, and the linear probes against naive computations."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from llm2clip.config import SGDProbeConfig
from llm2clip.data.classification_sets import read_templates
from llm2clip.errors import ConfigError
from llm2clip.evaluation.classifiers import linear_probe, sgd_logits, zeroshot_metrics


def _classified(seed: int, n_classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images that are near to their classes, of which no image has the last: features, labels, features."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n_classes, 5, generator=generator)
    labels = torch.randint(0, n_classes - 1, (60,), generator=generator)
    return torch.randn(60, 5, generator=generator) + weights[labels], labels, weights


def test_of_classes_that_score_the_same_the_first_is_nearest() -> None:
    found, _ = zeroshot_metrics(torch.ones(4, 3), torch.tensor([1, 0, 1, 1]), torch.ones(2, 3), ['a', 'b'], resamples=5)
    assert found.zeroshot_top1 == 25.0 and found.per_class == {'a': 100.0, 'b': 0.0}
    # Two classes of each name, and as many columns as make a matrix product round them in different ways.
    images, labels, weights = _classified(2, 203)
    weights[101:202], labels = weights[:101], labels.clamp(max=201)
    names = [f'c{i % 101}' for i in range(202)]
    found, _ = zeroshot_metrics(images, labels, weights[:202], names, resamples=0)
    alone, _ = zeroshot_metrics(images, labels % 101, weights[:101], names[:101], resamples=0)
    right = sum(alone.per_class[f'c{c}'] > 0 for c in labels.tolist() if c < 101)
    assert found.per_class.keys() == {f'c{c % 101} ({c})' for c in labels.tolist()}
    assert all(found.per_class[f'c{c - 101} ({c})'] == 0 for c in labels.tolist() if c >= 101)
    assert found.zeroshot_top1 == pytest.approx(100 * right / 60) and right > 1 and not found.intervals


def test_probe_selects_its_regularisation_on_a_held_out_fifth() -> None:
    # Many features that say nothing: with little regularisation the probe learns the noise.
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(2).repeat(60)
    train, test = (torch.cat([(labels * 2.0 - 1)[:, None] + x[:, :1], x], 1)
                   for x in torch.randn(2, 120, 200, generator=generator))
    found, _ = linear_probe([train[:70], train[70:]], labels, test, labels, ['a', 'b'], resamples=0)
    x, y, test_x = F.normalize(train, dim=-1).numpy(), labels.numpy(), F.normalize(test, dim=-1).numpy()
    part_x, held_x, part_y, held_y = train_test_split(x, y, test_size=24, stratify=y, random_state=0)
    held = {c: LogisticRegression(C=c, max_iter=1000).fit(part_x, part_y).score(held_x, held_y)
            for c in (10.0 ** power for power in range(-2, 5))}
    assert held[found.C] == max(held.values()) > min(held.values())
    # The last fit sees all of the training set.
    whole, part = (100 * LogisticRegression(C=found.C, max_iter=1000).fit(*data).score(test_x, y)
                   for data in ((x, y), (part_x, part_y)))
    assert found.linear_probe_top1 == pytest.approx(whole) and whole != part


def test_a_probe_trained_by_sgd_is_the_naive_loop() -> None:
    """Of which each step is written out: batches of uneven size, momentum and the cosine included."""
    # Features far from 0 and of different scales, with a column that is constant.
    x, labels, _ = _classified(3, 4)
    x = x * torch.tensor([1e-3, 1.0, 20.0, 1.0, 0.0]) + torch.tensor([0.0, 7.0, -300.0, 2.0, 0.3])
    x, test, labels = x[:50], x[50:], labels[:50]
    config = SGDProbeConfig(epochs=3, batch_size=16, learning_rate=0.3, momentum=0.8, seed=5)
    found = sgd_logits(x.split(13), labels, test, 3, config)
    mean, deviation = x.double().mean(0), x.double().std(0, correction=0)
    assert deviation[4] < 1e-7
    deviation[4] = 1

    def scaled(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([(rows.double() - mean) / deviation, torch.ones(len(rows), 1)], 1)

    weight, velocity, step = torch.zeros(3, 6, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64), 0
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        order = torch.randperm(50, generator=generator).tolist()
        for batch in (order[:16], order[16:32], order[32:48], order[48:]):
            gradient = torch.zeros_like(weight)
            for i in batch:
                row = scaled(x[i:i + 1])[0].half().double()
                error = (weight @ row).softmax(0)
                error[labels[i]] -= 1
                gradient += error[:, None] * row / len(batch)
            velocity = 0.8 * velocity + gradient
            weight -= 0.3 * (1 + math.cos(math.pi * step / 12)) / 2 * velocity
            step += 1
    torch.testing.assert_close(found.double(), scaled(test) @ weight.T, atol=1e-4, rtol=1e-4)
    assert found.abs().max() > 1
    # The seed decides the order of the images, and nothing else is drawn.
    assert sgd_logits(x.split(50), labels, test, 3, config).allclose(found, atol=1e-5)
    other = sgd_logits(x.split(13), labels, test, 3, dataclasses.replace(config, seed=6))
    assert not other.allclose(found, atol=1e-3)


def test_templates_are_lines_with_a_place_for_the_name(tmp_path: Path) -> None:
    path = tmp_path / 't.txt'
    path.write_text('# prompts\na {}\n\nthe {c}.\n')
    assert read_templates(path) == ['a {}', 'the {}.']
    for text in ('a photo\n', '# nothing\n\n'):
        path.write_text(text)
        with pytest.raises(ConfigError):
            read_templates(path)
