# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Evaluation of models on all benchmarks; benchmarks with the same images share one pass over them."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from composer.devices import Device

from llm2clip.config import CRAConfig, EvaluateConfig, RetrievalConfig
from llm2clip.config.loading import read_config, save_config
from llm2clip.data.schema import CAPTION, SAMPLE_ID, read_columns, read_index, whole_shard
from llm2clip.data.zeroshot_sets import ZeroshotSet, zeroshot_set
from llm2clip.errors import ConfigError, under
from llm2clip.evaluation.classifiers import class_features, linear_probe, zeroshot_metrics
from llm2clip.evaluation.comparison import BenchmarkResult, comparisons
from llm2clip.evaluation.evaluated_models import EvaluatedModel, check_evaluated_model
from llm2clip.evaluation.image_features import ImageFeatures, finite
from llm2clip.evaluation.report import write_page
from llm2clip.evaluation.retrieval_results import evaluate_retrieval, make_gallery
from llm2clip.evaluation.sets.files import ClassificationSet, EvaluationSet, RetrievalSet
from llm2clip.evaluation.tables import markdown
from llm2clip.io.files import write_json, write_text
from llm2clip.metrics.bootstrap import Outcomes
from llm2clip.metrics.retrieval import caption_retrieval_accuracy
from llm2clip.ranks import is_first, round_robin, rows
from llm2clip.registry import open_set
from llm2clip.teacher.caption_teacher import CaptionTeacher
from llm2clip.teacher.fingerprint import Fingerprint
from llm2clip.teacher.sources import teacher_source

_KINDS = ('retrieval', 'zeroshot', 'linear_probe')
# Captions per block: enough to sort by length, few enough to distribute over several ranks.
_BLOCK = 1024

def check_results(config: EvaluateConfig) -> None:
    """Raise a ConfigError if `out` has results of models, sets or encoders that `config` lacks or changes."""
    if not Path(config.out, 'results.json').is_file():
        return
    before = read_config(EvaluateConfig, config.out)
    parts = []
    for kind in ('models', *_KINDS):
        now = getattr(config, kind)
        parts += [(f'{kind}.{name}', value, now.get(name)) for name, value in getattr(before, kind).items()]
    if before.cra is not None:
        parts.append(('cra', before.cra, config.cra))
    for key, old, new in parts:
        # The number of tokens per forward pass does not change the results.
        if new is None or vars(old) | {'batch_tokens': 0} != vars(new) | {'batch_tokens': 0}:
            raise ConfigError(f'out: {config.out} has results of another {key}, expected a folder without '
                              'results, or with those of models and sets that are the same here')


class Evaluation:
    """Evaluation of one model after another, which the caller loads.

    Every rank creates one and calls the same methods.  The ranks share the encoding of images and texts.  The
    first rank collects all features, computes the metrics and writes the files.

    Creating it checks the configuration, benchmarks and model folders.  It raises a ConfigError if a key has
    an invalid value or names a file or folder that is missing or of the wrong kind, and a ValueError if the
    files of a benchmark have invalid content, or a model was trained with another teacher.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.results: dict[str, Any] = {kind: {} for kind in (*_KINDS, 'cra', 'weights')}
        self.galleries: dict[str, Any] = {}
        self.kept_features = Path(config.out, 'image_features')
        # Unrounded metrics and outcomes per query, for comparisons and averages.
        self._unrounded: dict[str, dict[str, BenchmarkResult]] = {}
        for name, model in config.models.items():
            with under(f'models.{name}'):
                check_evaluated_model(model)
        if config.cra is not None:
            _check_cra(config.cra)
        self.retrieval: dict[str, RetrievalSet] = {}
        for name, benchmark in config.retrieval.items():
            self.retrieval[name] = open_set('retrieval', benchmark.source, f'retrieval.{name}.source')
        self.zeroshot = {name: zeroshot_set(benchmark, f'zeroshot.{name}')
                         for name, benchmark in config.zeroshot.items()}
        self.probes: dict[str, tuple[ClassificationSet, ClassificationSet]] = {}
        for name, probe in config.linear_probe.items():
            train = open_set('linear_probe', probe.train, f'linear_probe.{name}.train')
            test = open_set('linear_probe', probe.test, f'linear_probe.{name}.test')
            _check_probe(train, test, f'linear_probe.{name}')
            self.probes[name] = train, test

    def run(self, model_name: str, model: EvaluatedModel) -> None:
        """Evaluate a model on every benchmark, and save the results after each."""
        config = self.config
        images = ImageFeatures(model, model_name, self.kept_features, config.batch_size, config.num_workers)
        if is_first():
            self.results['weights'][model_name] = images.weights
        for name, dataset in self.retrieval.items():
            self._run_retrieval(images, name, dataset)
        for name, benchmark in self.zeroshot.items():
            self._run_zeroshot(images, name, benchmark)
        for name, (train, test) in self.probes.items():
            self._run_linear_probe(images, name, train, test)

    def _run_retrieval(self, images: ImageFeatures, name: str, dataset: RetrievalSet) -> None:
        text_features, n_truncated = _text_features(images, dataset, dataset.texts)
        image_features = images(dataset)[0].whole()
        if not is_first():
            return
        config = self.config.retrieval[name]
        result = evaluate_retrieval(dataset, image_features, text_features, config.merge_equal_texts,
                                    images.model.device)
        if self.config.gallery and name not in self.galleries:
            gallery = make_gallery(dataset, result, self.config.gallery)
            self.galleries[name] = {'model': images.name} | gallery
        outcomes = result.ranks.outcomes(result.images, len(dataset.image_ids))
        values: dict[str, Any] = dict(result.ranks.recalls())
        values['intervals'] = {}
        for direction in outcomes:
            values['intervals'].update(direction.intervals(self.config.bootstrap))
        values['n_truncated'] = n_truncated
        values['n_without_caption'] = len(dataset.image_ids) - len(result.images)
        self._add(images, 'retrieval', name, published_name(config), dataset, values, outcomes)

    def _run_zeroshot(self, images: ImageFeatures, name: str, benchmark: ZeroshotSet) -> None:
        dataset = benchmark.dataset
        prompts, n_truncated = _text_features(images, dataset, benchmark.prompts)
        image_features = images(dataset)[0].whole()
        if not is_first():
            return
        classes = dataset.classes
        values, outcomes = zeroshot_metrics(image_features, torch.tensor(dataset.labels),
                                            class_features(prompts, classes), classes, self.config.bootstrap)
        values['n_truncated'] = n_truncated
        self._add(images, 'zeroshot', name, dataset.name, dataset, values, outcomes)

    def _run_linear_probe(
        self, images: ImageFeatures, name: str, train: ClassificationSet, test: ClassificationSet
    ) -> None:
        _, train_states = images(train)
        _, test_states = images(test)
        if not is_first():
            return
        values, outcomes = linear_probe(
            train_states, torch.tensor(train.labels), test_states.whole(), torch.tensor(test.labels),
            train.classes, self.config.linear_probe[name].sgd, images.model.device, self.config.bootstrap)
        self._add(images, 'linear_probe', name, test.name, test, values, outcomes)

    def _add(
        self, images: ImageFeatures, kind: str, name: str, benchmark: str, dataset: EvaluationSet,
        values: dict[str, Any], outcomes: Sequence[Outcomes],
    ) -> None:
        """Record, save and print the metrics of a model on the benchmark `kind.name`."""
        values['precision'] = images.model.precision
        # Benchmarks with the same images get the same seed, so that averages resample them together.
        seed = xxhash.xxh32(json.dumps([repr(dataset.read_image), dataset.image_ids])).intdigest()
        self._unrounded.setdefault(f'{kind}.{name}', {})[images.name] = BenchmarkResult(values, outcomes, seed)
        entry = self.results[kind].setdefault(name, {'benchmark': benchmark, 'models': {}})
        rounded = _rounded(values)
        entry['models'][images.name] = rounded
        self._save()
        shown = {key: value for key, value in rounded.items() if not isinstance(value, dict)}
        print(f'{images.name} on {name}: {shown}', flush=True)

    def finish(self, device: Device) -> None:
        """Add comparisons, averages and the caption retrieval accuracy of text encoders, which run on `device`,
        and remove the features kept for a restart."""
        cra = self.config.cra
        if is_first():
            self.results.update(_rounded(comparisons(self.config, self._unrounded)))
            self._save()
        if cra is not None:
            accuracies, n_pairs = evaluate_cra(cra, device)
            if is_first():
                self.results.update(cra=accuracies, cra_pairs=n_pairs, cra_precision=cra.precision, cra_name=cra.name)
                self._save()
        if is_first():
            shutil.rmtree(self.kept_features, ignore_errors=True)

    def _save(self) -> None:
        """Write all results so far, so that an interrupted evaluation keeps them."""
        missing = []
        for model in self.config.models:
            for kind in _KINDS:
                for name in getattr(self.config, kind):
                    evaluated = self.results[kind].get(name, {'models': {}})['models']
                    if model not in evaluated:
                        missing.append(f'{model}: {kind}.{name}')
        if self.config.cra is not None and not self.results['cra']:
            missing.append('cra')
        self.results.pop('missing', None)
        if missing:
            self.results = {'missing': missing} | self.results
        # Saved only with the first results: until then, the folder may hold results of another configuration.
        out = Path(self.config.out)
        save_config(self.config, out)
        write_json(out / 'results.json', self.results)
        write_text(out / 'results.md', markdown(self.results))
        write_text(out / 'gallery.json', json.dumps(self.galleries))
        write_page(out / 'report.html', self.config.title, self.results, self.galleries)


def _text_features(
    images: ImageFeatures, dataset: EvaluationSet, texts: Sequence[str]
) -> tuple[torch.Tensor, int]:
    """Features of texts by the model of `images`, and the number of truncated texts."""
    features, n_truncated = images.model.text_features(texts)
    return finite(features, f'{images.name}: features of texts of {dataset.name}'), n_truncated


def published_name(benchmark: RetrievalConfig) -> str:
    """Name of a set if it is measured as published, so that published numbers compare; otherwise empty."""
    source = benchmark.source
    is_whole = source.get('split', 'test') == 'test' and 'first' not in source
    return source['name'] if is_whole and not benchmark.merge_equal_texts else ''


def _check_probe(train: ClassificationSet, test: ClassificationSet, key: str) -> None:
    """Raise a ConfigError unless classes are equal, one per image, with at least two training images each."""
    if train.classes != test.classes:
        raise ConfigError(f'{key}: the classes of train and test differ: '
                          f'{sorted({*train.classes} ^ {*test.classes})[:5] or "in their order"}')
    labels: dict[str, list[int]] = {}
    for part, dataset in (('train', train), ('test', test)):
        labels[part] = [label for label in dataset.labels if isinstance(label, int)]
        if len(labels[part]) < len(dataset.labels):
            raise ConfigError(f'{key}.{part}: images of {dataset.name} have any number of classes, expected '
                              'a set with one each')
    if len(train.classes) < 2:
        raise ConfigError(f'{key}: there is one class, {train.classes[0]!r}, expected at least 2')
    counts = Counter(labels['train'])
    for c in sorted({*labels['train'], *labels['test']}):
        if counts[c] < 2:
            raise ConfigError(f'{key}.train: class {train.classes[c]!r} has {counts[c]} training images, '
                              'expected at least 2')


def _check_cra(config: CRAConfig) -> None:
    """Raise a ConfigError if caption pairs or encoder folders are invalid; loads no encoder."""
    columns = [CAPTION + key for key in config.caption_keys]
    for key, names in (('captions', [SAMPLE_ID]), ('caption_keys', columns)):
        try:
            read_columns(config.captions, names)
        except (OSError, ValueError) as error:
            raise ConfigError(f'cra.{key}: {error}') from None
    for name, encoder in config.teachers.items():
        try:
            teacher_source(encoder).check_encoding(None, '')
        except ValueError as error:
            raise ConfigError(f'cra.teachers.{name}: {error}') from None


def _vectors(teacher: CaptionTeacher, blocks: Iterable[list[str]]) -> Iterator[torch.Tensor]:
    return (teacher.embed(texts).vectors for texts in blocks)


def evaluate_cra(config: CRAConfig, device: Device) -> tuple[dict[str, float], int]:
    """Return the caption retrieval accuracy of each encoder in percent, and the number of pairs of captions.

    Samples that lack one of the two captions are skipped; a ValueError is raised if no pair is left.  Every
    rank calls this and embeds a share of the texts; only the first rank gets the accuracies.
    """
    pairs = _caption_pairs(config)
    accuracies = {}
    for name, encoder in config.teachers.items():
        # The fingerprint is not used here, and computing it would read all weights once more.
        teacher = teacher_source(encoder, cut=True).load(
            device, config.batch_tokens, config.precision, fingerprint=Fingerprint(()))
        vectors = []
        for captions in zip(*pairs):
            blocks = [list(captions[start:start + _BLOCK]) for start in range(0, len(captions), _BLOCK)]
            embedded = rows(round_robin(blocks, partial(_vectors, teacher)))
            vectors.append(finite(embedded, f'{name}: vectors of captions'))
        if is_first():
            accuracies[name] = round(caption_retrieval_accuracy(*vectors), 3)
            print(f'{name}: {accuracies[name]:.1f} % of {len(pairs)} pairs', flush=True)
    return accuracies, len(pairs)


def _caption_pairs(config: CRAConfig) -> list[list[str]]:
    """The two captions of each sample that has both."""
    samples = []
    # Not `read_samples`: an image dataset would keep all of its images in memory.
    for shard in read_index(config.captions)['shards']:
        for sample in whole_shard(config.captions, shard):
            samples.append([sample[CAPTION + key] for key in config.caption_keys])
    pairs = [captions for captions in samples if all(text.strip() for text in captions)]
    if not pairs:
        raise ValueError(f'cra.caption_keys: no sample of {config.captions} has all of {config.caption_keys}')
    if len(pairs) < len(samples) and is_first():
        print(f'{len(samples) - len(pairs)} of {len(samples)} samples of {config.captions} lack one of '
              f'{config.caption_keys}', flush=True)
    return pairs[:config.limit]


def _rounded(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(values), parse_float=lambda text: round(float(text), 3))
