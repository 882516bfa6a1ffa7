# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A real S3 server on loopback, and a proxy in front of it that misbehaves."""

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import boto3

S3_KEY, S3_SECRET = 'key', 'not-a-real-secret'


# Below those that the system gives to connections, one of which could take a port before it is listened on: of two
# ranks, the first would end at once, and the second wait for it for minutes.  Each process begins elsewhere.
_PORTS = range(12_000, 32_000)
_next_port = itertools.count(os.getpid() * 101)


def free_port() -> int:
    """A port that nobody listens on, another one each time."""
    while True:
        with socket.socket() as server, suppress(OSError):
            server.bind(('127.0.0.1', _PORTS[next(_next_port) % len(_PORTS)]))
            return server.getsockname()[1]


@contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """Serve a folder, whose folders are buckets, over S3; yields the port."""
    port = free_port()
    command = [str(Path(sys.executable).with_name('rclone')), 'serve', 's3', str(folder), '--addr', f'127.0.0.1:{port}',
               '--auth-key', f'{S3_KEY},{S3_SECRET}', '--force-path-style']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(2000):  # 100 s at most
            with socket.socket() as client:
                # A connection to a port that nobody listens on may be one to itself.
                if client.connect_ex(('127.0.0.1', port)) == 0 and client.getsockname() != client.getpeername():
                    break
            assert process.poll() is None, f'{command} ended'
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def s3_remove(port: int, bucket: str, prefix: str) -> None:
    """Remove objects by way of the server, which would not see that their files are gone."""
    names = ('endpoint_url', 'aws_access_key_id', 'aws_secret_access_key', 'region_name')
    client = boto3.client('s3', **dict(zip(names, s3_environment(port).values())))
    for found in client.list_objects_v2(Bucket=bucket, Prefix=prefix).get('Contents', ()):
        client.delete_object(Bucket=bucket, Key=found['Key'])


def s3_environment(port: int) -> dict[str, str]:
    """The environment variables with which boto3 finds that server, or a proxy before it."""
    return {'S3_ENDPOINT_URL': f'http://127.0.0.1:{port}', 'AWS_ACCESS_KEY_ID': S3_KEY,
            'AWS_SECRET_ACCESS_KEY': S3_SECRET, 'AWS_DEFAULT_REGION': 'us-east-1',
            # rclone knows the checksums of old clients only.
            'AWS_RESPONSE_CHECKSUM_VALIDATION': 'when_required', 'AWS_REQUEST_CHECKSUM_CALCULATION': 'when_required'}


class FaultyProxy:
    """Passes TCP connections on to a port; one answer in ten goes wrong, in the ways that `faults` lists in turn.

    An answer is what the server sends between two requests; a request may come in many pieces, as an upload does.  The
    ways: ``drop`` closes the connection before it, ``delay`` waits, ``truncate`` closes the connection inside it,
    ``503`` (HTTP only) sends an error instead.
    """

    def __init__(self, port: int, faults: Sequence[str], every: int = 10, delay: float = 2.0) -> None:
        self.target = port
        self.faults = list(faults)
        self.every = every
        self.delay = delay
        self.requests = 0
        self.done: list[str] = []
        self._lock = threading.Lock()
        self._server = socket.create_server(('127.0.0.1', 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(('127.0.0.1', self.target))
            except OSError:
                client.close()
                continue
            state = {'fault': '', 'last': 'answer'}
            for pair in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass, args=(*pair, state), daemon=True).start()

    def _next_fault(self) -> str:
        with self._lock:
            self.requests += 1
            if self.requests % self.every:
                return ''
            fault = self.faults[len(self.done) % len(self.faults)]
            self.done.append(fault)
            return fault

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool, state: dict[str, str]) -> None:
        try:
            while data := source.recv(1 << 16):
                begins = state['last'] == 'answer'
                state['last'] = 'answer' if answers else 'request'
                if not answers and begins:
                    state['fault'] = self._next_fault()
                    if state['fault'] == '503':
                        source.sendall(b'HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n')
                    if state['fault'] in ('503', 'drop'):
                        break
                elif answers and state['fault'] == 'delay':
                    state['fault'] = ''
                    time.sleep(self.delay)
                # botocore reads for ever where the connection ends inside `100 Continue`.
                elif answers and state['fault'] == 'truncate' and not data.startswith(b'HTTP/1.1 100'):
                    target.sendall(data[:len(data) // 2])
                    break
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            # Not only close: the other thread still reads from it.
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
