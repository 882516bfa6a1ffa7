# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Disks that fail, and what is known to be on a disk."""

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse what makes a file of this process larger than `size` bytes: File too large."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def flip(path: Path) -> None:
    """Change a bit of the last byte, not the size."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


class Disk:
    """What of the calls of this process a loss of power would not undo.

    A folder is flushed after a name in it has changed, and a file before its folder has its name.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self._flushed: dict[int, int] = {}  # inode -> time of its last change
        fsync, remove, rmtree = os.fsync, os.remove, shutil.rmtree

        def flush(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            self.calls.append(('flush', os.readlink(f'/proc/self/fd/{descriptor}')))
            status = os.stat(descriptor)
            self._flushed[status.st_ino] = status.st_mtime_ns
            fsync(file)

        def rename(call: Any) -> Any:
            def renamed(source: Any, target: Any, **options: Any) -> Any:
                self.check_flushed(Path(source))
                result = call(source, target, **options)
                self.calls.append(('rename', str(Path(target))))
                return result
            return renamed

        def removing(call: Any) -> Any:
            def removed(path: Any, *args: Any, **options: Any) -> Any:
                self.calls.append(('remove', str(path)))
                return call(path, *args, **options)
            return removed

        monkeypatch.setattr(os, 'fsync', flush)
        monkeypatch.setattr(Path, 'replace', rename(Path.replace))
        monkeypatch.setattr(os, 'replace', rename(os.replace))
        monkeypatch.setattr(os, 'remove', removing(remove))
        monkeypatch.setattr(shutil, 'rmtree', removing(rmtree))

    def check_flushed(self, path: Path) -> None:
        """Fail if a file, or something in a folder, has changed since it was flushed."""
        for present in [path, *path.rglob('*')]:
            status = present.stat()
            assert self._flushed.get(status.st_ino) == status.st_mtime_ns, present

    def check_names(self, folder: Path) -> None:
        """Fail if what is below `folder` was renamed into a folder that was not flushed afterwards."""
        renamed = [i for i, (call, path) in enumerate(self.calls)
                   if call == 'rename' and path.startswith(str(folder)) and os.path.exists(path)]
        assert renamed
        for i in renamed:
            assert ('flush', str(Path(self.calls[i][1]).parent)) in self.calls[i:]
