# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Remotes that cannot be used."""

from pathlib import Path

import pytest

from llm2clip.config import ExtractConfig
from llm2clip.config.loading import load_config
from llm2clip.data.streams.verified_stream import VerifiedStream
from llm2clip.errors import ConfigError
from llm2clip.io.remotes import OutputFolder, download
from llm2clip.training.checkpoints import find_checkpoint, read_latest


def test_a_remote_that_is_the_local_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'data').mkdir()
    (tmp_path / 'link').symlink_to('data')
    monkeypatch.chdir(tmp_path)
    given = ['datasets.train.local=data', 'out=new', 'teacher=x']
    for remote in ('data', './data/', 'link', f'{tmp_path}/link', f'file://{tmp_path}/data'):
        with pytest.raises(ConfigError, match=r'datasets\.train\.remote .*another place than local, data'):
            load_config(ExtractConfig, [*given, f'datasets.train.remote={remote}'])
    with pytest.raises(ConfigError, match='out_remote .*another place than out, new'):
        load_config(ExtractConfig, [*given, f'out_remote={tmp_path}/new'])
    load_config(ExtractConfig, [*given, 'datasets.train.remote=s3://data', 'out_remote=data/new'])


def test_a_remote_without_credentials_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY', 'AWS_PROFILE'):
        monkeypatch.delenv(name, raising=False)
    for name, value in (('HOME', str(tmp_path)), ('AWS_EC2_METADATA_DISABLED', 'true'), ('AWS_DEFAULT_REGION', 'x'),
                        ('S3_ENDPOINT_URL', 'http://127.0.0.1:9')):
        monkeypatch.setenv(name, value)
    (tmp_path / 'file').touch()
    for reach in (lambda: download('s3://bucket/file', tmp_path / 'new'),
                  lambda: OutputFolder(tmp_path, 's3://bucket').publish('file'),
                  lambda: VerifiedStream(local=str(tmp_path / 'cache'), remote='s3://bucket').open(),
                  lambda: find_checkpoint('s3://bucket/run', False), lambda: read_latest('s3://bucket/run')):
        with pytest.raises(ConfigError, match='s3://bucket.*: no access .*, expected credentials: AWS_ACCESS_KEY_ID'):
            reach()
