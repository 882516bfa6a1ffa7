# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Both trainings on a GPU against the same on a CPU, and against the plain computation."""

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from composer import Callback, State
from composer.loggers import Logger
from gradients import COPIES
from launched import DEVICE, Train, losses, on_cpu, weights

# Name -> stage and arguments of a training.
TRAININGS: dict[str, tuple[int, list[str]]] = {
    'captions': (1, ['train_data.pairs=[{query: [short], positive: [long]}]', 'learn_logit_scale=true']),
    'masked_texts': (1, ['objective=mntp', 'train_data.texts={short: 1.0}', 'device_train_microbatch_size=3']),
    'convnet': (2, []),
    'vit': (2, ['model.vision.name=test_vit']),
    'siglip': (2, ['model.vision.name=test_vit', 'loss.name=siglip', 'model.logit_scale=10', 'model.logit_bias=-10']),
}


def _final(folder: Path) -> torch.Tensor:
    found = weights(folder)
    return torch.cat([found[name].double().flatten() for name in sorted(found)])


def _assert_alike(found: Path, expected: Path, start: Path, precision: str = 'fp32') -> None:
    """Losses within a share, and weights that went from the same start into the same direction, as far."""
    losses_within, cosine = (1e-4, 0.9999) if precision == 'fp32' else (0.03, 0.98)
    assert losses(found).keys() == losses(expected).keys() and len(losses(found)) == 8
    assert losses(found) == pytest.approx(losses(expected), rel=losses_within)
    begun = _final(start)
    ours, other = _final(found) - begun, _final(expected) - begun
    assert other.norm() > 1e-4 * begun.norm()
    assert F.cosine_similarity(ours, other, dim=0) > cosine
    assert ours.norm() / other.norm() == pytest.approx(1, abs=2 * (1 - cosine) ** 0.5)


@pytest.mark.parametrize('name', TRAININGS)
def test_a_gpu_learns_what_a_cpu_learns(name: str, train: Train) -> None:
    stage, args = TRAININGS[name]
    start = train(stage, 'start', *on_cpu(*args, 'optimizer.lr=0', 'max_duration=1ba'))
    expected = train(stage, 'cpu', *on_cpu(*args))
    for precision in ('fp32', 'amp_bf16'):
        found = train(stage, precision, *args, f'precision={precision}')
        _assert_alike(found, expected, start, precision)
    if stage == 2 and DEVICE == 'gpu':
        # Whose first steps are left out, until the gradients' scale is found.
        found, whole = (losses(train(stage, name, *args, f'precision={precision}', 'optimizer.lr=0'))
                        for name, precision in (('float16', 'amp_fp16'), ('unchanged', 'fp32')))
        assert found == pytest.approx(whole, rel=0.02)


# What computes the same in another way.
WAYS: dict[str, list[str]] = {
    'cached': ['algorithms.grad_cache={}', 'device_train_microbatch_size=3'],
    'blockwise': ['loss.block_size=3'],
    'fsdp': ['fsdp={state_dict_type: full}'],
    'sharded_cached': ['fsdp={activation_checkpointing: true}', 'algorithms.grad_cache={}',
                       'device_train_microbatch_size=3'],
    'recomputed': ['model.vision.gradient_checkpointing=true'],
    'offloaded': ['fsdp={activation_cpu_offload: true}'],
    'compiled': ['compile={}'],
    'compiled_sharded': ['compile={}', 'fsdp={activation_checkpointing: true}'],
    'workers': ['train_data.num_workers=2'],
}


@pytest.mark.parametrize('precision', ['fp32', 'amp_bf16'])
@pytest.mark.parametrize('stage', [1, 2])
def test_every_way_is_the_plain_one(stage: int, precision: str, train: Train) -> None:
    args = [f'precision={precision}', *([] if stage == 1 else ['model.vision.name=test_vit'])]
    start = train(stage, 'start', *args, 'optimizer.lr=0', 'max_duration=1ba')
    expected = train(stage, 'plain', *args)
    for name, way in WAYS.items():
        own = [arg for arg in way if stage == 2 or not arg.startswith(('loss.', 'model.'))]
        if not own or (DEVICE == 'cpu' and (name == 'offloaded' or 'fsdp' in str(own) and precision != 'fp32')):
            continue
        _assert_alike(train(stage, name, *args, *own), expected, start, precision)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


@pytest.mark.usefixtures('deterministic')
@pytest.mark.parametrize('kind', ['', 'fsdp.state_dict_type=sharded', 'fsdp.state_dict_type=full'])
@pytest.mark.parametrize('stage', [1, 2])
def test_a_resumed_run_is_the_same_bit_for_bit(stage: int, kind: str, train: Train) -> None:
    args = ['precision=amp_bf16', 'save_interval=3ba', 'optimizer={name: adamw, lr: 0.01}']
    args += ['lora.lora_dropout=0.2'] if stage == 1 else ['model.vision.name=test_vit', 'algorithms.patch_dropout={}']
    args += [kind] if kind else []
    if kind and DEVICE == 'cpu':
        args[0] = 'precision=fp32'
    whole = train(stage, 'whole', *args)
    stopped = train(stage, 'resumed', *args, 'max_duration=3ba')
    for written in ('teacher', 'lora'):  # what stage 1 writes at its end
        shutil.rmtree(stopped / written, ignore_errors=True)
    resumed = train(stage, 'resumed', *args)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 8
    assert torch.equal(_final(resumed), _final(whole))


class _Peak(Callback):
    """Most bytes of tensors on the GPU in the steps after the first two."""

    bytes = 0

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == 2:
            torch.cuda.reset_peak_memory_stats()

    def fit_end(self, state: State, logger: Logger) -> None:
        _Peak.bytes = torch.cuda.max_memory_allocated()


@pytest.mark.parametrize('way', ['plain', 'cached', 'fsdp', 'recomputed'])
def test_the_plan_knows_the_peak(way: str, train: Train, watch: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """ViT-B/16 at 32 images, 2 to 4 GiB; on a CPU, the plan alone is tried."""
    args = ['model.vision.name=vit_base_patch16_224', 'model.vision.image_size=224', 'model.adapter.depth=4',
            'model.embed_dim=512', 'optimizer.name=adamw', 'optimizer.lr=1e-5', 'global_train_batch_size=32',
            f'precision={"fp32" if DEVICE == "cpu" else "amp_bf16"}', *WAYS.get(way, []), 'max_duration=2ep',
            *(['device_train_microbatch_size=16'] if way == 'cached' else [])]
    train(2, 'plan', *args, 'plan=true')
    planned = next(line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith('  peak'))
    if DEVICE == 'cpu':
        assert 0.5 < float(planned) < 8
        return
    watch(_Peak())
    gc.collect()
    before = torch.cuda.memory_allocated()  # of other tests
    train(2, 'run', *args)
    assert (_Peak.bytes - before) / 2**30 == pytest.approx(float(planned), rel=0.05)


@pytest.mark.parametrize('stage', [1, 2])
def test_two_gpus_learn_what_one_learns(stage: int, train: Train, train_on_two: Train) -> None:
    if DEVICE == 'gpu' and torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    args = ['precision=fp32', *([] if stage == 1 else ['model.vision.name=test_vit'])]
    start = train(stage, 'start', *args, 'optimizer.lr=0', 'max_duration=1ba')
    expected = train(stage, 'one', *args)
    for name, way in (('ddp', []), ('sharded', ['fsdp={activation_checkpointing: true}']),
                      ('copies', [f'fsdp.replicate={2 if DEVICE == "gpu" else COPIES}']),
                      ('cached', [*WAYS['cached'], 'fsdp={}'])):
        _assert_alike(train_on_two(stage, name, *args, *way), expected, start)
    if DEVICE == 'gpu':
        half = train_on_two(stage, 'half', *args, 'precision=amp_bf16', 'fsdp={}')
        _assert_alike(half, expected, start, 'amp_bf16')
