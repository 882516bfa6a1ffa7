# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Uploads, to a server on this machine that answers as the Hub does."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Optional

import huggingface_hub.constants as constants
import pytest
from huggingface_hub.utils import reset_sessions

from llm2clip.config import ConfigError
from llm2clip.export.hub import open_hub, upload
from llm2clip.folders import complete_folder

TOKEN = 'hf_of_tests'


class Hub:
    """Repositories, and who may write to them."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.role = 'write'
        self.broken = False
        self.asked: list[str] = []

    def answer(self, method: str, path: str, token: Optional[str], body: bytes) -> tuple[int, Any]:
        self.asked.append(f'{method} {path}')
        if token != f'Bearer {TOKEN}':
            return 401, {'error': 'Invalid credentials'}
        if path == '/api/whoami-v2':
            return 200, {'name': 'me', 'orgs': [{'name': 'lab'}], 'auth': {'accessToken': {'role': self.role}}}
        if path == '/api/repos/create':
            given = json.loads(body)
            name = f'{given.get("organization") or "me"}/{given["name"]}'
            if name in self.repositories:
                return 409, {'error': 'You already created this model repo', 'url': f'{constants.ENDPOINT}/{name}'}
            self.repositories[name] = {'private': given.get('private', False), 'files': {}}
            return 200, {'url': f'{constants.ENDPOINT}/{name}'}
        if path == '/api/validate-yaml':
            return 200, {'errors': [], 'warnings': []}
        name, what = '/'.join(path.split('/')[3:5]), path.split('/')[5:]
        if name not in self.repositories:
            return 404, {'error': 'Repository not found'}
        repository = self.repositories[name]
        if not what or what[0] == 'revision':
            return 200, {'id': name, 'private': repository['private'], 'sha': 'abc'}
        if what[0] == 'tree':
            return 200, [{'type': 'file', 'path': file, 'size': len(data), 'oid': 'abc'}
                         for file, data in repository['files'].items()]
        if what[0] == 'preupload':
            return 200, {'files': [{'path': file['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
                                   for file in json.loads(body)['files']]}
        if what[0] == 'commit' and not self.broken:
            for line in map(json.loads, body.splitlines()):
                if line['key'] == 'file':
                    repository['files'][line['value']['path']] = base64.b64decode(line['value']['content'])
                elif line['key'] == 'deletedFile':
                    del repository['files'][line['value']['path']]
            return 200, {'commitOid': 'def', 'commitUrl': f'{constants.ENDPOINT}/{name}/commit/def'}
        return 500, {'error': 'the Hub is on fire'}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    of_tests = Hub()

    class Handler(BaseHTTPRequestHandler):

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
            status, value = of_tests.answer(self.command, self.path.split('?')[0], self.headers['authorization'], body)
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header('Content-Length', str(len(data)))
            self.send_header('Content-Type', 'application/json')
            if status == 404:
                self.send_header('X-Error-Code', 'RepoNotFound')
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = respond

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    reset_sessions()
    yield of_tests
    server.shutdown()
    thread.join()
    reset_sessions()


def folder(out: Path, **files: str) -> Path:
    with complete_folder(out, 'model') as partial:
        for name, text in files.items():
            (partial / name.replace('__', '.')).parent.mkdir(exist_ok=True)
            (partial / name.replace('__', '.')).write_text(text)
        (partial / 'teacher').mkdir()
        (partial / 'teacher/model.safetensors').write_text('teacher')
    return out


@pytest.mark.parametrize('repo, private', [('me/model', False), ('lab/model', True)])
def test_a_folder_is_uploaded_and_replaced(repo: str, private: bool, hub: Hub, tmp_path: Path) -> None:
    first = folder(tmp_path / 'a', model__safetensors='weights', README__md='card')
    assert upload(open_hub(repo, private), first, repo, private) == f'{constants.ENDPOINT}/{repo}'
    found = hub.repositories[repo]
    assert found['private'] == private
    assert found['files'] == {'model.safetensors': b'weights', 'README.md': b'card',
                              'teacher/model.safetensors': b'teacher'}
    # The weights of an earlier upload would be loaded in place of these; what else there is stays.
    hub.repositories[repo]['files']['LICENSE'] = b'mine'
    second = {'model-00001-of-00001__safetensors': 'new', 'README__md': 'card'}
    upload(open_hub(repo, private), folder(tmp_path / 'b', **second), repo, private)
    assert sorted(found['files']) == ['LICENSE', 'README.md', 'model-00001-of-00001.safetensors',
                                      'teacher/model.safetensors']


def test_access_is_refused_before_the_work(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, repo: str = 'me/model', private: bool = False) -> None:
        with pytest.raises(ConfigError, match=message) as error:
            open_hub(repo, private)
        assert TOKEN not in str(error.value) and 'hf_wrong' not in str(error.value)

    refused('push_to_hub: expected owner/name, got model', 'model')
    refused('push_to_hub: .*Repo id must', 'me/a b')
    refused('push_to_hub: the token in HF_TOKEN may write for me, lab, not for you', 'you/model')
    hub.role = 'fineGrained'
    open_hub('you/model', False)
    hub.role = 'read'
    refused('the token in HF_TOKEN may only read')
    hub.role = 'write'
    hub.repositories['me/model'] = {'private': False, 'files': {}}
    refused('private: me/model exists and is public', private=True)
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    refused(f'push_to_hub: {constants.ENDPOINT} gives no access with the token in HF_TOKEN: Invalid user token')
    monkeypatch.delenv('HF_TOKEN')
    asked = len(hub.asked)
    refused('push_to_hub: set HF_TOKEN in the environment')
    assert len(hub.asked) == asked
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    reset_sessions()
    refused('gives no access .*offline mode is enabled')


def test_a_failed_upload_says_that_the_folder_is_there(hub: Hub, tmp_path: Path) -> None:
    out, api = folder(tmp_path / 'a', model__safetensors='weights'), open_hub('me/model', False)
    hub.broken = True
    with pytest.raises(ConfigError, match=f'(?s){out} is complete, but could not be .*hf upload me/model {out}'):
        upload(api, out, 'me/model', False)
    assert (out / 'model.safetensors').is_file()
