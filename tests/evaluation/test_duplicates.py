# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Near-copies that were planted into datasets and an evaluation set, found, shown, left out and counted."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clouds import cloud, encoded, near_copies
from recipes_in_process import run_recipe
from streaming import MDSWriter

import llm2clip.evaluation.duplicates
import llm2clip.evaluation.image_blocks
from llm2clip.config import ConfigError, DatasetConfig, EvaluateConfig, RetrievalConfig
from llm2clip.data.image_hashes import VIEWS, WORDS, distances, mirrored
from llm2clip.evaluation.duplicates import find_near_copies, near_copies_of_sets
from llm2clip.evaluation.evaluate import Evaluation
from llm2clip.evaluation.image_blocks import Images, dataset_images, hash_blocks, read_features, read_hashes
from llm2clip.evaluation.report import report_parts, summarize
from llm2clip.evaluation.tables import near_copy_tables
from llm2clip.registry import build_retrieval_set
from llm2clip.weights import write_safetensors

KINDS = [*near_copies(cloud(0, 32))]


def _sample(name: str, data: bytes) -> dict[str, Any]:
    return {'sample_id': name, 'caption.a': f'caption of <{name}>', 'image': data}


def _write(samples: list[dict[str, Any]], out: Path, size_limit: str = '64mb') -> None:
    columns = {'sample_id': 'str', 'caption.a': 'str', 'image': 'bytes'}
    with MDSWriter(out=str(out), columns=columns, hashes=['xxh64'], size_limit=size_limit) as writer:
        for sample in samples:
            writer.write(sample)


@pytest.fixture(scope='module')
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training datasets and an evaluation set.

    Of image 0, `one` has a copy of every kind and `two` one of equal bytes; image 1 is in the evaluation set, a crop of
    it in `two` and a mirrored one in `one`.
    """
    out = tmp_path_factory.mktemp('planted')
    images = [cloud(seed) for seed in range(20)]
    zero = encoded(images[0])
    copies = [_sample(f'0-{kind}', data) for kind, data in near_copies(images[0]).items()]
    one = [_sample(f'{i:02}', encoded(image)) for i, image in enumerate(images[2:12], 2)]
    two = [_sample(f'{i:02}', encoded(image)) for i, image in enumerate(images[12:17], 12)]
    of_one = near_copies(images[1])
    _write([*one, _sample('b', zero), *copies, _sample('1-mirror', of_one['mirror'])], out / 'one',
                  '64kb')
    _write([*two, _sample('a', zero), _sample('1-crop', of_one['crop'])], out / 'two')
    _write([_sample('t1', encoded(images[1])), *(
        _sample(f't{i}', encoded(image)) for i, image in enumerate(images[17:], 17))], out / 'test')
    return out


def _arguments(planted: Path, out: Path) -> list[str]:
    return [*(f'datasets.{name}.local={planted}/{name}' for name in ('one', 'two')), f'out={out}',
            'retrieval.held.source.name=mds', f'retrieval.held.source.local={planted}/test']


def test_planted_copies_are_found_shown_and_left_out(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / 'out'
    run_recipe(monkeypatch, 'find_duplicates', *_arguments(planted, out), 'num_workers=2', 'shown=4')
    assert '2 groups of near-copies; 1 images of evaluation sets have one' in capsys.readouterr().out
    found = json.loads((out / 'duplicates.json').read_text())
    copies = [['one', f'0-{kind}'] for kind in sorted(KINDS)]
    group, others = found['groups']
    # The smallest id stays.
    assert group == {'keep': copies[0], 'copies': [*copies[1:], ['two', 'a'], ['one', 'b']]}
    assert [others['keep'], *others['copies']] == [['two', '1-crop'], ['one', '1-mirror']]
    assert found['images'] == {'one': 18, 'two': 7, 'retrieval.held': 4}
    held = found['sets']['retrieval.held']
    assert held['images'] == 4 and [*held['near_copies']] == ['t1']
    assert held['near_copies']['t1'] in (['one', '1-mirror'], ['two', '1-crop'])
    left_out = {name: json.loads((out / f'leave_out/{name}.json').read_text()) for name in ('one', 'two')}
    assert {*left_out['one']} == {'b', '1-mirror', *(f'0-{kind}' for kind in sorted(KINDS)[1:])}
    assert {*left_out['two']} == {'a', '1-crop'}
    page = (out / 'report.html').read_text()
    assert re.findall('<h2>(.*?)</h2>', page) == ['Counts', 'Within the training data',
                                                  'retrieval.held and the training data']
    assert page.count('<figure>') == 2 * (4 + 1) == page.count('data:image/jpeg') and 'caption of &lt;0-' in page

    # Called again, it reads no image for its hash, but those of a dataset that is new.
    hashed: list[str] = []
    decode = llm2clip.evaluation.image_blocks.decode_grey
    monkeypatch.setattr(llm2clip.evaluation.image_blocks, 'decode_grey',
                        lambda data, name: (hashed.append(name), decode(data, name))[1])
    more = [_sample('new', near_copies(cloud(18))['resize'])]
    _write(more, tmp_path / 'more')
    run_recipe(monkeypatch, 'find_duplicates', *_arguments(planted, out), 'num_workers=0',
               f'datasets.more.local={tmp_path}/more')
    found = json.loads((out / 'duplicates.json').read_text())
    assert hashed == ['new'] and found['sets']['retrieval.held']['near_copies'].keys() == {'t1', 't18'}


def test_what_stays_does_not_depend_on_shards_and_is_none_that_is_near_a_test_image(
    planted: Path, tmp_path: Path
) -> None:
    """The same samples in other datasets, and image 0 in the evaluation set."""
    samples = [_sample(name, data) for name, data in near_copies(cloud(0)).items()]
    for order, size in ((1, '64mb'), (-1, '20kb')):
        _write(samples[::order], tmp_path / f'all{order}', size)
        dataset = DatasetConfig(local=f'{tmp_path}/cache{order}', remote=f'{tmp_path}/all{order}')
        training = [dataset_images('all', dataset)]
        hash_blocks(training[0].blocks, tmp_path / 'kept', 0)
        assert not list(Path(dataset.local).rglob('*.mds')), 'shards stay in the cache'
        found = find_near_copies(training, [], tmp_path / 'kept', 56)
        assert [member.image_id for member in found.groups[0]] == sorted(KINDS)
        assert {member.image_id for member in found.leave_out} == {*sorted(KINDS)[1:]}
    assert len(training[0].blocks) > 1
    test = [dataset_images('test', DatasetConfig(local=f'{planted}/two'))]
    hash_blocks(test[0].blocks, tmp_path / 'kept', 0)
    found = find_near_copies(training, test, tmp_path / 'kept', 56)
    assert {member.image_id for member in found.leave_out} == {*KINDS}
    assert [member.image_id for member in found.nearest] == ['a']


def _given(hashes: np.ndarray, name: str, folder: Path, sizes: list[int]) -> Images:
    """Images of these hashes ``(N, V, WORDS)`` in blocks of these sizes."""
    class Given:
        def __init__(self, at: int, size: int) -> None:
            self.name, self.size = f'{name}{at}', size

    blocks: list[Any] = [Given(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    for block, part in zip(blocks, np.split(hashes, np.cumsum(sizes)[:-1])):
        ids = [f'{block.name}-{i}' for i in range(block.size)]
        path = llm2clip.evaluation.image_blocks._hash_file(folder, block)
        write_safetensors(path, {'hashes': torch.from_numpy(part.view(np.int64).copy()),
                                 'ids': torch.frombuffer(bytearray(json.dumps(ids).encode()), dtype=torch.uint8)})
    return Images(name, blocks)


def test_near_pairs_are_those_of_every_image_with_every_other(tmp_path: Path) -> None:
    """With many equal hashes, in several datasets and sets."""
    rng = np.random.default_rng(0)
    n = 60
    few = rng.integers(0, 2**64, (12, len(VIEWS), WORDS), dtype=np.uint64)
    hashes = few[rng.integers(0, 12, n)]
    for i, image in enumerate(hashes):
        if i % 3 == 0:  # a part of another one, or in a mirror
            view = few[rng.integers(0, 12), rng.integers(0, len(VIEWS))]
            image[0] = mirrored(view) if i % 2 else view
        if i % 4 == 0:
            image[0, 1:] ^= np.uint64(0b10110001 << i % 50)
    sizes = [[10, 14], [6], [20], [10]]
    names, parts = ['one', 'two', 'set', 'other'], np.split(hashes, np.cumsum([sum(one) for one in sizes])[:-1])
    images = [_given(part, name, tmp_path, one) for name, part, one in zip(names, parts, sizes)]
    training, sets = images[:2], images[2:]
    found = find_near_copies(training, sets, tmp_path, 20)

    views = np.concatenate([hashes, mirrored(hashes)], axis=1)
    ways = distances(views[:, None], hashes[None, :, None, 0]).min(-1)
    least = np.minimum(ways, ways.T)
    ids = [name for one in images for block in one.blocks for name in read_hashes(block, tmp_path).ids]
    near = (least <= 20) & ~np.eye(n, dtype=bool)
    expected = {ids[j]: int(least[:30, j].min()) for j in range(30, n) if near[:30, j].any()}
    assert {member.image_id: pair.distance for member, pair in found.nearest.items()} == expected
    assert 5 < len(expected) < 30
    close = {ids[i] for i in range(30) if near[i, 30:].any()}
    label = np.arange(30)
    for i, j in np.argwhere(near[:30, :30]):
        label[label == label[j]] = label[i]
    groups = [{ids[i] for i in np.flatnonzero(label == one)} for one in {*label.tolist()}]
    assert {frozenset(member.image_id for member in one) for one in found.groups} == {
        frozenset(one) for one in groups if len(one) > 1}
    kept = {min(one - close or one) for one in groups} - close
    assert {member.image_id for member in found.leave_out} == {*ids[:30]} - kept
    whole = find_near_copies(training, sets, tmp_path, 20, parts=False, num_workers=2)
    assert whole.nearest.keys() < found.nearest.keys()


def test_features_find_pairs_as_a_whole_matrix_does(
    planted: Path, tmp_path: Path, exported: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'out'
    args = [*_arguments(planted, out), f'model.export={exported[1]}', 'max_distance=0', 'num_workers=0', 'device=cpu']
    run_recipe(monkeypatch, 'find_duplicates', *args, 'min_cosine=0.9999')
    images = [dataset_images(name, DatasetConfig(local=f'{planted}/{name}')) for name in ('one', 'two')]
    kept = out / 'images'
    model, = {path.name.split('.')[1] for path in kept.glob('*.safetensors')} - {
        llm2clip.evaluation.image_blocks.KIND}
    ids = [name for one in images for block in one.blocks for name in read_hashes(block, kept).ids]
    features = torch.cat([read_features(block, kept, model) for one in images for block in one.blocks]).float()
    cosines = (features @ features.T).fill_diagonal_(0)
    limit = float(cosines.flatten().sort().values[-40:].mean())
    found = find_near_copies(images, [], kept, 0, True, model, limit)
    pairs = {frozenset((pair.first.image_id, pair.second.image_id)): pair for pair in found.pairs}
    expected = {frozenset((ids[i], ids[j])) for i, j in (cosines >= limit).nonzero().tolist()}
    assert {names for names, pair in pairs.items() if pair.cosine is not None} == expected and len(expected) > 3
    assert pairs[frozenset('ab')].distance == 0 and pairs[frozenset('ab')].cosine == pytest.approx(1, abs=1e-3)
    monkeypatch.setattr(llm2clip.evaluation.duplicates, '_PAIRS_PER_IMAGE', 1)
    with pytest.raises(ConfigError, match='min_cosine: 0.01, but more than 25 pairs of the 25 images'):
        find_near_copies(images, [], kept, 0, True, model, 0.01)


def test_an_evaluation_says_how_many_of_its_images_are_known(planted: Path, tmp_path: Path) -> None:
    dataset = build_retrieval_set({'name': 'mds', 'local': f'{planted}/test'}, 'retrieval.held.source')
    content = {'sets': {'retrieval.held': {
        'fingerprint': llm2clip.evaluation.image_blocks.set_fingerprint(dataset), 'images': 4,
        'near_copies': {'t1': ['one', 'x']}}}}
    path = tmp_path / 'duplicates.json'
    path.write_text(json.dumps(content))
    found = near_copies_of_sets(str(path), {'retrieval.held': dataset, 'retrieval.unknown': dataset})
    assert found == {'retrieval.held': {'n_images': 4, 'near_copies': 1}}
    table, = near_copy_tables({'near_copies': found})
    assert table.rows == [['retrieval.held', '4', '1', '25.0 %']] and near_copy_tables({}) == []
    assert any('Near-copies in the training data' in part for part in report_parts({'near_copies': found}, {}))
    source = {'name': 'mds', 'local': f'{planted}/test'}
    config = EvaluateConfig(retrieval={'held': RetrievalConfig(source)}, out=f'{tmp_path}/out', duplicates=str(path))
    assert Evaluation(config).results['near_copies'] == found
    assert summarize({'near_copies': found}, {})['near_copies'] == found
    content['sets']['retrieval.held']['fingerprint'] = 'other'
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match='duplicates: .*duplicates.json is of other images of retrieval.held'):
        near_copies_of_sets(str(path), {'retrieval.held': dataset})
    with pytest.raises(ConfigError, match='has retrieval.held, expected one of those that are evaluated: zeroshot.z'):
        near_copies_of_sets(str(path), {'zeroshot.z': dataset})
    path.write_text('{}')
    with pytest.raises(ValueError, match='duplicates.json: cannot be read .*, expected a duplicates.json that find'):
        near_copies_of_sets(str(path), {'retrieval.held': dataset})
