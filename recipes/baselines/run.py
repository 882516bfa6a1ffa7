# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Compare LLM2CLIP with open_clip and sentence-transformers on Flickr8k: make baselines

Every program has the same minutes on the same CPU: 25 for a model of images and texts, 5 for a text encoder.
Stage 1 and the extraction of LLM2CLIP count as its time.  The paces of the programs give the numbers of
steps, the same for all seeds.  To measure them, the programs of a table take turns of 20 seconds, so that
a slow minute of the machine affects all alike; meanwhile, they need 20 GiB of memory together.

All programs use the photographs and captions of `make photographs`, EfficientNet-Lite0 with ImageNet weights
at 128 pixels or SmolLM2-135M with LoRA, the batch, AdamW with weight decay, warm-up, and gradient clipping of
`yamls/flickr8k/`.  They differ in what each of them offers:

- LLM2CLIP reads five captions of an image at once, freezes three blocks and the statistics of BatchNorm, and
  sets the learning rate of the tower to a third.  Its stage 1 has 150 steps, to leave time for the tower.
- With a frozen tower, LLM2CLIP reads precomputed vectors of both sides, of the same teacher and of the same
  tower or of EfficientNet-Lite2 at 320 pixels, for the ten epochs of `align.yaml`.
- open_clip trains a text tower from scratch.  Its crops and colours are those of LLM2CLIP, without flips.
  Its learning rate is that of LLM2CLIP.
- sentence-transformers trains LoRA on the LLM beside the tower, which its Router joins, without augmentation.
- As a text encoder, LLM2CLIP drops the causal mask and trains both directions;
  sentence-transformers keeps the mask.

A run has one seed, that of the environment variable `SEED` (17).  `baselines.json` in
`runs/flickr8k/baselines/` gets the numbers of all seeds and `baselines.md` the tables.  Finished measurements
are skipped; an interrupted one starts again.
"""

import csv
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from llm2clip.command import SECONDS_FILE, recorded_seconds
from llm2clip.config import Stage2Config
from llm2clip.config.loading import load_config
from llm2clip.data.schema import CAPTION, IMAGE, SAMPLE_ID, read_samples
from llm2clip.metrics.retrieval import rank_both_ways
from recipes.benchmarks.measuring import Record, kept, markdown_table, occurrences, paces_in_turns, watch

RUN = Path('runs/flickr8k')
OUT = RUN / 'baselines'
TEST = RUN / 'data/test'
SIZE = 128
PACED_STEPS = 1_000  # of trainings that are killed earlier
SEED = int(os.environ.get('SEED', '17'))
OPEN_CLIP_MODEL = OUT / f'open_clip_seed{SEED}'
THEIRS = (sys.executable, '-m', 'recipes.baselines.sentence_transformers_model')
OPEN_CLIP = (sys.executable, '-m', 'recipes.baselines.open_clip_model')
OURS = ('device=cpu', 'precision=fp32', f'seed={SEED}', f'train_data.shuffle_seed={SEED}', 'eval_data=null')


class Program(NamedTuple):
    """A program that trains for a number of steps."""

    command: Callable[[Path, int], list[str]]
    """Output folder, steps -> command."""
    progress: tuple[str, str]
    """File in the folder, and the text that the file has once for every finished step."""
    score: Callable[[Path], dict[str, float]]
    """Output folder -> accuracies in %."""
    steps: Optional[int] = None
    """Steps after which it has converged, before its minutes are over; more would only overfit."""
    before: tuple[str, ...] = ()
    """Steps of `prepare` whose time counts."""


def recalls(metrics: dict[str, float]) -> dict[str, float]:
    return {'text_to_image': metrics['image_retrieval_recall@10'],
            'image_to_text': metrics['text_retrieval_recall@10']}


def run_recipe(recipe: str, *settings: str) -> Callable[[Path, int], list[str]]:
    """Return the function of folder and steps that gives the command of a recipe."""
    return lambda folder, steps: [
        sys.executable, f'recipes/{recipe}.py', *settings, *OURS, f'save_folder={folder}',
        f'max_duration={steps}ba', f'save_interval={steps}ba']


def our_score(folder: Path, *keys: str) -> Any:
    out = folder / 'evaluate'
    watch([sys.executable, 'recipes/evaluate.py', *keys, f'out={out}', 'device=cpu'], folder / 'evaluate.log')
    return json.loads((out / 'results.json').read_text())


def our_recalls(folder: Path) -> dict[str, float]:
    results = our_score(folder, 'yamls/flickr8k/ablations_evaluate.yaml', f'cache={OUT}/text_embeddings',
                        f'models.llm2clip.run={folder}', 'models.llm2clip.batch_tokens=1024')
    return recalls(results['retrieval']['test']['models']['llm2clip'])


def our_accuracy(folder: Path) -> dict[str, float]:
    return our_score(folder, f'cra.captions={TEST}', 'cra.caption_keys=["0", "1"]', 'cra.batch_tokens=1024',
                     f'cra.teachers.cra={folder}/teacher')['cra']


def captions_of(sample: dict[str, Any]) -> list[str]:
    captions = []
    for key, text in sorted(sample.items()):
        if key.startswith(CAPTION) and text:
            captions.append(text)
    return captions


def recalls_of(images: torch.Tensor, texts: torch.Tensor, captions: list[list[str]]) -> dict[str, float]:
    """Return recalls in % from the features of images and of all their captions."""
    image_of_text = torch.arange(len(captions)).repeat_interleave(torch.tensor([*map(len, captions)]))
    return recalls(rank_both_ways(images, texts, image_of_text).recalls())


def pairs(folder: Path) -> list[tuple[str, str]]:
    """Write the training photographs as files, once; return (file, caption) of every caption."""
    images = folder / 'images'
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for sample in read_samples(RUN / 'data/train'):
        path = images / sample[SAMPLE_ID]
        if not path.is_file():
            path.write_bytes(sample[IMAGE])
        lines += [(str(path), text) for text in captions_of(sample)]
    return lines


def open_clip(folder: Path, steps: int) -> list[str]:
    """Return open_clip's command.  Its table repeats the captions until one epoch has all steps."""
    config = load_config(Stage2Config, ['yamls/flickr8k/stage2.yaml'])
    data = config.train_data
    jitter = data.color_jitter
    batch = config.global_train_batch_size
    table = folder.with_suffix('.csv')
    with table.open('w', newline='') as file:
        csv.writer(file).writerows([('image', 'caption'), *islice(cycle(pairs(OUT)), steps * batch)])
    options = {
        'model': f'local-dir:{OPEN_CLIP_MODEL}', 'dataset-type': 'csv', 'train-data': table,
        'csv-separator': ',', 'csv-img-key': 'image', 'csv-caption-key': 'caption', 'logs': folder.parent,
        'name': folder.name, 'batch-size': batch, 'epochs': 1, 'lr': config.optimizer['lr'],
        'warmup': min(20, steps // 2), 'beta1': 0.9, 'beta2': 0.999, 'eps': 1e-8,
        'wd': config.optimizer['weight_decay'],
        'grad-clip-norm': config.algorithms['gradient_clipping']['clipping_threshold'], 'precision': 'fp32',
        'device': 'cpu', 'seed': SEED, 'workers': data.num_workers, 'log-every-n-steps': 1}
    command = [sys.executable, '-m', 'open_clip_train.main']
    for name, value in options.items():
        command += [f'--{name}', str(value)]
    return [*command, '--aug-cfg', f'scale=({data.crop_scale[0]},{data.crop_scale[1]})',
            'color_jitter_prob=1.0', f'color_jitter=({jitter},{jitter},{jitter},{jitter / 5})',
            f'gray_scale_prob={data.grayscale}']


def score_by(command: tuple[str, ...], file: str, folder: Path) -> Any:
    """Let a module of this package write its numbers to a file."""
    watch([*command, str(TEST), f'{folder}/{file}'], folder / 'evaluate.log')
    return json.loads((folder / file).read_text())


def open_clip_recalls(folder: Path) -> dict[str, float]:
    checkpoint = f'{folder}/checkpoints/epoch_1.pt'
    return score_by((*OPEN_CLIP, 'recall', str(OPEN_CLIP_MODEL), checkpoint), 'recalls.json', folder)


def st_program(task: str, *arguments: str) -> Program:
    return Program(
        lambda folder, steps: [*THEIRS, 'train', task, str(OUT), str(folder), str(steps), *arguments],
        ('steps.txt', 'step'),
        lambda folder: score_by((*THEIRS, 'score', task, f'{folder}/final'), 'score.json', folder))


TOWER = load_config(Stage2Config, ['yamls/flickr8k/stage2.yaml']).model.vision
LITE0 = [f'vision.{key}={value}' for key, value in [
    ('name', TOWER.name), ('checkpoint', TOWER.checkpoint), ('image_size', SIZE), ('feature_levels', 1)]]
STREAM = 'train_data.streams.photographs'
EMBEDDINGS = (f'teacher={OUT}/stage1/teacher', f'{STREAM}.embeddings.smollm2.local={OUT}/embeddings/train')
TRAINED = ('yamls/flickr8k/stage2.yaml', f'model.vision.image_size={SIZE}', 'train_data.image_size=null',
           *EMBEDDINGS)
ALIGNED = ('yamls/flickr8k/align.yaml', *EMBEDDINGS)
STAGE1 = ('yamls/flickr8k/stage1.yaml', f'text_encoder.pretrained={OUT}/llm', 'text_encoder.gguf_file=null')
STEPS = ('metrics.jsonl', '"loss/train/total"')
TABLES: dict[str, dict[str, Program]] = {
    'images and texts': {
        'LLM2CLIP': Program(
            run_recipe('train_stage2', *TRAINED), STEPS, our_recalls,
            before=('stage1', 'embeddings')),
        'LLM2CLIP, frozen tower': Program(
            run_recipe('train_stage2', *ALIGNED, *(f'model.{setting}' for setting in LITE0),
                       f'{STREAM}.image_embeddings.local={OUT}/lite0/train'),
            STEPS, our_recalls, 110, ('stage1', 'embeddings', 'lite0')),
        'LLM2CLIP, frozen EfficientNet-Lite2': Program(
            run_recipe('train_stage2', *ALIGNED, f'{STREAM}.image_embeddings.local={OUT}/lite2/train'),
            STEPS, our_recalls, 110, ('stage1', 'embeddings', 'lite2')),
        'open_clip': Program(open_clip, ('out.log', 'Train Epoch'), open_clip_recalls),
        'sentence-transformers, Router': st_program('images', 'MultipleNegativesRankingLoss'),
    },
    'text encoder': {
        'LLM2CLIP': Program(run_recipe('train_stage1', *STAGE1), STEPS, our_accuracy),
        'LLM2CLIP, GradCache': Program(
            run_recipe('train_stage1', *STAGE1, 'algorithms.grad_cache={}',
                       'device_train_microbatch_size=16'),
            STEPS, our_accuracy),
        'sentence-transformers': st_program('captions', 'MultipleNegativesRankingLoss'),
        'sentence-transformers, cached loss': st_program('captions', 'CachedMultipleNegativesRankingLoss'),
        'sentence-transformers, SimCSE as in LLM2Vec': st_program('simcse', 'MultipleNegativesRankingLoss'),
    },
}
COLUMNS = {'before': 'seconds before', 'first_step': 'seconds to the first step',
           'seconds_per_step': 'seconds per step', 'peak_gib': 'GiB', 'steps': 'steps'}


def prepare() -> None:
    """Write what the programs start from: models, and what a short stage 1 and two towers embed."""
    kept(OPEN_CLIP_MODEL.with_suffix('.json'),
         lambda: watch([*OPEN_CLIP, 'make', str(OPEN_CLIP_MODEL)], OPEN_CLIP_MODEL.with_suffix('.log')))
    kept(OUT / 'base.json', lambda: watch([*THEIRS, 'base', str(OUT)], OUT / 'base.log'))
    extract_images = ['extract_image_embeddings', 'yamls/flickr8k/align_extract.yaml']
    commands = {
        'stage1': ['train_stage1', 'yamls/flickr8k/stage1.yaml', f'save_folder={OUT}/stage1',
                   'max_duration=150ba', 'save_interval=150ba', 'eval_data=null'],
        'embeddings': ['extract_embeddings', 'yamls/flickr8k/extract.yaml', f'teacher={OUT}/stage1/teacher',
                       f'out={OUT}/embeddings'],
        'lite0': [*extract_images, *LITE0, f'out={OUT}/lite0'],
        'lite2': [*extract_images, f'out={OUT}/lite2']}
    for step, (recipe, *settings) in commands.items():
        kept(OUT / f'{step}.json', partial(watch, [sys.executable, f'recipes/{recipe}.py', *settings],
                                           OUT / f'{step}.log'))


def plan_steps(programs: dict[str, Program], minutes: float, out: Path) -> dict[str, dict[str, float]]:
    """Return the steps of every program, and the pace that fills its minutes with them."""
    trainings = {}
    out.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        if program.steps is None:
            folder = out / folder_name(name)
            shutil.rmtree(folder, ignore_errors=True)
            trainings[name] = (program.command(folder, PACED_STEPS),
                               partial(occurrences, folder / program.progress[0], program.progress[1]))
    paces = paces_in_turns(trainings, out, warm_up=5, rounds=6, seconds=20.0)
    plan: dict[str, dict[str, float]] = {}
    for name, program in programs.items():
        if program.steps is not None:
            plan[name] = {'steps': program.steps}
            continue
        left = 60 * minutes - seconds_before(program) - paces[name]['first_step']
        if left < 0:
            raise SystemExit(f'{name}: {minutes:g} minutes are too few; they end before the first step')
        plan[name] = {'steps': 1 + int(left / paces[name]['seconds_per_step'])} | paces[name]
    return plan


def seconds_before(program: Program) -> float:
    """Return the seconds that the steps before a training took."""
    return sum(recorded_seconds(OUT / step / SECONDS_FILE) for step in program.before)


def folder_name(name: str) -> str:
    return name.replace(',', '').replace(' ', '_')


def measure(program: Program, planned: dict[str, float], folder: Path) -> dict[str, float]:
    """Train for the planned steps; return the times, the memory and the accuracies.

    The times are those of the plan if it has some, since the machine may have been slower or faster now.
    """
    def train() -> dict[str, Any]:
        shutil.rmtree(folder / 'run', ignore_errors=True)
        finished = partial(occurrences, folder / 'run' / program.progress[0], program.progress[1])
        command = program.command(folder / 'run', int(planned['steps']))
        return watch(command, folder / 'run.log', finished, memory=True)

    folder.mkdir(parents=True, exist_ok=True)
    trained = kept(folder / 'trained.json', train)
    del trained['seconds']
    scores = kept(folder / 'score.json', lambda: program.score(folder / 'run'))
    return {'before': seconds_before(program)} | trained | planned | scores


def to_markdown(record: Record) -> str:
    """Return one table per kind of model, with means over the seeds."""
    about = record.about
    lines = [f'Commit {about["commit"]}, {about["date"]}, torch {about["torch"]}, {about["hardware"]}, mean '
             f'of the seeds {about["seeds"]}', '']
    for title, programs in TABLES.items():
        rows = []
        columns: list[str] = []
        for name in programs:
            seeds = record.by_seed(f'{title}: {name}')
            columns = [*COLUMNS, *(key for key in seeds[0] if key not in COLUMNS)]
            means = [statistics.mean(seed[key] for seed in seeds) for key in columns]
            rows.append([name, *(f'{mean:.1f}' for mean in means)])
        lines += [f'### {title}', '', markdown_table(['', *(COLUMNS.get(key, key) for key in columns)], rows)]
    return '\n'.join(lines)


def main(minutes: float = 25.0, minutes_of_texts: float = 5.0) -> None:
    os.environ['HF_HUB_OFFLINE'] = '1'
    prepare()
    lengths = {'images and texts': minutes, 'text encoder': minutes_of_texts}
    record = Record(OUT / 'baselines.json')
    record.about['settings'] = f'{lengths} minutes'
    for title, programs in TABLES.items():
        out = OUT / folder_name(title)
        plan = kept(out / 'plan.json', partial(plan_steps, programs, lengths[title], out / 'paces'))
        for name, program in programs.items():
            if not record.has(f'{title}: {name}', SEED):
                folder = out / folder_name(name) / f'seed{SEED}'
                record.add(f'{title}: {name}', SEED, measure(program, plan[name], folder))
    text = to_markdown(record)
    (OUT / 'baselines.md').write_text(text)
    print(text)


if __name__ == '__main__':
    main(*map(float, sys.argv[1:]))
