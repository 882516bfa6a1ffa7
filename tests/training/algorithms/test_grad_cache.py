# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""GradCache against the plain computation: loss and every gradient, one rank and two, DDP and FSDP2, compiled."""

from pathlib import Path
from typing import Any

import gradients
import pytest
import torch
from filelock import FileLock
from gradients import (
    COMPILED,
    CUSTOM,
    JOINT,
    PREFIXES,
    WAYS,
    Result,
    caption_step,
    image_step,
    inheritance_step,
    joint_step,
)
from launched import Launched, finish

from llm2clip.training.algorithms.grad_cache import GradCache

pytestmark = pytest.mark.long


def _assert_equal(found: Result, expected: Result, close: float = 2e-5, part: str = 'logit_scale') -> None:
    """Each gradient within a share of its size, among them that of a part; not those that are zero but for rounding, of
    biases that add the same to all scores of a query."""
    assert found.keys() == expected.keys() and len(found) > 10
    assert any(part in name for name in found)
    for name, value in expected.items():
        if name != 'random' and not name.endswith('k_proj.bias'):
            error = (found[name] - value).abs().max() / value.abs().max()
            assert value.abs().max() > 0 and error < close, (name, error)


@pytest.fixture(scope='module')
def plain(llm_folder: Path) -> Result:
    return caption_step(str(llm_folder), gradients.N, 0.0, 'plain')


@pytest.fixture(scope='module')
def two_ranks(
    llm_folder: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> dict[str, Any]:
    """What two ranks find, once for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    out = (base if worker_id == 'master' else base.parent) / 'two_ranks.pt'
    with FileLock(out.with_suffix('.lock')):
        if not out.exists():
            log, unfinished = out.with_suffix('.log'), out.with_suffix('.unfinished')
            finish(Launched(['tests/gradients.py', str(llm_folder), str(clip), str(unfinished)], log, 2), log)
            unfinished.rename(out)
    return torch.load(out)


@pytest.mark.parametrize('microbatch_size', [gradients.N, 5, 3])
def test_one_rank(plain: Result, llm_folder: Path, microbatch_size: int) -> None:
    _assert_equal(caption_step(str(llm_folder), microbatch_size, 0.0, 'cached'), plain)


def test_one_rank_with_a_number_of_tokens(plain: Result, llm_folder: Path) -> None:
    _assert_equal(caption_step(str(llm_folder), gradients.N, 0.0, 'cached', max_tokens=gradients.TOKENS), plain)


def test_one_rank_with_dropout(plain: Result, llm_folder: Path) -> None:
    cached, naive = (caption_step(str(llm_folder), 3, 0.3, kind) for kind in ('cached', 'in_one_graph'))
    _assert_equal(cached, naive)
    assert not torch.allclose(cached['loss'], plain['loss'], rtol=1e-3)
    # What is random after the step is what it would have been without the cache.
    torch.testing.assert_close(cached['random'], naive['random'], rtol=0, atol=0)


@pytest.mark.parametrize('stage', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_compiled_blocks(stage: int, llm_folder: Path) -> None:
    """With dropout and an uneven microbatch; no compiled module has another name."""
    found, expected = (caption_step(str(llm_folder), 6, 0.3, 'cached', way) if stage == 1
                       else image_step(6, way, 'test_vit') for way in (COMPILED['ddp'], WAYS['ddp']))
    _assert_equal(found, expected, 1e-6)
    torch.testing.assert_close(found['random'], expected['random'], rtol=0, atol=0)


@pytest.mark.dist
def test_compiled_blocks_on_two_ranks(two_ranks: dict[str, Any]) -> None:
    """Sharded and recomputed; a sharded and compiled stage 1 is a slow test of the recipes."""
    _assert_equal(two_ranks['compiled'], image_step(None, tower='test_vit'))


@pytest.mark.dist
@pytest.mark.parametrize('case', ['ddp/5', 'ddp/2', 'ddp/tokens', 'fsdp/5', 'fsdp/2', 'fsdp/tokens', 'hsdp/2'])
def test_two_ranks(plain: Result, two_ranks: dict[str, Any], case: str) -> None:
    _assert_equal(two_ranks[f'captions/{case}'], plain)


@pytest.mark.dist
@pytest.mark.parametrize('way', WAYS)
def test_two_ranks_with_dropout(two_ranks: dict[str, Any], way: str) -> None:
    _assert_equal(two_ranks[f'dropout/{way}/cached'], two_ranks[f'dropout/{way}/in_one_graph'])


@pytest.mark.dist
def test_stage2(two_ranks: dict[str, Any]) -> None:
    expected = image_step(None)
    for found in (image_step(3), *(two_ranks[f'images/{way}'] for way in (*WAYS, 'hsdp'))):
        _assert_equal(found, expected)
    several = image_step(None, captions=3, distilled=True)
    for found in (image_step(3, captions=3, distilled=True),
                  *(two_ranks[f'images/{way}/3 captions, distilled'] for way in WAYS)):
        _assert_equal(found, several)
    plain = image_step(None, captions=3)
    assert several['loss'] > plain['loss'] + 0.1
    prefixes = image_step(None, captions=3, loss=PREFIXES)
    assert not torch.allclose(prefixes['loss'], plain['loss'], rtol=1e-3)
    for found in (image_step(3, captions=3, loss=PREFIXES), *(two_ranks[f'images/{way}/prefixes'] for way in WAYS)):
        _assert_equal(found, prefixes)


@pytest.mark.dist
def test_a_loss_of_the_user_sees_all_ranks_and_microbatches(two_ranks: dict[str, Any]) -> None:
    """Several captions per image, a matrix among its parameters, and a temperature that it does not use."""
    expected = image_step(None, captions=3, loss=CUSTOM)
    assert expected.pop('model.logit_scale') == 0
    cases = [f'images/{way}/custom/{size}' for way in WAYS for size in (None, 2)]
    for found in (image_step(3, captions=3, loss=CUSTOM), *(two_ranks[case] for case in cases)):
        assert found.pop('model.logit_scale') == 0
        _assert_equal(found, expected, part='loss_module.loss.matrix')


@pytest.mark.dist
@pytest.mark.parametrize('case', JOINT)
def test_trainable_text_encoders(llm_folder: Path, clip: Path, two_ranks: dict[str, Any], case: str) -> None:
    """With an uneven microbatch, and with dropout where one rank has the random numbers of the other computation."""
    def step(size: int, kind: str, dropout: float) -> Result:
        return joint_step(str(llm_folder), str(clip), size, kind, dropout=dropout, **JOINT[case])

    cached, naive = (step(3, kind, 0.3) for kind in ('cached', 'in_one_graph'))
    _assert_equal(cached, naive)
    torch.testing.assert_close(cached['random'], naive['random'], rtol=0, atol=0)
    plain = step(gradients.N, 'in_one_graph', 0.0)
    part = {'lora': 'lora_A', 'clip': 'text_projection'}[case]
    for found in (step(3, 'cached', 0.0), *(two_ranks[f'joint/{way}/{case}'] for way in WAYS)):
        _assert_equal(found, plain, part=part)


@pytest.mark.dist
def test_inheritance(two_ranks: dict[str, Any]) -> None:
    """Where the ranks have different numbers of samples that count."""
    expected = inheritance_step(None)
    for found in (inheritance_step(3), *(two_ranks[f'inheritance/{way}'] for way in WAYS)):
        _assert_equal(found, expected, part='adapter.projection')
    blocks = [f'model.adapter.blocks.{i}' for i in range(2)]
    assert two_ranks['inheritance/fsdp/units'] == {'sharded': ['model', 'model.adapter', *blocks], 'recomputed': blocks}


@pytest.mark.dist
def test_fsdp_shards_and_recomputes_block_by_block(two_ranks: dict[str, Any]) -> None:
    """By the names of what Composer wrapped: a model that is one unit trains all the same."""
    blocks = [f'model.vision_encoder.trunk.blocks.{i}' for i in range(5)]
    assert two_ranks['images/fsdp/units'] == {
        'sharded': ['model', 'model.vision_encoder', *blocks, 'model.visual_projection', 'model.adapter',
                    'model.adapter.blocks.0'], 'recomputed': blocks}
    layers = [f'text_encoder.llm.base_model.model.layers.{i}' for i in range(2)]
    assert two_ranks['captions/fsdp/units'] == {'sharded': ['text_encoder', *layers, 'scale'], 'recomputed': layers}
    assert two_ranks['images/ddp/units'] == {'sharded': [], 'recomputed': []}


def test_batch_norm_in_training_mode_is_refused() -> None:
    state = type('State', (), {'model': torch.nn.Sequential(torch.nn.BatchNorm1d(3))})()
    with pytest.raises(ValueError, match='freeze_batch_norm'):
        GradCache()._first_pass(state)
