# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Zero-shot evaluation during stage 2: evaluators with the images of zero-shot sets, and class features
computed with the evaluated weights."""

import gc
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from composer import DataSpec, Evaluator
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch.utils.data import DataLoader, Dataset

from llm2clip.config import Stage2Config
from llm2clip.data.classification_sets import ZeroshotSet
from llm2clip.data.images import decode_pixels
from llm2clip.device import Device, exact_float32, get_device, get_precision_context
from llm2clip.errors import FileError
from llm2clip.losses.contrastive import all_gather
from llm2clip.metrics.classification import mean_of_prompts
from llm2clip.modeling.image_processing_llm2clip import resize_and_crop
from llm2clip.models.llm2clip import ComposerLLM2CLIP
from llm2clip.models.sharding import without_ddp
from llm2clip.ranks import dist, is_first
from llm2clip.teacher.caption_teacher import CachedTeacher, CaptionTeacher
from llm2clip.teacher.fingerprint import TeacherRecord
from llm2clip.teacher.sources import teacher_source

# Prompts per forward pass of the adapter alone, and of a text encoder in the model.
_ROWS, _TEXTS = 4096, 256


class _Images(Dataset):
    """Images of a zero-shot set, padded with its first to the same number per rank; metrics ignore repeats.

    Composer drops the samples that its own sampler adds, which could leave a rank without images.
    """

    def __init__(self, zeroshot: ZeroshotSet, label: str, image_size: int) -> None:
        dataset = zeroshot.dataset
        self.ids, self.read_image, self.labels = dataset.image_ids, dataset.read_image, dataset.labels
        self.subject = f'eval_zeroshot.{label}: {dataset.name}'
        self.image_size = image_size
        self.length = -(-len(self.ids) // dist.get_world_size()) * dist.get_world_size()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        i %= len(self.ids)
        try:
            pixels = decode_pixels(self.read_image(i), self.ids[i])
        except (OSError, ValueError) as error:
            raise FileError(f'{self.subject}: {error}') from None
        return {'index': i, 'pixel_values': resize_and_crop(pixels, self.image_size),
                'label': torch.tensor(self.labels[i])}


def zeroshot_evaluator(
    zeroshot: ZeroshotSet, label: str, image_size: int, batch_size: int, num_workers: int
) -> Evaluator:
    """Build the evaluator of a zero-shot set, with the matching metrics of `ComposerLLM2CLIP`.

    `label` is the set's name in `eval_zeroshot`, and `image_size` the side of the images in pixels.
    `batch_size` and `num_workers` (processes that read images) are per rank.
    """
    images = _Images(zeroshot, label, image_size)
    loader = DataLoader(
        images, batch_size, sampler=dist.get_sampler(images), num_workers=num_workers,
        pin_memory=torch.cuda.is_initialized(),
        # A separate generator: drawing the workers' seed from the global one would change the training.
        generator=torch.Generator().manual_seed(0))
    data = DataSpec(loader, get_num_samples_in_batch=lambda batch: len(batch['index']))
    model = ComposerLLM2CLIP
    metrics = model.multilabel_metrics if zeroshot.multilabel else model.zeroshot_metrics
    return Evaluator(label=label, dataloader=data, metric_names=[*metrics])


class Prompts(NamedTuple):
    """P prompts for each of this rank's `names_of_rank`."""

    names: torch.Tensor
    """``(C,)``: index of each class's name among all distinct names."""
    inputs: Union[torch.Tensor, list[list[str]]]
    """Vectors of a frozen teacher, ``(n, P, llm_embed_dim)`` in float32 on the CPU, or texts for a trainable
    one.  ImageNet's vectors take 1.3 GB over all ranks at a width of 4,096."""


def names_of_rank(count: int) -> list[int]:
    """Indices of this rank's share of `count` names, with a stride of the world size.
    Every rank has the same number of names, with the first names repeated if needed."""
    ranks = dist.get_world_size()
    return [i % count for i in range(dist.get_global_rank(), -(-count // ranks) * ranks, ranks)]


def zeroshot_classes(
    config: Stage2Config, sets: Mapping[str, ZeroshotSet], record: TeacherRecord,
    in_loop: Optional[CaptionTeacher]
) -> 'ZeroshotClasses':
    """Build the algorithm that adds class features to the batches of each set; every rank calls this.

    A frozen LLM embeds the prompts: the LLM of `text_encoder_in_loop`, or one that is freed afterwards.  The
    vectors are cached on disk for a resumed run, unless the LLM is sharded.
    """
    texts: dict[str, list[list[str]]] = {}
    for label, zeroshot in sets.items():
        names = [zeroshot.names[i] for i in names_of_rank(len(zeroshot.names))]
        texts[label] = [[template.replace('{}', name) for template in zeroshot.templates] for name in names]
    vectors: dict[str, torch.Tensor] = {}
    if not config.reads_captions:
        device = get_device(config.device)
        device_type = 'cuda' if device.name == 'gpu' else device.name
        with exact_float32(device_type):
            if in_loop is not None and config.text_encoder_in_loop.sharded:
                for label, prompts in texts.items():
                    embedded = in_loop.embed([*chain.from_iterable(prompts)]).vectors.cpu()
                    vectors[label] = embedded.unflatten(0, (len(prompts), -1))
            else:
                vectors = _cached_vectors(config, sets, record, in_loop, device)
        gc.collect()  # free the memory of the LLM for the model
        torch.cuda.empty_cache()
    classes: dict[str, Prompts] = {}
    for label, zeroshot in sets.items():
        position = {name: i for i, name in enumerate(zeroshot.names)}
        indices = torch.tensor([position[name] for name in zeroshot.dataset.classes])
        classes[label] = Prompts(indices, vectors.get(label, texts[label]))
    return ZeroshotClasses(classes)


def _cached_vectors(
    config: Stage2Config, sets: Mapping[str, ZeroshotSet], record: TeacherRecord,
    in_loop: Optional[CaptionTeacher], device: Device,
) -> dict[str, torch.Tensor]:
    """Embed the prompts of all ranks with a cache on disk; return this rank's `Prompts.inputs` by set."""
    source = teacher_source(config.teacher)
    cached = CachedTeacher(Path(config.save_folder, 'text_embeddings'), record.teacher,
                           'fp32' if in_loop is None else config.text_encoder_in_loop.precision,
                           lambda: in_loop or source.load(device, fingerprint=record.teacher))
    vectors: dict[str, torch.Tensor] = {}
    for label, zeroshot in sets.items():
        num_names = len(zeroshot.names)
        embedded = cached(zeroshot.prompts)[0]  # on rank 0 only
        if not is_first():
            embedded = torch.empty(num_names * len(zeroshot.templates), record.llm_embed_dim)
        embedded = device.tensor_to_device(embedded)
        dist.broadcast(embedded, src=0)
        vectors[label] = embedded.unflatten(0, (num_names, -1))[names_of_rank(num_names)].cpu()
        del embedded  # before the next set is embedded
    return vectors


class ZeroshotClasses(Algorithm):
    """Add ``class_features`` ``(C, D)``, computed with the evaluated weights, to batches of zero-shot sets.
    The ranks divide the prompts at the first batch of an evaluation.
    `prompts` has the evaluations' labels as keys."""

    def __init__(self, prompts: Mapping[str, Prompts]) -> None:
        self.prompts = prompts
        self._features = torch.empty(0)

    def match(self, event: Event, state: State) -> bool:
        return event == Event.EVAL_BEFORE_FORWARD and state.dataloader_label in self.prompts

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        label: Any = state.dataloader_label
        prompts = self.prompts[label]
        pixels = state.batch['pixel_values']
        if state.eval_timestamp.batch.value == 0:
            with get_precision_context(state.precision, state.precision_config):
                self._features = _class_features(without_ddp(state.model), prompts, pixels[:1])
        # Every forward pass needs at least one image and one text.  Otherwise, FSDP2 may prefetch the weights
        # of a part that does not run, and keep them until it does, when they may be outdated.
        state.batch['class_features'] = self._features
        if isinstance(prompts.inputs, torch.Tensor):
            width = prompts.inputs.shape[-1]
            state.batch['text_embedding'] = torch.zeros(1, width, device=pixels.device)
        else:
            state.batch['caption'] = ['-']


def _class_features(model: Any, prompts: Prompts, pixels: torch.Tensor) -> torch.Tensor:
    """Compute class features ``(C, D)`` in float32 on the device of `pixels`, ``(1, 3, H, W)``.
    Each block of prompts goes through the model with this image; every rank has the same number of blocks."""
    inputs = prompts.inputs
    per_name = len(inputs[0])
    most_rows = _TEXTS
    if isinstance(inputs, torch.Tensor):
        most_rows = _ROWS
    size = max(1, most_rows // per_name)
    features = []
    for start in range(0, len(inputs), size):
        part = inputs[start:start + size]
        block: dict[str, Any] = {'pixel_values': pixels}
        if isinstance(part, torch.Tensor):
            block['text_embedding'] = part.flatten(0, 1).to(pixels.device)
        else:
            block['caption'] = [*chain.from_iterable(part)]
        features.append(mean_of_prompts(model(block)['text_features'].unflatten(0, (-1, per_name))))
    # Interleave the names of the ranks, to undo the stride of `names_of_rank`.
    gathered = all_gather(torch.cat(features)).unflatten(0, (dist.get_world_size(), -1))
    return gathered.transpose(0, 1).flatten(0, 1)[prompts.names.to(pixels.device)]
