# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Data loaders with text embeddings, beside images for stage 2 or CLIP's text features for inheritance."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from composer.core import DataSpec
from torchvision.transforms import InterpolationMode, v2

from llm2clip.config import ConfigError, DatasetConfig, ImageDataConfig, ImageStreamConfig, InheritanceDataConfig
from llm2clip.data.captions import caption_of, draw, draw_captions, text_id
from llm2clip.data.image_processing_llm2clip import resize_and_crop
from llm2clip.data.images import decode_pixels
from llm2clip.data.loader import all_caption_keys, build_loader, stream_arguments
from llm2clip.data.schema import CAPTION, EMBEDDING, EMBEDDING_SCALE, IMAGE, SAMPLE_ID, embedding_keys, read_columns
from llm2clip.data.streams.paired_stream import PairedStream
from llm2clip.data.streams.safe_dataset import SafeDataset

# ----------------------------------------------------------------------------------- Images with embeddings


def build_image_loader(
    config: ImageDataConfig, image_size: int, global_batch_size: int, seed: int, train: bool, key: str,
    captions: bool = False,
) -> DataSpec:
    """Build the loader of stage 2; `ComposerLLM2CLIP` documents its batches after ``microbatch_transforms``.

    If the streams have image embeddings, these are read instead of images, and the vector of one view is
    drawn.  In training, an image is cropped at random and one of its captions is drawn each time it is read.
    Several captions per image get an axis of their own.  In evaluation, an image has all captions; a missing
    one is an empty text with a zero embedding and ``text_id`` 0.

    Args:
        config: Streams, caption weights and crops.
        image_size: Side of the vision tower's square input, in pixels.
        global_batch_size, seed, key: As for `build_loader`.
        train: Drawn captions and a random crop, shuffled; else every caption and a centre crop, in order.
        captions: Deliver captions instead of their embeddings.
    """
    image_embeddings = reads_image_embeddings(config, key)
    mixes = [stream_mix(config, name, key) for name in config.streams]
    caption_keys = list(dict.fromkeys(itertools.chain(*mixes)))
    required = None if train else caption_keys
    streams: dict[str, PairedStream] = {}
    for name, stream in config.streams.items():
        streams[name] = paired_stream(name, stream, config, key, in_loop=captions, keys=required)
    samples = _ImageTextSamples(config, image_size, streams, mixes, caption_keys, captions, image_embeddings)
    return build_loader(
        streams, samples.train if train else samples.evaluation, config, global_batch_size, seed, train, key,
        split_batch=split_columns if captions else None, microbatch_transforms=float_vectors)


@dataclasses.dataclass
class _ImageTextSamples:
    """Batch entries of the samples of stage 2; each method is a `make` of `SafeDataset`."""

    config: ImageDataConfig
    image_size: int
    streams: Mapping[str, PairedStream]
    mixes: Sequence[Mapping[str, float]]  # caption key -> weight, of each stream
    caption_keys: Sequence[str]
    captions: bool  # deliver captions, not their embeddings
    image_embeddings: bool  # the samples have vectors, not images

    def __post_init__(self) -> None:
        config = self.config
        self.transform = train_transform(
            self.image_size, config.crop_scale, config.color_jitter, config.grayscale, config.horizontal_flip)
        self.shortest_side = pixels_needed(self.image_size, config.crop_scale[0])

    def train(self, dataset: SafeDataset, sample: Any, at: int) -> dict[str, Any]:
        """Return a random crop and drawn captions."""
        seed = dataset.sample_seed(sample)
        mix = self.mixes[dataset.stream_of(at)]
        captioned = _with_captions(sample, at, mix) if self.image_embeddings else sample
        texts: list[dict[str, Any]] = []
        for key, caption in draw_captions(captioned, mix, self.config.captions_per_image, seed):
            if self.captions:
                text = {'caption': caption}
            else:
                text = _caption_embedding(sample.text_embeddings, key, self.streams)
            texts.append(text | {'text_id': torch.tensor(text_id(caption))})

        if self.image_embeddings:
            views = embedding_keys(sample)
            view = views[draw([1] * len(views), seed, 'view')]
            entries: dict[str, Any] = _image_embedding(sample, view, self.streams)
        else:
            pixels = decode_pixels(sample[IMAGE], sample[SAMPLE_ID], self.shortest_side)
            entries = {'pixel_values': seeded(self.transform, pixels, seed)}
        entries.update(_stacked(texts) if len(texts) > 1 else texts[0])
        entries['sample_seed'] = seed & (1 << 63) - 1
        return entries

    def evaluation(self, dataset: SafeDataset, sample: Any, at: int) -> dict[str, Any]:
        """Return the centre crop and every caption."""
        if self.image_embeddings:
            captioned = _with_captions(sample, at, self.caption_keys)
            entries: dict[str, Any] = _image_embedding(sample, IMAGE, self.streams)
        else:
            captioned = sample
            pixels = decode_pixels(sample[IMAGE], sample[SAMPLE_ID])
            entries = {'pixel_values': resize_and_crop(pixels, self.image_size)}

        texts = [captioned[CAPTION + caption_of(key)] for key in self.caption_keys]
        if self.captions:
            entries['caption'] = texts
        else:
            rows = sample.text_embeddings
            entries |= _stacked([_caption_embedding(rows, key, self.streams) for key in self.caption_keys])
        # Position and key make an id unique, even if two samples have the same text.
        ids = [text_id(f'{at}/{key}') if text.strip() else 0 for key, text in zip(self.caption_keys, texts)]
        entries['text_id'] = torch.tensor(ids)
        return entries


def reads_image_embeddings(config: ImageDataConfig, key: str) -> bool:
    """Return whether the streams have image embeddings; a ConfigError if only some have."""
    without = [name for name, stream in config.streams.items() if stream.image_embeddings is None]
    if without and len(without) < len(config.streams):
        raise ConfigError(f'{key}.streams.{without[0]}.image_embeddings: required but not set, since other '
                          f'datasets of {key} have them')
    return bool(config.streams) and not without


def _with_captions(sample: Any, at: int, keys: Iterable[str]) -> dict[str, str]:
    """Stand-in for the captions of a sample that has only vectors: empty where the vector is zero, as it is
    for a missing caption, and otherwise unique, which sample ids of several datasets need not be."""
    row = sample.text_embeddings[0]
    captions: dict[str, str] = {SAMPLE_ID: sample[SAMPLE_ID]}
    for key in keys:
        captions[CAPTION + caption_of(key)] = f'{at}/{key}' if row[EMBEDDING + key].any() else ''
    return captions


def _image_embedding(sample: Any, key: str, streams: Mapping[str, PairedStream]) -> dict[str, torch.Tensor]:
    """``image_embedding`` ``(D,)`` of an image or a view of it, as stored if all streams have the same
    storage type, and otherwise in float32."""
    stored = stored_vector(sample, key, 'image_embedding')
    if len({stream.storages[0] for stream in streams.values()}) == 1:
        return stored
    return {'image_embedding': vectors_of(stored, 'image_embedding').float()}


def _caption_embedding(
    rows: Sequence[Mapping[str, Any]], key: str, streams: Mapping[str, PairedStream]
) -> dict[str, torch.Tensor]:
    """``text_embedding`` ``(D,)`` of one caption, from the sample's rows of the embeddings datasets.

    If every stream has one embeddings dataset and all have the same storage type, the vector stays as stored.
    Otherwise it is float32, and the vectors of several teachers are scaled to length 1 and concatenated.
    """
    stored = [stored_vector(row, key) for row in rows]
    if len(stored) == 1 and len({stream.storages[1] for stream in streams.values()}) == 1:
        return stored[0]
    return {'text_embedding': concatenate([vectors_of(vector).float() for vector in stored])}


def _stacked(texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Values of several texts of one image, stacked on a new first axis; strings in a list."""
    columns: dict[str, Any] = {}
    for name, first in texts[0].items():
        values = [text[name] for text in texts]
        columns[name] = torch.stack(values) if isinstance(first, torch.Tensor) else values
    return columns


def split_columns(batch: dict[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """Split a batch into microbatches; for K captions per image, ``caption`` has K columns of B texts."""
    parts: list[dict[str, Any]] = []
    for start in range(0, len(batch['index']), microbatch_size):
        rows = slice(start, start + microbatch_size)
        part = {name: values[rows] for name, values in batch.items()}
        if 'caption' in batch and not isinstance(batch['caption'][0], str):
            part['caption'] = [column[rows] for column in batch['caption']]
        parts.append(part)
    return parts


def stream_mix(config: ImageDataConfig, name: str, key: str) -> dict[str, float]:
    """Return caption key -> weight above 0 of a stream; without configured weights, all weights are equal."""
    stream = config.streams[name]
    caption_weights, where = config.caption_weights, key
    if stream.caption_weights is not None:
        caption_weights, where = stream.caption_weights, f'{key}.streams.{name}'
    if caption_weights:
        mix = {caption: weight for caption, weight in caption_weights.items() if weight}
        if not mix:
            raise ConfigError(f'{where}.caption_weights: expected caption keys with weights, at least one '
                              'above 0')
        return mix
    if stream.image_embeddings is None:
        return dict.fromkeys(all_caption_keys(name, stream, key, 'caption_weights'), 1.0)
    text_embeddings = _embeddings_of_teachers(stream.embeddings, config.teachers, name, key)
    return _equal_weights(next(iter(text_embeddings.values())), key)


def _equal_weights(embeddings: DatasetConfig, key: str) -> dict[str, float]:
    """Caption key -> 1 of each caption in an embeddings dataset."""
    if embeddings.remote is not None:
        raise ConfigError(f'{key}.caption_weights: expected caption keys, since the embeddings dataset '
                          f'{embeddings.remote} is in a remote, and which ones it has is not known yet')
    return dict.fromkeys(embedding_keys(read_columns(embeddings.local)), 1.0)


def paired_stream(
    name: str, stream: ImageStreamConfig, config: ImageDataConfig, key: str, in_loop: bool = False,
    keys: Optional[Sequence[str]] = None,
) -> PairedStream:
    """Open the stream of one dataset in ``key.streams``, and check its columns.

    Args:
        name, stream: Name of the dataset, and its folders and remotes.
        config, key: Caption weights and the teachers to read (unset, the only one), and their key for errors.
        in_loop: Read no embeddings dataset.
        keys: Captions that must have embeddings; by default the captions with a weight.

    Raises:
        ConfigError, ValueError: A dataset or caption is missing, or a teacher is ambiguous or unknown.
    """
    text_embeddings: dict[str, DatasetConfig] = {}
    if not in_loop:
        text_embeddings = _embeddings_of_teachers(stream.embeddings, config.teachers, name, key)
    if keys is None:
        keys = list(stream_mix(config, name, key))
    if stream.image_embeddings is None:
        arguments = stream_arguments(name, stream, key)
        # Vectors of prompts and parts have keys of their own, captions in the loop have not.
        captions = keys if in_loop else list(map(caption_of, keys))
        columns = [IMAGE, *dict.fromkeys(CAPTION + caption for caption in captions)]
    else:
        vectors = dataclasses.replace(
            stream, local=stream.image_embeddings.local, remote=stream.image_embeddings.remote)
        arguments = stream_arguments(f'{name}.image_embeddings', vectors, key)
        columns = [EMBEDDING + IMAGE]
    return _checked_stream(arguments, text_embeddings, columns, keys)


def _embeddings_of_teachers(
    text_embeddings: Mapping[str, DatasetConfig], teachers: Sequence[str], name: str, key: str
) -> dict[str, DatasetConfig]:
    """Embeddings datasets of `teachers`, or the only one; `name` and `key` are for error messages."""
    if not teachers and len(text_embeddings) != 1:
        raise ConfigError(f'{key}.teachers: dataset {name} has embeddings datasets of {len(text_embeddings)} '
                          f'teachers ({", ".join(text_embeddings) or "none"}); say which one to read')
    for teacher in teachers:
        if teacher not in text_embeddings:
            raise ConfigError(f'{key}.streams.{name}.embeddings: there is no embeddings dataset of {teacher!r}, '
                              f'only of {", ".join(text_embeddings) or "nobody"}')
    return {teacher: text_embeddings[teacher] for teacher in teachers or text_embeddings}


def _checked_stream(
    arguments: Mapping[str, Any], text_embeddings: Mapping[str, DatasetConfig], columns: Sequence[str],
    keys: Sequence[str]
) -> PairedStream:
    """Stream of a dataset with `columns` and its embeddings datasets with `keys`; local ones are checked."""
    embedding_columns = [EMBEDDING + key for key in keys]
    if arguments['remote'] is None:
        read_columns(arguments['local'], [SAMPLE_ID, *columns])
    for embeddings in text_embeddings.values():
        if embeddings.remote is None:
            read_columns(embeddings.local, [SAMPLE_ID, *embedding_columns])
    folders = [(embeddings.local, embeddings.remote) for embeddings in text_embeddings.values()]
    return PairedStream(
        text_embeddings=folders, columns=columns, embedding_columns=embedding_columns, **arguments)


# --------------------------------------------------------------------- CLIP's text features with embeddings


def build_target_loader(
    config: InheritanceDataConfig, global_batch_size: int, seed: int, train: bool, key: str
) -> DataSpec:
    """Build the loader of inheritance; `ComposerInheritance` documents its batches.

    Each time a sample is read, one of the captions with a target is drawn.  A sample without a target is
    delivered, but has ``counted`` False.

    Args:
        config: Streams and caption weights.
        global_batch_size, seed, key: As for `build_loader`.
        train: Drawn captions, shuffled; else the first caption of each sample that has a target, in order.
    """
    streams: dict[str, PairedStream] = {}
    mixes: list[dict[str, float]] = []
    for name, stream in target_streams(config, key).items():
        streams[name], mix = target_stream(name, stream, config, key)
        mixes.append(mix)

    def make(dataset: SafeDataset, sample: Any, at: int) -> dict[str, Any]:
        mix = mixes[dataset.stream_of(at)]
        targets = {caption: vectors_of(stored_vector(sample, caption)).float() for caption in mix}
        with_target = [caption for caption, target in targets.items() if target.any()]
        candidates = with_target or list(mix)
        caption = candidates[0]
        if train:
            weights = [mix[candidate] for candidate in candidates]
            caption = candidates[draw(weights, dataset.sample_seed(sample))]
        entries: dict[str, Any] = _caption_embedding(sample.text_embeddings, caption, streams)
        entries['target'] = targets[caption]
        entries['counted'] = bool(with_target)
        return entries

    return build_loader(
        streams, make, config, global_batch_size, seed, train, key, microbatch_transforms=float_vectors)


def target_streams(config: InheritanceDataConfig, key: str) -> dict[str, ImageStreamConfig]:
    """Return the streams of `config`, with the targets as main datasets and the teachers' vectors beside them."""
    streams: dict[str, ImageStreamConfig] = {}
    for name, stream in config.streams.items():
        target = _embeddings_of_teachers(stream.embeddings, [config.target], name, key)[config.target]
        teachers = {teacher: value for teacher, value in stream.embeddings.items() if teacher != config.target}
        text_embeddings = _embeddings_of_teachers(teachers, config.teachers, name, key)
        streams[name] = dataclasses.replace(
            stream, local=target.local, remote=target.remote, embeddings=text_embeddings)
    return streams


def target_stream(
    name: str, stream: ImageStreamConfig, config: InheritanceDataConfig, key: str
) -> tuple[PairedStream, dict[str, float]]:
    """Open one of `target_streams`, check its columns, and return it with its caption key -> weight.

    Raises:
        ConfigError, ValueError: The targets are missing, or a caption has no vector in an embeddings dataset.
    """
    caption_weights = config.caption_weights if stream.caption_weights is None else stream.caption_weights
    if caption_weights:
        mix = {caption: weight for caption, weight in caption_weights.items() if weight}
    else:
        mix = _equal_weights(stream, key)
    arguments = stream_arguments(f'{name}.embeddings.{config.target}', stream, key)
    columns = [EMBEDDING + caption for caption in mix]
    return _checked_stream(arguments, stream.embeddings, columns, list(mix)), mix


# -------------------------------------------------------------------- Stored vectors of embeddings datasets


def stored_vector(row: Mapping[str, Any], key: str, name: str = 'text_embedding') -> dict[str, Any]:
    """Return a stored vector, `name` ``(D,)``, and for int8 its ``<name>_scale`` ``()``."""
    values = torch.as_tensor(row[EMBEDDING + key])
    if values.dtype != torch.int8:
        return {name: values}
    return {name: values, f'{name}_scale': torch.as_tensor(row[EMBEDDING_SCALE + key])}


def vectors_of(batch: Mapping[str, torch.Tensor], name: str = 'text_embedding') -> torch.Tensor:
    """Return the vectors ``(…, D)`` of a batch or `stored_vector`, with int8 dequantised to float32."""
    scale = batch.get(f'{name}_scale')
    if scale is None:
        return batch[name]
    return batch[name] * scale.float()[..., None]


def concatenate(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate the vectors ``(…, D1)``, ``(…, D2)``, … of several teachers, each scaled to length 1; the
    vectors of a single teacher are returned unchanged."""
    if len(vectors) == 1:
        return vectors[0]
    return torch.cat([F.normalize(part, dim=-1) for part in vectors], dim=-1)


def float_vectors(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with the vectors from `vectors_of`, without their scales.

    Used as ``microbatch_transforms``, so that int8 vectors are dequantised after the copy to the device.
    """
    floats = {name: value for name, value in batch.items() if not name.endswith('_embedding_scale')}
    for name in floats:
        if name.endswith('_embedding'):
            floats[name] = vectors_of(batch, name)
    return floats


# ----------------------- Image transforms of training, (3, H, W) -> (3, image_size, image_size), both uint8
# On tensors: torchvision resizes several times faster than Pillow, with differences of at most 2 of 255.


class _RandomCrop(v2.RandomResizedCrop):
    """torchvision's crop, with the box drawn in fractions of the image, independently of the decoded size."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = flat_inputs[0].shape[-2:]
        area = height * width
        low, high = map(math.log, self.ratio)
        draws = torch.rand(10, 2).tolist()
        top, left = torch.rand(2).tolist()
        for scale, ratio in draws:
            target = area * (self.scale[0] + scale * (self.scale[1] - self.scale[0]))
            aspect = math.exp(low + ratio * (high - low))
            w, h = math.sqrt(target * aspect), math.sqrt(target / aspect)
            if w <= width and h <= height:
                break
        else:  # no crop of these shapes fits: the largest in the middle
            w, h = min(width, height * self.ratio[1]), min(height, width / self.ratio[0])
            top = left = 0.5
        y = round(top * (height - h))
        x = round(left * (width - w))
        return {'top': y, 'left': x, 'height': min(round(h), height - y), 'width': min(round(w), width - x)}


def train_transform(
    image_size: int, crop_scale: Sequence[float], color_jitter: float = 0.0, grayscale: float = 0.0,
    horizontal_flip: float = 0.0,
) -> v2.Compose:
    """Return the training transform to ``(3, image_size, image_size)``: a random crop, resized, with optional
    colour changes and mirroring.  `ImageDataConfig` describes the settings."""
    smallest, largest = crop_scale
    crop = _RandomCrop(image_size, scale=(smallest, largest), interpolation=InterpolationMode.BICUBIC)
    transforms: list[torch.nn.Module] = [crop]
    if grayscale:
        transforms.append(v2.RandomGrayscale(grayscale))
    if color_jitter:
        transforms.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 5))
    if horizontal_flip:
        transforms.append(v2.RandomHorizontalFlip(horizontal_flip))
    return v2.Compose(transforms)


def pixels_needed(image_size: int, crop_scale: float) -> int:
    """Return the shortest side, in pixels, that a decoded image needs.

    A square crop that keeps `crop_scale` of the area is then at least ``2 * image_size`` pixels wide, so that
    resizing it to `image_size` loses no detail.
    """
    return math.ceil(2 * image_size / math.sqrt(crop_scale))


def seeded(transform: v2.Compose, image: torch.Tensor, seed: int) -> torch.Tensor:
    """Apply a random transform with its own seed, and leave the global generator unchanged."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would format a stack trace on each call as long as CUDA is not initialised.
        torch.default_generator.manual_seed(seed)
        return transform(image)
