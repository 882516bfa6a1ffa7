# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Ways that read an export, ways in which files go wrong, and what has to be said about them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.devices import DeviceCPU
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel

from llm2clip.command import _is_expected
from llm2clip.config import EvaluatedModelConfig, SearchConfig
from llm2clip.evaluation.evaluated_models import load_evaluated_model
from llm2clip.modeling import modeling_llm2clip
from llm2clip.search import load_model

Damage = Callable[[Path], object]
CPU = DeviceCPU()
TEXTS = ['a red square']
# Every way from an exported folder to features of texts.
WAYS: dict[str, Callable[[Path], torch.Tensor]] = {
    'evaluate': lambda folder: load_evaluated_model(
        EvaluatedModelConfig(export=str(folder)), folder.parent / 'cache', CPU).text_features(TEXTS)[0],
    'search': lambda folder: load_model(SearchConfig(str(folder)), CPU)[0].text_features(TEXTS)[0],
    'transformers': lambda folder: AutoModel.from_pretrained(folder).get_text_features(TEXTS),
    'remote code': lambda folder: modeling_llm2clip.LLM2CLIPModel.from_pretrained(folder).get_text_features(TEXTS),
}


def edited(**fields: Any) -> Damage:
    """Change fields of a JSON object; `...` removes one."""
    def damage(path: Path) -> None:
        content = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return damage


def written(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(path: Path) -> None:
        with safe_open(path, 'pt') as file:
            state, about = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
        change(state)
        save_file(state, path, about)

    return damage


def spoilt(value: float, which: int = 0) -> Damage:
    """One value of the weight that stands at `which` is another."""
    def change(state: dict[str, torch.Tensor]) -> None:
        floating = sorted(name for name in state if state[name].is_floating_point() and state[name].numel())
        state[floating[which]].view(-1)[-1] = value

    return weights(change)


def _longer(state: dict[str, torch.Tensor]) -> None:
    name = max(state)
    state[name] = torch.cat([state[name], state[name]])


BYTES = {'cut': cut, 'empty': written(b''), 'garbage': written(b'\x93\x00 no such file \xff' * 40), 'gone': Path.unlink}
WEIGHTS = {
    **BYTES, 'nan': spoilt(float('nan')), 'inf': spoilt(float('inf'), -1),
    'missing': weights(lambda state: state.pop(max(state))), 'another shape': weights(_longer),
    'left over': weights(lambda state: state.update({'model.of.nobody': torch.ones(2)})),
    'renamed': weights(lambda state: state.update({'model.of.nobody': state.pop(min(state))})),
}


def once_each(ways: Iterable[str], damages: Iterable[str]) -> list[tuple[str, str]]:
    """Every damage by the first way, and the first damage by every other way."""
    (first, *others), damages = ways, list(damages)
    return [*((first, damage) for damage in damages), *((way, damages[0]) for way in others)]


def is_one_line(error: ValueError) -> bool:
    return _is_expected(error) and '\n' not in str(error) and len(str(error)) < 900


def refused(load: Callable[[], object], *names: str) -> str:
    """What an error says, which is one line and names each of `names`."""
    with pytest.raises(ValueError) as caught:
        load()
    message = str(caught.value)
    assert is_one_line(caught.value) and all(name in message for name in names), message
    return message
