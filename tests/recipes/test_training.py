# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Both trainings as a user launches them: one rank and two, DDP and FSDP2, warm starts, bad input."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import user_losses
from gradients import COPIES
from launched import (
    ROOT,
    SGD,
    SHARDED,
    Launched,
    assert_same_weights,
    finish,
    losses,
    may_have_own_memory,
    run,
    weights,
)
from parts import make_samples, write_dataset
from recipes_in_process import example_of_the_page, run_recipe
from remotes import free_port
from safetensors.torch import load_file, save_file

from llm2clip.data.convert.samples import Sample
from llm2clip.data.schema import read_index, read_samples
from llm2clip.metrics.retrieval import caption_retrieval_accuracy
from llm2clip.modeling.text_encoder import encode_texts
from llm2clip.teacher.llm import load_teacher
from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.checkpoints import read_model
from llm2clip.training.runs import Stage2Run

RECALL = 'metrics/eval/retrieval_recall@10'
ZEROSHOT = ['metrics/one/zeroshot_top1', 'metrics/one/mean_per_class', 'metrics/several/mean_average_precision']


def assert_same_losses(found: Path, expected: Path) -> None:
    assert len({round(v, 6) for v in losses(expected).values()}) == 6
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.dist
def test_stage2_on_two_ranks_learns_what_one_learns(
    stage2_args: list[str], zeroshot_args: list[str], tmp_path: Path
) -> None:
    variants: dict[str, tuple[int, list[str]]] = {
        'one': (1, []), 'ddp': (2, []), 'fsdp': (2, ['fsdp={state_dict_type: full, activation_checkpointing: true}'])}
    for name, (ranks, extra) in variants.items():
        run('train_stage2', tmp_path / name, [*stage2_args, *zeroshot_args, *SGD, 'eval_interval=6ba', *extra], ranks)
        found, expected = (read_metrics(tmp_path / run / 'metrics.jsonl') for run in (name, 'one'))
        assert_same_losses(tmp_path / name, tmp_path / 'one')
        assert_same_weights(weights(tmp_path / name), weights(tmp_path / 'one'))
        # The norm before clipping, which hides a factor on all gradients.
        for metric, tolerance in (('gradient_norm', 1e-4), (RECALL, 1e-6), *((metric, 1e-6) for metric in ZEROSHOT)):
            assert found[metric] == pytest.approx(expected[metric], rel=tolerance), (name, metric)
    assert all(list(expected[metric]) == [0, 6] for metric in ZEROSHOT)
    assert any(len({*expected[metric].values()}) > 1 for metric in ZEROSHOT)


@pytest.mark.dist
def test_the_teacher_in_the_loop_gives_what_the_embeddings_has(
    stage2_args: list[str], zeroshot_args: list[str], tmp_path: Path
) -> None:
    args = [*stage2_args, *SGD, *zeroshot_args, 'callbacks.save_best={}']
    loggers = ['loggers.tensorboard={flush_interval: 1}', 'loggers.wandb={project: test}']
    run('train_stage2', tmp_path / 'embeddings', [*args, *loggers], WANDB_MODE='offline')
    without = [arg for arg in args if '.embeddings.' not in arg]
    in_loop = ['text_encoder_in_loop={enabled: true, sharded: true, batch_tokens: 100}', 'algorithms.grad_cache={}',
              'device_train_microbatch_size=3']
    run('train_stage2', tmp_path / 'in_loop', [*without, *in_loop], 2)
    assert losses(tmp_path / 'in_loop') == pytest.approx(losses(tmp_path / 'embeddings'), rel=1e-3)
    found, expected = (read_metrics(tmp_path / name / 'metrics.jsonl') for name in ('in_loop', 'embeddings'))
    assert found[RECALL] == pytest.approx(expected[RECALL], abs=4)
    for metric in ZEROSHOT:  # before their rounding has changed weights
        assert found[metric][0] == pytest.approx(expected[metric][0], rel=1e-6)
    best = max(expected[RECALL].values())
    improved = list(expected['best/retrieval_recall@10'].values())
    assert improved[-1] == best and improved == sorted(set(improved))
    assert list((tmp_path / 'embeddings/tensorboard').rglob('*tfevents*'))
    assert list((tmp_path / 'embeddings/wandb').glob('offline-run-*/*.wandb'))


@pytest.mark.dist
def test_best_weights_of_a_sharded_run(stage2_args: list[str], tmp_path: Path) -> None:
    args = [*stage2_args, *SGD, 'model.vision.name=test_vit', 'callbacks.save_best={}', 'save_interval=3ba']
    run('train_stage2', tmp_path / 'one', args)
    sharded = 'fsdp={state_dict_type: sharded, activation_checkpointing: true}'
    # Begun compiled and spread over both ranks; resumed uncompiled, a whole copy on each.
    copies = [f'fsdp.replicate={COPIES}', 'dist_timeout=777.0',
              'callbacks={"user_callbacks:GroupsHaveTimeout": {seconds: 777}}']
    for steps, extra in ((3, ['compile={backend: eager, fullgraph: true}']), (6, copies)):
        run('train_stage2', tmp_path / 'two', [*args, sharded, *extra, f'max_duration={steps}ba'], 2,
            PYTHONPATH=str(ROOT / 'tests'))
    best = []
    for name in ('one', 'two'):
        metrics = read_metrics(tmp_path / name / 'metrics.jsonl')
        best.append(max(metrics['best/retrieval_recall@10']))
        found = Stage2Run(tmp_path / name, 'best').load_model().state_dict()
        expected = read_model(next((tmp_path / name / 'checkpoints').glob(f'ep*-ba{best[-1]}*')))
        assert all(torch.equal(found[key], expected[f'model.{key}']) for key in found)
    assert best[0] == best[1]
    assert_same_losses(tmp_path / 'two', tmp_path / 'one')
    # As `evaluate` and `export_hf` load it, shards joined.
    assert_same_weights(*(Stage2Run(tmp_path / name).load_model().state_dict() for name in ('two', 'one')))


@pytest.mark.dist
@pytest.mark.parametrize('objective', ['contrastive', 'mntp', pytest.param('compiled', marks=pytest.mark.slow)])
def test_stage1_on_two_ranks_learns_what_one_learns(
    objective: str, stage1_args: list[str], image_dataset: Path, tmp_path: Path
) -> None:
    args = [*stage1_args, *SGD, 'callbacks.speed_monitor={window_size: 2}']
    variants: dict[str, tuple[int, list[str]]] = {'one': (1, [])}
    if objective != 'mntp':
        compiled = ['compile={backend: aot_eager}'] if objective == 'compiled' else []
        variants |= {'ddp': (2, []), 'sharded': (2, [*SHARDED, *compiled])}
        args += [f'eval_data.streams.s.local={image_dataset}', 'eval_data.num_canonical_nodes=4', 'eval_interval=3ba',
                 'eval_data.num_workers=0']
    else:
        parts = ['device_train_microbatch_size=3']
        variants |= {'parts': (1, parts), 'sharded': (2, [SHARDED[0], *parts])}
        args += ['objective=mntp', 'train_data.texts={short: 1.0, long: 1.0}']
    for name, (ranks, extra) in variants.items():
        run('train_stage1', tmp_path / name, [*args, *extra], ranks)
        assert_same_losses(tmp_path / name, tmp_path / 'one')
        for result in ('lora/adapter_model.safetensors', 'teacher/model.safetensors'):
            assert_same_weights(load_file(tmp_path / name / result), load_file(tmp_path / 'one' / result))
        metrics = read_metrics(tmp_path / name / 'metrics.jsonl')
        assert all(metrics['throughput/tokens_per_sec'][step] > 0 for step in (4, 6))
        if objective != 'mntp':
            # Captions retrieve each other: the metric is that of all 64 pairs, whatever the ranks.
            assert metrics['metrics/eval/cra'].keys() == {3, 6}
            assert metrics['metrics/eval/cra'] == read_metrics(tmp_path / 'one' / 'metrics.jsonl')['metrics/eval/cra']
        assert metrics['data/texts'][5] == 6 * 8 * (1 if objective == 'mntp' else 2)


def test_warm_start_then_contrastive_on_its_adapter(
    llm_folder: Path, image_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [f'text_encoder.pretrained={llm_folder}', f'train_data.streams.s.local={image_dataset}', 'run_name=r',
            'global_train_batch_size=8', 'device=cpu', 'progress_bar=false', 'train_data.num_workers=0',
            'train_data.num_canonical_nodes=2', 'optimizer.name=adamw', 'optimizer.lr=1e-2']
    run_recipe(monkeypatch, 'train_stage1', *args, 'objective=mntp', 'train_data.texts={short: 1.0, long: 1.0}',
               'max_duration=4ep', f'save_folder={tmp_path}/mntp')
    found = losses(tmp_path / 'mntp')
    assert len(found) == 32 and found[31] < 0.8 * found[0]
    run_recipe(monkeypatch, 'train_stage1', *args, 'train_data.pairs=[{query: [short], positive: [long]}]',
               f'text_encoder.adapters=[{tmp_path}/mntp/lora]', 'max_duration=1ba', 'optimizer.lr=0.0',
               f'save_folder={tmp_path}/stage1')
    warm, stacked = (load_file(tmp_path / name / 'teacher/model.safetensors') for name in ('mntp', 'stage1'))
    raw = load_file(llm_folder / 'model.safetensors')
    moved = 'layers.0.mlp.up_proj.weight'
    torch.testing.assert_close(stacked[moved], warm[moved])
    assert (raw[moved] - warm[moved]).abs().max() > 1e-3


def test_accuracy_during_stage1_is_that_of_its_teacher(
    stage1_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [Sample(text, {'a': text, 'b': f'{text} on a wall'})
               for text in (sample.captions['long'][:28] for sample in make_samples(40, images=False))]
    write_dataset(samples, tmp_path / 'pairs')
    run_recipe(monkeypatch, 'train_stage1', *stage1_args, 'max_duration=4ba', 'eval_interval=2ba', 'optimizer.lr=0.01',
               'text_encoder.instruction="Find it. "', 'lora.lora_dropout=0.5', 'train_data.num_workers=0',
               f'eval_data.streams.s.local={tmp_path}/pairs/train', 'eval_data.num_workers=0',
               'eval_data.num_canonical_nodes=4', 'global_eval_batch_size=12', f'save_folder={tmp_path}/run')
    measured = read_metrics(tmp_path / 'run/metrics.jsonl')['metrics/eval/cra']
    # Of the first two captions of a dataset, which evaluation reads without instruction and without dropout.
    teacher = load_teacher(tmp_path / 'run/teacher')
    first, second = (encode_texts(*teacher, [sample.captions[key] for sample in samples]) for key in 'ab')
    assert measured.keys() == {2, 4} and measured[2] != measured[4]
    assert measured[4] == pytest.approx(caption_retrieval_accuracy(first, second))


@pytest.mark.dist
def test_two_nodes_that_share_only_a_remote_extract_together(
    image_dataset: Path, embeddings: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    """Each takes its shards, none twice; after one of them is lost, only that one is done again."""
    remote, port = tmp_path / 'bucket', free_port()

    def extract() -> str:
        nodes = []
        for k in range(2):
            recipe = ['recipes/extract_embeddings.py', f'teacher={teacher_folder}', f'out={tmp_path}/node{k}',
                      f'out_remote={remote}', f'datasets.train.local={tmp_path}/cache{k}',
                      f'datasets.train.remote={image_dataset}', 'device=cpu']
            (log := tmp_path / f'log{k}').unlink(missing_ok=True)
            nodes.append((Launched(recipe, log, first=k, world_size=2, port=port), log))
        return ''.join(finish(*node) for node in nodes)

    n = len(read_index(image_dataset)['shards'])
    assert f'train: {n} shards, 128 captions' in extract()
    assert read_index(remote / 'train')['shards'] and (remote / 'train/teacher.json').is_file()
    by_node = [{path.name for path in (tmp_path / f'node{k}/train').glob('*.mds')} for k in range(2)]
    assert by_node[0] and by_node[1] and not by_node[0] & by_node[1] and len(by_node[0] | by_node[1]) == n
    for row, other in zip(read_samples(remote / 'train'), read_samples(embeddings), strict=True):
        assert row['sample_id'] == other['sample_id']
        np.testing.assert_allclose(row['text_embedding.long'], other['text_embedding.long'], rtol=2e-3, atol=2e-3)
    for folder in (remote, tmp_path / 'node0', tmp_path / 'node1'):
        (folder / 'train/shard.00001.json').unlink(missing_ok=True)
    assert 'train: 1 shards' in extract()


@pytest.mark.dist
def test_a_corrupt_shard_stops_both_ranks(
    stage2_args: list[str], image_dataset: Path, embeddings: Path, tmp_path: Path
) -> None:
    shard = shutil.copytree(embeddings, tmp_path / 'embeddings') / 'shard.00001.mds'
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 255]))
    args = [*stage2_args, f'train_data.streams.s.local={tmp_path}/cache/images',
            f'train_data.streams.s.remote={image_dataset}', 'train_data.download_retry=1',
            f'train_data.streams.s.embeddings.tiny.local={tmp_path}/cache/embeddings',
            f'train_data.streams.s.embeddings.tiny.remote={tmp_path}/embeddings']
    script = tmp_path / 'without_wait.py'  # for the other rank's report of the same error
    script.write_text('import runpy\nimport llm2clip.command\nllm2clip.command._OTHER_RANKS_WAIT = 0\n'
                      "runpy.run_path('recipes/train_stage2.py', run_name='__main__')\n")
    # Without the launcher, which would kill the other rank when one has stopped.
    port, ranks = free_port(), []
    for rank in range(2):
        one_node = {'LOCAL_RANK': str(rank), 'LOCAL_WORLD_SIZE': '2', 'NODE_RANK': '0'}
        command = [str(script), *args, f'save_folder={tmp_path}/run']
        ranks.append((Launched(command, log := tmp_path / f'log{rank}', 1, one_node, rank, 2, port), log))
    outputs = [finish(*rank, ok=False) for rank in ranks]
    assert [rank.poll() for rank, _ in ranks] == [1, 1]
    named = [bool(re.search(r'error: .*embeddings/shard\.00001\.mds is damaged: xxh64', output)) for output in outputs]
    # The one that is in a collective operation when the other stops ends with that.
    assert any(named) and all(ok or 'another rank has ended' in output for ok, output in zip(named, outputs)), outputs


def test_the_loss_of_the_page_trains_and_nothing_warns(
    stage2_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """With two captions per image, and in microbatches by GradCache."""
    (tmp_path / 'my_parts.py').write_text(example_of_the_page('class Closer'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    # As most shipped files: no evaluation, and a scheduler that may begin at once.
    args = [*stage2_args, *SGD, 'eval_data=null', 'max_duration=2ba',
            'scheduler={name: linear_with_warmup, t_warmup: 0ba}']
    closer = 'loss={name: my_parts:Closer, arguments: {weight: %s}}'
    several, cached = 'train_data.captions_per_image=2', ['algorithms.grad_cache={}', 'device_train_microbatch_size=3']
    variants = {'clip': [], 'without': [closer % 0.0], 'several': [closer % 0.0, several],
                'added': [closer % 10, several], 'cached': [closer % 10, several, *cached]}
    for name, extra in variants.items():
        run_recipe(monkeypatch, 'train_stage2', *args, f'save_folder={name}', *extra)
    found = {name: losses(tmp_path / name) for name in variants}
    assert found['without'] == pytest.approx(found['clip'], rel=1e-5)
    assert found['several'][0] + 1 < found['added'][0] <= found['several'][0] + 40
    assert found['cached'] == pytest.approx(found['added'], rel=1e-5)
    assert [str(warning.message) for warning in recwarn if 'composer' in warning.filename] == []


@pytest.mark.dist
def test_initial_features_and_parameters_of_a_loss_outlast_a_stop(stage2_args: list[str], tmp_path: Path) -> None:
    """Self-distillation beside a loss of the user: what starts from trained weights in the second half of the steps
    still compares with the features before training."""
    torch.manual_seed(1)
    save_file(timm.create_model('test_efficientnet').state_dict(), tmp_path / 'tower.safetensors')
    shutil.copy(user_losses.__file__, tmp_path)
    script = tmp_path / 'train.py'  # beside it, where Python looks for modules
    script.write_text("import runpy\nrunpy.run_path('recipes/train_stage2.py', run_name='__main__')\n")
    args = [*stage2_args, *SGD, 'optimizer.momentum=0.5', 'optimizer.lr=0.002', 'eval_data=null',
            'model.vision.name=test_efficientnet', f'model.vision.checkpoint={tmp_path}/tower.safetensors',
            'model.vision.freeze_batch_norm=true', 'self_distillation={enabled: true, instance: 30, structure: 2}',
            'train_data.captions_per_image=2', 'lr_scale={loss_module: 20}',
            'loss={name: user_losses:Bilinear, arguments: {dim: 16}}']
    for name, ranks, extra in (('one', 1, []), ('two', 2, [*SHARDED, 'max_duration=3ba']), ('two', 2, SHARDED)):
        log = tmp_path / f'{name}.log'
        finish(Launched([str(script), *args, f'save_folder={tmp_path / name}', *extra], log, ranks), log)
    assert_same_losses(tmp_path / 'two', tmp_path / 'one')
    found, expected = (weights(tmp_path / name) for name in ('two', 'one'))
    assert_same_weights(found, expected)
    assert found['loss_module.loss.scale'] != 5 and found['loss_module.loss.matrix.weight'].shape == (16, 16)
    Stage2Run(tmp_path / 'two').load_model()


@pytest.mark.dist
@pytest.mark.skipif(not may_have_own_memory(), reason='needs root')
def test_two_nodes_train_together(
    stage2_args: list[str], image_dataset: Path, embeddings: Path, tmp_path: Path
) -> None:
    """Each with memory, temporary files and caches of its own, and a save_folder that both share."""
    args = [*stage2_args, *SGD, 'fsdp.state_dict_type=sharded', 'eval_data=null']
    run('train_stage2', tmp_path / 'one_node', args, 2)
    for steps in (3, 6):  # begun, and resumed
        port, nodes = free_port(), []
        for k in range(2):
            cache = tmp_path / f'cache{k}'
            data = [f'train_data.streams.s.{key}={value}' for key, value in (
                ('local', cache / 'images'), ('remote', image_dataset),
                ('embeddings.tiny.local', cache / 'embeddings'), ('embeddings.tiny.remote', embeddings))]
            command = ['recipes/train_stage2.py', *args, *data, f'max_duration={steps}ba',
                       f'save_folder={tmp_path}/two_nodes']
            (own := tmp_path / f'tmp{k}').mkdir(exist_ok=True)
            (log := tmp_path / f'log{k}').unlink(missing_ok=True)
            nodes.append((Launched(command, log, first=k, world_size=2, port=port, own=own), log))
        for node in nodes:
            finish(*node)
        assert max(losses(tmp_path / 'two_nodes')) == steps - 1
    assert losses(tmp_path / 'two_nodes') == losses(tmp_path / 'one_node')
    assert_same_weights(weights(tmp_path / 'two_nodes'), weights(tmp_path / 'one_node'))
