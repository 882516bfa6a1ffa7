# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Zero-shot sets: opened with their prompts, and, for an evaluation during training, their images in Composer's loop
and their prompts embedded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from composer import DataSpec, Evaluator
from composer.devices import Device
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset

from llm2clip.config import ConfigError, ZeroshotConfig
from llm2clip.data.image_processing_llm2clip import resize_and_crop
from llm2clip.data.images import decode_pixels
from llm2clip.evaluation.classification import class_prompts, read_templates
from llm2clip.evaluation.sets.files import ClassificationSet
from llm2clip.files import FileError
from llm2clip.models.llm2clip import MULTILABEL_METRICS, ZEROSHOT_METRICS
from llm2clip.registry import open_set
from llm2clip.training.algorithms.zeroshot_classes import Prompts, own_names

__all__ = [
    'ZeroshotSet', 'deal_prompts', 'own_prompts', 'prompt_texts', 'zeroshot_evaluator', 'zeroshot_set',
]


class ZeroshotSet(NamedTuple):
    """Images with classes, and prompts with `{}` for the name of a class."""

    dataset: ClassificationSet
    templates: list[str]

    @property
    def multilabel(self) -> bool:
        """Whether an image has any number of classes."""
        return not isinstance(self.dataset.labels[0], int)

    @property
    def names(self) -> list[str]:
        """Those of the classes, each once."""
        return list(dict.fromkeys(self.dataset.classes))

    @property
    def prompts(self) -> list[str]:
        """All of them, name by name."""
        return class_prompts(self.dataset.classes, self.templates)


def zeroshot_set(config: ZeroshotConfig, key: str) -> ZeroshotSet:
    """A set, and the prompts of the configuration or else the set's own.

    Args:
        config: Where they are.
        key: Where it stands in the configuration.

    Raises:
        ConfigError: A file or folder is missing or damaged, or there are no prompts.
    """
    dataset: ClassificationSet = open_set('zeroshot', config.source, f'{key}.source')
    templates = config.templates or dataset.templates
    if templates is None:
        raise ConfigError(f'{key}.templates: required but not set, since {dataset.name} has no prompts of its own')
    return ZeroshotSet(dataset, read_templates(templates, f'{key}.templates'))


class _Images(Dataset):
    """As many images for every rank: the first ones come again at the end, and metrics count each once.

    Were they left to Composer, which leaves out what its sampler adds, a rank might have no image at all.
    """

    def __init__(self, dataset: ClassificationSet, image_size: int, key: str) -> None:
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

    Args:
        zeroshot: The set.
        name: Label of the evaluator.
        key: Where the set stands in the configuration.
        image_size: Side of the square that the vision tower sees.
        batch_size: Images per batch and rank.
        num_workers: Processes that read images.
    """
    images = _Images(zeroshot.dataset, image_size, key)
    loader = DataLoader(
        images, batch_size, sampler=dist.get_sampler(images), num_workers=num_workers,
        pin_memory=torch.cuda.is_initialized(),
        # Its own generator: drawing the workers' seed from the global one would shift the training.
        generator=torch.Generator().manual_seed(0))
    data = DataSpec(loader, get_num_samples_in_batch=lambda batch: len(batch['index']))
    metrics = MULTILABEL_METRICS if zeroshot.multilabel else ZEROSHOT_METRICS
    return Evaluator(label=name, dataloader=data, metric_names=[*metrics])


def deal_prompts(
    sets: Mapping[str, ZeroshotSet], teacher: Callable[[Sequence[str]], tuple[torch.Tensor, int]], width: int,
    device: Device,
) -> dict[str, Prompts]:
    """The vectors of each set's prompts, dealt from the first rank to all; every rank calls this.

    Args:
        sets: Name -> set.
        teacher: Texts -> vectors ``(N, width)`` on the CPU, on the first rank alone.
        width: `llm_embed_dim`.
        device: Over which ranks talk.
    """
    dealt = {}
    for name, zeroshot in sets.items():
        vectors, shape = teacher(zeroshot.prompts)[0], (len(zeroshot.templates), width)
        if dist.get_world_size() > 1:
            vectors = _dealt(vectors, len(zeroshot.names), shape, device)
        dealt[name] = Prompts(vectors.view(-1, *shape), _names(zeroshot))
    return dealt


def _dealt(vectors: torch.Tensor, names: int, shape: tuple[int, int], device: Device) -> torch.Tensor:
    """``(n, *shape)`` of this rank's `own_names`, of ``(names * P, width)`` on the first rank."""
    own, ranks = [], dist.get_world_size()
    for start in range(0, names, ranks):
        turn = torch.empty(ranks, *shape)
        if dist.get_global_rank() == 0:
            turn = vectors.view(-1, *shape)[[at % names for at in range(start, start + ranks)]]
        turn = device.tensor_to_device(turn)
        dist.broadcast(turn, src=0)
        own.append(turn[dist.get_global_rank()].cpu())
    return torch.stack(own)


def own_prompts(
    sets: Mapping[str, ZeroshotSet], embed: Callable[[Sequence[str]], torch.Tensor]
) -> dict[str, Prompts]:
    """The vectors of each set's prompts, where each rank embeds its own.

    Args:
        sets: Name -> set.
        embed: Texts -> vectors ``(N, llm_embed_dim)``; the ranks call it together, each with as many texts.
    """
    embedded = {}
    for name, zeroshot in sets.items():
        own = _own_texts(zeroshot)
        vectors = embed([text for texts in own for text in texts])
        embedded[name] = Prompts(vectors.cpu().unflatten(0, (len(own), -1)), _names(zeroshot))
    return embedded


def _own_texts(zeroshot: ZeroshotSet) -> list[list[str]]:
    """The prompts of each of this rank's `own_names`."""
    return [[template.replace('{}', zeroshot.names[at]) for template in zeroshot.templates]
            for at in own_names(len(zeroshot.names))]


def prompt_texts(sets: Mapping[str, ZeroshotSet], embedded: Mapping[str, Prompts]) -> dict[str, Prompts]:
    """Each set's prompts for a text encoder that is trained.

    Args:
        sets: Name -> set.
        embedded: What a frozen teacher says of them, where there is one, too.
    """
    return {name: embedded.get(name, Prompts(None, _names(zeroshot)))._replace(texts=_own_texts(zeroshot))
            for name, zeroshot in sets.items()}


def _names(zeroshot: ZeroshotSet) -> torch.Tensor:
    """``(C,)``: which of the set's names each class has."""
    position = {name: at for at, name in enumerate(zeroshot.names)}
    return torch.tensor([position[name] for name in zeroshot.dataset.classes])
