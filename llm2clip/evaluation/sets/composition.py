# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Composition sets: SugarCrepe, Winoground, and the two parts of ARO with fixed captions."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.config import ConfigError
from llm2clip.data.caption_files import field, numbered, read_json_lines, text_field, texts_field
from llm2clip.data.images import crop_image, encode_image
from llm2clip.evaluation.sets.files import CompositionSet, Example, ImageFiles, Number, check_path
from llm2clip.files import FileError, read_json, reading

Box = tuple[float, float, float, float]
# An example as read from a file: hashable keys of its images, and its texts.
_Read = tuple[tuple[Any, ...], tuple[str, str]]

# In the order of the paper's tables.
_SUGARCREPE = ('replace_obj', 'replace_att', 'replace_rel', 'swap_obj', 'swap_att', 'add_obj', 'add_att')
# Pairs of attributes with fewer examples do not count in the average.
_FEWEST = 25
# Symmetric relations, which the authors' notebook excludes from the average.
_NOT_COUNTED = frozenset("""
adjusting, around, attached to, beside, between, bigger than, biting, boarding, brushing, by, chewing, cleaning,
climbing, close to, coming from, coming out of, contain, crossing, dragging, draped over, drinking, drinking from,
driving, driving down, driving on, eating from, eating in, enclosing, exiting, facing, filled with, floating in,
floating on, flying, flying above, flying in, flying over, flying through, full of, going down, going into,
going through, grazing in, growing in, growing on, guiding, hanging from, hanging in, hanging off, hanging over,
higher than, holding onto, hugging, in between, jumping off, jumping on, jumping over, kept in, larger than, leading,
leaning over, leaving, licking, longer than, looking in, looking into, looking out, looking over, looking through,
lying next to, lying on top of, making, mixed with, mounted on, moving, near, next to, of, on the back of,
on the edge of, on the front of, on the other side of, on the side of, opening, painted on, parked at, parked beside,
parked by, parked in, parked in front of, parked near, parked next to, perched on, petting, piled on, playing,
playing in, playing on, playing with, pouring, reaching for, reading, reflected on, riding on, running in, running on,
running through, seen through, sitting behind, sitting beside, sitting by, sitting in front of, sitting near,
sitting next to, sitting under, skiing down, skiing on, sleeping in, sleeping on, smiling at, sniffing, splashing,
sprinkled on, stacked on, standing against, standing around, standing behind, standing beside, standing in front of,
standing near, standing next to, staring at, stuck in, surrounding, swimming in, swinging, talking to, topped with,
touching, traveling down, traveling on, tying, typing on, underneath, wading in, waiting for, walking across,
walking by, walking down, walking next to, walking through, with, working in, working on, worn on, wrapped around,
wrapped in
""".replace('\n', ' ').strip().split(', '))


def sugarcrepe(images: str, annotations: str) -> CompositionSet:
    """SugarCrepe (arXiv 2306.14610): COCO images with their caption and a hard negative.

    In the negative, an object, an attribute or a relation is replaced, swapped with another one, or added.  As in the
    paper, the metrics are the accuracy on each of seven files, and on all examples of replace, swap and add.

    Args:
        images: Folder with the images of COCO's ``val2017`` (http://images.cocodataset.org/zips/val2017.zip, 0.8 GB).
        annotations: Folder with ``add_att.json``, ``add_obj.json``, ``replace_att.json``, ``replace_obj.json``,
            ``replace_rel.json``, ``swap_att.json`` and ``swap_obj.json``, the ``data`` of
            https://github.com/RAIVNLab/sugar-crepe (MIT).
    """
    check_path('sugarcrepe', 'annotations', annotations, 'folder')
    examples: list[_Read] = []
    files: dict[str, list[int]] = {}
    for name in _SUGARCREPE:
        path = f'{annotations}/{name}.json'
        check_path('sugarcrepe', 'annotations', path)
        begin = len(examples)
        for key, record in read_json(path, dict).items():
            where = f'{path}, example {key!r}'
            examples.append(((text_field(record, 'filename', where),),
                             _texts(record, 'caption', 'negative_caption', where)))
        files[name] = list(range(begin, len(examples)))
        if not files[name]:
            raise ConfigError(f'sugarcrepe: there are no examples in {path}')
    kinds = _by(name.split('_')[0] for name, positions in files.items() for _ in positions)
    numbers = {name: Number([positions]) for name, positions in {**files, **kinds}.items()}
    which, positions, texts = _positions(examples)
    return CompositionSet('sugarcrepe', which, texts, positions, [example.images[0] for example in positions], numbers,
                          {}, ImageFiles.open('sugarcrepe', images, which, annotations))


def winoground(images: str, annotations: str) -> CompositionSet:
    """Winoground (arXiv 2204.03162): 400 examples of two images and two captions with the same words in another order.

    The text score is the share of examples in which both images are nearer to their own caption.  For the image score,
    both captions are nearer to their own image; for the group score, both conditions hold.  The parts are the
    published tags.

    Args:
        images: Folder ``images`` (``ex_0_img_0.png``, …) of the unpacked ``data/images.zip`` from
            https://huggingface.co/datasets/facebook/winoground (research only; requires accepting the licence there).
        annotations: ``data/examples.jsonl`` from the same page.
    """
    check_path('winoground', 'annotations', annotations)
    examples: list[_Read] = []
    parts: dict[str, list[int]] = {}
    for where, record in read_json_lines(annotations):
        files = tuple(f'{text_field(record, key, where)}.png' for key in ('image_0', 'image_1'))
        examples.append((files, _texts(record, 'caption_0', 'caption_1', where)))
        for key in ('collapsed_tag', 'secondary_tag', 'tag'):
            if tag := text_field(record, key, where).strip():
                parts.setdefault(f'{key}: {tag}', []).append(len(examples) - 1)
    if not examples:
        raise ConfigError(f'winoground: there are no examples in {annotations}')
    everything = list(range(len(examples)))
    which, positions, texts = _positions(examples)
    return CompositionSet('winoground', which, texts, positions, everything, {
        f'{score}_score': Number([everything], score) for score in ('text', 'image', 'group')
    }, parts, ImageFiles.open('winoground', images, which, annotations))


def aro_relation(images: str, annotations: str) -> CompositionSet:
    """ARO Visual Genome Relation (arXiv 2210.01936): `the horse is eating the grass` against swapped nouns.

    The metric is the authors' macro accuracy: the mean over relations, except the symmetric ones that their
    notebook excludes.  The parts are all relations.

    Args:
        images: Folder ``images`` of the unpacked ``vgr_vga_images.zip`` (1 GB of Visual Genome images; Google Drive id
            1qaPlrwhGNMrR3a11iopZUT_GPP_LrgP9).
        annotations: ``visual_genome_relation.json`` (Google Drive id 1kX2iCHEv0CADL8dSO1nMdW-V0NqIAiP3); the code in
            https://github.com/mertyg/vision-language-models-are-bows downloads it, too.
    """
    return _aro('aro_relation', images, annotations, lambda record, where: text_field(record, 'relation_name', where),
                lambda relation, examples: relation not in _NOT_COUNTED, 'relation that counts')


def aro_attribution(images: str, annotations: str) -> CompositionSet:
    """ARO Visual Genome Attribution (arXiv 2210.01936): `the white cat and the open door` against swapped attributes.

    The metric is the authors' macro accuracy: the mean over pairs of attributes with at least 25 examples.  The parts
    are all pairs.

    Args:
        images: Same folder as for `aro_relation`.
        annotations: ``visual_genome_attribution.json`` (Google Drive id 13tWvOrNOLHxl3Rm9cR3geAdHx2qR3-Tw).
    """
    def attributes(record: Any, where: str) -> str:
        found = texts_field(record, 'attributes', where)
        if len(found) < 2:
            raise FileError(f"{where}: 'attributes' is {found}, expected two texts")
        return ', '.join(found[:2])

    return _aro('aro_attribution', images, annotations, attributes,
                lambda pair, examples: len(examples) >= _FEWEST, f'pair of attributes with {_FEWEST} examples')


@dataclass(frozen=True)
class CroppedImages:
    """Reader of image crops by position, encoded without loss."""

    folder: str
    files: Sequence[str]
    boxes: Sequence[Box]
    """Left, upper, right and lower border of each crop, in pixels."""

    def __call__(self, position: int) -> bytes:
        path = Path(self.folder, self.files[position])
        with reading(path, 'an image'):
            data = path.read_bytes()
        return encode_image(crop_image(data, str(path), self.boxes[position]), 'BMP')


def _aro(
    name: str, images: str, annotations: str, part_of: Callable[[Any, str], str],
    counts: Callable[[str, Sequence[int]], bool], counted: str,
) -> CompositionSet:
    """ARO set with its examples grouped by `part_of`; the metric is the mean over the groups accepted by `counts`."""
    check_path(name, 'annotations', annotations)
    examples: list[_Read] = []
    parts: list[str] = []
    for where, record in numbered(read_json(annotations), f'{annotations}, value'):
        image = text_field(record, 'image_path', where), _box(record, where)
        examples.append(((image,), _texts(record, 'true_caption', 'false_caption', where)))
        parts.append(part_of(record, where))
    if not examples:
        raise ConfigError(f'{name}: there are no examples in {annotations}')
    by_part = _by(parts)
    groups = [positions for part, positions in by_part.items() if counts(part, positions)]
    if not groups:
        raise ConfigError(f'{name}: {annotations} has no {counted}; it has {", ".join(list(by_part)[:6])}')
    which, positions, texts = _positions(examples)
    photographs: dict[str, int] = {}
    units = [photographs.setdefault(file, len(photographs)) for file, _ in which]
    ImageFiles.open(name, images, list(photographs), annotations)
    ids = [f'{file} ({", ".join(f"{border:g}" for border in box)})' for file, box in which]
    return CompositionSet(name, ids, texts, positions, [units[example.images[0]] for example in positions],
                          {'macro_accuracy': Number(groups)}, by_part,
                          CroppedImages(images, [file for file, _ in which], [box for _, box in which]))


def _box(record: Any, where: str) -> Box:
    """Left, upper, right and lower border of an example's crop, in pixels."""
    values = []
    for key in ('bbox_x', 'bbox_y', 'bbox_w', 'bbox_h'):
        value = field(record, key, where)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or key in ('bbox_w', 'bbox_h') and value <= 0:
            size = ' above 0' if key in ('bbox_w', 'bbox_h') else ''
            raise FileError(f'{where}: {key!r} is {str(value)[:60]!r}, expected a number of pixels{size}')
        values.append(value)
    x, y, width, height = values
    return x, y, x + width, y + height


def _texts(record: Any, first: str, second: str, where: str) -> tuple[str, str]:
    """Two fields, stripped of white space; raises a FileError if one is empty."""
    texts = text_field(record, first, where).strip(), text_field(record, second, where).strip()
    for key, text in zip((first, second), texts):
        if not text:
            raise FileError(f'{where}: {key!r} is empty, expected a text')
    return texts


def _positions(examples: Iterable[_Read]) -> tuple[list[Any], list[Example], list[str]]:
    """Distinct images, the examples as positions of images and texts, and distinct texts."""
    images: dict[Any, int] = {}
    texts: dict[str, int] = {}

    def number(numbers: dict[Any, int], key: Any) -> int:
        return numbers.setdefault(key, len(numbers))

    positions = [Example(tuple(number(images, image) for image in own), (number(texts, right), number(texts, other)))
                 for own, (right, other) in examples]
    return list(images), positions, list(texts)


def _by(names: Iterable[str]) -> dict[str, list[int]]:
    """Name -> positions where it occurs."""
    found: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        found.setdefault(name, []).append(position)
    return found
