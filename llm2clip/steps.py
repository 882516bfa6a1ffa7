# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What each recipe leaves behind, how it goes on after it was stopped, and which command comes next."""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Optional

from llm2clip.config import (
    DatasetConfig,
    DuplicatesConfig,
    EvaluateConfig,
    ExportConfig,
    ExportTeacherConfig,
    ExportVisionConfig,
    ExtractConfig,
    ImportConfig,
    InheritanceConfig,
    NamedTeacherConfig,
    PrepareConfig,
    ReportConfig,
    SearchConfig,
    Stage1Config,
    Stage2Config,
    TextEncoderConfig,
    TrainConfig,
)
from llm2clip.files import FileError, read_json
from llm2clip.folders import claimed, locked

__all__ = ['SECONDS_FILE', 'claim', 'goes_on', 'next_command', 'recorded_seconds', 'step_folder']


SECONDS_FILE = 'seconds.json'
_RECIPES = {
    PrepareConfig: 'prepare_data', Stage1Config: 'train_stage1', ExtractConfig: 'extract_embeddings',
    InheritanceConfig: 'train_inheritance', Stage2Config: 'train_stage2', EvaluateConfig: 'evaluate',
    ExportConfig: 'export_hf', ExportVisionConfig: 'export_vision', ExportTeacherConfig: 'export_sentence_transformers',
    ImportConfig: 'import_official', ReportConfig: 'report', SearchConfig: 'search',
    DuplicatesConfig: 'find_duplicates'}


def step_folder(config: Any) -> Optional[str]:
    """The folder of a step that keeps how long it took; None for one that keeps nothing."""
    if isinstance(config, TrainConfig):
        return config.save_folder
    if isinstance(config, (PrepareConfig, ExtractConfig, EvaluateConfig, ExportConfig, ExportTeacherConfig,
                           ImportConfig, DuplicatesConfig)):
        return config.out
    return None


def recorded_seconds(path: Path) -> float:
    """How long a step took, by its file; 0 if there is none, or it is damaged."""
    try:
        return float(read_json(path, dict)['seconds'])
    except (FileError, LookupError, TypeError, ValueError):
        return 0.0


def claim(config: Any) -> ExitStack:
    """Hold the folders that a step writes, in a block in which no other process can do so.

    Raises:
        ConfigError: On entering: another recipe's or somebody else's files are in one, or another process writes there.
    """
    held = ExitStack()
    recipe = _RECIPES[type(config)]
    if isinstance(config, TrainConfig):
        held.enter_context(claimed(config.save_folder, recipe))
        checkpoints = Path(os.path.abspath(config.checkpoint_folder))
        inside = checkpoints.is_relative_to(os.path.abspath(config.save_folder))
        if not inside and '://' not in config.checkpoint_folder:
            held.enter_context(claimed(checkpoints, recipe))
    elif isinstance(config, PrepareConfig):
        held.enter_context(claimed(config.out, recipe, part=config.machine))
    elif isinstance(config, ReportConfig):
        held.enter_context(claimed(config.out, recipe, ['report.html', 'results.json']))
    elif isinstance(config, SearchConfig):
        if config.images is not None:
            held.enter_context(claimed(config.index, recipe))
    elif isinstance(config, (ExportVisionConfig, ExportTeacherConfig)):
        # These replace the folder as a whole, by what its manifest says.
        out = Path(os.path.abspath(config.out))
        lock = out.with_name(f'.{out.name}.lock')
        held.enter_context(locked(lock, out))
        held.callback(lock.unlink)
    else:
        held.enter_context(claimed(config.out, recipe))
    return held


def goes_on(config: Any) -> str:
    """How the same command goes on after it was stopped; empty if it just begins again."""
    if isinstance(config, TrainConfig):
        if not config.autoresume:
            return ''
        if '://' in config.checkpoint_folder:
            return f'the same command goes on from the newest checkpoint in {config.checkpoint_folder}'
        batch = _newest_batch(config.checkpoint_folder)
        return 'there is no checkpoint yet, the same command begins from the beginning' if batch is None else \
            f'the same command goes on from batch {batch}'
    indexing = isinstance(config, SearchConfig) and config.images is not None
    if indexing or isinstance(config, (PrepareConfig, ExtractConfig, EvaluateConfig, DuplicatesConfig)):
        return 'the same command goes on with what is missing'
    return ''


def _newest_batch(checkpoints: str) -> Optional[int]:
    """The batch of the newest whole checkpoint, to which Composer links after it has written one."""
    try:
        return int(re.findall(r'-ba(\d+)', os.readlink(Path(checkpoints, 'latest-rank0.pt')))[-1])
    except (OSError, IndexError):
        return None


def next_command(config: Any, args: Sequence[str] = ()) -> Optional[str]:
    """A command of the next step that takes what this one wrote, or None at the end of the pipeline.

    Args:
        config: Of this step.
        args: From which it was read.  Where they name one file of a folder with a file for every step, such as
            `yamls/own`, and write where that says, the next file is launched.
    """
    elsewhere = any(arg.startswith(('out=', 'save_folder=', 'teacher_folder=')) for arg in args)
    for path in map(Path, args[:1]):
        if (step := _SERIES.get(path.stem)) is not None and path.with_stem(step[0]).is_file() and not elsewhere:
            return shlex.join([*step[1], str(path.with_stem(step[0]))])
    command = _NEXT.get(type(config))
    return shlex.join(command(config)) or None if command is not None else None


# Name of a step's file in such a folder -> that of the next one, and what launches it.
_SERIES = {
    'prepare': ('stage1', ['composer', '-n', '1', 'recipes/train_stage1.py']),
    'stage1': ('extract', ['composer', '-n', '1', 'recipes/extract_embeddings.py']),
    'extract': ('stage2', ['composer', '-n', '1', 'recipes/train_stage2.py']),
    'stage2': ('evaluate', ['python', 'recipes/evaluate.py']),
    'evaluate': ('export', ['python', 'recipes/export_hf.py']),
    'export': ('report', ['python', 'recipes/report.py']),
}


# Splits that are measured while training.
_MEASURED = ('val', 'heldout')


def _after_prepare(config: PrepareConfig) -> list[str]:
    """Stage 1 on the captions, which needs two of each sample, or else their extraction."""
    splits = {path.parent.name: str(path.parent) for path in sorted(Path(config.out).glob('*/index.json'))}
    if not splits:
        return []  # another machine is still writing
    if config.source.get('by_file'):
        streams = {name: DatasetConfig(folder) for name, folder in splits.items()}
        return [*_stage1(streams, _captions(min(splits.values()))), 'eval_data=null']
    train = splits.pop('train', None) or splits.pop(min(splits))
    keys = _captions(train)
    if len(keys) < 2:
        return _extract('TEACHER', {'train': DatasetConfig(train)}, f'{config.out}_embeddings')
    names = [*(name for name in _MEASURED if name in splits), *(name for name in splits if name != 'test')]
    measured = splits[names[0]] if names else None
    heldout = [f'eval_data.streams.heldout.local={measured}'] if measured else []
    return [*_stage1({'captions': DatasetConfig(train)}, keys), *(heldout or ['eval_data=null'])]


def _after_stage1(config: Stage1Config) -> list[str]:
    if config.objective == 'mntp':  # a warm start: stage 1 goes on from its adapter
        encoder, data = config.text_encoder, config.train_data
        keys = sorted({key for stream in data.streams.values() for key in stream.texts or data.texts})
        return [*_stage1(data.streams, keys), 'eval_data=null', f'save_folder={config.save_folder}-contrastive',
                f'text_encoder.pretrained={encoder.pretrained}',
                f'text_encoder.gguf_file={encoder.gguf_file or "null"}',
                f'text_encoder.adapters={_yaml([*encoder.adapters, config.adapter_folder])}']
    streams = _with_images(config.train_data.streams) or {'train': DatasetConfig('IMAGE_DATASET')}
    return _extract(config.teacher_folder, streams, f'{config.save_folder}/embeddings')


def _after_extract(config: ExtractConfig) -> list[str]:
    images = _with_images(config.datasets)
    if not images:
        return []
    if config.clip_text is not None:
        return _after_targets(config, images)
    measured = {name: images[name] for name in _MEASURED if name in images}
    # What else was embedded, such as the images for tests, is not to be trained on.
    images = {'train': images['train']} if 'train' in images else images
    keys = sorted({key for data in images.values() for key in _captions(data.local)})
    return [*_composer('train_stage2'), 'yamls/stage2/paper.yaml', 'yamls/stage2/vision/clip_b16.yaml',
            'run_name=stage2', f'save_folder={Path(config.out).parent / "stage2"}',
            *_dataset_arguments('train_data.streams', {**images, **_sidecars(config, images)}),
            f'train_data.caption_mix={_yaml(dict.fromkeys(keys or ["CAPTION"], 1.0))}',
            *_dataset_arguments('eval_data.streams', {**measured, **_sidecars(config, measured)}),
            *_teacher(config)]


def _after_targets(config: ExtractConfig, images: Mapping[str, DatasetConfig]) -> list[str]:
    """Inheritance, which also reads what a teacher's extraction wrote."""
    targets = {name.replace('.teacher', '.clip_text'): data for name, data in _sidecars(config, images).items()}
    teachers = {f'{name}.embeddings.teacher': DatasetConfig('TEACHER_SIDECAR') for name in images}
    return [*_composer('train_inheritance'), 'yamls/inheritance/paper.yaml', 'run_name=inheritance',
            f'save_folder={Path(config.out).parent / "inheritance"}',
            *_dataset_arguments('train_data.streams', {**images, **targets, **teachers})]


def _after_inheritance(config: InheritanceConfig) -> list[str]:
    """Stage 2 from the adapter on, with the tower whose text features it learned."""
    data, streams = config.train_data, dict[str, DatasetConfig](config.train_data.streams)
    for name, stream in data.streams.items():
        teachers = data.teachers or [teacher for teacher in stream.embeddings if teacher != data.target]
        streams.update({f'{name}.embeddings.{teacher}': stream.embeddings[teacher] for teacher in teachers})
    about = Path(config.adapter_folder, 'adapter.json')
    embed_dim = read_json(about, dict)['embed_dim'] if about.is_file() else 'EMBED_DIM'
    return [*_composer('train_stage2'), 'yamls/stage2/paper.yaml', 'yamls/stage2/inheritance.yaml',
            'yamls/stage2/vision/clip_l14_336.yaml', 'run_name=stage2', f'initial_adapter={config.adapter_folder}',
            f'model.embed_dim={embed_dim}', f'save_folder={Path(config.save_folder).parent / "stage2"}',
            *_dataset_arguments('train_data.streams', streams),
            *_teacher(config)]


def _teacher(config: NamedTeacherConfig) -> list[str]:
    """Arguments that name the same teacher."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(NamedTeacherConfig)}
    if (llm := config.text_encoder) is not None:
        default = vars(TextEncoderConfig(llm.pretrained))
        values['text_encoder'] = {name: value for name, value in vars(llm).items()
                                  if name == 'pretrained' or value != default[name]}
    as_typed = ('teacher', 'sentence_transformer', 'prompt_name')
    return [f'{name}={value if name in as_typed else _yaml(value)}' for name, value in values.items()
            if value not in (None, False)]


def _sidecars(config: ExtractConfig, names: Iterable[str]) -> dict[str, DatasetConfig]:
    """Key below `streams` -> sidecar."""
    remote = config.out_remote and config.out_remote.rstrip('/')
    return {f'{name}.embeddings.teacher': DatasetConfig(f'{config.out}/{name}', remote and f'{remote}/{name}')
            for name in names}


def _after_stage2(config: Stage2Config) -> list[str]:
    streams = config.eval_data.streams.values() if config.eval_data is not None else ()
    heldout = [f'retrieval.heldout.source.local={stream.local}' for stream in list(streams)[:1]]
    teacher = [] if config.named_by() or config.without_llm else ['models.ours.teacher=TEACHER']
    teacher += ['models.ours.trust_remote_code=true'] if config.trust_remote_code else []
    return [*_evaluate(), 'yamls/eval/sets/mds.yaml', *heldout,
            f'models.ours.run={config.save_folder}', *teacher, f'out={config.save_folder}/evaluate']


def _after_evaluate(config: EvaluateConfig) -> list[str]:
    model = next((model for model in config.models.values() if model.run), None)
    if model is None:
        return []
    teachers = [f'teachers={_yaml(model.teachers)}'] if model.teachers else _teacher(model)
    how = [] if model.interpolate == 1 else [f'interpolate={model.interpolate:g}']
    how += [] if model.dim is None else [f'dim={model.dim}']
    return ['python', 'recipes/export_hf.py', f'run={model.run}', f'weights={model.weights}', *how, *teachers,
            f'results={config.out}', f'out={model.run}/export']


def _after_export(config: ExportConfig) -> list[str]:
    trusted = ['trust_remote_code=true'] if config.trust_remote_code else []
    return ['python', 'recipes/search.py', f'model={config.out}/llm2clip', *trusted, 'images=IMAGES', 'query=a dog']


def _after_import(config: ImportConfig) -> list[str]:
    if config.checkpoint is None:
        return _extract(f'{config.out}/teacher', {'train': DatasetConfig('IMAGE_DATASET')}, f'{config.out}/embeddings')
    return ['python', 'recipes/evaluate.py', 'yamls/eval/sets/mds.yaml',
            f'models.official.export={config.out}/llm2clip', f'out={config.out}/evaluate']


_NEXT: dict[Any, Callable[[Any], list[str]]] = {
    PrepareConfig: _after_prepare, Stage1Config: _after_stage1, ExtractConfig: _after_extract,
    InheritanceConfig: _after_inheritance, Stage2Config: _after_stage2, EvaluateConfig: _after_evaluate,
    ExportConfig: _after_export, ImportConfig: _after_import}


def _composer(recipe: str) -> list[str]:
    return ['composer', '-n', os.environ.get('LOCAL_WORLD_SIZE', '1'), f'recipes/{recipe}.py']


def _evaluate() -> list[str]:
    """On as many ranks as this step had."""
    ranks = os.environ.get('LOCAL_WORLD_SIZE', '1')
    return ['python', 'recipes/evaluate.py'] if ranks == '1' else _composer('evaluate')


def _stage1(streams: Mapping[str, DatasetConfig], keys: list[str]) -> list[str]:
    query, positive = (['query'], ['positive']) if {'query', 'positive'} <= {*keys} else (keys, keys)
    return [*_composer('train_stage1'), 'yamls/stage1/laptop.yaml', *_dataset_arguments('train_data.streams', streams),
            f'train_data.pairs={_yaml([{"query": query, "positive": positive}])}']


def _extract(teacher: str, datasets: Mapping[str, DatasetConfig], out: str) -> list[str]:
    return [*_composer('extract_embeddings'), f'teacher={teacher}', *_dataset_arguments('datasets', datasets),
            f'out={out}']


def _dataset_arguments(key: str, datasets: Mapping[str, DatasetConfig]) -> list[str]:
    return [f'{key}.{name}.{field}={value}' for name, data in datasets.items()
            for field, value in (('local', data.local), ('remote', data.remote)) if value is not None]


def _columns(dataset: str) -> list[str]:
    """Columns of an MDS dataset; none if its index is not here."""
    path = Path(dataset, 'index.json')
    shards = read_json(path, dict).get('shards') if path.is_file() else []
    return shards[0]['column_names'] if shards else []


def _captions(dataset: str) -> list[str]:
    prefix = 'caption.'
    return sorted(name.removeprefix(prefix) for name in _columns(dataset) if name.startswith(prefix))


def _with_images(datasets: Mapping[str, DatasetConfig]) -> dict[str, DatasetConfig]:
    """All but those whose index is here and has no images: texts alone serve stage 1 only."""
    return {name: data for name, data in datasets.items() if 'image' in (_columns(data.local) or ['image'])}


def _yaml(value: Any) -> str:
    """On one line, with texts in quotes, so that a number stays a text."""
    return json.dumps(value, ensure_ascii=False)
