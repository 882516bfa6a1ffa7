# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Numbers of a trained model: retrieval on paired datasets, caption retrieval accuracy of text encoders."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from streaming.base.format import reader_from_json
from tqdm import tqdm

from llm2clip.config import CRAConfig, DatasetConfig, ImageDataConfig, ImageStreamConfig, RetrievalConfig
from llm2clip.data.image_embeddings import build_image_loader, check_same_teacher, sidecar_teacher
from llm2clip.data.schema import IMAGE, SAMPLE_ID, caption_column, check_dataset, read_index
from llm2clip.data.streaming import streaming_dataset
from llm2clip.data.vectors import vectors_of
from llm2clip.metrics.retrieval import caption_retrieval_accuracy, retrieval_recall
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.teacher import load_teacher
from llm2clip.models.text_encoder import encode_texts, load_text_encoder

__all__ = ['Features', 'evaluate_cra', 'read_gallery', 'retrieval_features']


@dataclass
class Features:
    """A benchmark's features: images ``(N, D)``, texts ``(N, K, D)``, and which texts are the same ``(N, K)``."""

    image_features: torch.Tensor
    text_features: torch.Tensor
    text_id: torch.Tensor

    def recall(self) -> dict[str, float]:
        """What `retrieval_recall` says, rounded."""
        values = retrieval_recall(self.image_features, self.text_features, self.text_id)
        return {name: round(value, 3) for name, value in values.items()}


def retrieval_features(
    model: LLM2CLIP,
    benchmarks: Mapping[str, RetrievalConfig],
    teacher: dict[str, Any],
    batch_size: int = 64,
    num_workers: int = 2,
) -> Iterator[tuple[str, Features]]:
    """Features of each benchmark; those that share a dataset share one pass over its images.

    Args:
        model: In evaluation mode, on its device.
        benchmarks: Name -> dataset, sidecar and captions.
        teacher: Fingerprint of the teacher that the model learned from.
        batch_size: Images a forward pass.
        num_workers: Processes that decode.

    Raises:
        ValueError: A sidecar comes from another teacher or belongs to another dataset, or samples are missing.
    """
    groups: dict[tuple[str, str, bool], list[str]] = {}
    for name, benchmark in benchmarks.items():
        groups.setdefault((benchmark.images, benchmark.embeddings, benchmark.merge_equal_texts), []).append(name)
    for (images, embeddings, merge), names in groups.items():
        keys = list(dict.fromkeys(key for name in names for key in benchmarks[name].caption_keys))
        config = ImageDataConfig(streams={names[0]: ImageStreamConfig(
            local=images, embeddings={'teacher': DatasetConfig(local=embeddings)})},
                                 caption_mix={key: 1.0 for key in keys}, num_workers=num_workers,
                                 num_canonical_nodes=1)
        every = _dataset_features(model, config, teacher, names[0], merge, batch_size)
        for name in names:
            columns = [keys.index(key) for key in benchmarks[name].caption_keys]
            yield name, Features(every.image_features, every.text_features[:, columns], every.text_id[:, columns])


@torch.no_grad()
def _dataset_features(
    model: LLM2CLIP, config: ImageDataConfig, teacher: dict[str, Any], name: str, merge: bool, batch_size: int
) -> Features:
    """Features of every image and caption of one dataset, in its order."""
    spec = build_image_loader(
        config, model.vision_encoder.preprocessing, batch_size, 0, False, f'retrieval.{name}', merge)
    expected = streaming_dataset(spec).num_samples
    check_same_teacher(sidecar_teacher(spec)[0], teacher, f'the sidecar of {name}', 'the model')
    device = model.logit_scale.device
    rows: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    for batch in tqdm(spec.dataloader, desc=f'evaluate {name}', unit=' batches'):
        images = model.get_image_features(batch['pixel_values'].to(device)).cpu()
        texts = model.get_text_features(vectors_of(batch).to(device)).cpu()
        for i, index in enumerate(batch['index'].tolist()):
            rows[index] = images[i], texts[i], batch['text_id'][i]
    if len(rows) != expected:
        raise ValueError(f'{name}: {len(rows)} of {expected} samples were delivered')
    return Features(*map(torch.stack, zip(*(rows[index] for index in sorted(rows)))))


def evaluate_cra(config: CRAConfig) -> dict[str, float]:
    """Caption retrieval accuracy of each encoder on the same pairs, in percent."""
    columns = [caption_column(key) for key in config.caption_keys]
    check_dataset(config.captions, [SAMPLE_ID, *columns])
    samples = _read_samples(config.captions)[:config.limit]
    first, second = ([sample[column] for sample in samples] for column in columns)
    encoders = {**{name: lambda how=how: load_text_encoder(how) for name, how in config.encoders.items()},
                **{name: lambda folder=folder: load_teacher(folder) for name, folder in config.teachers.items()}}
    result = {}
    for name, load in encoders.items():
        encoder, tokenizer = load()
        vectors = [encode_texts(encoder, tokenizer, texts, config.batch_tokens, config.precision)
                   for texts in (first, second)]
        result[name] = round(caption_retrieval_accuracy(*vectors), 3)
        print(f'{name}: {result[name]:.1f} % of {len(samples)} pairs', flush=True)
    return result


def _read_samples(folder: str) -> list[dict[str, Any]]:
    """All samples of a local MDS dataset, in order, without Streaming's shared memory."""
    return [sample for shard in read_index(folder)['shards'] for sample in reader_from_json(folder, '', shard)]


def read_gallery(
    features: Features, config: RetrievalConfig, queries: int = 12, top: int = 8, seed: int = 0
) -> dict[str, Any]:
    """What a picture grid shows: some captions with their best images, and some images with their best captions.

    Args:
        features: Of the benchmark.
        config: Of the benchmark.
        queries: Captions and images to show.
        top: Results a query.
        seed: Which ones are shown.

    Returns:
        ``captions`` and ``images``: lists of a query and its results, each with whether it is right; pictures are
        encoded image bytes.
    """
    samples = _read_samples(config.images)
    column = caption_column(config.caption_keys[0])
    text_id = features.text_id[:, 0]
    scores = features.text_features[:, 0] @ features.image_features.T
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:queries].tolist()
    captions = [{
        'query': samples[i][column],
        'results': [(samples[j][IMAGE], bool(text_id[i] == text_id[j])) for j in scores[i].topk(top).indices.tolist()],
    } for i in chosen]
    images = []
    for i in chosen:
        best: dict[int, int] = {}
        for j in scores[:, i].argsort(descending=True).tolist():
            best.setdefault(int(text_id[j]), j)
            if len(best) == top:
                break
        images.append({'query': samples[i][IMAGE], 'results': [
            (samples[j][column], bool(text_id[i] == text_id[j])) for j in best.values()]})
    return {'captions': captions, 'images': images}
