# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Zero-shot sets that are evaluated while stage 2 trains: their images in Composer's loop, and the features of their
classes by the weights that are evaluated."""

import gc
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from composer import DataSpec, Evaluator
from composer.core import Algorithm, Event, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from llm2clip.config import Stage2Config
from llm2clip.data.image_processing_llm2clip import resize_and_crop
from llm2clip.data.images import decode_pixels
from llm2clip.data.zeroshot import ZeroshotSet
from llm2clip.device import exact_float32, open_device
from llm2clip.files import FileError
from llm2clip.metrics.classification import mean_of_prompts
from llm2clip.models.llm2clip import ComposerLLM2CLIP
from llm2clip.teacher.caption_teacher import CachedTeacher, CaptionTeacher
from llm2clip.teacher.fingerprint import TeacherRecord
from llm2clip.teacher.sources import teacher_source

__all__ = ['zeroshot_classes', 'zeroshot_evaluator']

# Prompts that the adapter sees at once, or that a text encoder in the model reads at once.
_ROWS, _TEXTS = 4096, 256


class _Images(Dataset):
    """As many images for every rank: the first ones come again at the end, and metrics count each once.

    Were they left to Composer, which leaves out what its sampler adds, a rank might have no image at all.
    """

    def __init__(self, zeroshot: ZeroshotSet, image_size: int, key: str) -> None:
        dataset = zeroshot.dataset
        self.ids, self.read_image, self.labels = dataset.image_ids, dataset.read_image, dataset.labels
        self.name, self.key, self.image_size = dataset.name, key, image_size
        self.length = -(-len(self.ids) // dist.get_world_size()) * dist.get_world_size()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, at: int) -> dict[str, Any]:
        at %= len(self.ids)
        try:
            pixels = decode_pixels(self.read_image(at), self.ids[at])
        except (OSError, ValueError) as error:
            raise FileError(f'{self.key}: {self.name}: {error}') from None
        return {'index': at, 'pixel_values': resize_and_crop(pixels, self.image_size),
                'label': torch.tensor(self.labels[at])}


def zeroshot_evaluator(
    zeroshot: ZeroshotSet, name: str, key: str, image_size: int, batch_size: int, num_workers: int
) -> Evaluator:
    """A set for Composer's loop, with the metrics that `ComposerLLM2CLIP` has for it.

    `name` is the evaluator's label, `key` where the set stands in the configuration, `image_size` the side of the
    images in pixels, `batch_size` that of a rank, and `num_workers` processes of a rank read images.
    """
    images = _Images(zeroshot, image_size, key)
    loader = DataLoader(
        images, batch_size, sampler=dist.get_sampler(images), num_workers=num_workers,
        pin_memory=torch.cuda.is_initialized(),
        # Its own generator: drawing the workers' seed from the global one would shift the training.
        generator=torch.Generator().manual_seed(0))
    data = DataSpec(loader, get_num_samples_in_batch=lambda batch: len(batch['index']))
    model = ComposerLLM2CLIP
    metrics = model.multilabel_metrics if zeroshot.multilabel else model.zeroshot_metrics
    return Evaluator(label=name, dataloader=data, metric_names=[*metrics])


class Prompts(NamedTuple):
    """The P prompts of each of this rank's `own_names`: vectors of a frozen teacher, texts for a text encoder that is
    trained, or both.  ImageNet's vectors take 1.3 GB in all at a width of 4,096."""

    names: torch.Tensor
    """``(C,)``: which of all names each class has."""
    vectors: Optional[torch.Tensor]
    """``(n, P, llm_embed_dim)`` in float32 on the CPU."""
    texts: Optional[list[list[str]]]


def own_names(count: int) -> list[int]:
    """Which of `count` names are this rank's: every so-many-th; equally many on every rank, the first ones again where
    there are no more."""
    ranks = dist.get_world_size()
    return [at % count for at in range(dist.get_global_rank(), -(-count // ranks) * ranks, ranks)]


def zeroshot_classes(
    config: Stage2Config, sets: Mapping[str, ZeroshotSet], record: TeacherRecord, in_loop: Optional[CaptionTeacher]
) -> 'ZeroshotClasses':
    """Each set's classes for the model of a run, with its prompts as the model takes them; every rank calls this.

    A frozen LLM embeds them: the one in the loop, `text_encoder_in_loop`, or one that is let go afterwards.  A run that
    is resumed has the vectors on disk, unless the LLM is sharded.
    """
    own = {name: [[template.replace('{}', one.names[at]) for template in one.templates]
                  for at in own_names(len(one.names))] for name, one in sets.items()}
    vectors: dict[str, torch.Tensor] = {}
    if config.trainable_text.lora is None and not config.without_llm:
        device, source = open_device(config.device, config.precision), teacher_source(config.teacher)
        with exact_float32('cuda' if device.name == 'gpu' else device.name):
            if in_loop is not None and config.text_encoder_in_loop.sharded:
                for name, texts in own.items():
                    vectors[name] = in_loop.embed([*chain.from_iterable(texts)]).vectors.cpu().unflatten(
                        0, (len(texts), -1))
            else:
                cached = CachedTeacher(Path(config.save_folder, 'text_embeddings'), record.teacher,
                                       'fp32' if in_loop is None else config.text_encoder_in_loop.precision,
                                       lambda: in_loop or source.load(device, fingerprint=record.teacher))
                for name, one in sets.items():
                    embedded = cached(one.prompts)[0]  # which only the first rank has
                    if dist.get_world_size() > 1:
                        shape = len(one.names) * len(one.templates), record.llm_embed_dim
                        embedded = device.tensor_to_device(
                            embedded if dist.get_global_rank() == 0 else torch.empty(shape))
                        dist.broadcast(embedded, src=0)
                    of_names = embedded.unflatten(0, (len(one.names), -1))
                    vectors[name] = of_names[own_names(len(one.names))].cpu()
                    del embedded, of_names
                del cached
        gc.collect()  # of the LLM, which the model's weights and activations need the room of
        torch.cuda.empty_cache()
    prompts = {}
    for name, one in sets.items():
        position = {label: at for at, label in enumerate(one.names)}
        prompts[name] = Prompts(torch.tensor([position[label] for label in one.dataset.classes]), vectors.get(name),
                                own[name] if config.reads_captions else None)
    return ZeroshotClasses(prompts)


class ZeroshotClasses(Algorithm):
    """Give the evaluation batches of zero-shot sets their ``class_features`` ``(C, D)``, by the weights that are
    evaluated: at the first batch of each evaluation, of which `prompts` has the label, ranks share its prompts."""

    def __init__(self, prompts: Mapping[str, Prompts]) -> None:
        self.prompts = prompts
        self._features = torch.empty(0)

    def match(self, event: Event, state: State) -> bool:
        return event == Event.EVAL_BEFORE_FORWARD and state.dataloader_label in self.prompts

    def apply(self, event: Event, state: State, logger: Logger) -> Optional[int]:
        assert state.dataloader_label is not None
        prompts, pixels = self.prompts[state.dataloader_label], state.batch['pixel_values']
        if state.eval_timestamp.batch.value == 0:
            model: Any = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
            with get_precision_context(state.precision, state.precision_config):
                self._features = _class_features(model, prompts, pixels[:1])
        # Each forward pass is whole, of an image and a text at least: FSDP2 may have begun to gather the weights of the
        # part that comes next, and would otherwise keep them until that part is run, with other weights maybe.
        state.batch['class_features'] = self._features
        if prompts.vectors is not None:
            state.batch['text_embedding'] = torch.zeros(1, prompts.vectors.shape[-1], device=pixels.device)
        if prompts.texts is not None:
            state.batch['caption'] = ['-']


def _class_features(model: Any, prompts: Prompts, pixels: torch.Tensor) -> torch.Tensor:
    """``(C, D)`` in float32 on the device of the pixels, an image that goes through the model with each block of
    prompts; every rank has as many blocks."""
    of_names: Any = prompts.texts if prompts.vectors is None else prompts.vectors
    per_name = len(of_names[0])
    size = max(1, (_ROWS if prompts.texts is None else _TEXTS) // per_name)
    own = []
    for start in range(0, len(of_names), size):
        block: dict[str, Any] = {'pixel_values': pixels}
        if prompts.vectors is not None:
            block['text_embedding'] = prompts.vectors[start:start + size].flatten(0, 1).to(pixels.device)
        if prompts.texts is not None:
            block['caption'] = [*chain.from_iterable(prompts.texts[start:start + size])]
        own.append(mean_of_prompts(model(block)[model.tested].unflatten(0, (-1, per_name))))
    # A name of each rank, then the next of each.
    gathered: Sequence[torch.Tensor] = dist.all_gather(torch.cat(own))
    return torch.stack(list(gathered), dim=1).flatten(0, 1)[prompts.names.to(pixels.device)]
