# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Evaluation of models on all benchmarks; benchmarks with the same images share one pass over them."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash

from llm2clip.config import CRAConfig, EvaluateConfig, RetrievalConfig
from llm2clip.config.loading import read_config, save_config
from llm2clip.data.classification_sets import ClassificationSet, zeroshot_set
from llm2clip.data.schema import CAPTION, SAMPLE_ID, read_columns, read_index, whole_shard
from llm2clip.device import Device
from llm2clip.errors import ConfigError, under
from llm2clip.evaluation.classifiers import class_features, linear_probe, zeroshot_metrics
from llm2clip.evaluation.comparison import BenchmarkResult, average_models, compare_with_baseline
from llm2clip.evaluation.evaluated_models import EvaluatedModel, check_evaluated_model
from llm2clip.evaluation.image_features import EvaluationSet, ImageFeatures, finite
from llm2clip.evaluation.report import report_page
from llm2clip.evaluation.retrieval_results import evaluate_retrieval, make_gallery
from llm2clip.evaluation.retrieval_sets import RetrievalSet, open_retrieval_set
from llm2clip.evaluation.scores import KINDS, BenchmarkScores, Results, RetrievalScores, Scores, rounded
from llm2clip.evaluation.tables import markdown, plain
from llm2clip.io.files import write_json, write_text
from llm2clip.metrics.bootstrap import Outcomes
from llm2clip.metrics.retrieval import caption_retrieval_accuracy
from llm2clip.ranks import is_first, round_robin, rows
from llm2clip.registry import open_set
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.teacher.sources import teacher_source

# Captions per block: enough to sort by length, few enough to distribute over several ranks.
_BLOCK = 1024


def check_results(config: EvaluateConfig) -> None:
    """Raise a ConfigError if `out` has results of models, sets or encoders that `config` lacks or changes."""
    if not Path(config.out, 'results.json').is_file():
        return
    configured = _parts(config)
    for key, part in _parts(read_config(EvaluateConfig, config.out)).items():
        if configured.get(key) != part:
            raise ConfigError(f'{config.out} has results of another {key}, expected a folder without '
                              'results, or with those of models and sets that are the same here', key='out')


def _parts(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Key of a model, a set or the text encoders -> settings that change its results."""
    parts: dict[str, Any] = {}
    for kind in ('models', *KINDS):
        for name, part in getattr(config, kind).items():
            # The number of tokens per forward pass does not change the results.
            parts[f'{kind}.{name}'] = vars(part) | {'batch_tokens': 0}
    if config.cra is not None:
        parts['cra'] = vars(config.cra) | {'batch_tokens': 0}
    return parts


class Evaluation:
    """Evaluation of one model after another, which the caller loads.

    Every rank creates one, calls `run` with each model and then `finish`.  The ranks share the encoding of
    images and texts.  The first rank collects all features, computes the scores and writes the files, anew
    after each benchmark.

    Creating it checks the configuration, benchmarks and model folders.  It raises a ConfigError if a key has
    an invalid value or names a file or folder that is missing or of the wrong kind, and a ValueError if the
    files of a benchmark have invalid content, or a model was trained with another teacher.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.results = Results(retrieval={}, zeroshot={}, linear_probe={}, cra={}, weights={})
        self.galleries: dict[str, Any] = {}
        self.kept_features = Path(config.out, 'image_features')
        # Benchmark, such as `zeroshot.imagenet` -> model -> scores and outcomes per query.
        self._benchmark_results: dict[str, dict[str, BenchmarkResult]] = {}
        for name, model in config.models.items():
            with under(f'models.{name}'):
                check_evaluated_model(model)
        if config.cra is not None:
            columns = [SAMPLE_ID, *(CAPTION + key for key in config.cra.caption_keys)]
            try:
                read_columns(config.cra.captions, columns)
            except (OSError, ValueError) as error:
                raise ConfigError(str(error), key='cra.captions') from None
            for name, encoder in config.cra.teachers.items():
                with under(f'cra.teachers.{name}'):
                    teacher_source(encoder).encoding()
        self.retrieval: dict[str, RetrievalSet] = {}
        for name, benchmark in config.retrieval.items():
            with under(f'retrieval.{name}'):
                self.retrieval[name] = open_retrieval_set(benchmark.local, benchmark.caption_keys)
        self.zeroshot = {name: zeroshot_set(benchmark, f'zeroshot.{name}')
                         for name, benchmark in config.zeroshot.items()}
        self.probes: dict[str, tuple[ClassificationSet, ClassificationSet]] = {}
        for name, probe in config.linear_probe.items():
            train = open_set('linear_probe', probe.train, f'linear_probe.{name}.train')
            test = open_set('linear_probe', probe.test, f'linear_probe.{name}.test')
            with under(f'linear_probe.{name}'):
                _check_probe(train, test)
            self.probes[name] = train, test

    def run(self, model_name: str, model: EvaluatedModel) -> None:
        """Evaluate a model on every benchmark, and save the results after each."""
        config = self.config
        images = ImageFeatures(model, model_name, self.kept_features, config.batch_size, config.num_workers)
        self.results.weights[model_name] = images.weights
        for name, dataset in self.retrieval.items():
            texts, n_truncated = _text_features(images, dataset, dataset.texts)
            projected, _ = images.encode(dataset)
            if not is_first():
                continue
            settings = config.retrieval[name]
            result = evaluate_retrieval(dataset, rows(projected), texts, settings.merge_equal_texts,
                                        model.device)
            if config.gallery and name not in self.galleries:
                gallery = make_gallery(dataset, result, config.gallery)
                self.galleries[name] = {'model': model_name} | gallery
            outcomes = result.ranks.outcomes(result.images, len(dataset.image_ids))
            intervals = {}
            for direction in outcomes:
                intervals |= direction.intervals(config.bootstrap)
            scores = RetrievalScores.model_validate(result.ranks.recalls() | {
                'intervals': intervals, 'n_truncated': n_truncated,
                'n_without_caption': len(dataset.image_ids) - len(result.images)})
            self._add(images, 'retrieval', name, published_name(name, settings), dataset, scores, outcomes)
        for name, benchmark in self.zeroshot.items():
            dataset = benchmark.dataset
            prompts, n_truncated = _text_features(images, dataset, benchmark.prompts)
            projected, _ = images.encode(dataset)
            if is_first():
                classes = class_features(prompts, dataset.classes)
                scores, outcomes = zeroshot_metrics(rows(projected), torch.tensor(dataset.labels), classes,
                                                    dataset.classes, config.bootstrap)
                scores.n_truncated = n_truncated
                self._add(images, 'zeroshot', name, dataset.name, dataset, scores, outcomes)
        for name, (train, test) in self.probes.items():
            _, train_states = images.encode(train)
            _, test_states = images.encode(test)
            if is_first():
                scores, outcomes = linear_probe(
                    train_states, torch.tensor(train.labels), rows(test_states), torch.tensor(test.labels),
                    train.classes, config.linear_probe[name].sgd, model.device, config.bootstrap)
                self._add(images, 'linear_probe', name, test.name, test, scores, outcomes)

    def _add(
        self, images: ImageFeatures, kind: str, name: str, set_name: str, dataset: EvaluationSet,
        scores: Scores, outcomes: Sequence[Outcomes],
    ) -> None:
        """Record and save the scores of a model on the benchmark `kind.name`."""
        scores.precision = images.model.precision
        # Benchmarks with the same images get the same seed, so that averages resample them together.
        seed = xxhash.xxh32(json.dumps([repr(dataset.read_image), dataset.image_ids])).intdigest()
        result = BenchmarkResult(scores, outcomes, seed)
        self._benchmark_results.setdefault(f'{kind}.{name}', {})[images.name] = result
        benchmark = BenchmarkScores(benchmark=set_name, models={})
        self.results.benchmarks(kind).setdefault(name, benchmark).models[images.name] = scores
        self._save()

    def finish(self, device: Device) -> None:
        """Add comparisons, averages and the caption retrieval accuracy of text encoders, on `device`, and
        print the tables.

        Removes the image features that were kept for a restart.
        """
        config = self.config
        if config.cra is not None:
            self.results.cra, self.results.cra_pairs = evaluate_cra(config.cra, device)
            self.results.cra_precision = config.cra.precision
            self.results.cra_name = config.cra.name
        if not is_first():
            return
        if config.baseline is not None:
            self.results.comparison = compare_with_baseline(config, config.baseline, self._benchmark_results)
        if config.averages:
            self.results.averages = average_models(config, self._benchmark_results)
        self._save()
        shutil.rmtree(self.kept_features, ignore_errors=True)
        print(plain(Results.model_validate(rounded(self.results))), flush=True)

    def _save(self) -> None:
        """Write all results so far, so that an interrupted evaluation keeps them."""
        content = rounded(self.results)
        missing = []
        for model in self.config.models:
            for kind in KINDS:
                for name in getattr(self.config, kind):
                    if model not in self._benchmark_results.get(f'{kind}.{name}', {}):
                        missing.append(f'{model}: {kind}.{name}')
        if self.config.cra is not None and not self.results.cra:
            missing.append('cra')
        if missing:
            content = {'missing': missing} | content
        results = Results.model_validate(content)
        # Saved only with the first results: until then, the folder may hold results of another configuration.
        out = Path(self.config.out)
        save_config(self.config, out)
        write_json(out / 'results.json', content)
        write_text(out / 'results.md', markdown(results))
        write_text(out / 'gallery.json', json.dumps(self.galleries))
        write_text(out / 'report.html', report_page(self.config.title, results, self.galleries))


def _text_features(
    images: ImageFeatures, dataset: EvaluationSet, texts: Sequence[str]
) -> tuple[torch.Tensor, int]:
    """Features of texts by the model of `images`, and the number of truncated texts."""
    features, n_truncated = images.model.text_features(texts)
    return finite(features, f'{images.name}: features of texts of {dataset.name}'), n_truncated


def published_name(name: str, benchmark: RetrievalConfig) -> str:
    """Return the name under which papers report a benchmark, by its name in `retrieval`.

    The languages of XM3600 share one.  It is empty if equal texts are merged, since published numbers do not
    compare.
    """
    if benchmark.merge_equal_texts:
        return ''
    return 'xm3600' if name.startswith('xm3600_') else name


def _check_probe(train: ClassificationSet, test: ClassificationSet) -> None:
    """Raise a ConfigError unless classes are equal, one per image, with at least two training images each."""
    if train.classes != test.classes:
        raise ConfigError('train and test do not have the same classes in the same order; only one of them '
                          f'has {sorted({*train.classes} ^ {*test.classes})[:5]}')
    for part, dataset in (('train', train), ('test', test)):
        if torch.tensor(dataset.labels).ndim != 1:
            raise ConfigError(f'images of {dataset.name} have any number of classes, expected a set with one '
                              'each', key=part)
    counts: Any = Counter(train.labels)
    for c in sorted(counts | Counter(test.labels)):
        if counts[c] < 2:
            raise ConfigError(f'class {train.classes[c]!r} has {counts[c]} training images, '
                              'expected at least 2', key='train')


def evaluate_cra(config: CRAConfig, device: Device) -> tuple[dict[str, float], int]:
    """Return the caption retrieval accuracy of each encoder in percent, and the number of pairs of captions.

    Samples that lack one of the two captions are skipped; a ConfigError is raised if no pair is left.  Every
    rank calls this and embeds a share of the texts; only the first rank gets the accuracies.
    """
    pairs = []
    # Not `read_samples`: an image dataset would keep all of its images in memory.
    for shard in read_index(config.captions)['shards']:
        for sample in whole_shard(config.captions, shard):
            captions = [sample[CAPTION + key] for key in config.caption_keys]
            if all(map(str.strip, captions)):
                pairs.append(captions)
    if not pairs:
        raise ConfigError(f'no sample of {config.captions} has all of {config.caption_keys}',
                          key='cra.caption_keys')
    pairs = pairs[:config.limit]
    accuracies = {}
    for name, encoder in config.teachers.items():
        # The fingerprint is not used here, and computing it would read all weights once more.
        teacher = teacher_source(encoder, cut=True).load(
            device, config.batch_tokens, config.precision, fingerprint=Fingerprint(()))
        vectors = []
        for captions in zip(*pairs):
            blocks = [list(captions[start:start + _BLOCK]) for start in range(0, len(captions), _BLOCK)]
            embedded = rows(encoded.vectors for encoded in round_robin(blocks, partial(map, teacher.embed)))
            vectors.append(finite(embedded, f'{name}: vectors of captions'))
        if is_first():
            accuracies[name] = round(caption_retrieval_accuracy(*vectors), 3)
    return accuracies, len(pairs)
