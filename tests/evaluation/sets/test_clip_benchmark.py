# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""CLIP_benchmark's layout in tars, here and in a remote."""

import io
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from parts import picture
from set_files import WDS_CLASSES, write_wds

from llm2clip.config import ConfigError
from llm2clip.evaluation.sets.clip_benchmark import clip_benchmark
from llm2clip.registry import open_set

LABELS = [0, 3, 5, 1, 4]
SEVERAL = [[1, 0, 0, 0, 0, 0], [0] * 6, [0, 1, 0, 1, 0, 1]]


def test_tars_become_a_set(tmp_path: Path) -> None:
    write_wds(tmp_path, LABELS)
    found = clip_benchmark(str(tmp_path))
    order = [0, 2, 4, 1, 3]
    assert found.labels == [LABELS[i] for i in order] and found.classes == WDS_CLASSES and found.name == str(tmp_path)
    assert found.image_ids == [f'{tmp_path}/test/{i % 2}.tar/s{i:07}.png' for i in order]
    assert found.templates == f'{tmp_path}/zeroshot_classification_templates.txt'
    for read_image in (found.read_image, pickle.loads(pickle.dumps(found.read_image))):
        assert [read_image(i) for i in range(5)] == [picture(i) for i in order]
    (tmp_path / 'zeroshot_classification_templates.txt').unlink()
    assert clip_benchmark(str(tmp_path)).templates is None


def test_an_image_may_have_any_number_of_classes(tmp_path: Path) -> None:
    write_wds(tmp_path, SEVERAL, tars=1)
    found = clip_benchmark(str(tmp_path))
    assert found.labels == SEVERAL and [found.read_image(i) for i in range(3)] == [picture(i) for i in range(3)]


def put(name: str, content: Union[str, bytes, None]) -> Callable[[Path], Any]:
    """Write a file, or remove it."""
    def change(folder: Path) -> None:
        path = folder / name
        path.unlink() if content is None else path.write_bytes(
            content.encode() if isinstance(content, str) else content)
    return change


def tar(**files: bytes) -> Callable[[Path], Any]:
    """In place of the second tar, one with these files: `a_png` is `a.png`."""
    def change(folder: Path) -> None:
        with tarfile.open(folder / 'test/1.tar', 'w') as writer:
            for name, content in files.items():
                info = tarfile.TarInfo(name.replace('_', '.'))
                info.size = len(content)
                writer.addfile(info, io.BytesIO(content))
    return change


def cut(folder: Path) -> None:
    path = folder / 'test/1.tar'
    path.write_bytes(path.read_bytes()[:1600])


def no_samples(folder: Path) -> None:
    for number in range(2):
        tarfile.open(folder / f'test/{number}.tar', 'w').close()


def npy(values: Any, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype=object if pickled else None), allow_pickle=pickled)
    return buffer.getvalue()


CHANGES: list[tuple[Any, str]] = [
    (put('classnames.txt', None), r'.*: source\.local: there is no file .*/classnames\.txt; .* has test, zeroshot'),
    (put('classnames.txt', 'cat\n'), r".*/0\.tar: sample 's0000002': cls: is 5, expected 0 to 0, since classnames.txt "
                                     'has 1 names'),
    (put('dataset_type.txt', 'retrieval\n'), r".*/dataset_type\.txt: says 'retrieval', expected a set for classific"),
    (put('test/nshards.txt', None), r'.*: source\.split: there is no file .*/test/nshards\.txt; .*/test has 0\.tar'),
    (put('test/nshards.txt', '0'), r'.*/test/nshards\.txt: says 0, expected at least one tar'),
    (put('test/nshards.txt', '1'), r'.*/test/nshards\.txt: says 1 tars, but there is also .*/test/1\.tar'),
    (put('test/nshards.txt', '4'), r'.*/test/nshards\.txt: says 4 tars, but there is no .*/test/2\.tar; .*/test has 0'),
    (cut, r'.*/test/1\.tar: cannot be read .*unexpected end.*, expected a whole tar'),
    (no_samples, '.*/test: has no images in its tars'),
    (tar(a_png=b'', b_cls=b'0'), r".*/1\.tar: sample 'a': has no cls"),
    (tar(a_png=b'', a_cls=b'-1'), r".*/1\.tar: sample 'a': cls: is -1, expected 0 to 5"),
]
SEVERAL_CHANGES: list[tuple[Any, str]] = [
    (npy([1] * 6, pickled=True), 'cannot be read .*allow_pickle=False'), (npy([1] * 6)[:-1], 'cannot be read'),
    (npy([1] * 6, pickled=True), 'cannot be read .*allow_pickle=False'), (npy([1] * 6)[:-1], 'cannot be read'),
    (npy([0, 0, 0, 2, 0, 0]), 'holds int64 of shape'), (npy([[1] * 6]), r'holds int64 of shape \(1, 6\)'),
    (npy([0, 0, 0, 2, 0, 0]), 'holds int64 of shape'), (npy([[1] * 6]), r'holds int64 of shape \(1, 6\)'),
]


@pytest.mark.parametrize(('change', 'words'), CHANGES, ids=[str(i) for i in range(len(CHANGES))])
def test_what_is_wrong_is_named(change: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    write_wds(tmp_path, LABELS)
    change(tmp_path)
    with pytest.raises(ConfigError, match=f'^zeroshot.x.source: {words}'):
        open_set('zeroshot', {'name': 'clip_benchmark', 'local': str(tmp_path)}, 'zeroshot.x.source')


@pytest.mark.parametrize(('content', 'words'), SEVERAL_CHANGES, ids=[str(i) for i in range(len(SEVERAL_CHANGES))])
def test_ones_and_zeros_are_one_per_class(content: bytes, words: str, tmp_path: Path) -> None:
    write_wds(tmp_path, SEVERAL)
    tar(a_png=b'', a_npy=content)(tmp_path)
    with pytest.raises(ValueError, match=f"1.tar: sample 'a': npy: {words}.*, expected a 1 or a 0 for each of the 6"):
        clip_benchmark(str(tmp_path))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*')}


def test_a_remote_is_asked_for_what_is_missing(tmp_path: Path) -> None:
    remote, local = tmp_path / 'remote', tmp_path / 'local'
    write_wds(remote, SEVERAL)
    last = (remote / 'test/1.tar').rename(tmp_path / '1.tar')
    with pytest.raises(ConfigError, match=f'source.remote: there is no {remote}/test/1.tar'):
        clip_benchmark(str(local), str(remote))
    kept = (local / 'test/0.tar').stat().st_mtime_ns
    last.rename(remote / 'test/1.tar')
    found = clip_benchmark(str(local), str(remote))
    assert files(local) == files(remote) and (local / 'test/0.tar').stat().st_mtime_ns == kept
    assert found.labels == clip_benchmark(str(remote)).labels and found.read_image(0) == picture(0)
    # Nothing is asked for any more.
    shutil.rmtree(remote)
    assert clip_benchmark(str(local), str(remote)) == found
    with pytest.raises(ConfigError, match=f'source.remote: there is no {remote}/val/nshards.txt'):
        clip_benchmark(str(local), str(remote), 'val')
    with pytest.raises(ValueError, match='ftp://x/dataset_type.txt: cannot be read .Unsupported remote path'):
        clip_benchmark(str(tmp_path / 'other'), 'ftp://x')


def test_hugging_face_is_a_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, local = tmp_path / 'hub', tmp_path / 'local'
    write_wds(hub, LABELS)
    connected = True

    def hf_hub_download(repo_id: str, filename: str, repo_type: str, local_dir: str) -> None:
        """As Hugging Face's, which makes the folders of a file's name, and one for itself."""
        assert (repo_id, repo_type) == ('clip-benchmark/wds_cars', 'dataset')
        if not connected:
            raise LocalEntryNotFoundError('Please check your connection')
        if not (hub / filename).is_file():
            raise EntryNotFoundError('404 Client Error')
        for path in (Path(local_dir, filename), Path(local_dir, '.cache/huggingface', filename)):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(hub / filename, path)

    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', hf_hub_download)
    remote = 'hf://datasets/clip-benchmark/wds_cars'
    connected = False
    # What is not there for want of a connection is not taken for what the set does not have.
    with pytest.raises(ValueError, match=f'{remote}/dataset_type.txt: cannot be read .Please check your connection'):
        clip_benchmark(str(local), remote)
    connected = True
    found = clip_benchmark(str(local), remote)
    assert files(local) == files(hub) and found.labels == clip_benchmark(str(hub)).labels
    connected = False
    assert clip_benchmark(str(local), remote) == found
