# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Images of an evaluation set -> features, in order, none left out."""

from collections.abc import Callable, Sequence

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llm2clip.evaluation.models import EvaluatedModel

__all__ = ['encode_images']


class _Images(Dataset):

    def __init__(
        self, read_image: Callable[[int], bytes], names: Sequence[str],
        preprocess: Callable[[bytes, str], torch.Tensor],
    ) -> None:
        self.read_image, self.names, self.preprocess = read_image, names, preprocess

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocess(self.read_image(index), self.names[index])


def encode_images(
    model: EvaluatedModel,
    read_image: Callable[[int], bytes],
    names: Sequence[str],
    what: str,
    batch_size: int = 64,
    num_workers: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``(N, D)`` and the tower's own ``(N, W)``, in float32 on the CPU.

    Args:
        model: Which encodes.
        read_image: Position -> encoded image; picklable.
        names: Of the N images, for messages.
        what: Shown beside the progress bar.
        batch_size: Images per forward pass.
        num_workers: Processes that read and decode.

    Raises:
        ValueError: An image cannot be decoded; names it.
    """
    loader = DataLoader(_Images(read_image, names, model.preprocess), batch_size, num_workers=num_workers,
                        pin_memory=model.device.type == 'cuda')
    features, pooled = [], []
    with tqdm(total=len(names), desc=what, unit=' images') as progress:
        for pixel_values in loader:
            for rows, part in zip((features, pooled), model.image_features(pixel_values.to(model.device))):
                rows.append(part.cpu())
            progress.update(len(pixel_values))
    return torch.cat(features), torch.cat(pooled)
