# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Choices between texts that are much alike: against naive computations and CLIP_benchmark, and by the recipe."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import image_caption_selection
from recipes_in_process import run_recipe
from set_files import COMPOSITION_WRITERS

from llm2clip.config import ConfigError
from llm2clip.evaluation.composition import composition_metrics, right_examples, similarities
from llm2clip.evaluation.sets.files import CompositionSet, Example, Number
from llm2clip.models.llm2clip import LLM2CLIP


def _features(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _set(examples: list[Example], numbers: dict[str, Number], parts: dict[str, list[int]],
         units: Sequence[int] = ()) -> CompositionSet:
    images, texts = (1 + max(i for example in examples for i in example[side]) for side in range(2))
    return CompositionSet('set', [f'{i}' for i in range(images)], [f't{i}' for i in range(texts)], examples,
                          list(units or range(len(examples))), numbers, parts, lambda i: b'')


def _pairs(n: int) -> list[Example]:
    """Of n images and n + 1 texts, of which some belong to several examples."""
    return [Example((i % (n // 2),), (i, (i * i + 1) % (n + 1) if (i * i + 1) % (n + 1) != i else n)) for i in range(n)]


def test_one_image_prefers_its_text() -> None:
    examples = _pairs(40)
    images, texts = _features(20), _features(41, seed=1)
    parts = {'first': list(range(7)), 'second': list(range(7, 40))}
    dataset = _set(examples, {'all': Number([list(range(40))]), 'macro': Number(list(parts.values()))}, parts)
    found, _ = composition_metrics(dataset, images, texts, resamples=100)
    hits = [float(images[i] @ texts[right]) > float(images[i] @ texts[wrong]) for (i,), (right, wrong) in examples]
    shares = [100 * sum(hits[i] for i in part) / len(part) for part in parts.values()]
    assert found['all'] == pytest.approx(100 * sum(hits) / 40) and found['macro'] == pytest.approx(sum(shares) / 2)
    assert found['all'] != found['macro'] and found['chance'] == {'all': 50.0, 'macro': 50.0}
    assert found['per_part'] == {name: {'n_examples': len(part), 'text': pytest.approx(share)}
                                 for (name, part), share in zip(parts.items(), shares)}
    for name in ('all', 'macro'):
        low, high = found['intervals'][name]
        assert low < found[name] < high
    assert (found['n_images'], found['n_texts'], found['n_examples']) == (20, 41, 40)
    assert composition_metrics(dataset, images, texts, resamples=0)[0]['intervals'] == {}


@pytest.mark.parametrize('n_images', [1, 2])
def test_the_numbers_are_those_of_clip_benchmark(n_images: int) -> None:
    n = 30
    images, texts = _features(n, n_images), _features(n, 2, seed=1)
    texts[:, 0] = F.normalize(texts[:, 0] + 0.5 * images[:, 0], dim=-1)

    class Given(torch.nn.Module):
        encode_image = staticmethod(lambda pixels: images.flatten(0, 1)[pixels[:, 0, 0, 0].long()])
        encode_text = staticmethod(lambda tokens: texts.flatten(0, 1)[tokens])

    pixels = torch.arange(n * n_images).view(n, n_images, 1, 1, 1).float()
    batches = [(pixels[i:i + 8], [[2 * k, 2 * k + 1] for k in range(i, min(i + 8, n))]) for i in range(0, n, 8)]
    theirs = image_caption_selection.evaluate(Given(), batches, torch.tensor, 'cpu', amp=False)
    examples = [Example(tuple(range(i * n_images, (i + 1) * n_images)), (2 * i, 2 * i + 1)) for i in range(n)]
    right = right_examples(similarities(images.flatten(0, 1), texts.flatten(0, 1), examples))
    assert 0.2 < theirs['text_acc'] < 0.95
    names = {'text': 'text_acc', 'image': 'image_acc', 'group': 'acc'}
    assert {names[score]: pytest.approx(hits.float().mean().item()) for score, hits in right.items()} == {
        names[score]: theirs[names[score]] for score in right}


def test_a_tie_is_not_right() -> None:
    """Also where a matrix product would round equal columns in different ways."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(9000, 37, generator=generator)
    texts = torch.randn(5, 37, generator=generator)[[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    examples = [Example((i,), (i % 5, i % 5 + 5)) for i in range(9000)]
    assert not right_examples(similarities(images, texts, examples))['text'].any()
    assert not right_examples(similarities(images, texts, [Example((0,), (3, 3))]))['text'].any()
    for equal in ('texts', 'images'):
        both = torch.randn(2, 37, generator=generator)
        i, t = (both[[0, 0]], both) if equal == 'images' else (both, both[[1, 1]])
        right = right_examples(similarities(i, t, [Example((0, 1), (0, 1))]))
        assert not any(hits.any() for hits in right.values()), equal


def test_examples_of_one_photograph_are_drawn_together() -> None:
    examples = [Example((i,), (0, 1)) for i in range(40)]
    texts = torch.eye(6)[:2]
    images = torch.eye(6)[[0, 1] * 20]

    def width(units: list[int]) -> float:
        dataset = _set(examples, {'all': Number([list(range(40))])}, {}, units)
        low, high = composition_metrics(dataset, images, texts)[0]['intervals']['all']
        return high - low

    # Each photograph has one example that is right and one that is wrong.
    assert width([i // 2 for i in range(40)]) == 0 and width(list(range(40))) > 20


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    """Arguments of an evaluation on all four."""
    chosen = []
    for name, write in COMPOSITION_WRITERS.items():
        (tmp_path / name).mkdir()
        source = {'name': name, **write(tmp_path / name)}
        chosen.append(f'composition.{name}.source={json.dumps(source)}')
    return [f'out={tmp_path}/out', 'num_workers=0', 'device=cpu', 'bootstrap=50', *chosen]


@pytest.mark.parametrize('baseline', ['clip'], indirect=True)
def test_models_side_by_side(
    exported: tuple[LLM2CLIP, Path], baseline: Path, sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(monkeypatch, 'evaluate', *sets, f'models.ours.export={exported[1]}',
               f'models.theirs.pretrained={baseline}', 'baseline=theirs', 'composition.sugarcrepe.metric=swap',
               'averages.words=[composition.sugarcrepe, composition.aro_attribution]')
    results = json.loads((tmp_path / 'out/results.json').read_text())
    assert list(results['composition']) == list(COMPOSITION_WRITERS) and 'missing' not in results
    assert all(list(entry['models']) == ['ours', 'theirs'] for entry in results['composition'].values())
    ours = {name: entry['models']['ours'] for name, entry in results['composition'].items()}
    files = [ours['sugarcrepe'][name] for name in ('replace_obj', 'replace_att', 'replace_rel')]
    assert ours['sugarcrepe']['replace'] == pytest.approx((4 * files[0] + files[1] + 3 * files[2]) / 8, abs=0.01)
    parts = ours['aro_relation']['per_part']
    assert ours['aro_relation']['macro_accuracy'] == pytest.approx((parts['on']['text'] + parts['eating']['text']) / 2,
                                                                   abs=0.01)
    # Random features find some.
    assert all(0 < values[name] < 100 for values, name in ((ours['aro_attribution'], 'macro_accuracy'),
                                                           (ours['sugarcrepe'], 'replace')))
    table = (tmp_path / 'out/results.md').read_text()
    assert '## Composition: winoground\n\n| model | text score | image score | group score |' in table
    assert '| chance | 25.0 | 25.0 | 16.7 |\n\n4 examples of 8 images and 8 texts; %, 95 % bootstrap' in table
    # A caption of SugarCrepe is longer than the 12 tokens that the baseline reads.
    cut = {name: value['n_truncated'] for name, value in results['composition']['sugarcrepe']['models'].items()}
    assert cut['ours'] == 0 < cut['theirs'] and f'lost their end: theirs {cut["theirs"]}\n' in table
    assert '<h2>Composition: sugarcrepe</h2><p>How often' in (tmp_path / 'out/report.html').read_text()
    compared = results['comparison']['benchmarks']
    assert compared['composition.winoground']['metrics'] == ['text_score', 'image_score', 'group_score']
    for name, entry in results['composition'].items():
        found = compared[f'composition.{name}']['models']['ours']
        for metric in entry['models']['ours']['chance']:
            values = [entry['models'][model][metric] for model in ('ours', 'theirs')]
            assert found['difference'][metric] == pytest.approx(values[0] - values[1], abs=2e-3)
            low, high = found['intervals'][metric]
            assert low - 1e-3 <= found['difference'][metric] <= high + 1e-3
    mean = (ours['sugarcrepe']['swap'] + ours['aro_attribution']['macro_accuracy']) / 2
    average = results['averages']['words']['models']['ours']
    assert average['mean'] == pytest.approx(mean, abs=2e-3) and average['compared']['intervals']['mean']
    assert 'mean of 2 sets: sugarcrepe (swap), aro_attribution (macro accuracy); %' in table
    title = '## Beside theirs: Composition\n\n'
    assert f'{title}| set | number | model | of theirs | of the model | difference |\n' in table


def test_a_set_is_checked_before_a_model_is_loaded(
    exported: tuple[LLM2CLIP, Path], sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for argument, words in (
            ('composition.winoground.metric=group',
             "composition.winoground.metric: 'group', expected one of text_score, image_score, group_score"),
            ('averages.words=[composition.aro_relation, composition.winoground]',
             'composition.winoground.metric: required but not set, since averages.words has the set; its numbers are '
             'text_score, image_score')):
        with pytest.raises(ConfigError, match=words):
            run_recipe(monkeypatch, 'evaluate', *sets, f'models.m.export={exported[1]}', argument)
        assert not (tmp_path / 'out').exists()
