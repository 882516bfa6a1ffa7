# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The recipe on two models side by side, and what it writes."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.devices import DeviceCPU
from evaluated import Given
from parts import picture, write_dataset
from recipes_in_process import run_recipe
from refusals import refused_at
from set_files import custom_sets, write_custom_sets, write_images

import llm2clip.evaluation.benchmarks
import llm2clip.evaluation.evaluated_models
import llm2clip.evaluation.image_features
import llm2clip.teacher.sources
from llm2clip.config import CRAConfig, EvaluateConfig, EvaluatedModelConfig, LLMTeacherConfig, RetrievalConfig
from llm2clip.config.loading import load_config, save_config
from llm2clip.data.convert.samples import Sample
from llm2clip.evaluation.benchmarks import Evaluation, check_results, evaluate_cra
from llm2clip.evaluation.evaluated_models import HuggingFaceCLIP
from llm2clip.evaluation.image_features import ImageFeatures
from llm2clip.evaluation.retrieval_results import evaluate_retrieval, make_gallery, thumbnail
from llm2clip.evaluation.retrieval_sets import RetrievalSet
from llm2clip.metrics.retrieval import caption_retrieval_accuracy
from llm2clip.models.llm2clip import LLM2CLIP


def _set(captions: list[list[str]], read_image: Callable[[int], bytes] = picture) -> RetrievalSet:
    return RetrievalSet('set', [str(i) for i in range(len(captions))], captions, read_image)


def _interrupted(i: int) -> bytes:
    raise KeyboardInterrupt


def _evaluation(out: Path, bootstrap: int = 0, **sets: RetrievalSet) -> Evaluation:
    evaluation = Evaluation(EvaluateConfig(out=str(out), bootstrap=bootstrap, gallery=2, num_workers=0))
    evaluation.retrieval = sets
    evaluation.config.retrieval = {name: RetrievalConfig(local=name) for name in sets}
    return evaluation


def test_equal_captions_are_merged_on_request() -> None:
    dataset = _set([['a', 'b', 'c'], ['a'], ['d', 'e']])
    texts = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts[3] = texts[0]
    # The second image is nearest to the text that it shares with the first one.
    images = torch.stack([texts[1], texts[0], texts[5]])
    plain, merged = (evaluate_retrieval(dataset, images, texts, merge).ranks.recalls() for merge in (False, True))
    assert (plain['n_texts'], merged['n_texts'], merged['text_retrieval_recall@1']) == (6, 5, 100)


def test_images_without_a_caption_are_left_out_and_counted(tmp_path: Path) -> None:
    n = 12
    captions = [[] if i % 4 == 1 else [f'text {i}'] * (1 + i % 2) for i in range(n)]
    features = torch.nn.functional.normalize(torch.randn(2, n, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    kept = [i for i in range(n) if captions[i]]
    texts = torch.cat([features[1, i].expand(len(captions[i]), -1) + 0.1 * i for i in kept])
    result = evaluate_retrieval(_set(captions), features[0], texts)
    alone = evaluate_retrieval(_set([captions[i] for i in kept]), features[0, kept], texts)
    assert result.images == kept and result.ranks.recalls() == alone.ranks.recalls()
    assert result.ranks.recalls()['n_images'] == 9 and result.ranks.recalls()['n_texts'] == len(texts) == 12

    def read_image(i: int) -> bytes:
        assert captions[i]
        return picture(i)

    gallery = make_gallery(_set(captions, read_image), result, 3, top=2)
    shown = {found for row in gallery['texts'] for found, _ in row['results']}
    assert shown <= {thumbnail(picture(i), str(i)) for i in kept} and len(shown) > 3
    evaluation = _evaluation(tmp_path, bootstrap=10, de=_set(captions))
    evaluation.run('m', Given(features[0], texts))  # type: ignore[arg-type]
    table = (tmp_path / 'results.md').read_text()
    assert 'no caption of the set: de 3\n' in table and '| de | 9 | 12 |' in table


def test_cra_takes_the_pairs_that_there_are(llm_folder: Path, tmp_path: Path) -> None:
    samples = [Sample(f'{i}', {'a': f'a {i}' if i % 3 else '', 'b': f'b {i}' if i % 4 else '', 'c': 'x'})
               for i in range(12)]
    whole = [Sample(s.sample_id, s.captions) for s in samples if s.captions['a'] and s.captions['b']]
    encoders = {'e': LLMTeacherConfig(pretrained=str(llm_folder))}
    results = []
    for name, rows in (('gaps', samples), ('whole', whole)):
        write_dataset(rows, tmp_path / name)
        config = CRAConfig(f'{tmp_path}/{name}/train', ['a', 'b'], encoders)
        results.append(evaluate_cra(config, DeviceCPU()))
    assert results[0] == results[1] and results[0][1] == len(whole) == 6
    config.limit = 2
    assert evaluate_cra(config, DeviceCPU())[1] == 2
    write_dataset([Sample('0', {'a': 'x', 'b': ''})], tmp_path / 'none')
    with refused_at('cra.caption_keys'):
        evaluate_cra(CRAConfig(f'{tmp_path}/none/train', ['a', 'b'], encoders), DeviceCPU())


@pytest.mark.parametrize('baseline', ['siglip'], indirect=True)
def test_cra_of_a_clip_reads_the_beginning_of_captions(baseline: Path, tmp_path: Path) -> None:
    texts = [[f'a {color} {thing}{end}' for color in ('red', 'green', 'blue') for thing in ('cat', 'dog', 'hat')]
             for end in ('', ', ' + 'seen from far away ' * 5)]
    write_dataset([Sample(f'{i}', {'a': a, 'b': b}) for i, (a, b) in enumerate(zip(*texts))], tmp_path)
    config = load_config(EvaluateConfig, ['out=o', f'cra={{captions: {tmp_path}/train, caption_keys: [a, b]}}',
                                          f'cra.teachers.clip={{type: clip_text, name: {baseline}}}'])
    assert config.cra is not None
    model = HuggingFaceCLIP(str(baseline), DeviceCPU())
    expected = caption_retrieval_accuracy(*(model.text_features(side)[0] for side in texts))
    assert evaluate_cra(config.cra, DeviceCPU())[0]['clip'] == pytest.approx(expected, abs=1e-3)


def test_gallery_shows_best_median_and_worst() -> None:
    # Text i's image has rank i: the i images before it score higher.
    scores = torch.eye(9) + 2 * torch.ones(9, 9).tril(-1)
    dataset = _set([[f'text {i}'] for i in range(9)])
    result = evaluate_retrieval(dataset, torch.eye(9), scores)
    gallery = make_gallery(dataset, result, 2, top=3)
    assert [(row['kind'], row['rank']) for row in gallery['texts']] == [
        ('best', 1), ('best', 2), ('median', 4), ('median', 5), ('worst', 8), ('worst', 9)]
    first, last = gallery['texts'][0], gallery['texts'][-1]
    assert first['query'] == 'text 0' and first['results'][0] == (thumbnail(picture(0), '0'), True)
    # The right answer, which is not among the first, comes last.
    assert last['query'] == 'text 8' and [right for _, right in last['results']] == [False] * 3 + [True]
    assert last['results'][-1] == (thumbnail(picture(8), '8'), True)
    assert base64.b64decode(gallery['images'][0]['query'].removeprefix('data:image/jpeg;base64,'))[:2] == b'\xff\xd8'


def _arguments(folder: Path) -> list[str]:
    write_custom_sets(folder)
    return [f'out={folder}/out', 'num_workers=0', 'device=cpu', 'gallery=2', 'bootstrap=50', *custom_sets(folder)]


def test_models_side_by_side(
    exported: tuple[LLM2CLIP, Path], clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _arguments(tmp_path)
    with (tmp_path / 'templates.txt').open('a') as file:
        file.write('a very' + ' very' * 600 + ' {}\n')
    classes = f'{{name: imagenet_folder, images: {tmp_path}/classes}}'
    run_recipe(monkeypatch, 'evaluate', *arguments, f'models.ours.export={exported[1]}',
               f'models.theirs.pretrained={clip}',
               f'linear_probe.again={{train: {classes}, test: {classes}, sgd: {{}}}}')
    results = json.loads((tmp_path / 'out/results.json').read_text())
    probes = [results['linear_probe'][name]['models']['ours'] for name in ('pets', 'again')]
    assert 'C' in probes[0] and 'C' not in probes[1] and probes[1]['linear_probe_top1'] == 100
    for kind, name in (('retrieval', 'flickr30k'), ('zeroshot', 'pets'), ('linear_probe', 'pets')):
        assert list(results[kind][name]['models']) == ['ours', 'theirs']
    ours = results['retrieval']['flickr30k']['models']['ours']
    assert (ours['n_images'], ours['n_texts']) == (12, 24)
    low, high = ours['intervals']['image_retrieval_recall@10']
    assert low <= ours['image_retrieval_recall@10'] <= high
    # Of each class, ours cannot read the longest prompt, and the baseline not the longest two.
    assert [values['n_truncated'] for values in results['zeroshot']['pets']['models'].values()] == [2, 4]
    table = (tmp_path / 'out/results.md').read_text()
    assert 'lost their end: ours 2, theirs 4\n' in table and '## Linear probe: pets' in table
    assert not (tmp_path / 'out/image_features').exists()
    assert 'worst, rank' in (tmp_path / 'out/report.html').read_text()


def test_features_of_large_sets_are_kept_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one block at a time is in memory, and a killed evaluation resumes at the block at which it was."""
    monkeypatch.setattr(llm2clip.evaluation.image_features, '_BLOCK', 5)
    generator = torch.Generator().manual_seed(0)
    model: Any = Given(torch.randn(13, 4, generator=generator), torch.eye(4))
    model.image_features = lambda x: (model.images[x[:, 0]], -model.images[x[:, 0]])
    read: list[int] = []

    def counting(i: int) -> bytes:
        read.append(i)
        return _interrupted(i) if len(read) == 9 else picture(i)

    dataset = _set([['a']] * 13, counting)
    images = ImageFeatures(model, 'm', tmp_path, 2, 0)
    with pytest.raises(KeyboardInterrupt):
        images.encode(dataset)
    assert read == [0, 1, 2, 3, 4, 5, 6, 7, 8] and len(list(tmp_path.iterdir())) == 1
    projected, pooled = images.encode(dataset)
    assert read[9:] == [5, 6, 7, 8, 9, 10, 11, 12]
    assert torch.cat([*projected]).equal(model.images) and torch.cat([*pooled]).equal(-model.images)
    assert [len(block) for block in pooled] == [5, 5, 3]


@pytest.mark.parametrize('broken', ['images', 'texts'])
def test_features_that_are_no_numbers_are_refused(broken: str, tmp_path: Path) -> None:
    model: Any = Given(torch.eye(2), torch.eye(2))
    setattr(model, broken, torch.eye(2) * torch.nan)
    evaluation = _evaluation(tmp_path, r=_set([['a'], ['b']]))
    with pytest.raises(ValueError, match=f'ours: features of {broken} of set are not finite'):
        evaluation.run('ours', model)


def test_a_killed_evaluation_resumes_with_missing_sets(tmp_path: Path) -> None:
    embedded: list[int] = []

    def image_features(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedded.append(len(pixels))
        return torch.eye(2), torch.eye(2)

    def evaluation(second: Callable[[int], bytes]) -> Evaluation:
        """Two sets of the same images, and one of others of the same names."""
        return _evaluation(tmp_path, first=_set([['a'], ['b']]), same=_set([['e'], ['f']]),
                           second=_set([['c'], ['d']], second))

    def other_picture(i: int) -> bytes:
        return picture(i)

    def sets_embedded(begun: Evaluation, name: str = 'm') -> int:
        before = len(embedded)
        begun.run(name, model)
        return len(embedded) - before

    model: Any = Given(torch.eye(2), torch.eye(2))
    model.image_features = image_features
    with pytest.raises(KeyboardInterrupt):
        evaluation(_interrupted).run('m', model)
    assert embedded == [2]
    resumed = evaluation(other_picture)
    assert sets_embedded(resumed) == 1 and list(resumed.results.retrieval) == ['first', 'same', 'second']
    assert sets_embedded(resumed) == 0
    # Other weights have other features.
    model.model = torch.nn.Linear(1, 1)
    assert sets_embedded(resumed) == 2
    # So may another model of the same weights, which may see images otherwise.
    assert sets_embedded(resumed, 'other') == 2
    model.precision = 'amp_bf16'
    assert sets_embedded(resumed, 'other') == 2
    resumed.finish(DeviceCPU())
    assert sets_embedded(evaluation(other_picture)) == 2


@pytest.mark.parametrize(('arguments', 'key'), [
    (['retrieval.x.local=nowhere'], 'retrieval.x.local'),
    (['linear_probe.pets.test={name: imagenet_folder, images: PLACE/other}'], 'linear_probe.pets'),
    (['linear_probe.pets={train: ONE, test: ONE}'], 'linear_probe.pets.train'),
    (['cra.captions=IMAGES', 'cra.caption_keys=[short, lang]'], 'cra.captions'),
    (['cra.captions=IMAGES', 'cra.teachers.t=nowhere'], 'cra.teachers.t'),
    (['models.n.export=nowhere'], 'models.n.export'),
])
def test_settings_are_checked_before_a_model_is_loaded(
    arguments: list[str], key: str, exported: tuple[LLM2CLIP, Path], image_dataset: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm2clip.evaluation.evaluated_models, 'load_evaluated_model', None)
    monkeypatch.setattr(llm2clip.teacher.sources, 'teacher_fingerprint', None)
    write_images(tmp_path, ['other/owl/0.png', 'other/owl/1.png', 'one/0/picture.png', 'one/1/picture.png'])
    one = f'{{name: imagenet_folder, images: {tmp_path}/one}}'
    arguments = [argument.replace('PLACE', str(tmp_path)).replace('ONE', one).replace('IMAGES', str(image_dataset))
                 for argument in arguments]
    with refused_at(key):
        run_recipe(monkeypatch, 'evaluate', *_arguments(tmp_path), f'models.m.export={exported[1]}', *arguments)
    assert not (tmp_path / 'out').exists()


def test_a_partial_evaluation_says_so_in_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(second: Callable[[int], bytes] = picture) -> Evaluation:
        evaluation = _evaluation(tmp_path, first=_set([['a'], ['b']]), second=_set([['c'], ['d']], second))
        evaluation.config.models = {name: EvaluatedModelConfig(run=name) for name in ('m', 'n')}
        evaluation.config.cra = CRAConfig(captions='captions')
        return evaluation

    def said() -> list[str]:
        missing = json.loads((tmp_path / 'results.json').read_text()).get('missing', [])
        for name in ('results.md', 'report.html'):
            text = (tmp_path / name).read_text()
            assert ('Partial' in text) == bool(missing) and ', '.join(missing) in text
        return missing

    model: Any = Given(torch.eye(2), torch.eye(2))
    with pytest.raises(KeyboardInterrupt):
        begun(_interrupted).run('m', model)
    assert said() == ['m: retrieval.second', 'n: retrieval.first', 'n: retrieval.second', 'cra']
    evaluation = begun()
    evaluation.run('m', model)
    assert said() == ['n: retrieval.first', 'n: retrieval.second', 'cra']
    evaluation.run('n', model)
    assert said() == ['cra']
    monkeypatch.setattr(llm2clip.evaluation.benchmarks, 'evaluate_cra', lambda config, device: ({'encoder': 50.0}, 2))
    evaluation.finish(DeviceCPU())
    assert said() == []


def test_results_of_other_models_and_sets_are_not_replaced(tmp_path: Path) -> None:
    def config(*args: str) -> EvaluateConfig:
        return load_config(EvaluateConfig, [f'out={tmp_path}', 'models.m.run=a', 'models.n.export=b',
                                            'retrieval.r.local=c', *args])

    check_results(config())
    (tmp_path / 'results.json').touch()
    save_config(config(), tmp_path)
    check_results(config('models.o.run=d', 'zeroshot.z.source={name: mds}', 'title=t', 'models.m.batch_tokens=1'))
    for change, part in (('models.m.run=other', 'models.m'), ('models.n=null', 'models.n'),
                         ('retrieval.r.local=d', 'retrieval.r')):
        with refused_at('out', f'results of another {part}, '):
            check_results(config(change))
    save_config(config('cra.captions=a'), tmp_path)
    with refused_at('out', 'results of another cra, '):
        check_results(config('cra.captions=b'))
