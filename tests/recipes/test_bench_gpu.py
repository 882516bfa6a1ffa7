# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""`make bench-gpu` around its cases, which are stood in for: what it runs again, and when it passes."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llm2clip.config.files import load_config

ROOT = Path(__file__).parents[2]
# In place of a case: NAME DEVICE RESULT.json.  The third one ends without a result, the second with an error.
STAND_IN = '''
import json, pathlib, sys
name, device, path = sys.argv[1:]
with open('started', 'a') as file:
    file.write(name + ' ')
if name == 'b16_compile' and not pathlib.Path('mended').exists():
    raise MemoryError('too large')
if name != 'b16_not_fused' or pathlib.Path('mended').exists():
    rate = 50.0 if name == 'b16' else 60.0
    result = {'per_second': rate, 'seconds_per_step': 0.1, 'mfu': 0.4, 'peak_gib': 10.0, 'plan_peak_gib': 8.0,
              'peak_over_plan': 1.25, 'data_wait_share': None}
    pathlib.Path(path).write_text(json.dumps(result))
'''
THREE = ('b16', 'b16_compile', 'b16_not_fused')


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, ModuleType]:
    """The scripts of recipes/benchmarks/gpu that import no torch, in an empty folder with the stand-ins."""
    folder, found = ROOT / 'recipes/benchmarks/gpu', {}
    for name in ('cases', 'run_all'):
        spec = importlib.util.spec_from_file_location(name, folder / f'{name}.py')
        assert spec is not None and spec.loader is not None
        found[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, found[name])
        spec.loader.exec_module(found[name])
    (tmp_path / 'one_case.py').write_text(STAND_IN)
    (tmp_path / 'machine.py').write_text('print(\'{"device": "NVIDIA H100 80GB HBM3"}\')')
    monkeypatch.setattr(found['run_all'], 'FOLDER', tmp_path)
    monkeypatch.chdir(tmp_path)
    return found


def test_a_case_that_failed_is_run_again_and_no_other(
    bench: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    run_all = bench['run_all']
    assert run_all.main('gpu', THREE) == 1
    said = capsys.readouterr().out
    assert said.endswith('1 of 3 cases ran on NVIDIA H100 80GB HBM3\n')
    assert 'MemoryError: too large' in said and 'ended without a result' in said
    Path('mended').touch()
    assert run_all.main('gpu', THREE) == 0
    assert Path('started').read_text().split() == [*THREE, *THREE[1:]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == '3 of 3 cases ran on NVIDIA H100 80GB HBM3'
    row, = (line.split() for line in lines if line.startswith('b16_compile'))
    assert row == ['b16_compile', '60.0', '1.20', '0.100', '40.0%', '10.0', '8.0', '1.25', '-', 'b16']
    whole = json.loads(Path('runs/bench_gpu/NVIDIA_H100_80GB_HBM3.json').read_text())
    assert list(whole['cases']) == [*THREE] and whole['machine']['device'] == 'NVIDIA H100 80GB HBM3'


def test_without_a_gpu_it_fails(
    bench: dict[str, ModuleType], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / 'machine.py').write_text('import sys; sys.exit("no NVIDIA GPU here")')
    assert bench['run_all'].main('gpu', []) == 1
    assert 'nothing was measured: no NVIDIA GPU here' in capsys.readouterr().out
    assert not Path('runs').exists()


def test_every_case_is_a_configuration(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    cases = bench['cases']
    monkeypatch.chdir(ROOT)
    for name, case in cases.CASES.items():
        assert case.against is None or case.against in cases.CASES
        config = load_config(cases.SCHEMAS[case.kind], cases.arguments(name, 'gpu', Path('r')))
        assert (config.device, config.precision) == ('gpu', 'amp_bf16')
