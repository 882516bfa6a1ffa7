# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The index of a folder of images: one vector per image, in one SQLite file.

SQLite makes a change whole or not at all, whenever the process dies.  One process at a time writes images; any number
read, also meanwhile.
"""

import fcntl
import os
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from llm2clip.config import ConfigError
from llm2clip.search.files import FileState

__all__ = ['About', 'Entry', 'Index']

INDEX_FILE = 'index.sqlite'
LOCK_FILE = 'lock'
_FORMAT = 1
_TABLES = (
    'CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL)',
    'CREATE TABLE images (path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, vector BLOB, '
    'error TEXT)',
    'CREATE TABLE texts (text TEXT PRIMARY KEY, vector BLOB NOT NULL)',
    f'PRAGMA user_version = {_FORMAT}',
)
# Images in half the size, texts as they are: what is asked again scores the same.
_IMAGE, _TEXT = np.dtype('<f2'), np.dtype('<f4')


class About(NamedTuple):
    """What all vectors of an index have in common."""

    images: str
    """Absolute path of the folder of images."""
    model: str
    """Fingerprint of the model."""
    model_folder: str
    """Where the model was then."""
    precision: str
    """Of the forward pass."""


class Entry(NamedTuple):
    """An image file, with its vector or the reason why it has none."""

    path: str
    """Inside the folder of images."""
    state: FileState
    vector: Optional[np.ndarray] = None
    error: Optional[str] = None


class Index:
    """Vectors of the images of one folder, and of texts that were asked for.

    Args:
        folder: Where the index is, or will be after the first `claim`.

    Raises:
        ConfigError: What is there is no index, or one that another version of this package wrote; by any method: the
            file is damaged or the disk is full.
    """

    def __init__(self, folder: Union[str, Path]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / INDEX_FILE
        self._connection: Optional[sqlite3.Connection] = None
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f'index: {folder} is a file; expected a folder')
        if self.path.is_file():
            self._connect()

    def _connect(self) -> None:
        # Autocommit, with explicit transactions; waits a minute for another process's transaction.
        self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)

    @contextmanager
    def _transaction(self, kind: str = 'DEFERRED') -> Iterator[sqlite3.Connection]:
        assert self._connection is not None
        try:
            with self._connection as connection:
                connection.execute(f'BEGIN {kind}')
                yield connection
        except sqlite3.DatabaseError as error:
            raise ConfigError(f'index: {self.path}: {error}') from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only process that changes the images of this index.

        Raises:
            ConfigError: Another one does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK_FILE).open('a+') as file:
            try:
                # Not flock, which the loader's workers would inherit and hold after this process was killed.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                raise ConfigError(f'index: {self.folder} is being written by {file.read() or "another process"}; wait '
                                  'for it, or leave out `images` to search what is there') from None
            file.truncate(0)
            file.write(f'process {os.getpid()} on {socket.gethostname()}')
            file.flush()
            yield

    def about(self) -> Optional[About]:
        """What the index is of; None if there is none yet.

        Raises:
            ConfigError: Another version of this package wrote it.
        """
        if self._connection is None:
            return None
        with self._transaction() as connection:
            version, = connection.execute('PRAGMA user_version').fetchone()
            if version == 0 and not connection.execute('SELECT * FROM sqlite_master').fetchall():
                return None
            if version != _FORMAT:
                raise ConfigError(f'index: {self.path} has format {version}, this version of llm2clip reads {_FORMAT}; '
                                  f'remove {self.folder} or give another `index`')
            fields = dict(connection.execute('SELECT name, value FROM about'))
        return About(*(fields[name] for name in About._fields))

    def claim(self, about: About, replace: bool = False) -> None:
        """Begin an index, or make sure that the one that is there is of the same model and images.

        Args:
            about: What it is to be of.
            replace: Discard one that is of something else.

        Raises:
            ConfigError: It is of something else, and not to be replaced.
        """
        found = self.about()
        if found is not None and (difference := _difference(found, about)) is not None:
            if not replace:
                raise ConfigError(f'index: {self.folder} {difference}; give another `index`, or `images` and '
                                  f'replace=true to discard its {self.count():,} images')
            with self._transaction('IMMEDIATE') as connection:
                for table in ('about', 'images', 'texts'):
                    connection.execute(f'DROP TABLE {table}')
                self._create(connection, about)
        elif found is None:
            self._connect()
            with self._transaction('IMMEDIATE') as connection:
                self._create(connection, about)

    def _create(self, connection: sqlite3.Connection, about: About) -> None:
        for statement in _TABLES:
            connection.execute(statement)
        connection.executemany('INSERT INTO about VALUES (?, ?)', [*about._asdict().items(), ('finished', '')])

    def states(self) -> dict[str, tuple[FileState, Optional[str]]]:
        """Path -> state of the file when it was read, and why it has no vector."""
        with self._transaction() as connection:
            rows = connection.execute('SELECT path, size, mtime_ns, error FROM images').fetchall()
        return {os.fsdecode(path): (FileState(size, mtime_ns), error) for path, size, mtime_ns, error in rows}

    def count(self) -> int:
        """Number of images that have a vector."""
        with self._transaction() as connection:
            return connection.execute('SELECT count(vector) FROM images').fetchone()[0]

    def put(self, entries: Iterable[Entry]) -> None:
        """Add entries, or replace those of the same path, all at once."""
        rows = [(os.fsencode(entry.path), *entry.state, _encode(entry.vector, _IMAGE), entry.error)
                for entry in entries]
        with self._transaction('IMMEDIATE') as connection:
            connection.executemany('INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?)', rows)

    def remove(self, paths: Iterable[str]) -> None:
        """Drop entries, all at once."""
        with self._transaction('IMMEDIATE') as connection:
            connection.executemany('DELETE FROM images WHERE path = ?', [(os.fsencode(path),) for path in paths])

    @property
    def finished(self) -> bool:
        """Whether every image that the last update found is in the index."""
        with self._transaction() as connection:
            return bool(connection.execute("SELECT value FROM about WHERE name = 'finished'").fetchone()[0])

    @finished.setter
    def finished(self, value: bool) -> None:
        with self._transaction('IMMEDIATE') as connection:
            connection.execute("UPDATE about SET value = ? WHERE name = 'finished'", ['yes' if value else ''])

    def load(self) -> tuple[list[str], np.ndarray]:
        """Paths in their order, and vectors ``(N, D)`` in float32."""
        with self._transaction() as connection:
            rows = connection.execute('SELECT path, vector FROM images WHERE vector NOT NULL ORDER BY path').fetchall()
        vectors = np.empty((len(rows), len(rows[0][1]) // _IMAGE.itemsize if rows else 0), np.float32)
        for i, (_, vector) in enumerate(rows):
            vectors[i] = np.frombuffer(vector, _IMAGE)
        return [os.fsdecode(path) for path, _ in rows], vectors

    def texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Vectors ``(D,)`` of those texts that were kept."""
        with self._transaction() as connection:
            found = {text: connection.execute('SELECT vector FROM texts WHERE text = ?', [text]).fetchone()
                     for text in texts}
        return {text: np.frombuffer(row[0], _TEXT) for text, row in found.items() if row is not None}

    def put_texts(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Keep vectors ``(N, D)`` of texts."""
        rows = [(text, _encode(vector, _TEXT)) for text, vector in zip(texts, vectors)]
        with self._transaction('IMMEDIATE') as connection:
            connection.executemany('INSERT OR REPLACE INTO texts VALUES (?, ?)', rows)


def _encode(vector: Optional[np.ndarray], dtype: np.dtype[Any]) -> Optional[bytes]:
    return None if vector is None else vector.astype(dtype).tobytes()


def _difference(found: About, wanted: About) -> Optional[str]:
    """In what an index differs from what is wanted."""
    if found.model != wanted.model:
        return (f'was made with another model: {found.model_folder} ({found.model}), not {wanted.model_folder} '
                f'({wanted.model})')
    if found.images != wanted.images:
        return f'is of the images in {found.images}, not of those in {wanted.images}'
    if found.precision != wanted.precision:
        return f'was made with precision={found.precision}, not {wanted.precision}'
    return None
