# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Progress bars in a log file."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_progress_in_a_log_is_a_line_per_ten_seconds(tmp_path: Path) -> None:
    """Of bars that are drawn at each step, as Composer draws its, and of those in libraries."""
    code = f'''
        import sys, time
        from tqdm.auto import tqdm
        from llm2clip.command import run_command
        from llm2clip.config import PrepareConfig
        from llm2clip.io import progress

        def main(config):
            seconds = 0.0
            time.monotonic = lambda: seconds
            progress._log_lines()._last_time = 0.0
            for more in ({{}}, {{'file': progress.progress_file()}}):
                bar = tqdm(total=50, **more, position=1, mininterval=0, leave=True)
                for i in range(50):
                    seconds += 0.5
                    bar.update()
                    bar.set_postfix(loss=i)
                bar.close()

        run_command(PrepareConfig, main, ['out={tmp_path}/out', 'source.name=emoji'])
        '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                          timeout=60, check=True)
    lines = done.stderr.splitlines()[1:]
    assert 3 <= len(lines) <= 5, lines
    assert all(re.match(r'\d+%\|.*\]$', line) for line in lines), lines
