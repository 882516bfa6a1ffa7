# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Run the cases of `cases.py` on this machine's first GPU, or those named: run_all.py gpu|cpu [NAME …]

Each runs in a process of its own.  One that fails does not stop the others, but the exit status is then 1.  One whose
result is there is not run again; what failed is.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import CASES, OUT

FOLDER = Path(__file__).parent
MOST_SECONDS = 1800
_CAUSE = re.compile(r'^[\w.]*(Error|Exception|Exit)\b.*', re.MULTILINE)


def run(command: Sequence[str], log: Path) -> str:
    """Run a command, all that it says in `log`; returns what went wrong, or nothing."""
    environment = {**os.environ, 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'LLM2CLIP_TRACEBACK': '1'}
    with log.open('w') as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment,
                                   start_new_session=True)
        try:
            code = process.wait(MOST_SECONDS)
        except subprocess.TimeoutExpired:
            return f'took longer than {MOST_SECONDS} s'
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the workers of its loader
                process.wait()
    if code == 0:
        return ''
    causes = [match[0] for match in _CAUSE.finditer(log.read_text(errors='replace'))]
    return causes[-1][:300] if causes else f'ended with the status {code}'


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per case; `x` is its rate over that of the case it is compared with."""
    def shown(value: Any, form: str) -> str:
        return '-' if value is None else format(value, form)

    lines = [f'{"case":<26}{"per s":>10}{"x":>7}{"s/step":>10}{"MFU":>7}{"GiB":>8}{"plan":>8}{"ratio":>7}{"waits":>7}'
             '  against']
    for name, result in results.items():
        if 'error' in result:
            lines.append(f'{name:<26}{"failed":>10}  {result["error"]}')
            continue
        against = CASES[name].against
        rate = results.get(against or '', {}).get('per_second')
        lines.append(
            f'{name:<26}{result["per_second"]:>10,.1f}{shown(rate and result["per_second"] / rate, ".2f"):>7}'
            f'{result["seconds_per_step"]:>10.3f}{shown(result["mfu"], ".1%"):>7}'
            f'{shown(result.get("peak_gib"), ".1f"):>8}{shown(result["plan_peak_gib"], ".1f"):>8}'
            f'{shown(result["peak_over_plan"], ".2f"):>7}{shown(result["data_wait_share"], ".1%"):>7}  {against or ""}')
    return '\n'.join(lines)


def main(device: str, names: Sequence[str]) -> int:
    if unknown := sorted(set(names) - set(CASES)):
        raise SystemExit(f'there is no case {", ".join(unknown)}; there are {", ".join(CASES)}')
    asked = subprocess.run([sys.executable, str(FOLDER / 'machine.py'), device], capture_output=True, text=True)
    if asked.returncode:
        print(f'nothing was measured: {(asked.stderr.strip().splitlines() or ["machine.py failed"])[-1]}; DEVICE=cpu '
              'tries the benchmark itself')
        return 1
    machine = json.loads(asked.stdout.splitlines()[-1])
    folder = OUT / re.sub(r'\W+', '_', machine['device'])
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    chosen = [name for name in CASES if name in (names or CASES)]
    for i, name in enumerate(chosen):
        path, start = folder / f'{name}.json', time.monotonic()
        log, done = path.with_suffix('.log'), path.is_file()
        error = '' if done else run([sys.executable, str(FOLDER / 'one_case.py'), name, device, str(path)], log)
        if not error and not path.is_file():
            error = 'ended without a result'
        results[name] = {'error': error, 'log': str(log)} if error else json.loads(path.read_text())
        said = 'was there' if done else f'failed ({log}): {error}' if error else f'{time.monotonic() - start:.0f} s'
        print(f'{i + 1} of {len(chosen)}: {name}, {said}', flush=True)
    before = {path.stem: json.loads(path.read_text()) for path in folder.glob('*.json')}
    known = {name: {**before, **results}[name] for name in CASES if name in before or name in results}
    whole = folder.with_suffix('.json')
    whole.write_text(json.dumps({'machine': machine, 'cases': known}, indent=2) + '\n')
    ran = sum('error' not in result for result in results.values())
    print(f'\n{table(known)}\n\nwrote {whole}\n{ran} of {len(chosen)} cases ran on {machine["device"]}')
    return 0 if ran == len(chosen) > 0 else 1


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
