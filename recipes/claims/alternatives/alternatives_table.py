# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The comparisons as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ['describe_kill', 'to_markdown']

Row = Mapping[str, Any]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f'| {" | ".join(head)} |', '|---' * len(head) + '|', *(f'| {" | ".join(row)} |' for row in rows), '']


def describe_kill(kill: Row) -> str:
    """What a kill cost a training, as `kill_and_go_on` found it."""
    if kill['difference'] == 0:
        weights = 'final weights as without the kill'
    else:
        weights = f'final weights differ by up to {kill["difference"]:.1g}'
        if kill['difference_of_a_repetition']:
            weights += f', of a repetition without kill by up to {kill["difference_of_a_repetition"]:.1g}'
    return (f'killed after {kill["killed_after"]} of {kill["steps"]} steps, goes on from {kill["goes_on_from"]}; '
            f'{weights}')


def _recalls(found: Row, way: str) -> str:
    return ' / '.join(f'{found[f"{way}_retrieval_recall@{k}"]:.1f}' for k in (1, 5, 10))


def _training(name: str, scores: Sequence[str], seconds: float, row: Row) -> list[str]:
    return [name, *scores, f'{seconds:.1f}', f'{row["peak_gib_of_training"]:.2f} / {row["peak_gib"]:.2f}',
            f'{row["first_step"]:.0f}', describe_kill(row['kill'])]


def to_markdown(found: Row) -> str:
    """What `run_all` found, as three tables."""
    machine, setting, stage2, extraction = (found[name] for name in ('machine', 'setting', 'stage2', 'extraction'))
    rest = ['peak memory in GiB, training / with what follows', 'seconds to the end of the first step', 'SIGKILL']
    images = next(iter(stage2['rows'].values()))['recalls']
    before = stage2['seconds_before']
    lines = [
        f'{machine["cpu"]}, {machine["threads"]} threads; '
        + ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
        + '; seconds per pass and per step are medians of short trainings that took turns', '',
        f'### Stage 2, {setting["passes"]} passes over the photographs, batch {setting["batch"]}', '',
        f'{images["n_images"]} other photographs with {images["n_texts"]} captions, recall in %. Once before it, '
        f'LLM2CLIP needs stage 1 ({before["stage1"]:.0f} s) and the vectors of the captions '
        f'({before["embeddings"]:.0f} s).', '',
        *_table(['', 'text → image, R@1 / 5 / 10', 'image → text', 'seconds per pass', *rest], [
            _training(name, [_recalls(row['recalls'], 'image'), _recalls(row['recalls'], 'text')],
                      row['seconds_per_pass'], row) for name, row in stage2['rows'].items()]),
        f'### Stage 1, {setting["steps"]} steps of {setting["pairs"]} pairs', '',
        *_table(['', 'caption retrieval accuracy, %', 'seconds per step', *rest], [
            _training(name, [f'{row["cra"]:.1f}'], row['seconds_per_step'], row)
            for name, row in found['stage1'].items()]),
        '### Extraction', '',
        f'Largest difference of two vectors of a caption, relative to their length: '
        f'{extraction["largest_difference"]:.1g}; LLM2CLIP stores them in float16.', '',
        *_table(['', 'captions', 'captions per second', 'peak memory, GiB', 'seconds of the first few', 'SIGKILL'], [
            [name, str(row['captions']), f'{row["captions_per_second"]:.1f}', f'{row["peak_gib"]:.2f}',
             f'{row["seconds_few"]:.0f}', _describe_kill_of_extraction(row['kill'], row['captions'])]
            for name, row in extraction['rows'].items()])]
    return '\n'.join(lines)


def _describe_kill_of_extraction(kill: Row, captions: int) -> str:
    vectors = 'the same vectors' if kill['difference'] == 0 else f'vectors differ by up to {kill["difference"]:.1g}'
    return (f'killed after {kill["killed_after"]:.0f} s, {kill["rescued"]} of {captions} captions are kept; started '
            f'again, it takes {kill["seconds_again"]:.0f} s, in place of {kill["seconds"]:.0f} s; {vectors}')
