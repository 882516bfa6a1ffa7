# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Two ranks share an evaluation, and leave what one rank leaves."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from launched import Launched, contents, finish
from recipes_in_process import run_recipe
from set_files import custom_sets, write_custom_sets, write_wds

from llm2clip.evaluation import benchmarks, evaluated_models
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher import caption_teacher

pytestmark = pytest.mark.dist

# Several blocks of texts, as large sets have them.
BLOCK = 7
# Evaluations one after the other, then what this rank encoded; the last one fails.
SCRIPT = f"""
import json, os, runpy, sys
from llm2clip.evaluation import benchmarks, evaluated_models
from llm2clip.teacher import caption_teacher, sources
caption_teacher._BLOCK = benchmarks._BLOCK = evaluated_models._TEXTS = {BLOCK}
encoded = {{'images': 0, 'texts': 0}}

def counted(what, method):
    def call(self, inputs):
        encoded[what] += len(inputs)
        return method(self, inputs)
    return call

evaluated_models.TrainedLLM2CLIP.image_features = counted(
    'images', evaluated_models.TrainedLLM2CLIP.image_features)
sources.LLMTeacher.embed = counted('texts', sources.LLMTeacher.embed)
for args in json.loads(sys.argv[1]):
    sys.argv = ['evaluate', *args]
    if 'broken' in str(args):
        print('rank', os.environ['RANK'], 'encoded', json.dumps(encoded))
    runpy.run_path('recipes/evaluate.py', run_name='__main__')
"""


class Place:
    def __init__(self, folder: Path, exported: Path, baseline: Path, teacher: Path, images: Path) -> None:
        self.folder, self.sets, self.broken = folder, folder / 'sets', folder / 'broken'
        self.models = [f'models.ours.export={exported}', f'models.bf16={{export: {exported}, precision: amp_bf16}}',
                       f'models.theirs={{pretrained: {baseline}, precision: amp_bf16}}']
        write_wds(folder / 'tars', [i % 6 for i in range(12)])
        self.others = [f'cra.captions={images}', f'cra.teachers.t={teacher}', 'cra.limit=20',
                       f'zeroshot.tars.source={{name: clip_benchmark, local: {folder}/tars}}',
                       'baseline=theirs', 'averages.all=[zeroshot.pets, zeroshot.tars]']
        for sets in (self.sets, self.broken):
            sets.mkdir()
            write_custom_sets(sets)
        # Of the second batch, which the second rank takes.
        self.damaged = self.broken / 'classes/dog/1.png'
        self.damaged.write_bytes(self.damaged.read_bytes()[:60])

    def evaluate(self, out: str, sets: Path, models: Sequence[str]) -> list[str]:
        return [f'out={self.folder / out}', 'num_workers=0', 'device=cpu', 'gallery=1', 'bootstrap=20', 'batch_size=5',
                *custom_sets(sets), *models]


@pytest.fixture(scope='module')
def place(exported: tuple[LLM2CLIP, Path], clip: Path, teacher_folder: Path, image_dataset: Path,
          tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp('ranks'), exported[1], clip, teacher_folder, image_dataset)


@pytest.fixture(scope='module')
def log(place: Place) -> str:
    """The output of two ranks that evaluate, and then come across the damaged image."""
    script, log = place.folder / 'script.py', place.folder / 'log'
    script.write_text(SCRIPT)
    evaluations = [place.evaluate('two', place.sets, [*place.models, *place.others]),
                   place.evaluate('resumed', place.broken, place.models[:1])]
    return finish(Launched([str(script), json.dumps(evaluations)], log, 2), log, ok=False)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for module, name in ((caption_teacher, '_BLOCK'), (benchmarks, '_BLOCK'), (evaluated_models, '_TEXTS')):
        monkeypatch.setattr(module, name, BLOCK)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield monkeypatch
    torch.set_num_threads(before)


def test_two_ranks_find_what_one_finds(place: Place, log: str, one_rank: pytest.MonkeyPatch) -> None:
    run_recipe(one_rank, 'evaluate', *place.evaluate('one', place.sets, [*place.models, *place.others]))
    one, two = (contents(place.folder / name, r'config\.yaml|seconds\.json') for name in ('one', 'two'))
    assert one == two
    results = json.loads(one['results.json'])
    assert results['cra'] and results['averages']['all']['models']['ours']['compared'] and 'missing' not in results
    assert len(results['comparison']['benchmarks']) == 4
    precisions = [found['precision'] for found in results['retrieval']['flickr30k']['models'].values()]
    assert precisions == ['fp32', 'amp_bf16', 'amp_bf16']
    assert b'; computed in bfloat16: bf16, theirs\n' in one['results.md']
    # Each image and text was encoded on one rank, and its progress shown by one.
    encoded = [json.loads(line) for line in re.findall(r'rank \d encoded (.*)', log)]
    assert sorted(rank['images'] for rank in encoded) == [5 * 3 * 2, 7 * 3 * 2]
    texts = [rank['texts'] for rank in encoded]
    # Of the evaluation by two models, and of 20 pairs of captions.
    assert sum(texts) == 2 * (24 + 4 + 10) + 2 * 20 and min(texts) > 8
    for said in ('wrote results.json', 'Zero-shot classification: pets\n  model  ',
                 f'ours on {place.sets}/photos/train:   0%'):
        assert log.count(said) == 1, said


def test_a_damaged_image_ends_both_ranks_and_keeps_the_rest(
    place: Place, log: str, one_rank: pytest.MonkeyPatch
) -> None:
    errors = re.findall("^error: .*", log, re.MULTILINE)
    assert len(errors) == 1 and "the image of sample 'dog/1.png' cannot be decoded" in errors[0], log[-3000:]
    assert 'Traceback' not in log
    out = place.folder / 'resumed'
    assert len(list((out / 'image_features').iterdir())) == 1
    missing = json.loads((out / 'results.json').read_text())['missing']
    assert missing == ['ours: zeroshot.pets', 'ours: linear_probe.pets']
    shutil.copy(place.sets / 'classes/dog/1.png', place.damaged)
    run_recipe(one_rank, 'evaluate', *place.evaluate('resumed', place.broken, place.models[:1]))
    results, whole = (json.loads((place.folder / name / 'results.json').read_text()) for name in ('resumed', 'two'))
    for kind, name in (('retrieval', 'flickr30k'), ('zeroshot', 'pets'), ('linear_probe', 'pets')):
        assert results[kind][name]['models']['ours'] == whole[kind][name]['models']['ours']
