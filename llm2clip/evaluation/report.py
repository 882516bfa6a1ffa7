# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Everything that a pipeline wrote, as one self-contained HTML page.

The numbers of a pipeline stand beside its report, in one `results.json`.

::

    {
      "stage1":  {"cra_causal": 51.9, "cra_untrained": 24.8, "cra": 95.1},
      "stage2":  {"unseen_style": {"n_images": 1668, "image_retrieval_recall@10": 42.9, "chance@10": 0.6, …}, …},
      "seconds": {"prepare_emoji": 26.4, "stage1": 506.1, …}
    }

- ``stage1``: text encoder -> caption retrieval accuracy, in percent; the encoders have the names that the evaluation's
  configuration gives them.
- ``stage2``: evaluation set for retrieval -> its metrics, by the first model of the evaluation: ``n_images`` and
  ``n_texts``; ``image_retrieval_recall@k`` (text -> image) and ``text_retrieval_recall@k`` (image -> text) for k = 1, 5
  and 10, and ``chance@10`` (text -> image), in percent; ``image_retrieval_mean_rank`` and ``text_retrieval_mean_rank``,
  where 1 is the best; ``n_truncated`` texts that lost their end and ``n_without_caption`` images that were left out;
  ``precision``, ``fp32`` or ``amp_bf16``; ``intervals``: metric -> both ends of its 95 % bootstrap interval;
  ``by_length``: number of words of a text, ``1-2``, ``3-5``, ``6-12`` or ``13+`` -> what
  `llm2clip.evaluation.retrieval.by_query_length` finds with the texts of that length.
- ``seconds``: step of the pipeline -> how long it took, over all its starts.
- ``zeroshot`` and ``linear_probe``: as ``stage2``, of the sets for classification, if the evaluation has any: what
  `llm2clip.evaluation.classification.zeroshot_metrics` and `accuracy_metrics` return.
- ``composition``: as ``stage2``, of the sets whose texts are much alike, if the evaluation has any: what
  `llm2clip.evaluation.composition.composition_metrics` returns.
- ``missing``: what has no numbers yet, if the evaluation did not come to its end.

Other models of the evaluation are in the `results.json` that `evaluate` wrote.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from llm2clip.config import ConfigError
from llm2clip.evaluation.curve import curve_lines
from llm2clip.evaluation.page import CHANCE, bars, chip, curves, differences, picture, scatter, section, table
from llm2clip.evaluation.tables import (
    Table,
    accuracy_tables,
    average_tables,
    comparison_tables,
    composition_tables,
    cra_tables,
    curve_tables,
    measure,
    partial_note,
    query_length_tables,
    retrieval_tables,
)
from llm2clip.files import read_json, read_text, reading
from llm2clip.steps import SECONDS_FILE, recorded_seconds
from llm2clip.training.callbacks.jsonl_logger import read_metrics

__all__ = ['check_steps', 'collect_seconds', 'read_claims', 'read_evaluation', 'report_parts', 'summarize']

# Model -> label -> difference to the baseline, and its interval.
Series = dict[str, dict[str, tuple[float, Optional[list[float]]]]]

# Sets that hold captions of one language end in its code: de, lang_de, xm3600_fil.
_LANGUAGE = re.compile(r'(.+_)?[a-z]{2}|.+_[a-z]{3}')
# The quickstart's text encoders.
_ENCODERS = {'cra_causal': 'LLM, causal', 'cra_untrained': 'causal mask dropped,\nuntrained', 'cra': 'after stage 1'}


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
            _gallery(name, pictures[name])
    return results, {name: pictures[name] for name in galleries}


def read_claims(folder: Union[str, Path]) -> list[dict[str, Any]]:
    """What `recipes/claims/run_all.py` found.

    Each claim has its ``statement``, what the ``paper`` says, and ``tests``: name -> a row for each variant, with the
    recall of each seed, their mean and standard deviation, and whether it is worse than that of the first variant.

    Raises:
        ConfigError: There is no such folder.
        FileError: The file is damaged.
    """
    path = Path(folder, 'claims.json')
    if not path.is_file():
        raise ConfigError(f'claims: {folder} has no {path.name}, expected what recipes/claims/run_all.py wrote')
    return read_json(path, list)


def check_steps(steps: Mapping[str, str]) -> None:
    """Raise a ConfigError unless every step's folder is there."""
    for step, folder in steps.items():
        if not Path(folder).is_dir():
            raise ConfigError(f'steps.{step}: there is no folder {folder}')


def report_parts(
    results: Mapping[str, Any], galleries: Mapping[str, Any], steps: Optional[Mapping[str, str]] = None,
    claims: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """The parts of the page, in the order of the pipeline.

    Args:
        results: `results.json` of an evaluation.
        galleries: Benchmark -> what `llm2clip.evaluation.gallery.make_gallery` returned, with the ``model``'s name.
        steps: Step of a pipeline -> folder, where seconds, metrics and configurations are looked for.
        claims: As `read_claims` returns them.
    """
    steps = steps or {}
    note = partial_note(results)
    return [
        f'<p><b>{html.escape(note)}</b></p>' if note else '', _cra(results),
        *(section(content.title, 'How often the right image is among the first 1, 5 or 10 that a text finds '
                  '(text→image), and the right text among the first that an image finds (image→text).', table(content))
          for content in retrieval_tables(results)),
        _query_lengths(results), _languages(results.get('retrieval', {})),
        *(section(content.title, 'How often the right class of an image is the first, or among the first five; where '
                  'images have any number of classes, how high each class has its images (mAP).', table(content))
          for content in accuracy_tables(results)),
        *(section(content.title, 'How often a model tells texts of nearly the same words apart: whether an image is '
                  'nearer to its own text than to the other one, or where two images have a text each, whether both '
                  'images (text), both texts (image) or all four (group) are nearer to their own.', table(content))
          for content in composition_tables(results)),
        *(section(content.title, 'The mean of several sets, each of which counts the same.', table(content))
          for content in average_tables(results)),
        *_comparisons(results), _curve(results), _claims(claims),
        *(_gallery(name, gallery) for name, gallery in galleries.items()),
        *(section(f'Training: {step}', 'How loss, learning rates and evaluations went from batch to batch.',
                  curves(metrics) + table(_first_and_last(metrics)))
          for step, folder in steps.items() if (metrics := read_metrics(Path(folder, 'metrics.jsonl')))),
        _seconds(collect_seconds(steps)), _configurations(steps)]


def _cra(results: Mapping[str, Any]) -> str:
    """Of each text encoder, as bars and as a table."""
    cra: Mapping[str, float] = results.get('cra', {})
    pairs = f'{results["cra_pairs"]:,} pairs' if 'cra_pairs' in results else 'all pairs'
    return ''.join(
        section(content.title, f'How often the two captions of a pair find each other among {pairs}, which is what '
                'stage 1 teaches the LLM.',
                bars([_ENCODERS.get(name, name) for name in cra], {'CRA': list(cra.values())}) + table(content))
        for content in cra_tables(results))


def _query_lengths(results: Mapping[str, Any]) -> str:
    """Models for the texts of each length, as a table, and beside a baseline as a picture."""
    series: Series = {}
    metric = 'image_retrieval_recall@1'
    for benchmark, entry in results.get('compare', {'benchmarks': {}})['benchmarks'].items():
        for model, compared in entry['models'].items():
            for length, found in compared.get('by_length', {}).items():
                label = f'{benchmark.partition(".")[2]}, {length.replace("-", "–")} words'
                series.setdefault(model, {})[label] = found['difference'][metric], found['intervals'].get(metric)
    return ''.join(
        section(content.title, 'How often the right image is among the first that a text finds, by the number of its '
                'words.  Short texts fit several images, so that lengths of one set compare models, and not each other.'
                + (f'  The picture has what is won and lost at R@1 against {results["compare"]["baseline"]}.'
                   if series else ''), (differences(_labels(series), series) if series else '') + table(content))
        for content in query_length_tables(results))


def _labels(series: Series) -> list[str]:
    """All that a model has a difference for, in the order in which they come."""
    return list(dict.fromkeys(label for found in series.values() for label in found))


def _languages(sets: Mapping[str, Any]) -> str:
    """Of sets that differ by the language of their captions, as bars beside chance."""
    found = {name: entry['models'] for name, entry in sets.items() if _LANGUAGE.fullmatch(name)}
    if len(found) < 2:
        return ''
    codes = [name.rsplit('_', 1)[-1] for name in found]
    labels = codes if len({*codes}) == len(codes) else list(found)
    everywhere = [model for model in next(iter(found.values())) if all(model in models for models in found.values())]
    series = {model: [models[model]['image_retrieval_recall@10'] for models in found.values()] for model in everywhere}
    chance = [next(iter(models.values()))['chance@10'] for models in found.values()]
    return section('Languages', 'How often a text of each language has the right image among the first 10 that it '
                   'finds (text→image R@10), beside what a random order would give.',
                   bars(labels, {**series, CHANCE: chance}))


def _comparisons(results: Mapping[str, Any]) -> list[str]:
    """Models beside a baseline, kind by kind, as a picture and a table."""
    return [section(content.title, f'What each model has won (to the right) and lost (to the left) against '
                    f'{results["compare"]["baseline"]}, with the 95 % interval of the difference.',
                    differences(*_differences(results['compare']['benchmarks'], kind)) + table(content))
            for kind, content in comparison_tables(results).items()]


def _differences(benchmarks: Mapping[str, Any], kind: str) -> tuple[list[str], Series]:
    """Labels, and the differences of the benchmarks of a kind."""
    series: Series = {}
    for benchmark, entry in benchmarks.items():
        of_kind, _, name = benchmark.partition('.')
        for metric in entry['metrics'] if of_kind == kind else ():
            label = f'{name}, {measure(metric)}'
            for model, compared in entry['models'].items():
                found = (compared['difference'][metric], compared['intervals'].get(metric))
                series.setdefault(model, {})[label] = found
    return _labels(series), series


def _curve(results: Mapping[str, Any]) -> str:
    """Models between two benchmarks, as a table and a picture."""
    curve = results.get('curve', {})
    return ''.join(
        section(content.title, f'What is left of what the tower could do before ({curve["old"]}), and what it has '
                f'learned ({curve["new"]}): weights between those that a run began with (0) and ended with (1).',
                scatter([curve['old'], curve['new']], curve_lines(curve)) + table(content))
        for content in curve_tables(results))


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    """A table and bars for each test of each claim."""
    parts = []
    for number, claim in enumerate(claims, 1):
        parts.append(f'<h3>{number}. {html.escape(claim["statement"])}</h3><p>Paper: {html.escape(claim["paper"])}</p>')
        for test, rows in claim['tests'].items():
            seeds = len(rows[0]['scores'])
            cells = [[row['variant'], f'{row["mean"]:.1f} ± {row["spread"]:.1f}', row['worse than the first']]
                     for row in rows]
            parts += [table(Table(test, [test, f'R@10, {seeds} seeds', 'worse than the first'], cells)),
                      bars([row['variant'].replace('_', '\n') for row in rows], {
                          'R@10': [row['mean'] for row in rows], CHANCE: [row['chance'] for row in rows]})]
    return section("The paper's claims", 'Trainings that differ in one thing: recall at 10, the mean of both '
                   'directions, and its standard deviation over the seeds.  What the paper says is best comes first.',
                   ''.join(parts)) if parts else ''


def _gallery(name: str, gallery: Mapping[str, Any]) -> str:
    """Best, median and worst queries of both directions."""
    parts = []
    for title, rows, query, result in (
            ('Texts as queries', gallery['texts'], lambda text: f'<b>{html.escape(text)}</b>', picture),
            ('Images as queries', gallery['images'], picture, chip)):
        parts.append(f'<h3>{title}</h3><div class="grid">')
        for row in rows:
            found = ''.join(result(item, right) for item, right in row['results'])
            parts.append(f'<div class="row"><i>{html.escape(row["kind"])}, rank {row["rank"]:,}</i>'
                         f'{query(row["query"])}<div>{found}</div></div>')
        parts.append('</div>')
    return section(f'{name}, by {gallery["model"]}', 'What the best, the median and the worst queries found, the first '
                   'on the left. Right results are framed in green; the rank is that of the first right one, which '
                   'stands last where it is not among the first.',
                   ''.join(parts))


def _first_and_last(metrics: Mapping[str, Mapping[int, float]]) -> Table:
    """What a training began and ended with, of each loss and evaluation."""
    rows = [[name, *(f'{values[batch]:.4g} (batch {batch:,})' for batch in (min(values), max(values)))]
            for name, values in metrics.items() if name.startswith(('loss/', 'metrics/'))]
    return Table('Training', ['', 'first', 'last'], rows)


def _seconds(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ''
    rows = [[step, f'{value:.0f}'] for step, value in seconds.items()]
    content = Table('Steps', ['step', 'seconds'], [*rows, ['all', f'{sum(seconds.values()):.0f}']])
    return section('Time', 'How long each step took, over all its starts.', table(content))


def _configurations(steps: Mapping[str, str]) -> str:
    configs = ''.join(
        f'<details><summary>{html.escape(step)}</summary><pre>{html.escape(read_text(path))}</pre></details>'
        for step, folder in steps.items() if (path := Path(folder, 'config.yaml')).is_file())
    return section('Configurations', 'Every key of each step as it was set when it ran.', configs) if configs else ''


def summarize(results: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The contents of the file.

    Args:
        results: `results.json` of the evaluation.
        seconds: Step -> seconds.
    """
    summary = {'stage1': results.get('cra', {}), 'stage2': _first_model(results.get('retrieval', {})),
               'seconds': dict(seconds)}
    others = {kind: _first_model(results[kind]) for kind in ('zeroshot', 'linear_probe', 'composition')
              if results.get(kind)}
    return {**summary, **others, **({'missing': results['missing']} if 'missing' in results else {})}


def _first_model(sets: Mapping[str, Any]) -> dict[str, Any]:
    """Set -> metrics."""
    return {name: next(iter(entry['models'].values())) for name, entry in sets.items()}


def collect_seconds(steps: Mapping[str, str]) -> dict[str, float]:
    """Step -> seconds that its folder has recorded."""
    files = {step: Path(folder, SECONDS_FILE) for step, folder in steps.items()}
    return {step: recorded_seconds(file) for step, file in files.items() if file.is_file()}
