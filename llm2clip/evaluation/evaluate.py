# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A model on every benchmark, with one pass over images that benchmarks share."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import xxhash
from composer.devices import Device

from llm2clip.config import ConfigError, EvaluateConfig
from llm2clip.config.files import read_config, save_config
from llm2clip.data.zeroshot import zeroshot_set
from llm2clip.evaluation.classification import class_features, zeroshot_metrics
from llm2clip.evaluation.comparison import Comparisons, Found
from llm2clip.evaluation.composition import composition_metrics
from llm2clip.evaluation.cra import check_cra, evaluate_cra
from llm2clip.evaluation.gallery import make_gallery
from llm2clip.evaluation.images import ImageFeatures, finite
from llm2clip.evaluation.linear_probe import check_probe_labels, linear_probe, sgd_probe
from llm2clip.evaluation.models import EvaluatedModel, check_evaluated_model
from llm2clip.evaluation.page import write_page
from llm2clip.evaluation.report import report_page
from llm2clip.evaluation.retrieval import by_query_length, evaluate_retrieval
from llm2clip.evaluation.sets.files import ClassificationSet, CompositionSet, EvaluationSet, RetrievalSet
from llm2clip.evaluation.tables import markdown, partial_note, result_tables
from llm2clip.files import write_json, write_text
from llm2clip.ranks import is_first
from llm2clip.registry import open_set

__all__ = ['Evaluation', 'check_results']

_KINDS = ('retrieval', 'zeroshot', 'linear_probe', 'composition')


def check_results(config: EvaluateConfig) -> None:
    """Raise a ConfigError if results in `out` would be replaced by those of other models, sets or text encoders."""
    if not Path(config.out, 'results.json').is_file():
        return
    before = read_config(EvaluateConfig, config.out)
    for kind in ('models', *_KINDS, 'cra'):
        then, now = ({'': value} if is_dataclass(value) else value or {}
                     for value in (getattr(before, kind), getattr(config, kind)))
        for name, value in then.items():
            if name not in now or {**vars(value), 'batch_tokens': 0} != {**vars(now[name]), 'batch_tokens': 0}:
                raise ConfigError(f'out: {config.out} has results of another {f"{kind}.{name}".rstrip(".")}, expected '
                                  'a folder without results, or with those of models and sets that are the same here')


class Evaluation:
    """Benchmarks, models' folders and the rest of a configuration, checked; models are then run one after the other.

    Every rank makes one and calls the same methods.  They share what is embedded; the first has all features, computes
    the numbers and writes the files.

    Args:
        config: Benchmarks, and where results go; its models are for the caller to load.

    Raises:
        ConfigError: A key has a wrong value, or a file or folder that it names is missing or of another kind.
        ValueError: The contents of a benchmark's files are wrong, or a model was trained with another teacher.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.results: dict[str, Any] = {kind: {} for kind in (*_KINDS, 'cra', 'weights')}
        if config.ablations:
            self.results['ablations'] = config.ablations
        self.galleries: dict[str, Any] = {}
        self.comparisons = Comparisons(config)
        self.kept_features = Path(config.out, 'image_features')
        for name, model in config.models.items():
            check_evaluated_model(model, f'models.{name}')
        if config.cra is not None:
            check_cra(config.cra)
        self.retrieval: dict[str, RetrievalSet] = {
            name: open_set('retrieval', benchmark.source, f'retrieval.{name}.source')
            for name, benchmark in config.retrieval.items()}
        self.zeroshot = {name: zeroshot_set(benchmark, f'zeroshot.{name}')
                         for name, benchmark in config.zeroshot.items()}
        self.probes: dict[str, tuple[ClassificationSet, ClassificationSet]] = {
            name: (open_set('linear_probe', benchmark.train, f'linear_probe.{name}.train'),
                   open_set('linear_probe', benchmark.test, f'linear_probe.{name}.test'))
            for name, benchmark in config.linear_probe.items()}
        self.composition: dict[str, CompositionSet] = {
            name: open_set('composition', benchmark.source, f'composition.{name}.source')
            for name, benchmark in config.composition.items()}
        for name, (train, test) in self.probes.items():
            if train.classes != test.classes:
                raise ConfigError(f'linear_probe.{name}: the classes of train and test differ: '
                                  f'{sorted({*train.classes} ^ {*test.classes})[:5] or "in their order"}')
            labels = [[label for label in one.labels if isinstance(label, int)] for one in (train, test)]
            for which, dataset, single in zip(('train', 'test'), (train, test), labels):
                if len(single) < len(dataset.labels):
                    raise ConfigError(f'linear_probe.{name}.{which}: images of {dataset.name} have any number of '
                                      'classes, expected a set with one each')
            try:
                check_probe_labels(labels[0], labels[1], train.classes)
            except ValueError as error:
                raise ConfigError(f'linear_probe.{name}.train: {error}') from None
        for name, dataset in self.composition.items():
            metric, numbers = config.composition[name].metric, ', '.join(dataset.numbers)
            averages = [average for average, benchmarks in config.averages.items()
                        if f'composition.{name}' in benchmarks]
            if metric is None and averages and len(dataset.numbers) > 1:
                raise ConfigError(f'composition.{name}.metric: required but not set, since averages.{averages[0]} has '
                                  f'the set; its numbers are {numbers}')
            if metric not in (None, *dataset.numbers):
                raise ConfigError(f'composition.{name}.metric: {metric!r}, expected one of {numbers}')

    def run(self, model_name: str, model: EvaluatedModel) -> None:
        """Add a model's numbers on every benchmark."""
        config, resamples = self.config, self.config.bootstrap
        images = ImageFeatures(model, model_name, self.kept_features, config.batch_size, config.num_workers)
        if is_first():
            self.results['weights'][model_name] = images.weights

        def features_of(dataset: EvaluationSet, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, int]:
            """Of images and texts, and how many texts were cut."""
            features, truncated = model.text_features(texts)
            texts_of_set = finite(features, f'{model_name}: features of texts of {dataset.name}')
            return images(dataset)[0].whole(), texts_of_set, truncated

        for name, dataset in self.retrieval.items():
            projected, texts, truncated = features_of(dataset, dataset.texts)
            if is_first():
                benchmark = config.retrieval[name]
                found = evaluate_retrieval(dataset, projected, texts, benchmark.merge_equal_texts, model.device)
                if config.gallery and name not in self.galleries:
                    self.galleries[name] = {'model': model_name, **make_gallery(dataset, found, config.gallery)}
                lengths = by_query_length(found, resamples)
                values: dict[str, Any] = {**found.ranks.recalls(), 'n_truncated': truncated,
                                          'n_without_caption': len(dataset.image_ids) - len(found.images),
                                          'precision': model.precision}
                if resamples:
                    values['intervals'] = found.ranks.intervals(resamples=resamples)
                values['by_length'] = {length: numbers for length, (numbers, _) in lengths.items()}
                self._add('retrieval', name, benchmark.source['name'], model_name, Found(
                    values, found.ranks.outcomes(), _seed(dataset, found.images),
                    {length: Found(numbers, [outcomes]) for length, (numbers, outcomes) in lengths.items()}))
        for name, zeroshot in self.zeroshot.items():
            dataset = zeroshot.dataset
            projected, prompts, truncated = features_of(dataset, zeroshot.prompts)
            if is_first():
                values, outcomes = zeroshot_metrics(projected, torch.tensor(dataset.labels), class_features(
                    prompts, dataset.classes), dataset.classes, resamples)
                self._add('zeroshot', name, dataset.name, model_name, Found(
                    {**values, 'n_truncated': truncated, 'precision': model.precision}, outcomes, _seed(dataset)))
        for name, (train, test) in self.probes.items():
            (_, learned), (_, tested) = images(train), images(test)
            if is_first():
                sgd, labels = config.linear_probe[name].sgd, torch.tensor(train.labels)
                of_test = tested.whole(), torch.tensor(test.labels), train.classes
                values, outcomes = (
                    linear_probe(learned.whole(), labels, *of_test, resamples) if sgd is None else
                    sgd_probe(learned, labels, *of_test, sgd, model.device, resamples))
                self._add('linear_probe', name, test.name, model_name, Found(
                    {**values, 'precision': model.precision}, outcomes, _seed(test)))
        for name, dataset in self.composition.items():
            projected, texts, truncated = features_of(dataset, dataset.texts)
            if is_first():
                values, outcomes = composition_metrics(dataset, projected, texts, resamples)
                self._add('composition', name, dataset.name, model_name, Found(
                    {**values, 'n_truncated': truncated, 'precision': model.precision}, outcomes, _seed(dataset)))

    def finish(self, device: Device) -> None:
        """Add the text encoders' numbers, if any are asked for, and remove the features kept for a restart.

        Args:
            device: Where the text encoders run.
        """
        if self.config.cra is not None:
            found = evaluate_cra(self.config.cra, device)
            if is_first():
                self.results['cra'], self.results['cra_pairs'] = found
                self.results['cra_precision'] = self.config.cra.precision
                self.results['cra_name'] = self.config.cra.name
                self._save()
        if is_first():
            shutil.rmtree(self.kept_features, ignore_errors=True)

    def _add(self, kind: str, name: str, benchmark: str, model: str, found: Found) -> None:
        """Add a model's numbers on a benchmark, which are compared and averaged by its outcomes."""
        entry = self.results[kind].setdefault(name, {'benchmark': benchmark, 'models': {}})
        entry['models'][model] = _rounded(found.values)
        self.results.update(_rounded(self.comparisons.add(f'{kind}.{name}', model, found)))
        self._save()
        shown = {key: value for key, value in entry['models'][model].items() if not isinstance(value, dict)}
        print(f'{model} on {name}: {shown}', flush=True)

    def _save(self) -> None:
        """All that there is so far: nothing is lost when a long evaluation is stopped."""
        missing = [f'{model}: {kind}.{name}' for model in self.config.models for kind in _KINDS
                   for name in getattr(self.config, kind)
                   if model not in self.results[kind].get(name, {'models': {}})['models']]
        missing += ['cra'] * (self.config.cra is not None and not self.results['cra'])
        self.results.pop('missing', None)
        if missing:
            self.results = {'missing': missing, **self.results}
        # With the first numbers, not before: the folder may have those of another configuration.
        out = Path(self.config.out)
        save_config(self.config, out)
        write_json(out / 'results.json', self.results)
        write_text(out / 'results.md', markdown(result_tables(self.results), partial_note(self.results)))
        write_text(out / 'gallery.json', json.dumps(self.galleries))
        write_page(out / 'report.html', report_page(self.config.title, self.results, self.galleries))


def _rounded(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(values), parse_float=lambda text: round(float(text), 3))


def _seed(dataset: EvaluationSet, positions: Optional[Sequence[int]] = None) -> int:
    """The same for sets of the same images, or of the same ones among them."""
    return xxhash.xxh32(json.dumps([repr(dataset.read_image), dataset.image_ids, positions])).intdigest()
