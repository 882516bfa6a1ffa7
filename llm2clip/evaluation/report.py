# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Everything that a pipeline wrote, as one HTML page, and its numbers in one file (format: recipes/README.md)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from markupsafe import Markup

from llm2clip.command import SECONDS_FILE, recorded_seconds
from llm2clip.config import ConfigError
from llm2clip.evaluation.page import CHANCE, bars, curves, differences, render
from llm2clip.evaluation.tables import Table, measure, partial_note, result_tables
from llm2clip.files import read_json, read_text, reading
from llm2clip.training.callbacks.jsonl_logger import read_metrics

__all__ = ['check_steps', 'collect_seconds', 'read_evaluation', 'report_page', 'summarize']

# Sets that hold captions of one language end in its code: de, lang_de, xm3600_fil.
_LANGUAGE = re.compile(r'(.+_)?[a-z]{2}|.+_[a-z]{3}')
# The quickstart's text encoders.
_ENCODERS = {'cra_causal': 'LLM, causal', 'cra_untrained': 'causal mask dropped,\nuntrained', 'cra': 'after stage 1'}
# What a table is about -> what one sees in it.
_SEEN = {
    'cra': 'How often the two captions of a pair find each other among {pairs}, which is what stage 1 teaches the LLM.',
    'retrieval': 'How often the right image is among the first 1, 5 or 10 that a text finds (text→image), and the '
                 'right text among the first that an image finds (image→text).',
    'lengths': 'How often the right image is among the first that a text finds, by the number of its words. Short '
               'texts fit several images, so that lengths of one set compare models, and not each other.',
    'accuracy': 'How often the right class of an image is the first, or among the first five; where images have any '
                'number of classes, how high each class has its images (mAP).',
    'composition': 'How often a model tells texts of nearly the same words apart: whether an image is nearer to its '
                   'own text than to the other one, or where two images have a text each, whether both images (text), '
                   'both texts (image) or all four (group) are nearer to their own.',
    'averages': 'The mean of several sets, each of which counts the same.',
    'compare': 'What each model has won (to the right) and lost (to the left) against {baseline}, with the 95 % '
               'interval of the difference.',
}


class _Section(NamedTuple):
    """A heading, a sentence that says what one sees below, a picture and a table."""

    title: str
    seen: str
    picture: Markup = Markup('')
    table: Optional[Table] = None


def read_evaluation(folder: Union[str, Path], galleries: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `evaluate` wrote.

    Args:
        folder: Where to.
        galleries: Which retrieval benchmarks' pictures are wanted.

    Returns:
        `results.json`, and the wanted part of `gallery.json`.

    Raises:
        ConfigError: There is no such folder, file or gallery; says what there is.
        FileError: A file is damaged.
    """
    found = []
    for name in ('results.json', 'gallery.json'):
        if not Path(folder, name).is_file():
            raise ConfigError(f'results: {folder} has no {name}, expected the folder that `evaluate` wrote')
        found.append(read_json(Path(folder, name), dict))
    results, pictures = found
    for name in galleries:
        if name not in pictures:
            raise ConfigError(f'galleries: {folder} has pictures of {", ".join(pictures) or "nothing"}, not of {name}; '
                              '`evaluate` keeps those of retrieval benchmarks, unless its gallery is 0')
        with reading(Path(folder, 'gallery.json'), 'the pictures that `evaluate` keeps'):
            render('gallery.html.j2', name=name, gallery=pictures[name])
    return results, {name: pictures[name] for name in galleries}


def check_steps(steps: Mapping[str, str]) -> None:
    """Raise a ConfigError unless every step's folder is there."""
    for step, folder in steps.items():
        if not Path(folder).is_dir():
            raise ConfigError(f'steps.{step}: there is no folder {folder}')


def report_page(
    title: str, results: Mapping[str, Any], galleries: Mapping[str, Any], steps: Optional[Mapping[str, str]] = None,
) -> str:
    """The HTML page, in the order of the pipeline.

    Args:
        title: Of the page.
        results: `results.json` of an evaluation.
        galleries: Benchmark -> what `llm2clip.evaluation.gallery.make_gallery` returned, with the ``model``'s name.
        steps: Step of a pipeline -> folder, where seconds, metrics and configurations are looked for.
    """
    steps = steps or {}
    sections = []
    for table in result_tables(results):
        seen = _SEEN[table.about.partition('.')[0]].format(
            baseline=results.get('compare', {}).get('baseline'),
            pairs=f'{results["cra_pairs"]:,} pairs' if 'cra_pairs' in results else 'all pairs')
        sections.append(_Section(table.title, seen, _picture(table.about, results), table))
    sections += _languages(results.get('retrieval', {}))
    for step, folder in steps.items():
        if metrics := read_metrics(Path(folder, 'metrics.jsonl')):
            rows = [[name, *(f'{values[batch]:.4g} (batch {batch:,})' for batch in (min(values), max(values)))]
                    for name, values in metrics.items() if name.startswith(('loss/', 'metrics/'))]
            sections.append(_Section(
                f'Training: {step}', 'How loss, learning rates and evaluations went from batch to batch.',
                curves(metrics), Table('Training', ['', 'first', 'last'], rows)))
    if seconds := collect_seconds(steps):
        rows = [[step, f'{value:.0f}'] for step, value in {**seconds, 'all': sum(seconds.values())}.items()]
        sections.append(_Section('Time', 'How long each step took, over all its starts.',
                                 table=Table('Steps', ['step', 'seconds'], rows)))
    configurations = {step: read_text(path) for step, folder in steps.items()
                      if (path := Path(folder, 'config.yaml')).is_file()}
    return render('report.html.j2', title=title, note=partial_note(results), sections=sections,
                  galleries=galleries, configurations=configurations)


def _picture(about: str, results: Mapping[str, Any]) -> Markup:
    """The picture above a table: bars of text encoders, or differences to a baseline; of other tables, none."""
    if about == 'cra':
        cra: Mapping[str, float] = results['cra']
        return bars([_ENCODERS.get(name, name) for name in cra], {'CRA': list(cra.values())})
    series: dict[str, dict[str, tuple[float, Optional[list[float]]]]] = {}
    for benchmark, entry in results.get('compare', {'benchmarks': {}})['benchmarks'].items():
        kind, _, name = benchmark.partition('.')
        for model, compared in entry['models'].items():
            found = []
            if about == f'compare.{kind}':
                found = [(f'{name}, {measure(metric)}', compared, metric) for metric in entry['metrics']]
            elif about == 'lengths':
                found = [(f'{name}, {length.replace("-", "–")} words', of_length, 'image_retrieval_recall@1')
                         for length, of_length in compared.get('by_length', {}).items()]
            for label, of, metric in found:
                series.setdefault(model, {})[label] = of['difference'][metric], of['intervals'].get(metric)
    labels = list(dict.fromkeys(label for found in series.values() for label in found))
    return differences(labels, series) if series else Markup('')


def _languages(sets: Mapping[str, Any]) -> list[_Section]:
    """Of sets that differ by the language of their captions, bars beside chance."""
    found = {name: entry['models'] for name, entry in sets.items() if _LANGUAGE.fullmatch(name)}
    if len(found) < 2:
        return []
    codes = [name.rsplit('_', 1)[-1] for name in found]
    labels = codes if len({*codes}) == len(codes) else list(found)
    everywhere = [model for model in next(iter(found.values())) if all(model in models for models in found.values())]
    series = {model: [models[model]['image_retrieval_recall@10'] for models in found.values()] for model in everywhere}
    chance = [next(iter(models.values()))['chance@10'] for models in found.values()]
    return [_Section('Languages', 'How often a text of each language has the right image among the first 10 that it '
                     'finds (text→image R@10), beside what a random order would give.',
                     bars(labels, {**series, CHANCE: chance}))]



def summarize(results: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The contents of the file.

    Args:
        results: `results.json` of the evaluation.
        seconds: Step -> seconds.
    """
    def first_model(kind: str) -> dict[str, Any]:
        return {name: next(iter(entry['models'].values())) for name, entry in results.get(kind, {}).items()}

    return {'stage1': results.get('cra', {}), 'stage2': first_model('retrieval'), 'seconds': dict(seconds),
            **{kind: numbers for kind in ('zeroshot', 'linear_probe', 'composition') if (numbers := first_model(kind))},
            **({'missing': results['missing']} if 'missing' in results else {})}


def collect_seconds(steps: Mapping[str, str]) -> dict[str, float]:
    """Step -> seconds that its folder has recorded."""
    files = {step: Path(folder, SECONDS_FILE) for step, folder in steps.items()}
    return {step: recorded_seconds(file) for step, file in files.items() if file.is_file()}
