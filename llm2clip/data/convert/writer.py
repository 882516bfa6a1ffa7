# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Samples -> MDS datasets that appear only when they are complete, with a card of what went in.

Every part of a split becomes a folder of shards inside that of the split, ``part-<name>``, written by one process; when
all are there, on whichever machine, one index over all of them, in the split's folder, makes the dataset readable.
"""

import os
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

from tqdm import tqdm

from llm2clip.config import ConfigError, WriterConfig
from llm2clip.config.files import check_values
from llm2clip.config.ranges import FolderName
from llm2clip.data.convert.finish import CARD_FILE, finish
from llm2clip.data.convert.part_writer import writing
from llm2clip.data.convert.parts import (
    PART_FILE,
    PartJob,
    as_json,
    check_inputs,
    check_left_out,
    check_options,
    covers,
    deciding_options,
    input_identity,
    parts_of_index,
    read_record,
)
from llm2clip.data.convert.samples import Dropped, Part, size_of_input
from llm2clip.engine import Engine, LocalEngine
from llm2clip.files import read_json
from llm2clip.folders import OutputFolder

__all__ = ['CARD_FILE', 'is_written', 'write_splits']


def write_splits(
    splits: Mapping[str, list[Part]],
    dropped: Dropped,
    out: Union[str, Path, OutputFolder],
    config: Optional[WriterConfig] = None,
    about: Optional[Mapping[str, Any]] = None,
    extend: bool = False,
    engine: Optional[Engine] = None,
) -> Optional[dict[str, int]]:
    """Write one MDS dataset per split, and their card beside them.

    Every image is decoded to check it; a sample whose image does not decode, or that has no caption or lacks one that
    its source requires, is left out and counted.  Parts that are there already are kept.  With several machines each
    writes its share, and the last one to finish writes the indices.

    Args:
        splits: Name -> parts.
        dropped: What the source left out before the parts.
        out: The folder; a part that is complete is uploaded if it has a remote.
        config: How to write.
        about: Facts about the source for the card; a folder with samples of another source is refused.
        extend: It may have parts of a source with fewer ``files``, which then come first, in the order of the index.
        engine: By which the parts are written; unset, by the processes of this machine that `config` says.

    Returns:
        Samples written, a split; None if other machines are not done.

    Raises:
        ConfigError: The folder has samples that were written with another configuration, or a dataset that was not
            written here, or one with a part that is none of the source's; a split has a name that no folder can have;
            or `require_any_caption` has a key that the samples do not have.
        FileError: A part that is there already is damaged, or a text cannot be written.
        FileNotFoundError: A part was written on a machine that does not share `out`, which has no remote.
        ValueError: Two samples have the same id, the captions' keys differ, a split is empty, or more samples were
            left out than `max_dropped` allows.
    """
    out, config = out if isinstance(out, OutputFolder) else OutputFolder(out), config or WriterConfig()
    options = deciding_options(about or {}, config)
    there = {}
    for split, parts in splits.items():
        check_values(FolderName, split, 'source.split')
        before = parts_of_index(out, split)
        there[split] = before if extend else []
        if gone := [folder for folder in there[split] if folder not in {f'part-{part.name}' for part in parts}]:
            raise ConfigError(f'extend: {out.local / split} has {gone[0]}, which comes from none of the input files; '
                              'expected those that the dataset was written from, and more')
        if extend and config.leave_out is not None:
            check_left_out(out, split, before, config.leave_out)
    files = dict.fromkeys(path for parts in splits.values() for part in parts for path in part.files)
    inputs = {path: input_identity(path) for path in files}
    jobs = [PartJob(out, f'{split}/part-{part.name}', part, config,
                    {**options, 'inputs': {path: inputs[path] for path in part.files}}, extend)
            for split, parts in splits.items() for part in parts]
    for job in jobs:
        check_values(FolderName, f'part-{job.part.name}', 'the folder of a part')
    names = Counter(job.folder for job in jobs)
    if max(names.values(), default=0) > 1:
        raise ValueError(f'two input files would be written to {names.most_common(1)[0][0]}; give them different names')
    # A part of every other machine, so that other options are refused before the work.
    for job in jobs[:config.machine] + jobs[config.machine + 1:config.machines]:
        read_record(job)
    mine = jobs[config.machine::config.machines]
    # A part that gave no sample is read again: what was missing may be there now.
    todo = {job.folder: job for job in mine if not (read_record(job) or {}).get('samples')}
    engine = engine or LocalEngine(config.num_workers)
    size = size_of_input(job.part for job in todo.values())
    more = '' if size is None else f'; their input files have {tqdm.format_sizeof(size, "B")}'
    print(f'{out}: {len(todo)} of {len(mine)} parts are to be written, by {engine}{more}', flush=True)
    written = 0
    with tqdm(total=len(mine), desc=f'write {out.local.name}', unit=' parts') as progress:
        progress.update(len(mine) - len(todo))

        def count(samples: int) -> None:
            nonlocal written
            written += samples
            progress.update()
            progress.set_postfix(samples=written)

        engine.run(todo, partial(writing, len(todo) == 1), count)
    records: dict[str, dict[str, Any]] = {split: {} for split in splits}
    for job in jobs:
        if (record := read_record(job)) is None:
            if config.machines == 1:
                raise FileNotFoundError(f'{out.local / job.folder / PART_FILE}, which another machine has written, is '
                                        'not here: machines that do not share the folder need out_remote')
            return None
        split, folder = job.folder.rsplit('/', 1)
        records[split][folder] = record
    # A dataset that grows keeps its shards where they were: sidecars rely on it.
    records = {split: {**{folder: parts[folder] for folder in there[split]}, **parts}
               for split, parts in records.items()}
    return finish(records, dropped, out, config, {**(about or {}), 'inputs': inputs}, options)


def is_written(out: OutputFolder, about: Mapping[str, Any], config: WriterConfig) -> bool:
    """Whether a dataset is complete.

    Args:
        out: Its folder.
        about: Facts about its source, as `write_splits` was given them.
        config: As `write_splits` was given it.

    Raises:
        ConfigError: It is, but was written from another source, with other options, or from an input file that has
            changed since.
    """
    if not out.fetch(CARD_FILE):
        return False
    card = read_json(out.local / CARD_FILE, dict)
    for name, value in as_json(about).items():
        if name in card and card[name] != value:
            more = ', or extend it by extend=true' if covers(card[name], value) else ''
            raise ConfigError(f'out: {out} is complete, but was written with another {name} ({out.local / CARD_FILE} '
                              f'has it); remove it to convert again{more}')
    inputs = card.get('inputs', {})
    check_inputs(out, inputs, {path: input_identity(path) for path in inputs if os.path.isfile(path)})
    options = deciding_options(about, config)
    if card.get('leave_out') != options.get('leave_out'):
        raise ConfigError(f'out: {out} is complete, but was written with another leave_out; remove it to convert again')
    for split in card.get('samples', ()):
        for folder in parts_of_index(out, split)[:1]:
            if out.fetch(name := f'{split}/{folder}/{PART_FILE}'):
                check_options(out, out.local / name, read_json(out.local / name, dict), options, True)
    return True
