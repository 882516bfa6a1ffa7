# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What starts runs for the tests: no run waits for ever for one of its ranks."""

import time
from pathlib import Path

from launched import Launched
from remotes import free_port

ONE_FAILS = """
import os, signal, sys, time
if os.environ['RANK'] == '0':
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""


def test_a_rank_that_does_not_end_with_the_others_is_killed(tmp_path: Path) -> None:
    (tmp_path / 'script.py').write_text(ONE_FAILS)
    begun = time.monotonic()
    assert Launched([str(tmp_path / 'script.py')], tmp_path / 'log', 2, grace=0.5).wait(120) == 3
    assert time.monotonic() - begun < 100


def test_no_connection_takes_a_port_before_it_is_used() -> None:
    first_of_connections = int(Path('/proc/sys/net/ipv4/ip_local_port_range').read_text().split()[0])
    ports = [free_port() for _ in range(50)]
    assert len({*ports}) == 50 and max(ports) < first_of_connections
