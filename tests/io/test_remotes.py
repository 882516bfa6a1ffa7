# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Datasets on an S3 server whose answers go wrong one time in ten, and remotes that cannot be used."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import wandb.errors
from composer.devices import DeviceCPU
from launched import stage2_arguments
from parts import make_samples, write_dataset, write_text_embeddings
from recipes_in_process import run_recipe
from refusals import refused_at
from remotes import FaultyProxy, s3_environment, s3_server
from streaming.base.storage import CloudUploader

from llm2clip.command import run_command
from llm2clip.config import DatasetConfig, ExtractConfig, PrepareConfig
from llm2clip.config.loading import load_config
from llm2clip.data.convert.samples import Dropped, one_part
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.schema import read_samples
from llm2clip.data.streams.verified_stream import ShardError, VerifiedStream
from llm2clip.errors import ConfigError
from llm2clip.io.remotes import OutputFolder, _process_downloader, download, is_missing, reaching
from llm2clip.teacher.extraction import ExtractionTask, write_embeddings
from llm2clip.teacher.sources import TeacherFolder
from llm2clip.training.callbacks.jsonl_logger import read_metrics
from llm2clip.training.checkpoints import find_checkpoint, read_latest

pytestmark = [pytest.mark.long, pytest.mark.usefixtures('no_leftovers'), pytest.mark.timeout(240)]


@pytest.fixture(scope='module')
def served(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bucket that holds a dataset of many shards and its embeddings dataset."""
    folder = tmp_path_factory.mktemp('served')
    write_dataset(make_samples(64), folder / 'bucket', size_limit='1kb')
    write_text_embeddings(folder / 'bucket/train', folder / 'bucket/embeddings', teacher_folder)
    for empty in ('out', 'uploads', 'many/folder'):
        (folder / empty).mkdir(parents=True)
    return folder


@pytest.fixture(scope='module')
def port(served: Path) -> Iterator[int]:
    with s3_server(served) as port:
        yield port


@pytest.fixture
def s3(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The connection to the server, whose answers go wrong as soon as `every` says which ones."""
    monkeypatch.setattr('llm2clip.io.remotes.time', SimpleNamespace(sleep=lambda _: None))
    _process_downloader.cache_clear()  # which knows the connection of another test
    proxy = FaultyProxy(port, ['503', 'truncate', 'drop', 'delay'], every=10**6, delay=0.2)
    for name, value in s3_environment(proxy.port).items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.close()


def test_a_training_over_a_bad_connection_sees_what_it_should(
    s3: FaultyProxy, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses as from local files."""
    losses, s3.every = [], 10
    for name, local, remotes in (
        ('here', served / 'bucket', []),
        ('there', tmp_path / 'cache', ['train_data.streams.s.remote=s3://bucket/train',
                                       'train_data.streams.s.embeddings.tiny.remote=s3://bucket/embeddings']),
    ):
        run_recipe(monkeypatch, 'train_stage2', *stage2_arguments(local / 'train', local / 'embeddings'), *remotes,
                   'eval_data=null', 'max_duration=2ep', f'save_folder={tmp_path}/{name}')
        losses.append(read_metrics(tmp_path / name / 'metrics.jsonl')['loss/train/total'])
    assert len(losses[0]) == 16 and losses[0] == losses[1]
    assert s3.requests > 60 and {'503', 'truncate', 'drop', 'delay'} <= set(s3.done)


def test_conversion_and_extraction_write_to_s3(
    s3: FaultyProxy, served: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    s3.every = 10
    samples = make_samples(20)
    write_splits({'train': one_part(samples)}, Dropped(), OutputFolder(tmp_path / 'out', 's3://out/photos'))
    dataset = DatasetConfig(local=str(tmp_path / 'cache'), remote='s3://out/photos/train')
    embeddings = ExtractionTask(dataset, OutputFolder(tmp_path / 'embeddings', 's3://out/embeddings'))
    write_embeddings(embeddings, TeacherFolder(teacher_folder).load(DeviceCPU()))
    assert [row['sample_id'] for row in read_samples(served / 'out/photos/train')] == \
        [row['sample_id'] for row in read_samples(served / 'out/embeddings')] == [s.sample_id for s in samples]
    shutil.rmtree(tmp_path / 'embeddings')
    done = write_embeddings(embeddings, TeacherFolder(teacher_folder).load(DeviceCPU()))
    assert done['shards'] == 0
    client = boto3.client('s3', endpoint_url=os.environ['S3_ENDPOINT_URL'])
    keys = {item['Key'] for item in client.list_objects_v2(Bucket='out')['Contents']}
    assert {'photos/dataset.json', 'photos/train/index.json', 'embeddings/teacher.json'} <= keys


def test_one_client_uploads_all_files(
    s3: FaultyProxy, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients: list[str] = []
    create = boto3.session.Session.client

    def counted(session: Any, service: str, **options: Any) -> Any:
        clients.append(service)
        return create(session, service, **options)

    monkeypatch.setattr(boto3.session.Session, 'client', counted)
    out = OutputFolder(tmp_path / 'out', 's3://uploads/folder')
    out.local.mkdir()
    for i in range(5):
        (out.local / f'{i}.mds').write_text(f'{i}')
        out.publish(f'{i}.mds')
        out.commit(f'{i}.json', 'café \udcff')  # as the name of a file that is no UTF-8
    assert len(clients) == 2  # of the folder, and of where files wait to be committed
    assert {path.name for path in (served / 'uploads/folder').iterdir()} == {
        f'{i}.{suffix}' for i in range(5) for suffix in ('mds', 'json')}
    for folder in (out.local, served / 'uploads/folder'):
        assert (folder / '4.mds').read_text() == '4'
        assert (folder / '4.json').read_text(encoding='utf-8') == 'café ?'


def test_one_listing_finds_all_finished_files(
    s3: FaultyProxy, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f'shard.{i:05}.json' for i in range(60)]
    folder = served / 'many/folder'
    for name in [*names[:50], 'shard.00000.mds', 'index.json']:
        (folder / name).write_text('{}')
    (tmp_path / names[55]).write_text('{}')
    out = OutputFolder(tmp_path, 's3://many/folder')
    assert out.existing(names) == {*names[:50], names[55]} and s3.requests < 10
    assert out.fetch_all(names[45:55]) == [True] * 5 + [False] * 5
    assert (tmp_path / names[49]).read_text() == '{}'
    monkeypatch.setattr('streaming.base.storage.S3Uploader.list_objects', CloudUploader.list_objects)
    assert out.existing(names[45:55]) == {*names[45:50]}  # as of stores that cannot be listed
    assert OutputFolder(tmp_path / 'new', str(folder)).existing(names) == {*names[:50]}


def test_errors_of_an_object_store_name_the_remote(
    s3: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('AWS_MAX_ATTEMPTS', '1')
    monkeypatch.delenv('LLM2CLIP_TRACEBACK', raising=False)
    (tmp_path / 'file').touch()

    def upload(config: PrepareConfig) -> None:
        OutputFolder(tmp_path, config.out_remote).publish('file')

    def check_error_of(remote: str) -> None:
        with pytest.raises(SystemExit, match=f'error: .*{remote}'):
            run_command(PrepareConfig, upload, [f'out={tmp_path}/out', 'source.name=emoji', f'out_remote={remote}'])

    check_error_of('s3://nowhere/x')
    with pytest.raises(ConfigError, match='s3://nowhere/x.*expected a bucket'):
        download('s3://nowhere/x', tmp_path / 'new')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'a wrong secret')
    check_error_of('s3://bucket/x')
    with pytest.raises(ConfigError, match='s3://bucket/x.*AWS_SECRET_ACCESS_KEY'):
        download('s3://bucket/x', tmp_path / 'new')
    monkeypatch.setenv('S3_ENDPOINT_URL', 'http://127.0.0.1:9')  # no server
    check_error_of('s3://bucket/y')
    with pytest.raises(ShardError, match=r's3://other/index\.json cannot be downloaded: .*tried 2 times') as error:
        VerifiedStream(local=str(tmp_path / 'cache'), remote='s3://other').open(download_retry=2)
    assert 'a wrong secret' not in str(error.value)
    with pytest.raises(wandb.errors.AuthenticationError), reaching('s3://bucket/x'):
        raise wandb.errors.AuthenticationError('of another service')


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


def test_a_published_file_is_kept_where_a_link_makes_it_the_upload(tmp_path: Path) -> None:
    (tmp_path / 'out/train').mkdir(parents=True)
    (tmp_path / 'out/train/shard').write_text('samples')
    (tmp_path / 'remote').mkdir()
    (tmp_path / 'remote/train').symlink_to(tmp_path / 'out/train')
    OutputFolder(tmp_path / 'out', f'{tmp_path}/remote').publish('train/shard', keep=False)
    assert (tmp_path / 'out/train/shard').read_text() == 'samples'


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


@pytest.mark.parametrize('module, name, arguments', [
    ('google.api_core.exceptions', 'NotFound', ['no such object']),
    ('oci.exceptions', 'ServiceError', [404, 'ObjectNotFound', {}, 'no such object'])])
def test_a_missing_file_is_recognised_in_every_store(module: str, name: str, arguments: list[Any]) -> None:
    missing = getattr(pytest.importorskip(module), name)(*arguments)
    assert is_missing(missing) and not is_missing(OSError(404))


@pytest.mark.parametrize('name', ['train/part-a#1/shard.00000.mds', 'train/part-a?b/shard.00000.mds'])
def test_a_name_at_which_a_url_ends_is_not_uploaded(name: str, tmp_path: Path) -> None:
    with refused_at(tmp_path / name):
        OutputFolder(tmp_path, 's3://bucket').publish('train/part-b/shard.00000.mds', name)
