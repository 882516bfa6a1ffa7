# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How the programs beside which LLM2CLIP is put are measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / 'recipes/claims/alternatives'
# Six steps, after every second of which it writes a checkpoint; what it trains is where it went on.  In the folder that
# is killed it waits for that.  A child of it holds 64 MB.
PROGRAM = '''
import subprocess, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
checkpoint = folder / 'checkpoint'
begun = int(checkpoint.read_text()) if checkpoint.is_file() else 0
print('goes on from', begun)
child = subprocess.Popen([sys.executable, '-c', 'held = b"1" * 2**26; import time; time.sleep(60)'])
for step in range(begun + 1, 7):
    time.sleep(60 if step == 6 and folder.name == 'killed' and not begun else 0.25)
    with (folder / 'log').open('a') as file:
        file.write('step ')
    if step % 2 == 0:
        checkpoint.write_text(str(step))
(folder / 'weights').write_text(str(begun))
'''


def test_what_a_kill_costs_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    watched, table = (importlib.import_module(name) for name in ('watched', 'alternatives_table'))
    for name in ('watched', 'alternatives_table'):
        monkeypatch.delitem(sys.modules, name)

    def make(folder: Path) -> 'watched.Program':  # pyright: ignore
        return watched.Program(
            [sys.executable, '-c', PROGRAM, str(folder)], lambda: watched.count(folder / 'log', 'step'),
            lambda text: int(text.split('goes on from ')[1]),
            lambda: {'weight': torch.tensor([float((folder / 'weights').read_text())])})

    found = watched.kill_and_go_on(make, tmp_path / 'killed', steps=6, kill_after=5)
    assert found == {'steps': 6, 'killed_after': 5, 'goes_on_from': 4, 'difference': 4.0,
                     'difference_of_a_repetition': 0.0}
    assert table.describe_kill(found) == 'killed after 5 of 6 steps, goes on from 4; final weights differ by up to 4'
    program = make(tmp_path / 'whole')
    whole = watched.watch(program.command, tmp_path / 'log.txt', program.done)
    assert whole['peak_gib'] > 2**26 / 2**30 and whole['seconds'] > whole['first_step'] > 0.25
    assert whole['seconds_per_step'] > 0.2
    monkeypatch.setattr(watched, 'ROUNDS', 1)
    assert watched.paces({'one': make}, tmp_path / 'pace')['one'] > 0.2
    assert sorted(path.name for path in (tmp_path / 'pace').iterdir()) == ['round0.json', 'run.log']
    assert watched.paces({'one': lambda _: pytest.fail('measured again')}, tmp_path / 'pace')['one'] > 0.2
    # What a round lacks is not measured without the others.
    both = watched.paces({'one': make, 'two': make}, tmp_path / 'pace')
    assert sorted(both) == ['one', 'two'] and min(both.values()) > 0.2
    assert 'two' in json.loads((tmp_path / 'pace/round0.json').read_text())
