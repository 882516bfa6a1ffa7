# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Inheritance's data: the teacher's vector of a caption beside its target, without the images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parts import make_samples, write_dataset, write_text_embeddings
from refusals import refused_at

from llm2clip.config import DatasetConfig, ImageDataConfig, ImageStreamConfig, InheritanceDataConfig
from llm2clip.data.image_text_dataset import build_image_loader
from llm2clip.data.inheritance_dataset import build_target_loader
from llm2clip.data.schema import read_samples
from llm2clip.data.vectors import dequantize, stored_vector
from llm2clip.io.remotes import OutputFolder
from llm2clip.teacher.embedder import Embedded
from llm2clip.teacher.extraction import ExtractionTask, write_embeddings
from llm2clip.teacher.fingerprint import Fingerprint, teacher_of_embeddings

DIM, LONGEST = 6, 76


class Targets:
    """Stands for CLIP: vectors of texts, which cannot be longer than it reads."""

    fingerprint = Fingerprint.of('of a clip', {'clip_text': 'clip'})
    width = DIM

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def prepare(self, items: Any) -> Any:
        return list(items)

    def embed_prepared(self, inputs: Any, on_batch: Any = lambda n: None) -> Embedded:
        vectors = torch.stack([target(text) * (len(text) <= self.longest) for text in inputs])
        return Embedded(vectors, 0, 0, sum(len(text) > self.longest for text in inputs))

    embed = embed_prepared


def target(text: str) -> torch.Tensor:
    return torch.tensor([len(text), *map(float, text.encode()[:DIM - 1])]) / 100


@pytest.fixture
def config(image_dataset: Path, embeddings: Path, tmp_path: Path,
           no_leftovers: None) -> InheritanceDataConfig:
    write_embeddings(ExtractionTask(DatasetConfig(str(image_dataset)), OutputFolder(tmp_path / 'targets')),
                            Targets(LONGEST))
    by_name = {'tiny': DatasetConfig(str(embeddings)), 'clip_text': DatasetConfig(str(tmp_path / 'targets'))}
    stream = ImageStreamConfig('/no/images/are/read', embeddings=by_name)
    return InheritanceDataConfig(streams={'s': stream}, num_workers=0, num_canonical_nodes=4)


def test_both_vectors_of_a_caption_that_has_a_target(
    config: InheritanceDataConfig, image_dataset: Path, embeddings: Path
) -> None:
    captions = {sample['sample_id']: sample for sample in read_samples(image_dataset)}
    vectors = {sample['sample_id']: sample for sample in read_samples(embeddings)}
    long = {name: len(sample['caption.long']) for name, sample in captions.items()}
    assert 0 < sum(length > LONGEST for length in long.values()) < len(long)
    drawn: set[tuple[str, str]] = set()
    loader = build_target_loader(config, 8, 3, train=True)
    for batch in [batch for _ in range(4) for batch in loader.dataloader]:
        assert batch['counted'].all()
        for i, name in enumerate(batch['sample_id']):
            key, = (key for key in ('short', 'long') if torch.allclose(
                batch['target'][i], target(captions[name][f'caption.{key}']), rtol=1e-3, atol=1e-3))
            expected = dequantize(stored_vector(vectors[name], key))
            assert torch.equal(batch['text_embedding'][i], expected)
            drawn.add((name, key))
    assert len({name for name, _ in drawn}) == 64
    with_long = [name for name, key in drawn if key == 'long']
    assert len(with_long) > 10 and all(long[name] <= LONGEST for name in with_long)
    assert teacher_of_embeddings(loader).llm_embed_dim == 32


def test_evaluation_counts_the_first_caption_with_a_target(config: InheritanceDataConfig, image_dataset: Path) -> None:
    def rows(column: str) -> dict[str, Any]:
        loader = build_target_loader(config, 8, 3, train=False).dataloader
        return {name: value for batch in loader for name, value in zip(batch['sample_id'], batch[column])}

    samples = {sample['sample_id']: sample for sample in read_samples(image_dataset)}
    config.caption_weights = {'long': 1.0}
    assert {name: bool(counted) for name, counted in rows('counted').items()} == {
        name: len(sample['caption.long']) <= LONGEST for name, sample in samples.items()}
    config.caption_weights = {'short': 1.0, 'long': 1.0}
    for name, found in rows('target').items():
        torch.testing.assert_close(found, target(samples[name]['caption.short']), rtol=1e-3, atol=1e-3)


def test_targets_of_other_captions_or_unknown_keys_are_refused(
    config: InheritanceDataConfig, teacher_folder: Path, tmp_path: Path
) -> None:
    embeddings = config.streams['s'].embeddings
    tiny = embeddings.pop('tiny')
    write_dataset(make_samples(40), tmp_path / 'data')
    write_text_embeddings(tmp_path / 'data/train', tmp_path / 'others', teacher_folder)
    embeddings['other'] = DatasetConfig(str(tmp_path / 'others'))
    with pytest.raises(ValueError, match='embeddings dataset .*others belongs to another dataset than .*targets'):
        build_target_loader(config, 8, 3, train=True)
    config.streams['s'].embeddings = {
        'tiny': tiny, 'clip_text': DatasetConfig(str(tmp_path / 'cache'), str(tmp_path / 'targets'))}
    with refused_at('streams.s.caption_weights'):
        build_target_loader(config, 8, 3, train=True)


def test_stage2_does_not_take_targets_for_a_teacher(config: InheritanceDataConfig, image_dataset: Path) -> None:
    stream = ImageStreamConfig(str(image_dataset), embeddings=config.streams['s'].embeddings)
    images = ImageDataConfig(streams={'s': stream}, teachers=['clip_text'], num_workers=0, num_canonical_nodes=4)
    loader = build_image_loader(images, 32, 8, 0, train=True)
    with pytest.raises(ValueError, match="targets holds the features of .*text tower"):
        teacher_of_embeddings(loader)
