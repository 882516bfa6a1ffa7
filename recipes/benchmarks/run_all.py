# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Run all or the named benchmarks of this folder and print one table:
python -m recipes.benchmarks.run_all [NAME …]"""

import json
import subprocess
import sys
import time

from recipes.benchmarks.measuring import BENCH_FOLDER

NAMES = ('cost', 'stage1_step', 'stage2_step')


def main(names: list[str]) -> int:
    results = []
    for name in names or NAMES:
        start = time.time()
        subprocess.run([sys.executable, '-m', f'recipes.benchmarks.{name}'], check=True)
        written = [path for path in sorted(BENCH_FOLDER.glob('*.json')) if path.stat().st_mtime >= start]
        results += [json.loads(path.read_text()) for path in written]
    print(f'{"name":<24}{"ratio":>8}{"bound":>8}  {"meets":<6} what / against')
    for result in results:
        print(f'{result["name"]:<24}{result["ratio"]:>8.3f}{result["bound"]:>8.2f}  '
              f'{str(result["meets"]):<6} {result["what"]} / {result["against"]}')
    return int(not all(result['meets'] for result in results))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
