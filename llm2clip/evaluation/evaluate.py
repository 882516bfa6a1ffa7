# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A model on every benchmark, with one pass over images that benchmarks share."""

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import torch
import xxhash
from composer.devices import Device
from tqdm import tqdm

from llm2clip.config import ConfigError, EvaluateConfig
from llm2clip.config.files import save_config
from llm2clip.evaluation.classification import (
    check_probe_labels,
    class_features,
    linear_probe,
    zeroshot_metrics,
)
from llm2clip.evaluation.comparison import Comparisons, Found
from llm2clip.evaluation.composition import composition_metrics
from llm2clip.evaluation.cra import check_cra, evaluate_cra
from llm2clip.evaluation.curve import curve_points
from llm2clip.evaluation.gallery import make_gallery
from llm2clip.evaluation.images import encode_batches
from llm2clip.evaluation.models import EvaluatedModel, check_evaluated_model
from llm2clip.evaluation.page import write_page
from llm2clip.evaluation.report import report_parts
from llm2clip.evaluation.retrieval import RetrievalResult, evaluate_retrieval
from llm2clip.evaluation.sets.files import ClassificationSet, CompositionSet, RetrievalSet
from llm2clip.evaluation.tables import markdown, partial_note, result_tables
from llm2clip.evaluation.zeroshot import zeroshot_set
from llm2clip.files import write_json, write_text
from llm2clip.metrics.bootstrap import Outcomes
from llm2clip.ranks import agreed, is_first, rows
from llm2clip.registry import build_classification_set, build_composition_set, build_retrieval_set
from llm2clip.weights import hash_tensors, read_safetensors, write_safetensors

__all__ = ['Evaluation']

Results = dict[str, Any]
EvaluationSet = Union[RetrievalSet, ClassificationSet, CompositionSet]
_KINDS = ('retrieval', 'zeroshot', 'linear_probe', 'composition')


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
        self.results: Results = {kind: {} for kind in (*_KINDS, 'cra')}
        self.galleries: Results = {}
        self.comparisons = Comparisons(config)
        self.kept_features = Path(config.out, 'image_features')
        for name, model in config.models.items():
            check_evaluated_model(model, f'models.{name}')
        if config.cra is not None:
            check_cra(config.cra)
        self.retrieval = {name: build_retrieval_set(benchmark.source, f'retrieval.{name}.source')
                          for name, benchmark in config.retrieval.items()}
        self.zeroshot = {name: zeroshot_set(benchmark, f'zeroshot.{name}')
                         for name, benchmark in config.zeroshot.items()}
        self.probes = {name: (build_classification_set(benchmark.train, f'linear_probe.{name}.train'),
                              build_classification_set(benchmark.test, f'linear_probe.{name}.test'))
                       for name, benchmark in config.linear_probe.items()}
        self.composition = {name: build_composition_set(benchmark.source, f'composition.{name}.source')
                            for name, benchmark in config.composition.items()}
        for name, (train, test) in self.probes.items():
            if train.classes != test.classes:
                raise ConfigError(f'linear_probe.{name}: the classes of train and test differ: '
                                  f'{sorted({*train.classes} ^ {*test.classes})[:5] or "in their order"}')
            learned = _one_per_image(train, f'linear_probe.{name}.train')
            tested = _one_per_image(test, f'linear_probe.{name}.test')
            try:
                check_probe_labels(learned, tested, train.classes)
            except ValueError as error:
                raise ConfigError(f'linear_probe.{name}.train: {error}') from None

    def run(self, model_name: str, model: EvaluatedModel) -> None:
        """Add a model's numbers on every benchmark."""
        images = _ImageFeatures(model, self.config, model_name, self.kept_features)
        for name, dataset in self.retrieval.items():
            projected, (texts, truncated) = images(dataset)[0], model.text_features(dataset.texts)
            if is_first():
                result = evaluate_retrieval(dataset, projected, texts, self.config.retrieval[name].merge_equal_texts,
                                            model.device)
                self._add_retrieval(name, model_name, model.precision, result, truncated)
        for name, zeroshot in self.zeroshot.items():
            dataset = zeroshot.dataset
            prompts, truncated = model.text_features(zeroshot.prompts)
            projected = images(dataset)[0]
            if is_first():
                values, outcomes = zeroshot_metrics(
                    projected, torch.tensor(dataset.labels), class_features(prompts, dataset.classes), dataset.classes,
                    self.config.bootstrap)
                self._add('zeroshot', name, dataset.name, model_name,
                          {**values, 'n_truncated': truncated, 'precision': model.precision}, outcomes, _seed(dataset))
        for name, (train, test) in self.probes.items():
            learned, tested = images(train)[1], images(test)[1]
            if is_first():
                values, outcomes = linear_probe(learned, torch.tensor(train.labels), tested, torch.tensor(test.labels),
                                                train.classes, self.config.bootstrap)
                self._add('linear_probe', name, test.name, model_name, {**values, 'precision': model.precision},
                          outcomes, _seed(test))
        for name, dataset in self.composition.items():
            projected, (texts, truncated) = images(dataset)[0], model.text_features(dataset.texts)
            if is_first():
                values = composition_metrics(dataset, projected, texts, self.config.bootstrap)
                self._add('composition', name, dataset.name, model_name,
                          {**values, 'n_truncated': truncated, 'precision': model.precision})

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
                self._save()
        if is_first():
            shutil.rmtree(self.kept_features, ignore_errors=True)

    def _add_retrieval(
        self, name: str, model_name: str, precision: str, result: RetrievalResult, truncated: int
    ) -> None:
        config, dataset = self.config, self.retrieval[name]
        if config.gallery and name not in self.galleries:
            self.galleries[name] = {'model': model_name, **make_gallery(dataset, result, config.gallery)}
        values: Results = {**result.ranks.recalls(), 'n_truncated': truncated,
                           'n_without_caption': len(dataset.image_ids) - len(result.images), 'precision': precision}
        if config.bootstrap:
            values['intervals'] = result.ranks.intervals(resamples=config.bootstrap)
        self._add('retrieval', name, config.retrieval[name].source['name'], model_name, values,
                  result.ranks.outcomes(), _seed(dataset, result.images))

    def _add(
        self, kind: str, name: str, benchmark: str, model: str, values: Mapping[str, Any],
        outcomes: Optional[Sequence[Outcomes]] = None, seed: int = 0,
    ) -> None:
        """Add a model's numbers on a benchmark; with its outcomes, they are compared and averaged."""
        entry = self.results[kind].setdefault(name, {'benchmark': benchmark, 'models': {}})
        entry['models'][model] = _rounded(values)
        if outcomes is not None:
            self.results.update(_rounded(self.comparisons.add(f'{kind}.{name}', model, Found(values, outcomes, seed))))
        self._save()
        shown = {key: value for key, value in entry['models'][model].items() if not isinstance(value, dict)}
        print(f'{model} on {name}: {shown}', flush=True)

    def _missing(self) -> list[str]:
        """What has no numbers yet."""
        sets = [(kind, name) for kind in _KINDS for name in getattr(self.config, kind)]
        missing = [f'{model}: {kind}.{name}' for model in self.config.models for kind, name in sets
                   if model not in self.results[kind].get(name, {'models': {}})['models']]
        return missing + ['cra'] * (self.config.cra is not None and not self.results['cra'])

    def _save(self) -> None:
        """All that there is so far: nothing is lost when a long evaluation is stopped."""
        out = Path(self.config.out)
        self.results.pop('missing', None)
        if missing := self._missing():
            self.results = {'missing': missing, **self.results}
        if self.config.curve is not None:
            self.results['curve'] = curve_points(self.config.curve, self.config.models, self.results)
        # With the first numbers, not before: the folder may have those of another configuration.
        save_config(self.config, out)
        write_json(out / 'results.json', self.results)
        write_text(out / 'results.md', markdown(result_tables(self.results), partial_note(self.results)))
        write_text(out / 'gallery.json', json.dumps(self.galleries))
        write_page(out / 'report.html', self.config.title, report_parts(self.results, self.galleries))


def _rounded(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(values), parse_float=lambda text: round(float(text), 3))


def _seed(dataset: Union[RetrievalSet, ClassificationSet], positions: Optional[Sequence[int]] = None) -> int:
    """The same for sets of the same images, or of the same ones among them."""
    return xxhash.xxh32(json.dumps([repr(dataset.read_image), dataset.image_ids, positions])).intdigest()


def _one_per_image(dataset: ClassificationSet, key: str) -> list[int]:
    labels = [label for label in dataset.labels if isinstance(label, int)]
    if len(labels) < len(dataset.labels):
        raise ConfigError(f'{key}: images of {dataset.name} have any number of classes, expected a set with one each')
    return labels


class _ImageFeatures:
    """A model's features of the sets' images, computed once for sets of the same images.

    Those of each set are kept in a folder until the evaluation is finished, so that it goes on where it was killed.
    """

    def __init__(self, model: EvaluatedModel, config: EvaluateConfig, name: str, folder: Path) -> None:
        self.model, self.config, self.name, self.folder = model, config, name, folder

    @cached_property
    def _weights(self) -> str:
        digest = xxhash.xxh64()
        hash_tensors(self.model.model.state_dict(), digest)
        return digest.hexdigest()

    def _file(self, dataset: EvaluationSet) -> Path:
        what = json.dumps([self.name, self._weights, self.model.precision, repr(dataset.read_image), dataset.image_ids])
        return self.folder / f'{xxhash.xxh64(what).hexdigest()}.safetensors'

    def __call__(self, dataset: EvaluationSet) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and pooled states, on the first rank; the others, which call this too, have no rows."""
        if not agreed(lambda: self._file(dataset).is_file()):
            size = self.config.batch_size
            batches = list(tqdm(
                encode_batches(self.model, dataset.read_image, dataset.image_ids, size, self.config.num_workers),
                f'{self.name} on {dataset.name}', -(-len(dataset.image_ids) // size), unit=' batches',
                disable=not is_first()))
            if is_first():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_safetensors(self._file(dataset), {'projected': torch.cat([batch.features for batch in batches]),
                                                        'pooled': torch.cat([batch.pooled for batch in batches])})
        if not is_first():
            return rows([]), rows([])
        expected = 'features of images; remove it to compute them again'
        features = read_safetensors(self._file(dataset), expected).tensors
        return features['projected'], features['pooled']
