# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Models compared with a baseline, their averages, and those of the paper's numbers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from composer.devices import DeviceCPU
from evaluated import Given
from markupsafe import Markup
from parts import picture
from recipes_in_process import ROOT

import llm2clip.evaluation.report
from llm2clip.config import EvaluateConfig, EvaluatedModelConfig, RetrievalConfig, ZeroshotConfig
from llm2clip.data.classification_sets import ClassificationSet, ZeroshotSet
from llm2clip.evaluation.benchmarks import Evaluation, published_name
from llm2clip.evaluation.comparison import BenchmarkResult, average, compare
from llm2clip.evaluation.paper import reported_average, reported_recalls
from llm2clip.evaluation.retrieval_sets import RetrievalSet
from llm2clip.evaluation.scores import BenchmarkScores, ClassificationScores, Results, RetrievalScores, rounded
from llm2clip.metrics.bootstrap import Outcomes
from llm2clip.metrics.retrieval import RetrievalRanks, rank_both_ways
from llm2clip.registry import SOURCES

N = 24


def _ranks(seed: int, shared: bool = False) -> RetrievalRanks:
    """A model's, on images with one to three texts, some of which two images share."""
    generator = torch.Generator().manual_seed(seed)
    image_of_text = torch.arange(N).repeat_interleave(torch.arange(N) % 3 + 1)
    images, texts = (torch.randn(n, 6, generator=generator) for n in (N, len(image_of_text)))
    texts += 0.7 * images[image_of_text]
    text_id = torch.arange(len(image_of_text))
    if shared:
        text_id[-5:] = text_id[:5]
    return rank_both_ways(images, texts, image_of_text, text_id)


def _found(ranks: RetrievalRanks, seed: int = 0) -> BenchmarkResult:
    return BenchmarkResult(RetrievalScores.model_validate(ranks.recalls()), ranks.outcomes(range(N), N), seed)


def _classified(right: torch.Tensor, labels: torch.Tensor, seed: int) -> BenchmarkResult:
    per_class = {f'c{c}': 100 * right[labels == c].double().mean().item() for c in labels.unique().tolist()}
    values = {'zeroshot_top1': 100 * right.double().mean().item(), 'per_class': per_class, 'n_images': len(right),
              'n_classes': len(per_class), 'mean_per_class': sum(per_class.values()) / len(per_class)}
    hits, images = right[:, None], torch.arange(len(right))
    outcomes = [Outcomes(('zeroshot_top1',), hits, images, len(hits)),
                Outcomes(('mean_per_class',), hits, images, len(hits), labels)]
    return BenchmarkResult(ClassificationScores.model_validate(values), outcomes, seed)


def _naive(right: torch.Tensor, images_of: list[list[int]], drawn: Sequence[int]) -> float:
    """The share of queries that are right, of images drawn one at a time with all their queries."""
    values = [float(right[query]) for image in drawn for query in images_of[image]]
    return 100 * sum(values) / len(values)


@pytest.mark.parametrize('shared', [False, True])
def test_differences_draw_the_same_images_for_both_models(shared: bool) -> None:
    old, new = _ranks(0, shared), _ranks(1, shared)
    found = compare(_found(old), _found(new), resamples=40)
    texts_of: list[list[int]] = [[] for _ in range(N)]
    for text in range(len(old.texts)):
        texts_of[min(old.right[old.right[:, 0] == text, 1].tolist())].append(text)
    for way, ranks, queries in (('image', 'texts', texts_of), ('text', 'images', [[image] for image in range(N)])):
        for k in (1, 5):
            generator = torch.Generator().manual_seed(0)
            naive = []
            for _ in range(40):
                drawn = torch.randint(len(queries), (len(queries),), generator=generator).tolist()
                after, before = (_naive(getattr(model, ranks) < k, queries, drawn) for model in (new, old))
                naive.append(after - before)
            ends = np.quantile(naive, [0.025, 0.975]).tolist()
            metric = f'{way}_retrieval_recall@{k}'
            assert found.intervals[metric] == pytest.approx(ends) and ends[0] < ends[1]
            assert found.difference[metric] == pytest.approx(new.recalls()[metric] - old.recalls()[metric], abs=1e-4)


def test_averages_draw_the_images_of_each_set_by_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, sets, before = (300, 500, 400), [], []
    for seed, n in enumerate(sizes):
        labels = torch.randint(0, 4, (n,), generator=generator)
        sets.append(_classified(torch.rand(n, generator=generator).lt(0.6), labels, seed))
        before.append(_classified(torch.rand(n, generator=generator).lt(0.7), labels, seed))
    metrics = ['zeroshot_top1', 'mean_per_class', 'zeroshot_top1']
    means = [sum(one.scores.value(metric) for one, metric in zip(of, metrics)) / 3 for of in (sets, before)]
    variances = [sum(share * (1 - share) / n for n in sizes) for share in (0.6, 0.7)]
    # Two models that have nothing to do with each other: their variances add up.
    for baseline, expected, variance in ((None, means[0], variances[0]), (before, means[0] - means[1], sum(variances))):
        mean, interval = average(sets, metrics, 2000, baseline)
        half = 1.96 * 100 * variance ** 0.5 / 3
        assert mean == pytest.approx(expected) and interval is not None
        assert [mean - interval[0], interval[1] - mean] == pytest.approx([half, half], rel=0.15)
    assert average(sets, metrics, 0)[1] is None


def test_sets_of_the_same_images_are_drawn_together() -> None:
    """Captions in another language, say, that are found with the same images: the mean says nothing more than one."""
    ranks = _ranks(0)
    one, same, other = _found(ranks, 3), _found(ranks, 3), _found(ranks, 4)
    metrics = ['text_retrieval_recall@5'] * 2
    alone, joint, apart = (average(sets, metrics, 500)[1] for sets in ([one, one], [one, same], [one, other]))
    assert alone is not None and apart is not None and joint == alone
    assert apart[1] - apart[0] < 0.85 * (alone[1] - alone[0])


def test_a_missing_text_leaves_images_drawn_together() -> None:
    """Without the only text of the first image, nearly nothing changes."""
    whole = _ranks(0)
    without = RetrievalRanks(whole.texts[1:], whole.images[1:], whole.text_index[1:], whole.right[1:] - 1)
    for one, other in zip(whole.outcomes(range(N), N), without.outcomes(range(1, N), N)):
        draws = torch.stack([outcomes.resampled(300, 3)[:, 1] for outcomes in (one, other)])
        assert torch.corrcoef(draws)[0, 1] > 0.9


def test_a_resample_without_any_query_does_not_count() -> None:
    outcomes = Outcomes(('recall',), torch.ones(1, 1), torch.tensor([1]), 3)
    assert outcomes.resampled(100).isnan().any() and outcomes.intervals(100)['recall'] == (100, 100)


def test_each_class_counts_the_same_and_is_drawn_by_itself() -> None:
    classes = torch.tensor([4, 0, 4, 1, 4, 4, 1])
    values = torch.stack([classes.double(), torch.tensor([1.0, 0, 0, 1, 0, 0, 0])], dim=1)
    means = Outcomes(('a', 'b'), values, torch.arange(7), 7, classes).resampled(300)
    # What is the same within each class is the same in every resample, with one image as with four.
    assert (means[:, 0] - 5 / 3).abs().max() < 1e-12
    # One of two in a class, and one of four: k and m / 3 of one and of three draws, over three classes.
    assert {round(9 * mean) for mean in means[:, 1].tolist()} == {0, 1, 2, 3, 4, 5, 6}
    assert means[:, 1].mean().item() == pytest.approx((1 / 2 + 1 / 4) / 3, abs=0.02)


class _Given(Given):
    """A model whose features are a matter of chance, but for the share that they have of what is right."""

    def __init__(self, seed: int, signal: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(N, 8, generator=generator)
        self.centres = torch.randn(N, 8, generator=torch.Generator().manual_seed(99))
        self.images = F.normalize(noise + signal * self.centres, dim=-1)

    def text_features(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        """Texts end in the number of an image, or of a class, to which one image in four belongs."""
        return F.normalize(self.centres[[int(text.split()[-1]) for text in texts]], dim=-1), 0


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Labels and series of each picture of differences, in place of the picture, which takes long."""
    pictures: list[Any] = []
    monkeypatch.setattr(llm2clip.evaluation.report, 'differences', lambda *args: pictures.append(args) or Markup())
    return pictures


MODELS = {'weak': (1, 0.3), 'clip': (2, 0.9), 'twin': (2, 0.9), 'other': (3, 0.7)}


@dataclass(frozen=True)
class _Reader:
    name: str

    def __call__(self, i: int) -> bytes:
        return picture(i)


def _evaluation(out: Path, names: Sequence[str] = tuple(MODELS)) -> Evaluation:
    config = EvaluateConfig(out=str(out), bootstrap=50, gallery=0, num_workers=0, baseline='clip', averages={
        'both': ['retrieval.urban1k', 'retrieval.docci'], 'accuracy': ['zeroshot.top1', 'zeroshot.balanced']})
    evaluation = Evaluation(config)
    config.models = {name: EvaluatedModelConfig(run=name) for name in names}
    ids = [str(i) for i in range(N)]
    evaluation.retrieval = {name: RetrievalSet(name, ids, [[f'{name} {i}'] for i in range(n)] + [[]] * (N - n),
                                               _Reader('others'))
                            for name, n in (('urban1k', N - 3), ('docci', N))}
    config.retrieval = {name: RetrievalConfig(local=name) for name in evaluation.retrieval}
    labels, classes = [i % 5 if i % 3 else i % 2 for i in range(N)], [f'class {c}' for c in range(5)]
    evaluation.zeroshot = {name: ZeroshotSet(ClassificationSet('photos', ids, labels, classes, _Reader('photos')),
                                          ['a {}'])
                           for name in ('top1', 'balanced')}
    config.zeroshot = {'top1': ZeroshotConfig(), 'balanced': ZeroshotConfig(metric='mean_per_class')}
    return evaluation


def _run(evaluation: Evaluation) -> dict[str, Any]:
    for name in evaluation.config.models:
        evaluation.run(name, _Given(*MODELS[name]))  # type: ignore[arg-type]
    evaluation.finish(DeviceCPU())
    return json.loads(Path(evaluation.config.out, 'results.json').read_text())


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp('whole')
    return _run(_evaluation(out)), out


def test_every_model_is_compared_in_any_order_of_models(
    whole: tuple[dict[str, Any], Path], drawn: list[Any], tmp_path: Path
) -> None:
    results, _ = whole
    assert json.dumps(rounded(Results.model_validate(results))) == json.dumps(results)
    compared = results['comparison']['benchmarks']
    assert results['comparison']['baseline'] == 'clip' and list(compared) == [
        'retrieval.urban1k', 'retrieval.docci', 'zeroshot.top1', 'zeroshot.balanced']
    for benchmark, entry in compared.items():
        kind, _, name = benchmark.partition('.')
        numbers = results[kind][name]['models']
        assert set(entry['models']) == {'weak', 'twin', 'other'}
        for model, found in entry['models'].items():
            for metric, difference in found['difference'].items():
                assert difference == pytest.approx(numbers[model][metric] - numbers['clip'][metric], abs=2e-3)
                low, high = found['intervals'][metric]
                assert low <= difference <= high and (low < high or abs(difference) < 1e-3)
                assert low == high == 0 or model != 'twin'
    assert compared['zeroshot.balanced']['metrics'] == ['mean_per_class']
    # In any other order of the models, the same, and so is the picture.
    again = _run(_evaluation(tmp_path, names=('other', 'twin', 'weak', 'clip')))
    assert again['comparison'] == results['comparison'] and again['averages'] == results['averages']
    labels, series = drawn[-1]
    weak = compared['zeroshot.top1']['models']['weak']
    assert labels == ['top1, top-1', 'balanced, mean per class'] and {*series} == {'weak', 'twin', 'other'}
    assert series['weak']['top1, top-1'] == (weak['difference']['zeroshot_top1'], weak['intervals']['zeroshot_top1'])


def test_averages_are_means_of_the_number_of_each_set(whole: tuple[dict[str, Any], Path]) -> None:
    results, out = whole
    for model in MODELS:
        accuracy = results['averages']['accuracy']['models'][model]
        one, two = (results['zeroshot'][name]['models'][model] for name in ('top1', 'balanced'))
        assert accuracy['mean'] == pytest.approx((one['zeroshot_top1'] + two['mean_per_class']) / 2, abs=1e-3)
        both = results['averages']['both']['models'][model]
        for metric in ('image_retrieval_recall@1', 'text_retrieval_recall@1'):
            recalls = [results['retrieval'][name]['models'][model][metric] for name in ('urban1k', 'docci')]
            assert both[metric] == pytest.approx(sum(recalls) / 2, abs=1e-3)
        assert ('compared' in accuracy) == (model != 'clip')
    before, after = (results['averages']['accuracy']['models'][model] for model in ('clip', 'weak'))
    difference, (low, high) = (after['compared'][part]['mean'] for part in ('difference', 'intervals'))
    assert difference == pytest.approx(after['mean'] - before['mean'], abs=2e-3) and low <= difference <= high
    table = (out / 'results.md').read_text()
    assert '## Average: accuracy' in table and 'mean of 2 sets: top1 (top-1), balanced (mean per class); ' in table
    # The paper's numbers on sets that it reports, averaged in the same way.
    reported = [reported_recalls([name]).rows['CLIP L/14-224'] for name in ('urban1k', 'docci')]
    mean = sum(recalls['image_retrieval_recall@1'] for recalls in reported) / 2
    assert f'| CLIP L/14-224 (paper) | {mean:.1f} | ' in table.partition('## Average: both')[2].partition('##')[0]


FIVE = ['flickr30k', 'coco', 'sharegpt4v', 'urban1k', 'docci']
# What the paper has in the last columns of table 1, image→text and text→image.
AVERAGES = ('69.5/57.1 86.1/81.9 74.0/65.6 86.1/82.7 71.4/61.3 87.8/84.6 78.4/71.5 87.3/84.7 89.3/85.8 90.4/86.3 '
            '74.4/62.2 86.6/83.3 91.1/84.5 79.3/72.3 88.0/84.8 91.0/86.8 81.8/75.8 91.2/86.4')
# Rows whose average is not that of their numbers.
OTHERWISE = {'CLIP L/14-336 + LLM2CLIP 60M', 'EVA02 L/14-336 + LLM2CLIP 15M', 'EVA02 L/14-336 + LLM2CLIP 60M'}


def _results(sets: dict[str, str]) -> Results:
    return Results(retrieval={name: BenchmarkScores(benchmark=set_name, models={}) for name, set_name in sets.items()})


def test_the_mean_over_five_sets_is_the_average_of_the_paper() -> None:
    results = _results({f'my {name}': name for name in FIVE})
    reported = reported_average([f'retrieval.my {name}' for name in FIVE], results)
    assert reported.source == 'arXiv 2411.04997 v6, table 1'
    for (model, means), cell in zip(reported.rows.items(), AVERAGES.split(), strict=True):
        found = [means[f'{way}_retrieval_recall@1'] for way in ('text', 'image')]
        # Some of the last digits are cut off, and not rounded.
        right = found == pytest.approx([*map(float, cell.split('/'))], abs=0.08)
        assert right == (model not in OTHERWISE), f'{model}: {found}, the paper has {cell}'


def test_means_of_other_sets() -> None:
    assert published_name('coco', RetrievalConfig('d', merge_equal_texts=True)) == ''
    content = yaml.safe_load((ROOT / 'yamls/eval/sets/xm3600.yaml').read_text())['evaluate']
    benchmarks = content['averages']['xm3600']
    sets = content['retrieval'].items()
    results = _results({name: published_name(name, RetrievalConfig(**entry)) for name, entry in sets})
    reported = reported_average(benchmarks, results)
    assert reported.rows['SigLIP2'] == {'text_retrieval_recall@1': 59.7, 'image_retrieval_recall@1': 48.2}
    assert reported.source == 'arXiv 2411.04997 v6, table 2'
    assert reported_average(benchmarks[1:], results) == ({}, '')
    assert {'flickr_cn', 'coco_cn', 'xm3600', *FIVE} <= {*SOURCES} and reported_recalls(['mine']) == ({}, '')
