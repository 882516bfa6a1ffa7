# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What `make claims` makes of its runs' results, and CLIP's own text tower in the loop."""

import importlib.util
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from launched import COMMON
from parts import make_samples, picture, text_encoder_from_config
from streaming import MDSWriter
from transformers import AutoTokenizer

from llm2clip.config import (
    AdapterConfig,
    EvaluateConfig,
    ExtractConfig,
    InheritanceConfig,
    ModelConfig,
    PrepareConfig,
    Stage1Config,
    Stage2Config,
    TextEncoderConfig,
    VisionConfig,
)
from llm2clip.config.files import load_config
from llm2clip.data.schema import read_samples
from llm2clip.models.joint import JointLLM2CLIP
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.clip_text import ClipTextTeacher, load_clip_text, load_clip_tokenizer
from llm2clip.training.runs import load_stage2

ROOT = Path(__file__).parents[2]


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The scripts of recipes/claims, which import each other by name."""
    monkeypatch.syspath_prepend(str(ROOT / 'recipes/claims'))
    found = {}
    for name in ('suite', 'emoji_claims', 'photograph_claims', 'forgetting_claims', 'table', 'clip_text_tower',
                 'photograph_captions', 'emoji_halves', 'pretrained_clip', 'lanes', 'record', 'stage1'):
        spec = importlib.util.spec_from_file_location(name, ROOT / f'recipes/claims/{name}.py')
        assert spec is not None and spec.loader is not None
        found[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, found[name])
        spec.loader.exec_module(found[name])
    return found


def _results(sets: list[str], recall: float) -> dict[str, Any]:
    """Long captions are found more easily than short ones, and new concepts, of which there are fewer, than others."""
    found = {}
    for name in sets:
        value = recall + 2 * name.endswith('long') + 10 * name.startswith('new')
        found[name] = {'models': {'m': {'image_retrieval_recall@10': value, 'text_retrieval_recall@10': value + 2,
                                        'chance@10': 0.5}}}
    return found


def test_the_table_says_who_is_better_in_which_seeds(claims: dict[str, ModuleType], tmp_path: Path) -> None:
    suite = claims['emoji_claims'].SUITE._replace(folder=str(tmp_path))
    sets = [name for test in suite.tests.values() for name in test]
    recalls = {name: (20.0, 21.0, 22.0) for name in suite.variants}
    recalls.update({'untuned_llm': (10.0, 11.0, 12.0), 'short_captions': (25.0, 25.0, 25.0),
                    'long_captions': (19.0, 22.0, 20.0)})
    results = {name: [_results(sets, recall) for recall in seeds] for name, seeds in recalls.items()}
    text = claims['table'].write_table(suite, results)
    assert '| new concepts (chance 0.5) | R@10 |' in text
    assert '| llm2clip | 23.0 ± 1.0 |  | short 22.0, long 24.0 |' in text
    assert '| llm2clip | 33.0 ± 1.0 |  | new_short 32.0, new_long 34.0 |' in text
    assert '| untuned_llm | 23.0 ± 1.0 | yes | new_short' in text and '| short_captions | 27.0 ± 0.0 | no |' in text
    assert '| long_captions | 22.3 ± 1.5 | in 2 of 3 seeds |' in text
    assert (tmp_path / 'claims.md').read_text() == text and (tmp_path / 'claims.png').stat().st_size > 10_000


SCHEMAS = {'prepare_data': PrepareConfig, 'train_stage1': Stage1Config, 'extract_embeddings': ExtractConfig}


@pytest.mark.parametrize('name', ['emoji_claims', 'photograph_claims'])
def test_every_variant_is_a_configuration(
    claims: dict[str, ModuleType], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    suite = claims[name].SUITE
    configs = {name: load_config(Stage2Config, [*suite.train, *variant.train, 'save_folder=x'])
               for name, variant in suite.variants.items()}
    assert [configs[f'adapter_depth_{n}'].model.adapter.depth for n in (0, 1, 2)] == [0, 1, 2]
    assert configs['llm2clip'].model.adapter.depth == 4
    assert {variant for claim in suite.claims for variant in claim.variants} == set(suite.variants)
    assert {test for claim in suite.claims for test in claim.tests} == set(suite.tests)
    for name, variant in suite.variants.items():
        files = {step.file for step in variant.needs}
        for step in variant.needs:
            if (schema := SCHEMAS.get(Path(step.script).stem)) is not None:
                config = load_config(schema, [*step.arguments])
                assert step.file.startswith(f'{config.save_folder if schema is Stage1Config else config.out}/')
        sidecars = [sidecar.local for stream in configs[name].train_data.streams.values()
                    for sidecar in stream.embeddings.values()]
        made = Path(suite.made_first).parent
        assert all(Path(local).parent == made or f'{Path(local).parent}/config.yaml' in files for local in sidecars)
        benchmarks = load_config(EvaluateConfig, [suite.evaluate, 'models.m.run=r', *(
            f'models.m.{argument}' for argument in variant.encoder)]).retrieval
        assert [name for test in suite.tests.values() for name in test] == list(benchmarks)


def test_every_variant_of_stage1_is_a_configuration(
    claims: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every training has one, no two are the same, and what a warm start leaves is merged."""
    monkeypatch.chdir(ROOT)
    stage1, trained, record = claims['stage1'], [], claims['record'].Record(tmp_path / 'measured.json')

    def run(script: str, *arguments: str, **_: Any) -> None:
        if 'train_stage1' in script:
            trained.append(load_config(Stage1Config, list(arguments)))
            Path(trained[-1].save_folder).mkdir(parents=True)
        else:
            config = load_config(EvaluateConfig, list(arguments))
            Path(config.out).mkdir()
            Path(config.out, 'results.json').write_text('{"cra": {"cra": 50.0}}')

    monkeypatch.setattr(stage1, 'run', run)
    for name in stage1.VARIANTS:
        stage1.measure(tmp_path, 'train', {'coco': 'coco/val'}, [], record, (1, name), Path())
    assert record.of('nothing') == [{'coco': 50.0}] and list(record.found) == list(stage1.VARIANTS)
    assert not list(tmp_path.rglob('run')) and not list(tmp_path.rglob('warm_start'))
    assert all(config.seed == config.train_data.shuffle_seed == 1 for config in trained)
    warm, = (config for config in trained if config.objective == 'mntp')
    merged, = (config for config in trained if config.text_encoder.adapters)
    assert merged.text_encoder.adapters == [str(warm.adapter_folder)]
    unnamed = [replace(config, save_folder='') for config in trained]
    assert all(one != other for one, other in combinations(unnamed, 2))


def test_what_is_forgotten(
    claims: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step and variant is a configuration, what is read is made before, and the picture has both axes."""
    monkeypatch.chdir(ROOT)
    suite = claims['forgetting_claims'].SUITE
    made: set[str] = set()
    for variant in suite.variants.values():
        for step in variant.needs:
            folder = step.file.partition('/adapter/')[0] if 'inheritance' in step.file else str(Path(step.file).parent)
            if step.script.endswith(('extract_embeddings.py', 'train_inheritance.py')):
                schema = ExtractConfig if 'extract' in step.script else InheritanceConfig
                config = load_config(schema, [*step.arguments])
                assert folder == getattr(config, 'save_folder', getattr(config, 'out', None))
            made.add(folder)
        stage2 = load_config(Stage2Config, [*suite.train, *variant.train, 'save_folder=x'])
        stream, = stage2.train_data.streams.values()
        read = {str(Path(stream.local).parent), str(Path(stream.embeddings['smollm2'].local).parent)}
        assert read <= made and stage2.initial_adapter in (None, *(f'{folder}/adapter' for folder in made))
        assert (stage2.initial_adapter is None) == (stage2.model.visual_projection == 'linear')
        assert variant.results is None or str(Path(variant.results).parent) in made
    assert suite.claims[0].variants == tuple(suite.measured)
    results = {name: [{kind: {'models': {'m': {
        'image_retrieval_recall@10': 10 * i + seed, 'text_retrieval_recall@10': 20, 'chance@10': 1}}}
        for kind in ('old', 'new')} for seed in range(3)] for i, name in enumerate(suite.measured)}
    text = claims['table'].write_table(suite._replace(folder=str(tmp_path)), results)
    assert '| both_halfway | 45.5' in text and (tmp_path / 'plane.png').stat().st_size > 10_000


@pytest.mark.parametrize('suite', ['emoji_claims', 'forgetting_claims', 'photograph_claims'])
def test_a_run_without_a_teacher_is_evaluated(
    claims: dict[str, ModuleType], suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    args = [claims[suite].SUITE.evaluate, 'out=o', f'models.{claims["clip_text_tower"].NAME}.run=r']
    found = load_config(EvaluateConfig, args)
    assert found.out == 'o' and found.retrieval and [*found.models] == ['clip_text_tower']


def test_emoji_of_two_kinds(claims: dict[str, ModuleType], tmp_path: Path) -> None:
    columns = {'sample_id': 'str', 'caption.short': 'str', 'caption.long': 'str', 'image': 'bytes'}
    long = ['cat, an emoji of animals & nature', 'tea, also called cuppa, an emoji of food & drink', 'sun, an emoji',
            'flag: food, an emoji of flags']
    for part in ('train', 'unseen_style'):
        with MDSWriter(out=str(tmp_path / part), columns=columns, hashes=['xxh64']) as writer:
            for i, text in enumerate(long):
                writer.write({'sample_id': f'{part}/{i}', 'caption.short': text.split(',')[0], 'caption.long': text,
                              'image': picture(i)})
    claims['emoji_halves'].main(str(tmp_path), str(tmp_path / 'out'))
    found = {path.name: [row['caption.short'] for row in read_samples(path)] for path in (tmp_path / 'out').iterdir()
             if path.is_dir()}
    old, new = ['cat', 'tea'], ['sun', 'flag: food']
    assert found == {'old_train': old, 'old_test': old, 'new_train': new, 'new_test': new}


def test_a_clip_is_trained_and_published_as_timm_and_transformers_load_it(
    claims: dict[str, ModuleType], image_dataset: Path, tmp_path: Path, no_leftovers: None
) -> None:
    """With the tokenizer of the LLM in its package."""
    config = load_config(Stage2Config, [
        *COMMON, f'train_data.streams.s.local={image_dataset}', 'train_data.num_workers=0', 'max_duration=2ba',
        'model={vision: {name: test_efficientnet, pretrained: false, image_size: 64}, embed_dim: 24}', 'optimizer.lr=0.01',
        f'save_folder={tmp_path}/run', 'train_data.caption_mix={short: 1.0}'])
    claims['clip_text_tower'].train(config)
    claims['pretrained_clip'].publish(config.save_folder, tmp_path)
    text = ClipTextTeacher(str(tmp_path / 'text'))
    assert text.llm_embed_dim == 24 and text.embed(['a red square']).vectors.abs().sum() > 0
    model, _, _ = load_stage2(config.save_folder)
    again = LLM2CLIP(ModelConfig(VisionConfig(f'local-dir:{tmp_path}/tower', pretrained=True, image_size=64),
                                 embed_dim=24, visual_projection='pretrained'), 8).eval()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(again.get_image_features(pixels), model.get_image_features(pixels),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['emoji', 'forgetting', 'photograph', 'stage1'])
def test_kept_records_go_on(claims: dict[str, ModuleType], name: str) -> None:
    """What they hold has the names that the scripts look for, and seeds that these would train."""
    record = claims['record'].Record(ROOT / f'recipes/claims/measured/{name}.json')
    if name == 'stage1':
        names, seeds = [*claims['stage1'].VARIANTS], claims['stage1'].SEEDS
    else:
        suite = claims[f'{name}_claims'].SUITE
        names, seeds = suite.measured, suite.seeds
    assert record.found and record.found.keys() <= set(names)
    assert all(found.keys() <= set(map(str, seeds)) for found in record.found.values())


def test_jobs_run_in_lanes_and_what_they_found_is_kept(
    claims: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'here').mkdir()
    (tmp_path / 'here/script.py').write_text('import os, sys; print(os.getcwd(), os.environ["OMP_NUM_THREADS"]);'
                                             'sys.exit(int(sys.argv[1]))')
    monkeypatch.chdir(tmp_path / 'here')
    record = claims['record'].Record(tmp_path / 'measured.json')

    def do(job: int, lane: Path) -> None:
        claims['lanes'].run('script.py', str(job // 3), log=tmp_path / f'{job}.txt', lane=lane)
        record.add('variant', job, (tmp_path / f'{job}.txt').read_text())

    claims['lanes'].in_lanes(tmp_path / 'lanes', [2, 0, 1], do)
    assert '3 of 3 done' in capsys.readouterr().out
    again = claims['record'].Record(tmp_path / 'measured.json')
    assert [again.has('variant', seed) for seed in range(4)] == [True, True, True, False]
    assert set(again.of('variant')) <= {f'{tmp_path}/lanes/lane{i} 1\n' for i in range(2)}
    with pytest.raises(RuntimeError, match='script.py 1 failed'):
        claims['lanes'].in_lanes(tmp_path / 'lanes', [3, 4, *[0] * 50], do)
    assert not record.has('variant', 3)


def test_captions_are_joined_and_halved(claims: dict[str, ModuleType], tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path / 'mds'), columns={
            'sample_id': 'str', 'image': 'bytes', **{f'caption.{i}': 'str' for i in range(3)}}) as writer:
        for name, third in (('a.jpg', ''), ('b.jpg', 'b 2')):
            writer.write({'sample_id': name, 'image': name.encode(), 'caption.0': f'{name[0]} 0',
                          'caption.1': f'{name[0]} 1', 'caption.2': third})
    claims['photograph_captions'].main(str(tmp_path / 'mds'), str(tmp_path / 'files'))
    assert (tmp_path / 'files/images/b.jpg').read_bytes() == b'b.jpg'
    lines = {name: (tmp_path / f'files/{name}.csv').read_text().splitlines()[1:]
             for name in ('joined', 'half', 'other_half')}
    assert lines == {'other_half': ['a.jpg,a 0', 'a.jpg,a 1'], 'half': ['b.jpg,b 0', 'b.jpg,b 1', 'b.jpg,b 2'],
                     'joined': ['a.jpg,a 0', 'a.jpg,a 1', 'a.jpg,a 0 a 1', 'b.jpg,b 0', 'b.jpg,b 1', 'b.jpg,b 2',
                                'b.jpg,b 0 b 1']}


def test_a_text_encoder_in_the_loop_learns(llm_folder: Path) -> None:
    torch.manual_seed(0)
    encoder, tokenizer = text_encoder_from_config(TextEncoderConfig(pretrained=str(llm_folder)))
    config = ModelConfig(VisionConfig('test_efficientnet', False, image_size=32), AdapterConfig('linear'), embed_dim=16)
    model = JointLLM2CLIP(LLM2CLIP(config, 32), encoder, tokenizer).train()
    captions = [list(sample.captions.values()) for sample in make_samples(4, images=False)]
    batch = {'pixel_values': torch.randn(4, 3, 32, 32), 'caption': [own[0] for own in captions],
             'text_id': torch.arange(4), 'sample_seed': torch.arange(4)}
    outputs = model(batch)
    model.loss(outputs, batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.llm.layers.parameters())
    several = model({**batch, 'caption': [list(column) for column in zip(*captions)]})
    assert several['text_features'].shape == (4, 2, 16)
    torch.testing.assert_close(several['text_features'][:, 0], outputs['text_features'])


def test_clip_s_text_tower_pools_its_end_token(
    claims: dict[str, ModuleType], llm_folder: Path, tmp_path: Path
) -> None:
    script = claims['clip_text_tower']
    llm = AutoTokenizer.from_pretrained(llm_folder)
    llm.add_special_tokens({'additional_special_tokens': ['<|endoftext|>']})
    config = script.text_tower(llm, tmp_path, 24)
    tower, tokenizer = load_clip_text(config, 'clip').eval(), load_clip_tokenizer(config, 'clip')
    end = llm.convert_tokens_to_ids('<|endoftext|>')
    ids = tokenizer(['a red square', 'a ' * 100])['input_ids']
    assert ids.shape == (2, script.LENGTH) and ids[1, -1] == end and ids[0, -1] == end  # the first is padded by it
    assert [text.cut for text in tokenizer.tokenize(['a red square', 'a ' * 100])] == [False, True]
    # What follows the first end token is padding.
    other = ids[:1].clone()
    other[0, -3:] = torch.tensor([5, 7, 9])
    torch.testing.assert_close(tower(other), tower(ids)[:1])
    other[0, 1] = 9
    assert tower(other).shape == (1, 24) and not torch.allclose(tower(other), tower(ids)[:1])
