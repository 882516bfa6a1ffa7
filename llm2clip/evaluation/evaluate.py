# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Every model on every benchmark: one model in memory at a time, one pass over images that benchmarks share."""

from collections.abc import Callable, Mapping
from typing import Any, Union

import torch
from composer.devices import Device

from llm2clip.builders import build_classification_set, build_retrieval_set
from llm2clip.config import ConfigError, EvaluateConfig
from llm2clip.data.benchmarks.base import ClassificationSet, RetrievalSet
from llm2clip.evaluation.classification import class_features, linear_probe, read_templates, zeroshot_metrics
from llm2clip.evaluation.cra import evaluate_cra
from llm2clip.evaluation.gallery import make_gallery
from llm2clip.evaluation.images import encode_images
from llm2clip.evaluation.models import EvaluatedModel, load_evaluated_model
from llm2clip.evaluation.retrieval import evaluate_retrieval

__all__ = ['evaluate']

Results = dict[str, Any]


class _Images:
    """A model's features of the sets' images, computed once."""

    def __init__(self, model: EvaluatedModel, config: EvaluateConfig, name: str) -> None:
        self.model, self.config, self.name = model, config, name
        self.known: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, dataset: Union[RetrievalSet, ClassificationSet]) -> tuple[torch.Tensor, torch.Tensor]:
        key = dataset.read_image, tuple(dataset.image_ids)
        if key not in self.known:
            self.known[key] = encode_images(self.model, dataset.read_image, dataset.image_ids,
                                            f'{self.name} on {dataset.name}', self.config.batch_size,
                                            self.config.num_workers)
        return self.known[key]


def evaluate(config: EvaluateConfig, device: Device, save: Callable[[Results, Results], None]) -> None:
    """All numbers that the configuration asks for.

    Args:
        config: Models and benchmarks.
        device: Where the models run.
        save: Called with results and galleries whenever there are more of them.

    Raises:
        ConfigError: A model or benchmark is not what was expected, found before anything is computed where that is
            possible.
    """
    retrieval = {name: build_retrieval_set(benchmark.source, f'retrieval.{name}.source')
                 for name, benchmark in config.retrieval.items()}
    zeroshot = {name: (build_classification_set(benchmark.source, f'zeroshot.{name}.source'),
                       read_templates(benchmark.templates, f'zeroshot.{name}.templates'))
                for name, benchmark in config.zeroshot.items()}
    probes = {name: (build_classification_set(benchmark.train, f'linear_probe.{name}.train'),
                     build_classification_set(benchmark.test, f'linear_probe.{name}.test'))
              for name, benchmark in config.linear_probe.items()}
    results: Results = {'retrieval': {}, 'zeroshot': {}, 'linear_probe': {}, 'cra': {}}
    galleries: Results = {}
    for name, (train, test) in probes.items():
        if train.classes != test.classes:
            raise ConfigError(f'linear_probe.{name}: the classes of train and test differ: '
                              f'{sorted({*train.classes} ^ {*test.classes})[:5] or "in their order"}')

    def add(kind: str, name: str, benchmark: str, model: str, values: Mapping[str, Any]) -> None:
        entry = results[kind].setdefault(name, {'benchmark': benchmark, 'models': {}})
        entry['models'][model] = _rounded(values)
        save(results, galleries)
        shown = {key: value for key, value in entry['models'][model].items() if not isinstance(value, dict)}
        print(f'{model} on {name}: {shown}', flush=True)

    for model_name, model_config in config.models.items():
        model = load_evaluated_model(model_config, config.cache, device, f'models.{model_name}')
        images = _Images(model, config, model_name)
        for name, dataset in retrieval.items():
            result = evaluate_retrieval(model, dataset, images(dataset)[0], config.retrieval[name].merge_equal_texts)
            if config.gallery and name not in galleries:
                galleries[name] = {'model': model_name, **make_gallery(dataset, result, config.gallery)}
            intervals = result.ranks.intervals(resamples=config.bootstrap) if config.bootstrap else {}
            add('retrieval', name, config.retrieval[name].source['name'], model_name,
                {**result.ranks.recalls(), 'intervals': intervals})
        for name, (dataset, templates) in zeroshot.items():
            add('zeroshot', name, dataset.name, model_name, zeroshot_metrics(
                images(dataset)[0], torch.tensor(dataset.labels), class_features(model, dataset.classes, templates),
                dataset.classes, config.bootstrap))
        for name, (train, test) in probes.items():
            add('linear_probe', name, test.name, model_name, linear_probe(
                images(train)[1], torch.tensor(train.labels), images(test)[1], torch.tensor(test.labels),
                train.classes, config.bootstrap))
        del model, images
    if config.cra is not None:
        results['cra'] = evaluate_cra(config.cra)
        save(results, galleries)


def _rounded(values: Any) -> Any:
    if isinstance(values, float):
        return round(values, 3)
    if isinstance(values, Mapping):
        return {key: _rounded(value) for key, value in values.items()}
    return [_rounded(value) for value in values] if isinstance(values, (list, tuple)) else values
