# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Evaluation of models on all benchmarks; benchmarks with the same images share one pass over them."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from composer.devices import Device

from llm2clip.config import ConfigError, CRAConfig, EvaluateConfig, RetrievalConfig
from llm2clip.config.files import read_config, save_config
from llm2clip.data.schema import CAPTION, SAMPLE_ID, read_columns, read_index, whole_shard
from llm2clip.data.zeroshot import zeroshot_set
from llm2clip.evaluation.classification import class_features, linear_probe, zeroshot_metrics
from llm2clip.evaluation.comparison import BenchmarkResult, comparisons
from llm2clip.evaluation.images import ImageFeatures, finite
from llm2clip.evaluation.models import EvaluatedModel, check_evaluated_model
from llm2clip.evaluation.report import write_page
from llm2clip.evaluation.retrieval import evaluate_retrieval, make_gallery
from llm2clip.evaluation.sets.files import ClassificationSet, EvaluationSet, RetrievalSet
from llm2clip.evaluation.tables import markdown
from llm2clip.files import write_json, write_text
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
    """Raise a ConfigError if `out` has results of models, sets or text encoders that `config` lacks or changes."""
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
    """Evaluation of one model after another; creating it checks the configuration, benchmarks and model folders.

    Every rank creates one and calls the same methods.  The ranks share the encoding of images and texts.  The first
    rank collects all features, computes the metrics and writes the files.

    Args:
        config: Benchmarks, models and output folder; the caller loads the models.

    Raises:
        ConfigError: A key has an invalid value, or a file or folder that it names is missing or of the wrong kind.
        ValueError: The files of a benchmark have invalid content, or a model was trained with another teacher.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.results: dict[str, Any] = {kind: {} for kind in (*_KINDS, 'cra', 'weights')}
        self.galleries: dict[str, Any] = {}
        self.kept_features = Path(config.out, 'image_features')
        # Unrounded metrics and outcomes per query, for comparisons and averages.
        self._found: dict[str, dict[str, BenchmarkResult]] = {}
        for name, model in config.models.items():
            check_evaluated_model(model, f'models.{name}')
        if config.cra is not None:
            _check_cra(config.cra)

        def opened(kind: str, key: str = 'source') -> dict[str, Any]:
            return {name: open_set(kind, getattr(benchmark, key), f'{kind}.{name}.{key}')
                    for name, benchmark in getattr(config, kind).items()}

        self.retrieval: dict[str, RetrievalSet] = opened('retrieval')
        self.zeroshot = {name: zeroshot_set(benchmark, f'zeroshot.{name}')
                         for name, benchmark in config.zeroshot.items()}
        train, test = opened('linear_probe', 'train'), opened('linear_probe', 'test')
        self.probes: dict[str, tuple[ClassificationSet, ClassificationSet]] = {
            name: (train[name], test[name]) for name in train}
        for name, pair in self.probes.items():
            _check_probe(*pair, f'linear_probe.{name}')

    def run(self, model_name: str, model: EvaluatedModel) -> None:
        """Evaluate a model on every benchmark, and save the results after each."""
        config, resamples = self.config, self.config.bootstrap
        images = ImageFeatures(model, model_name, self.kept_features, config.batch_size, config.num_workers)
        if is_first():
            self.results['weights'][model_name] = images.weights

        def features_of(dataset: EvaluationSet, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, int]:
            """Features of images and texts, and the number of truncated texts."""
            features, truncated = model.text_features(texts)
            texts_of_set = finite(features, f'{model_name}: features of texts of {dataset.name}')
            return images(dataset)[0].whole(), texts_of_set, truncated

        def add(kind: str, name: str, benchmark: str, values: Mapping[str, Any], outcomes: Sequence[Outcomes],
                images_of: EvaluationSet) -> None:
            values = {**values, 'precision': model.precision}
            # Benchmarks with the same images get the same seed, so that averages resample them together.
            seed = xxhash.xxh32(json.dumps([repr(images_of.read_image), images_of.image_ids])).intdigest()
            self._found.setdefault(f'{kind}.{name}', {})[model_name] = BenchmarkResult(values, outcomes, seed)
            entry = self.results[kind].setdefault(name, {'benchmark': benchmark, 'models': {}})
            entry['models'][model_name] = _rounded(values)
            self._save()
            shown = {key: value for key, value in entry['models'][model_name].items() if not isinstance(value, dict)}
            print(f'{model_name} on {name}: {shown}', flush=True)

        for name, dataset in self.retrieval.items():
            projected, texts, truncated = features_of(dataset, dataset.texts)
            if is_first():
                benchmark = config.retrieval[name]
                found = evaluate_retrieval(dataset, projected, texts, benchmark.merge_equal_texts, model.device)
                if config.gallery and name not in self.galleries:
                    self.galleries[name] = {'model': model_name, **make_gallery(dataset, found, config.gallery)}
                outcomes = found.ranks.outcomes(found.images, len(dataset.image_ids))
                intervals = {metric: ends for way in outcomes for metric, ends in way.intervals(resamples).items()}
                add('retrieval', name, published_name(benchmark),
                    {**found.ranks.recalls(), 'intervals': intervals, 'n_truncated': truncated,
                     'n_without_caption': len(dataset.image_ids) - len(found.images)}, outcomes, dataset)
        for name, zeroshot in self.zeroshot.items():
            dataset = zeroshot.dataset
            projected, prompts, truncated = features_of(dataset, zeroshot.prompts)
            if is_first():
                values, outcomes = zeroshot_metrics(projected, torch.tensor(dataset.labels), class_features(
                    prompts, dataset.classes), dataset.classes, resamples)
                add('zeroshot', name, dataset.name, {**values, 'n_truncated': truncated}, outcomes, dataset)
        for name, (train, test) in self.probes.items():
            (_, learned), (_, tested) = images(train), images(test)
            if is_first():
                values, outcomes = linear_probe(
                    learned, torch.tensor(train.labels), tested.whole(), torch.tensor(test.labels), train.classes,
                    config.linear_probe[name].sgd, model.device, resamples)
                add('linear_probe', name, test.name, values, outcomes, test)

    def finish(self, device: Device) -> None:
        """Add comparisons, averages and caption retrieval accuracy, and remove the features kept for a restart.

        Args:
            device: Device of the text encoders.
        """
        config = self.config
        if is_first():
            self.results.update(_rounded(comparisons(config, self._found)))
            self._save()
        if config.cra is not None:
            found = evaluate_cra(config.cra, device)
            if is_first():
                self.results['cra'], self.results['cra_pairs'] = found
                self.results['cra_precision'], self.results['cra_name'] = config.cra.precision, config.cra.name
                self._save()
        if is_first():
            shutil.rmtree(self.kept_features, ignore_errors=True)

    def _save(self) -> None:
        """Write all results so far, so that an interrupted evaluation keeps them."""
        missing = [f'{model}: {kind}.{name}' for model in self.config.models for kind in _KINDS
                   for name in getattr(self.config, kind)
                   if model not in self.results[kind].get(name, {'models': {}})['models']]
        missing += ['cra'] * (self.config.cra is not None and not self.results['cra'])
        self.results.pop('missing', None)
        if missing:
            self.results = {'missing': missing, **self.results}
        # Saved only with the first results: until then, the folder may hold another configuration and its results.
        out = Path(self.config.out)
        save_config(self.config, out)
        write_json(out / 'results.json', self.results)
        write_text(out / 'results.md', markdown(self.results))
        write_text(out / 'gallery.json', json.dumps(self.galleries))
        write_page(out / 'report.html', self.config.title, self.results, self.galleries)


def published_name(benchmark: RetrievalConfig) -> str:
    """Name of a set if it is measured as published, so that published numbers compare; otherwise empty."""
    source = benchmark.source
    whole = source.get('split', 'test') == 'test' and 'first' not in source and not benchmark.merge_equal_texts
    return source['name'] if whole else ''


def _check_probe(train: ClassificationSet, test: ClassificationSet, key: str) -> None:
    """Raise a ConfigError that names the key unless classes are equal, one per image, with two training images each."""
    if train.classes != test.classes:
        raise ConfigError(f'{key}: the classes of train and test differ: '
                          f'{sorted({*train.classes} ^ {*test.classes})[:5] or "in their order"}')
    labels = [[label for label in one.labels if isinstance(label, int)] for one in (train, test)]
    for which, dataset, single in zip(('train', 'test'), (train, test), labels):
        if len(single) < len(dataset.labels):
            raise ConfigError(f'{key}.{which}: images of {dataset.name} have any number of classes, expected a set '
                              'with one each')
    if len(train.classes) < 2:
        raise ConfigError(f'{key}: there is one class, {train.classes[0]!r}, expected at least 2')
    counts = Counter(labels[0])
    for c in sorted({*labels[0], *labels[1]}):
        if counts[c] < 2:
            raise ConfigError(f'{key}.train: class {train.classes[c]!r} has {counts[c]} training images, expected at '
                              'least 2')


def _check_cra(config: CRAConfig) -> None:
    """Raise a ConfigError that names the key if caption pairs or encoder folders are invalid; loads no encoder."""
    for key, columns in (('captions', [SAMPLE_ID]), ('caption_keys', [CAPTION + key for key in config.caption_keys])):
        try:
            read_columns(config.captions, columns)
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
    """Return the caption retrieval accuracy of each encoder on the same pairs, in percent, and the number of pairs.

    Samples that lack one of the two captions are skipped; a ValueError is raised if no pair is left.  Every rank calls
    this and embeds a share of the texts; only the first rank gets the accuracies.
    """
    columns = [CAPTION + key for key in config.caption_keys]
    # Not `read_samples`: an image dataset would keep all of its images in memory.
    captions = [tuple(sample[name] for name in columns) for shard in read_index(config.captions)['shards']
                for sample in whole_shard(config.captions, shard)]
    pairs = [pair for pair in captions if all(text.strip() for text in pair)]
    if not pairs:
        raise ValueError(f'cra.caption_keys: no sample of {config.captions} has all of {config.caption_keys}')
    if len(pairs) < len(captions) and is_first():
        print(f'{len(captions) - len(pairs)} of {len(captions)} samples of {config.captions} lack one of '
              f'{config.caption_keys}', flush=True)
    pairs = pairs[:config.limit]
    result = {}
    for name, encoder in config.teachers.items():
        # The fingerprint is not used here, and computing it would read all weights once more.
        teacher = teacher_source(encoder, cut=True).load(
            device, config.batch_tokens, config.precision, fingerprint=Fingerprint(()))
        vectors = []
        for side in range(2):
            blocks = [[pair[side] for pair in pairs[start:start + _BLOCK]] for start in range(0, len(pairs), _BLOCK)]
            embedded = rows(round_robin(blocks, partial(_vectors, teacher)))
            vectors.append(finite(embedded, f'{name}: vectors of captions'))
        if is_first():
            result[name] = round(caption_retrieval_accuracy(*vectors), 3)
            print(f'{name}: {result[name]:.1f} % of {len(pairs)} pairs', flush=True)
    return result, len(pairs)


def _rounded(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(values), parse_float=lambda text: round(float(text), 3))
