# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Data loaders with text embeddings: beside images for stage 2, and beside CLIP's text features for inheritance."""

import dataclasses
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
from llm2clip.data.schema import CAPTION, EMBEDDING, EMBEDDING_SCALE, IMAGE, SAMPLE_ID, read_columns
from llm2clip.data.streams.paired_stream import PairedStream
from llm2clip.data.streams.safe_dataset import SafeDataset

# ---------------------------------------------------------------------------------------------------------------------
# Images with embeddings
# ---------------------------------------------------------------------------------------------------------------------


def build_image_loader(
    config: ImageDataConfig,
    image_size: int,
    global_batch_size: int,
    seed: int,
    train: bool,
    key: str,
    captions: bool = False,
) -> DataSpec:
    """Build the loader of stage 2; `ComposerLLM2CLIP` documents its batches after their ``microbatch_transforms``.

    If the streams have image embeddings, these are read instead of images, and the vector of one view is drawn.
    In training, an image is cropped at random and one of its captions is drawn each time it is read.  Several captions
    per image get an axis of their own.  In evaluation, an image has all captions; a missing one is an empty text with a
    zero embedding and ``text_id`` 0.

    Args:
        config: Streams, caption weights and crops.
        image_size: Side of the vision tower's square input, in pixels.
        global_batch_size: Samples per step over all ranks.
        seed: Seed of caption choice and crops.
        train: Drawn captions and a random crop, shuffled; otherwise every caption and a centre crop, in order.
        key: Configuration key of `config`, for error messages.
        captions: Deliver captions instead of their embeddings.
    """
    of_vectors = reads_image_embeddings(config, key)
    mixes = [stream_mix(config, name, key) for name in config.streams]
    keys = list(dict.fromkeys(name for mix in mixes for name in mix))
    streams = {name: paired_stream(name, stream, config, key, captions, None if train else keys)
               for name, stream in config.streams.items()}
    transform = train_transform(image_size, config.crop_scale, config.color_jitter, config.grayscale,
                                config.horizontal_flip)
    needed = pixels_needed(image_size, config.crop_scale[0])

    def make_train(dataset: SafeDataset, sample: Any, at: int) -> dict[str, Any]:
        seed, mix = dataset.sample_seed(sample), mixes[dataset.stream_of(at)]
        drawn = draw_captions(_with_captions(sample, at, mix) if of_vectors else sample, mix,
                              config.captions_per_image, seed)
        texts = [
            {**({'caption': caption} if captions else _caption_embedding(sample.text_embeddings, key, streams)),
             'text_id': torch.tensor(text_id(caption))} for key, caption in drawn]
        if of_vectors:
            views = [name.removeprefix(EMBEDDING) for name in sample if name.startswith(EMBEDDING)]
            image = _image_embedding(sample, views[draw([1] * len(views), seed, 'view')], streams)
        else:
            pixels = decode_pixels(sample[IMAGE], sample[SAMPLE_ID], needed)
            image = {'pixel_values': seeded(transform, pixels, seed)}
        return {
            **image,
            **(_stacked(texts) if len(texts) > 1 else texts[0]),
            'sample_seed': seed & (1 << 63) - 1,
        }

    def make_eval(dataset: SafeDataset, sample: Any, at: int) -> dict[str, Any]:
        there = _with_captions(sample, at, keys) if of_vectors else sample
        texts = [there[CAPTION + caption_of(key)] for key in keys]
        return {
            **(_image_embedding(sample, IMAGE, streams) if of_vectors else {
                'pixel_values': resize_and_crop(decode_pixels(sample[IMAGE], sample[SAMPLE_ID]), image_size)}),
            **({'caption': texts} if captions else _stacked(
                [_caption_embedding(sample.text_embeddings, key, streams) for key in keys])),
            'text_id': torch.tensor([text_id(text.strip() and f'{at}/{key}') for key, text in zip(keys, texts)]),
        }

    return build_loader(streams, make_train if train else make_eval, config, global_batch_size, seed, train, key,
                        split_batch=split_columns if captions else None, microbatch_transforms=float_vectors)


def reads_image_embeddings(config: ImageDataConfig, key: str) -> bool:
    """Return whether the streams have image embeddings; a ConfigError if only some have."""
    without = [name for name, stream in config.streams.items() if stream.image_embeddings is None]
    if without and len(without) < len(config.streams):
        raise ConfigError(f'{key}.streams.{without[0]}.image_embeddings: required but not set, since other datasets of '
                          f'{key} have them')
    return bool(config.streams) and not without


def _with_captions(sample: Any, at: int, keys: Iterable[str]) -> dict[str, str]:
    """Stand-in for the captions of a sample that has only vectors: empty where the vector is zero, as extraction
    writes it for a missing caption, and otherwise unique, which sample ids of several datasets need not be."""
    row = sample.text_embeddings[0]
    return {SAMPLE_ID: sample[SAMPLE_ID], **{
        CAPTION + caption_of(key): f'{at}/{key}' if row[EMBEDDING + key].any() else '' for key in keys}}


def _image_embedding(sample: Any, key: str, streams: Mapping[str, PairedStream]) -> dict[str, torch.Tensor]:
    """``image_embedding`` ``(D,)`` of an image or a view of it, as stored if all streams have the same storage type,
    and otherwise in float32."""
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
    return {'text_embedding': concatenate([vectors_of(one).float() for one in stored])}


def _stacked(texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Values of several texts of one image, stacked on a new first axis; strings in a list."""
    columns = {name: [text[name] for text in texts] for name in texts[0]}
    return {name: torch.stack(values) if isinstance(values[0], torch.Tensor) else values
            for name, values in columns.items()}


def split_columns(batch: dict[str, Any], microbatch_size: int) -> list[dict[str, Any]]:
    """Split a batch into microbatches; for K captions per image, ``caption`` has K columns of B texts."""
    parts = [slice(start, start + microbatch_size) for start in range(0, len(batch['index']), microbatch_size)]
    return [{name: [column[rows] for column in values] if name == 'caption' and not isinstance(values[0], str)
             else values[rows] for name, values in batch.items()} for rows in parts]


def stream_mix(config: ImageDataConfig, name: str, key: str) -> dict[str, float]:
    """Return caption key -> weight above 0 of a stream; without configured weights, all captions have equal weight."""
    caption_weights, where = config.caption_weights, key
    if (own := config.streams[name].caption_weights) is not None:
        caption_weights, where = own, f'{key}.streams.{name}'
    if not caption_weights and config.streams[name].image_embeddings is not None:
        found = next(iter(_of_teachers(config.streams[name].embeddings, config.teachers, name, key).values()))
        if found.remote is not None:
            raise ConfigError(f'{key}.caption_weights: expected caption keys, since the embeddings dataset '
                              f'{found.remote} is in a remote, and which ones it has is not known yet')
        return {name.removeprefix(EMBEDDING): 1.0 for name in read_columns(found.local) if name.startswith(EMBEDDING)}
    if not caption_weights:
        return dict.fromkeys(all_caption_keys(name, config.streams[name], key, 'caption_weights'), 1.0)
    mix = {caption: weight for caption, weight in caption_weights.items() if weight}
    if not mix:
        raise ConfigError(f'{where}.caption_weights: expected caption keys with weights, at least one above 0')
    return mix


def paired_stream(
    name: str, stream: ImageStreamConfig, config: ImageDataConfig, key: str, in_loop: bool = False,
    keys: Optional[Sequence[str]] = None,
) -> PairedStream:
    """Open the stream of one dataset in ``key.streams``, and check its columns.

    Args:
        name: Name of the dataset.
        stream: Folders and remotes of the dataset and its embeddings datasets.
        config: Caption weights, and the teachers to read; without teachers, the dataset must have a single one.
        key: Configuration key of `config`, for error messages.
        in_loop: Read no embeddings dataset.
        keys: Captions that must have embeddings; by default the captions with a weight.

    Raises:
        ConfigError, ValueError: A dataset is missing or lacks a caption, or the teacher is ambiguous or unknown.
    """
    text_embeddings = {} if in_loop else _of_teachers(stream.embeddings, config.teachers, name, key)
    keys = list(stream_mix(config, name, key)) if keys is None else keys
    if (images := stream.image_embeddings) is None:
        # Vectors of prompts and parts have keys of their own, captions in the loop have not.
        captions = [CAPTION + (key if in_loop else caption_of(key)) for key in keys]
        return _checked_stream(stream_arguments(name, stream, key), text_embeddings,
                               [IMAGE, *dict.fromkeys(captions)], keys)
    vectors = dataclasses.replace(stream, local=images.local, remote=images.remote)
    return _checked_stream(stream_arguments(f'{name}.image_embeddings', vectors, key), text_embeddings,
                           [EMBEDDING + IMAGE], keys)


def _of_teachers(
    text_embeddings: Mapping[str, DatasetConfig], teachers: Sequence[str], name: str, key: str
) -> dict[str, DatasetConfig]:
    """Embeddings datasets of `teachers`, or the only one; `name` and `key` are for error messages."""
    if not teachers and len(text_embeddings) != 1:
        raise ConfigError(f'{key}.teachers: dataset {name} has embeddings datasets of {len(text_embeddings)} teachers '
                          f'({", ".join(text_embeddings) or "none"}); say which one to read')
    for teacher in teachers:
        if teacher not in text_embeddings:
            raise ConfigError(f'{key}.streams.{name}.embeddings: there is no embeddings dataset of {teacher!r}, only '
                              f'of {", ".join(text_embeddings) or "nobody"}')
    return {teacher: text_embeddings[teacher] for teacher in teachers or text_embeddings}


def _checked_stream(
    arguments: Mapping[str, Any], text_embeddings: Mapping[str, DatasetConfig], columns: Sequence[str],
    keys: Sequence[str]
) -> PairedStream:
    """Stream of a dataset with `columns` and its embeddings datasets with captions `keys`; local ones are checked."""
    embedding_columns = [EMBEDDING + k for k in keys]
    if arguments['remote'] is None:
        read_columns(arguments['local'], [SAMPLE_ID, *columns])
    for embeddings in text_embeddings.values():
        if embeddings.remote is None:
            read_columns(embeddings.local, [SAMPLE_ID, *embedding_columns])
    places = [(embeddings.local, embeddings.remote) for embeddings in text_embeddings.values()]
    return PairedStream(text_embeddings=places, columns=columns, embedding_columns=embedding_columns, **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP's text features with embeddings
# ---------------------------------------------------------------------------------------------------------------------


def build_target_loader(
    config: InheritanceDataConfig, global_batch_size: int, seed: int, train: bool, key: str
) -> DataSpec:
    """Build the loader of inheritance; `ComposerInheritance` documents its batches after ``microbatch_transforms``.

    Each time a sample is read, one of the captions with a target is drawn.  A sample without a target is delivered, but
    has ``counted`` False.

    Args:
        config: Streams and caption weights.
        global_batch_size: Samples per step over all ranks.
        seed: Seed of the caption choice.
        train: Drawn captions, shuffled; otherwise the first caption of each sample that has a target, in order.
        key: Configuration key of `config`, for error messages.
    """
    opened = {name: target_stream(name, stream, config, key) for name, stream in target_streams(config, key).items()}
    streams, mixes = {name: stream for name, (stream, _) in opened.items()}, [mix for _, mix in opened.values()]

    def make(dataset: SafeDataset, sample: Any, at: int) -> dict[str, Any]:
        mix = mixes[dataset.stream_of(at)]
        targets = {key: vectors_of(stored_vector(sample, key)).float() for key in mix}
        there = [key for key, target in targets.items() if target.any()]
        among = there or list(mix)
        key = among[draw([mix[key] for key in among], dataset.sample_seed(sample)) if train else 0]
        return {**_caption_embedding(sample.text_embeddings, key, streams), 'target': targets[key],
                'counted': bool(there)}

    return build_loader(streams, make, config, global_batch_size, seed, train, key, microbatch_transforms=float_vectors)


def target_streams(config: InheritanceDataConfig, key: str) -> dict[str, ImageStreamConfig]:
    """Return the streams of `config`, each with the targets as main dataset and the teachers' vectors beside them."""
    result = {}
    for name, stream in config.streams.items():
        target = _of_teachers(stream.embeddings, [config.target], name, key)[config.target]
        others = {teacher: embeddings for teacher, embeddings in stream.embeddings.items() if teacher != config.target}
        result[name] = dataclasses.replace(stream, local=target.local, remote=target.remote,
                                           embeddings=_of_teachers(others, config.teachers, name, key))
    return result


def target_stream(
    name: str, stream: ImageStreamConfig, config: InheritanceDataConfig, key: str
) -> tuple[PairedStream, dict[str, float]]:
    """Open one of `target_streams`, check its columns, and return it with its caption key -> weight.

    Raises:
        ConfigError, ValueError: The targets are missing, or a caption has no vector in an embeddings dataset.
    """
    configured = config.caption_weights if stream.caption_weights is None else stream.caption_weights
    if not configured and stream.remote is not None:
        raise ConfigError(f'{key}.caption_weights: expected caption keys, since the embeddings dataset {stream.remote} '
                          'is in a remote, and which ones it has is not known yet')
    mix = {caption: weight for caption, weight in configured.items() if weight} if configured else {
        name.removeprefix(EMBEDDING): 1.0 for name in read_columns(stream.local) if name.startswith(EMBEDDING)}
    arguments = stream_arguments(f'{name}.embeddings.{config.target}', stream, key)
    return _checked_stream(arguments, stream.embeddings, [EMBEDDING + caption for caption in mix], list(mix)), mix


# ---------------------------------------------------------------------------------------------------------------------
# Stored vectors of embeddings datasets
# ---------------------------------------------------------------------------------------------------------------------


def stored_vector(row: Mapping[str, Any], key: str, name: str = 'text_embedding') -> dict[str, Any]:
    """Return the stored vector of a caption or image, `name` ``(D,)``, and for int8 its ``<name>_scale`` ``()``."""
    values = torch.as_tensor(row[EMBEDDING + key])
    if values.dtype != torch.int8:
        return {name: values}
    return {name: values, f'{name}_scale': torch.as_tensor(row[EMBEDDING_SCALE + key])}


def vectors_of(batch: Mapping[str, torch.Tensor], name: str = 'text_embedding') -> torch.Tensor:
    """Return the vectors ``(…, D)`` of a batch or `stored_vector`, with int8 dequantised to float32."""
    values, scale = batch[name], batch.get(f'{name}_scale')
    return values if scale is None else values * scale.float()[..., None]


def concatenate(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate the vectors ``(…, D1)``, ``(…, D2)``, … of several teachers, each scaled to length 1; the vectors of
    a single teacher are returned unchanged."""
    if len(vectors) == 1:
        return vectors[0]
    return torch.cat([F.normalize(part, dim=-1) for part in vectors], dim=-1)


def float_vectors(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with the vectors from `vectors_of`, without their scales.

    Used as ``microbatch_transforms``, so that int8 vectors are copied to the device before they are dequantised.
    """
    scales = [name for name in batch if name.endswith('_embedding_scale')]
    vectors = {name: vectors_of(batch, name) for name in (scale.removesuffix('_scale') for scale in scales)}
    return {name: value for name, value in {**batch, **vectors}.items() if name not in scales}


# ---------------------------------------------------------------------------------------------------------------------
# Image transforms of training, (3, H, W) -> (3, image_size, image_size), both uint8
# ---------------------------------------------------------------------------------------------------------------------
# On tensors: torchvision resizes several times faster than Pillow, with values that differ by at most 2 of 255.


class _RandomCrop(v2.RandomResizedCrop):
    """torchvision's crop, with the box drawn in fractions of the image, independently of the decoded size."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = flat_inputs[0].shape[-2:]
        area, (low, high) = height * width, (math.log(self.ratio[0]), math.log(self.ratio[1]))
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
        box = {'top': round(top * (height - h)), 'left': round(left * (width - w))}
        return {**box, 'height': min(round(h), height - box['top']), 'width': min(round(w), width - box['left'])}


def train_transform(
    image_size: int, crop_scale: Sequence[float], color_jitter: float = 0.0, grayscale: float = 0.0,
    horizontal_flip: float = 0.0,
) -> v2.Compose:
    """Return the training transform: a random crop, resized, with optional colour changes and mirroring.

    Args:
        image_size: Side of the vision tower's square input, in pixels.
        crop_scale: Smallest and largest share of the area that a crop keeps.
        color_jitter: Strength of random brightness, contrast and saturation; a fifth of it applies to hue.
        grayscale: Probability of conversion to grey.
        horizontal_flip: Probability of mirroring.
    """
    crop = _RandomCrop(image_size, scale=(crop_scale[0], crop_scale[1]), interpolation=InterpolationMode.BICUBIC)
    more: list[torch.nn.Module] = []
    if grayscale:
        more.append(v2.RandomGrayscale(grayscale))
    if color_jitter:
        more.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 5))
    if horizontal_flip:
        more.append(v2.RandomHorizontalFlip(horizontal_flip))
    return v2.Compose([crop, *more])


def pixels_needed(image_size: int, crop_scale: float) -> int:
    """Return the shortest side, in pixels, that a decoded image needs.

    A square crop that keeps `crop_scale` of the area is then at least ``2 * image_size`` pixels wide, so that resizing
    it to `image_size` loses no detail.
    """
    return math.ceil(2 * image_size / math.sqrt(crop_scale))


def seeded(transform: v2.Compose, image: torch.Tensor, seed: int) -> torch.Tensor:
    """Apply a random transform with its own seed, and leave the global generator unchanged."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would format a stack trace on each call as long as CUDA is not initialised.
        torch.default_generator.manual_seed(seed)
        return transform(image)
