# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Rules across the settings of a training, which are checked before anything is loaded."""

from typing import Optional

import pytest
from composer.utils import dist
from recipes_in_process import REQUIRED, SCHEMAS

from llm2clip.config.loading import load_config
from llm2clip.errors import ConfigError
from llm2clip.training.trainer import check_train_config


@pytest.mark.parametrize(('recipe', 'overrides', 'key'), [
    ('train_stage2', ['fsdp={}', 'compile.bakend=inductor'], 'compile.bakend'),
    ('train_stage2', ['fsdp={}', 'device_train_microbatch_size=4'], 'device_train_microbatch_size'),
    ('train_stage2', ['fsdp={}', 'algorithms.channels_last={}'], 'algorithms.channels_last'),
    ('train_stage2', ['fsdp={}', 'device=cpu', 'precision=amp_bf16'], 'precision'),
    ('train_stage1', ['device_train_microbatch_size=4'], 'device_train_microbatch_size'),
    ('train_stage1', ['objective=mntp', 'algorithms.grad_cache={}'], 'algorithms.grad_cache'),
    ('train_stage1', ['fsdp={}', 'text_encoder.dtype=bfloat16'], 'text_encoder.dtype'),
    ('train_stage1', ['objective=mntp', 'eval_data.streams.s.local=d'], 'eval_data'),
])
def test_conflicting_settings_are_refused_by_key(recipe: str, overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_train_config(load_config(SCHEMAS[recipe], [*REQUIRED[recipe], *overrides]))
    assert error.value.key == key


@pytest.mark.parametrize(('keys', 'refused'), [
    ('replicate: 2, reshard_after_forward: 2', None), ('replicate: 3', 'fsdp.replicate'),
    ('replicate: 2, reshard_after_forward: 8', 'fsdp.reshard_after_forward')])
def test_fsdp_sizes_divide_the_ranks(keys: str, refused: Optional[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, 'get_world_size', lambda: 8)
    config = load_config(SCHEMAS['train_stage2'], [*REQUIRED['train_stage2'], f'fsdp={{{keys}}}',
                                                   'global_train_batch_size=24', 'global_eval_batch_size=24'])
    if refused is None:
        check_train_config(config)
        return
    with pytest.raises(ConfigError) as error:
        check_train_config(config)
    assert error.value.key == refused
