# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Run all or the named cases of `cases.py` on this machine's first GPU:
python -m recipes.benchmarks.gpu.run_all gpu|cpu [NAME …]

Each case runs in a separate process.  A failure does not stop the other cases, but sets the exit status to 1.
Cases with a result are skipped; failed ones run again.
"""

import json
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.benchmarks.gpu.cases import CASES, OUT
from recipes.benchmarks.measuring import ProcessFailedError, describe, watch

MOST_SECONDS = 1800
ENVIRONMENT = {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'LLM2CLIP_TRACEBACK': '1'}
_CAUSE = re.compile(r'^[\w.]*(?:Error|Exception|Exit)\b.*', re.MULTILINE)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Format one line per case; `x` is the rate divided by that of the reference case."""
    def shown(value: Any, form: str) -> str:
        return '-' if value is None else format(value, form)

    lines = [f'{"case":<26}{"per s":>10}{"x":>7}{"MFU":>7}{"s/step":>9}{"plan":>9}{"ratio":>7}{"GiB":>8}'
             f'{"plan":>8}{"ratio":>7}{"waits":>7}  against']
    for name, result in results.items():
        if 'error' in result:
            lines.append(f'{name:<26}{"failed":>10}  {result["error"]}')
            continue
        against = CASES[name].against
        rate = results.get(against, {}).get('per_second')
        lines.append(
            f'{name:<26}{result["per_second"]:>10,.1f}{shown(rate and result["per_second"] / rate, ".2f"):>7}'
            f'{shown(result["mfu"], ".1%"):>7}'
            f'{result["seconds_per_step"]:>9.3f}{shown(result["plan_seconds_per_step"], ".3f"):>9}'
            f'{shown(result["seconds_over_plan"], ".2f"):>7}'
            f'{shown(result.get("peak_gib"), ".1f"):>8}{shown(result["plan_peak_gib"], ".1f"):>8}'
            f'{shown(result["peak_over_plan"], ".2f"):>7}{shown(result["data_wait_share"], ".1%"):>7}  '
            + against)
    return '\n'.join(lines)


def measure(name: str, device: str, path: Path) -> dict[str, Any]:
    """Return the result of a case from its file `path`, after running it if there is none; or its error."""
    log = path.with_suffix('.log')
    if not path.is_file():
        try:
            watch([sys.executable, '-m', 'recipes.benchmarks.gpu.one_case', name, device, str(path)], log,
                  limit=MOST_SECONDS, environment=ENVIRONMENT)
        except ProcessFailedError as error:
            causes = [*_CAUSE.findall(log.read_text(errors='replace')), str(error).splitlines()[-1]]
            return {'error': causes[0][:300], 'log': str(log)}
    return json.loads(path.read_text())


def main(device: str, names: Sequence[str]) -> int:
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        raise SystemExit(f'there is no case {", ".join(unknown)}; there are {", ".join(CASES)}')
    if device == 'gpu' and not torch.cuda.is_available():
        print(f'nothing was measured: torch {torch.__version__} finds no NVIDIA GPU here; DEVICE=cpu tries '
              'the benchmark itself')
        return 1
    machine = torch.cuda.get_device_name() if device == 'gpu' else 'cpu'
    folder = OUT / re.sub(r'\W+', '_', machine)
    chosen = names or list(CASES)
    results = {path.stem: json.loads(path.read_text()) for path in folder.glob('*.json')}
    for i, name in enumerate(chosen, 1):
        start = time.monotonic()
        result = measure(name, device, folder / f'{name}.json')
        results[name] = result
        message = f'{time.monotonic() - start:.0f} s'
        if 'error' in result:
            message = f'failed ({result["log"]}): {result["error"]}'
        print(f'{i} of {len(chosen)}: {name}, {message}', flush=True)
    results = {name: results[name] for name in CASES if name in results}
    whole = folder.with_suffix('.json')
    whole.write_text(json.dumps({'about': describe(), 'cases': results}, indent=2) + '\n')
    num_failed = sum('error' in results[name] for name in chosen)
    print(f'\n{table(results)}\n\nwrote {whole}\n{len(chosen) - num_failed} of {len(chosen)} cases ran on '
          f'{machine}')
    return int(num_failed > 0)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
