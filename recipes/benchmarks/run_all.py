# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Run the benchmarks of this folder, or those named, and print one table: run_all.py [NAME …]"""

import json
import subprocess
import sys
import time
from pathlib import Path

from bench_result import BENCH_FOLDER

FOLDER = Path(__file__).parent
HELPERS = (Path(__file__).stem, 'bench_result')


def main(names: list[str]) -> int:
    there = sorted(path.stem for path in FOLDER.glob('*.py') if path.stem not in HELPERS)
    unknown = sorted(set(names) - set(there))
    if unknown:
        raise SystemExit(f'there is no benchmark {", ".join(unknown)}; there are {", ".join(there)}')
    results = []
    for name in names or there:
        start = time.time()
        subprocess.run([sys.executable, str(FOLDER / f'{name}.py')], check=True)
        written = [path for path in sorted(BENCH_FOLDER.glob('*.json')) if path.stat().st_mtime >= start]
        results += [json.loads(path.read_text()) for path in written]
    print(f'{"name":<20}{"ratio":>8}{"bound":>8}  {"meets":<6} what / against')
    for result in results:
        print(f'{result["name"]:<20}{result["ratio"]:>8.3f}{result["bound"]:>8.2f}  {str(result["meets"]):<6} '
              f'{result["what"]} / {result["against"]}')
    return 0 if all(result['meets'] for result in results) else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
