# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Retrieval sets: published ones, and custom data.

The test sets of Flickr8k, Flickr30k and COCO are those of Karpathy and Fei-Fei (arXiv 1412.2306).
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Optional, Union

from streaming import LocalDataset

from llm2clip.config.ranges import Count, Text, Texts
from llm2clip.data.caption_files import (
    captions_of_lines,
    check_image_paths,
    check_text,
    field,
    numbered,
    official_lists,
    read_captions,
    read_json_lines,
    read_lines,
    read_splits,
    text_field,
    texts_field,
)
from llm2clip.data.schema import CAPTION, IMAGE, SAMPLE_ID, read_columns, read_index, whole_shard
from llm2clip.errors import ConfigError, FileError
from llm2clip.evaluation.sets.files import ImageFiles, RetrievalSet, check_path, found_in, visible_files
from llm2clip.io.files import read_json, read_text

LANGUAGES = (
    'ar', 'bn', 'cs', 'da', 'de', 'el', 'en', 'es', 'fa', 'fi', 'fil', 'fr', 'he', 'hi', 'hr', 'hu', 'id', 'it', 'ja',
    'ko', 'mi', 'nl', 'no', 'pl', 'pt', 'quz', 'ro', 'ru', 'sv', 'sw', 'te', 'th', 'tr', 'uk', 'vi', 'zh',
)
_CAPTIONS = 'imageid.human-written-caption.txt'
_SPLITS = ('train', 'val', 'test')


def flickr8k(
    images: str, annotations: str, split: str = 'test', split_files: Optional[dict[Text, Text]] = None
) -> RetrievalSet:
    """Flickr8k: 1,000 images with 5 captions each (test).

    The 8,091 images (for research and teaching only) are in
    https://github.com/jbrownlee/Datasets/releases/tag/Flickr8k (``Flickr8k_Dataset.zip``,
    ``Flickr8k_text.zip``) and in https://www.kaggle.com/datasets/adityajn105/flickr8k .

    Args:
        images: Folder of the images, ``Flicker8k_Dataset`` or Kaggle's ``Images``.
        annotations: One of

            - ``Flickr8k.token.txt``, with the official split lists beside it,
            - ``dataset_flickr8k.json`` (https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip),
            - Kaggle's ``captions.txt``, which needs `split_files`.
        split: ``train``, ``val`` (officially ``dev``) or ``test``.  A file without splits and lists must have
            the name of the split in its own name; ``all`` reads it whole.
        split_files: For a file without splits: split -> file with one image per line.  Unset: the official
            lists ``Flickr_8k.{train,dev,test}Images.txt`` beside ``Flickr8k.token.txt``.
    """
    check_path('flickr8k', 'annotations', annotations)
    lists = official_lists(annotations) if split_files is None else split_files
    captions = _select_split('flickr8k', annotations, split, read_splits(annotations, lists),
                             ', and split_files: {test: <file>} lists its images')
    return _retrieval_set('flickr8k', captions, annotations, images)


def flickr30k(images: str, annotations: str, split: str = 'test') -> RetrievalSet:
    """Flickr30k: 1,000 images with 5 captions each (test).

    The 31,783 images (``flickr30k-images/<number>.jpg``, for research only) are available on request from
    https://shannon.cs.illinois.edu/DenotationGraph/ and in https://huggingface.co/datasets/nlphuji/flickr30k .

    Args:
        images: Folder of the images, to which paths in `annotations` are relative.
        annotations: One of

            - ``dataset_flickr30k.json`` (https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip),
            - ``flickr_annotations_30k.csv`` (nlphuji/flickr30k),
            - ``flickr30k_test.json`` of ALBEF, BLIP and LLM2CLIP, with paths ``flickr30k-images/<number>.jpg``
              (https://storage.googleapis.com/sfr-vision-language-research/datasets/flickr30k_test.json),
            - ``flickr30k_test_karpathy.txt`` of CLIP_benchmark
              (https://github.com/mehdidc/retrieval_annotations/releases/tag/1.0.0),
            - ``results_20130124.token``, which comes with the images and has no splits.
        split: ``train``, ``val`` or ``test``.  A file without splits must have the name of the split in its
            own name; ``all`` reads it whole.
    """
    check_path('flickr30k', 'annotations', annotations)
    captions = _select_split('flickr30k', annotations, split, read_splits(annotations))
    return _retrieval_set('flickr30k', captions, annotations, images)


def coco(images: str, annotations: str, split: str = 'test', captions_per_image: Optional[Count] = 5) -> RetrievalSet:
    """COCO: 5,000 images of val2014 (test, 5K).

    Unpack the images to ``val2014/``, for the other splits also to ``train2014/`` (val2014.zip, 6 GB;
    https://cocodataset.org/#download; annotations CC BY 4.0, images under Flickr's terms).

    Args:
        images: Folder that contains ``val2014/``, or the folder to which paths in `annotations` are relative.
            It may be a symbolic link, but links inside it must not lead out of it.
        annotations: One of

            - ``dataset_coco.json`` (https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip),
            - ``coco_karpathy_test.json`` of BLIP and LLM2CLIP
              (https://storage.googleapis.com/sfr-vision-language-research/datasets/coco_karpathy_test.json),
            - a file in COCO's own format, with paths relative to ``val2014`` or ``val2017``, such as
              ``captions_val2017.json`` or CLIP_benchmark's ``coco_test_karpathy.json``
              (https://github.com/mehdidc/retrieval_annotations/releases/tag/1.0.0).
        split: ``train``, ``restval``, ``val`` or ``test``.  A file without splits must have the name of the
            split in its own name; ``all`` reads it whole.
        captions_per_image: Maximum number of captions per image, from the first on; a few images have six or seven.
            Null: all, as in CLIP_benchmark.
    """
    check_path('coco', 'annotations', annotations)
    captions = _select_split('coco', annotations, split, read_splits(annotations))
    first_captions = ((image, texts[:captions_per_image]) for image, texts in captions)
    return _retrieval_set('coco', first_captions, annotations, images)


def _select_split(
    name: str, annotations: str, split: str,
    splits: Mapping[Optional[str], Iterable[tuple[str, list[str]]]], hint: str = ''
) -> Iterable[tuple[str, list[str]]]:
    """Image files and captions of one split."""
    if splits.keys() != {None}:
        _check_has_split(name, split, [key for key in splits if key is not None], annotations)
        return splits[split]
    # Only the name of a file without splits can show which split it holds.
    if split != 'all' and split not in Path(annotations).name.lower():
        raise ConfigError(f'{name}: source.split: {annotations} has no splits, and its name does not say {split!r}; '
                          f'split: all takes all of it{hint}')
    return splits[None]


def _check_has_split(name: str, split: str, splits: Sequence[str], path: str) -> None:
    """Raise a ConfigError unless `split` is among the `splits` of a file."""
    if split not in splits:
        raise ConfigError(f'{name}: source.split: there is no {split!r} in {path}; it has '
                          f'{", ".join(sorted(set(splits))) or "no images"}')


def sharegpt4v(images: str, annotations: str, first: Count = 1000) -> RetrievalSet:
    """ShareGPT4V-1k, the test set of Long-CLIP (arXiv 2403.15378): the first 1,000 of 1.2 million captions.

    As in Long-CLIP, line breaks become spaces.

    Args:
        images: Folder in ShareGPT4V's layout: ``sam/images``, ``coco/train2017``, ``llava/llava_pretrain/images``
            (sources: https://github.com/beichenzbc/Long-CLIP/blob/main/train/train.md).  Only the images of the first
            captions are needed; an error names the first missing one.
        annotations: ``share-captioner_coco_lcs_sam_1246k_1107.json`` (1.5 GB, read whole;
            https://huggingface.co/datasets/Lin-Chen/ShareGPT4V, CC BY-NC 4.0).
        first: Number of captions.
    """
    check_path('sharegpt4v', 'annotations', annotations)
    records = read_json(annotations, list)
    if len(records) < first:
        raise FileError(f'{annotations} has {len(records):,} values, expected at least {first:,}')
    captions = []
    for where, record in numbered(records[:first], f'{annotations}, value'):
        turns = numbered(field(record, 'conversations', where), f'{where}, turn')
        answer = next((turn for _, turn in turns if field(turn, 'from', where) == 'gpt'), None)
        if answer is None:
            raise FileError(f'{where}: no turn of the conversation is from \'gpt\'')
        image = text_field(record, 'image', where)
        captions.append((image, [text_field(answer, 'value', where).replace('\n', ' ')]))
    return _retrieval_set('sharegpt4v', captions, annotations, images)


def urban1k(folder: str) -> RetrievalSet:
    """Urban1k of Long-CLIP (arXiv 2403.15378): 1,000 city scenes from Visual Genome.

    Args:
        folder: Unpacked ``Urban1k.zip`` (https://huggingface.co/datasets/BeichenZhang/Urban1k) with
            ``image/<number>.jpg`` and ``caption/<number>.txt``.  Only the first line of a caption file is used.
    """
    for part in ('image', 'caption'):
        if not Path(folder, part).is_dir():
            raise ConfigError(f'urban1k: source.folder: expected the folders image and caption in {folder}; '
                              f'{found_in(Path(folder))}')
    stems = {}
    for part, suffix in (('image', '.jpg'), ('caption', '.txt')):
        names = visible_files(Path(folder, part), [suffix], f'{suffix} files in')
        stems[part] = {Path(name).stem for name in names}
    for part, other in (('image', 'caption'), ('caption', 'image')):
        alone = sorted(stems[part] - stems[other], key=_natural)
        if alone:
            raise ConfigError(f'urban1k: {len(alone):,} of {len(stems[part]):,} files in {folder}/{part} have none of '
                              f'the same name in {folder}/{other}, the first of them is {alone[0]}')
    captions = []
    for stem in sorted(stems['caption'], key=_natural):
        lines = read_text(Path(folder, 'caption', f'{stem}.txt')).splitlines()
        captions.append((f'{stem}.jpg', lines[:1]))
    return _retrieval_set('urban1k', captions, f'{folder}/caption', f'{folder}/image')


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts 2 before 10."""
    return [(int(part), '') if part.isdigit() else (-1, part) for part in re.split(r'(\d+)', name)]


def docci(images: str, annotations: str, split: str = 'test') -> RetrievalSet:
    """DOCCI (arXiv 2404.19753, CC BY 4.0): 5,000 images with one description each (test).

    Args:
        images: Folder ``images`` of the unpacked ``docci_images.tar.gz``
            (https://storage.googleapis.com/docci/data/docci_images.tar.gz, 7 GB).
        annotations: https://storage.googleapis.com/docci/data/docci_descriptions.jsonlines .
        split: ``train``, ``test``, ``qual_dev`` or ``qual_test``.
    """
    check_path('docci', 'annotations', annotations)
    records = list(read_json_lines(annotations))
    splits = [text_field(record, 'split', where) for where, record in records]
    _check_has_split('docci', split, splits, annotations)
    captions = [(text_field(record, 'image_file', where), [text_field(record, 'description', where)])
                for (where, record), split_of_record in zip(records, splits) if split_of_record == split]
    return _retrieval_set('docci', captions, annotations, images)


def flickr_cn(images: str, annotations: str) -> RetrievalSet:
    """Flickr30k-CN (Lan et al., ACM MM 2017): Flickr30k's 1,000 test images with 5 translations each.

    Args:
        images: Folder of Flickr30k's images (see `flickr30k`).
        annotations: One of

            - ``flickr30k_cn_test.txt`` of Flickr30k-CNA (https://zero.so.com), with the same translations,
            - ``seg.flickr30kzhmbosontest.caption.txt`` of the original package
              (https://github.com/li-xirong/cross-lingual-cap), with words that are joined again,
            - ``flickr30k_test_zh.txt`` of CLIP_benchmark
              (https://github.com/mehdidc/retrieval_annotations/releases/tag/1.0.0).
    """
    check_path('flickr_cn', 'annotations', annotations)
    return _retrieval_set('flickr_cn', captions_of_lines(annotations).items(), annotations, images)


def coco_cn(images: str, annotations: str, split: str = 'test') -> RetrievalSet:
    """COCO-CN (arXiv 1805.08661): 1,000 COCO images with 1,053 captions written in Chinese (test).

    Args:
        images: Folder that contains COCO's ``train2014/`` and ``val2014/`` (see `coco`).
        annotations: Folder ``coco-cn-version1805v1.1`` with ``imageid.human-written-caption.txt`` and
            ``coco-cn_<split>.txt`` (on request from https://github.com/li-xirong/coco-cn; also in
            https://huggingface.co/datasets/AIMClab-RUC/COCO-CN).
        split: ``train``, ``val`` or ``test``.
    """
    captions_file = Path(annotations, _CAPTIONS)
    split_file = Path(annotations, f'coco-cn_{split}.txt')
    if not captions_file.is_file():
        raise ConfigError(f'coco_cn: source.annotations: expected {_CAPTIONS} and coco-cn_<split>.txt in '
                          f'{annotations}; {found_in(Path(annotations))}')
    if not split_file.is_file():
        splits = [name for name in _SPLITS if Path(annotations, f'coco-cn_{name}.txt').is_file()]
        raise ConfigError(f'coco_cn: source.split: there is no {split_file}; the splits there are '
                          f'{", ".join(splits) or "none"}')
    all_captions = captions_of_lines(str(captions_file))
    captions = []
    for _, image in read_lines(str(split_file)):
        parts = image.split('_')  # such as COCO, val2014 and 000000043734
        if len(parts) != 3 or parts[0] != 'COCO':
            raise FileError(f'coco_cn: expected image ids such as COCO_val2014_000000043734, found {image!r}')
        captions.append((f'{parts[1]}/{image}.jpg', all_captions.get(f'{image}.jpg', [])))
    return _retrieval_set('coco_cn', captions, f'{captions_file} and {split_file.name}', images)


def xm3600(images: str, annotations: str, language: str, captions_per_image: Optional[Count] = None) -> RetrievalSet:
    """XM3600 (arXiv 2205.12522): 3,600 images with about two captions per language.

    Args:
        images: Folder of the unpacked ``images.tgz``, with ``<key>.jpg``
            (https://open-images-dataset.s3.amazonaws.com/crossmodal-3600/images.tgz, 300 MB; from Open Images, CC BY).
        annotations: ``captions.jsonl`` of https://google.github.io/crossmodal-3600/web-data/captions.zip (CC BY 4.0).
        language: One of `LANGUAGES`; ``'no'`` needs quotes in YAML.
        captions_per_image: Maximum number of captions per image, from the first on.  Null: all; CLIP_benchmark uses 1.
    """
    if language not in LANGUAGES:
        quotes = "; in YAML, 'no' needs quotes" if isinstance(language, bool) else ''
        raise ConfigError(f'xm3600: source.language: there is no {language!r}; there are '
                          f'{", ".join(LANGUAGES)}{quotes}')
    name = f'xm3600_{language}'
    check_path(name, 'annotations', annotations)
    captions = []
    for where, record in read_json_lines(annotations):
        texts = texts_field(field(record, language, where), 'caption', f'{where}, {language}')
        image = text_field(record, 'image/key', where)
        captions.append((f'{image}.jpg', texts[:captions_per_image]))
    return _retrieval_set(name, captions, annotations, images)


def image_folder(
    images: str, captions: str, image_column: str = 'image', caption_column: str = 'caption'
) -> RetrievalSet:
    """A folder of images and a file of captions; images without a caption do not count.

    Args:
        images: Folder of the images.
        captions: CSV or TSV file with a header, JSON list or JSON lines, with one row per caption.
        image_column: Column with the path of the image inside `images`.
        caption_column: Column with the caption; in JSON, also a list of captions.
    """
    texts = read_captions(captions, image_column, caption_column)
    check_image_paths(texts, images, captions)
    return _retrieval_set(images, texts.items(), captions, images, gaps=True)


def mds(local: str, caption_keys: Optional[Texts] = None) -> RetrievalSet:
    """An image dataset that `prepare_data` wrote; images with none of the captions do not count.

    Args:
        local: Folder of the dataset.
        caption_keys: Captions to use as texts; images may lack some of them.  Unset: all.
    """
    columns = [CAPTION + key for key in caption_keys or ()]
    all_columns = read_columns(local, [SAMPLE_ID, IMAGE, *columns])
    if caption_keys is None:
        columns = [name for name in all_columns if name.startswith(CAPTION)]
    read_image = MDSImages.open(local)
    ids: set[str] = set()
    captions = []
    for i, sample in enumerate(itertools.chain.from_iterable(read_image.dataset.shards)):
        image = sample[SAMPLE_ID]
        if image in ids:  # files that were converted together may use an id twice
            image = f'{image} ({i})'
        ids.add(sample[SAMPLE_ID])
        captions.append((image, [sample[column] for column in columns]))
    return _retrieval_set(local, captions, local, read_image, gaps=True)


@dataclasses.dataclass(frozen=True)
class MDSImages:
    """Reader of the images of a local MDS dataset by position, without Streaming's shared memory."""

    local: str
    """Folder of the dataset; readers of the same folder compare equal."""
    dataset: LocalDataset = dataclasses.field(compare=False, repr=False)

    @classmethod
    def open(cls, local: str) -> 'MDSImages':
        """Return a reader; raise a FileError if index or shards are damaged, or a shard is missing or compressed."""
        for shard in read_index(local)['shards']:
            whole_shard(local, shard)
        return cls(local, LocalDataset(local))

    def __call__(self, position: int) -> bytes:
        return self.dataset[position][IMAGE]


def _retrieval_set(
    name: str, entries: Iterable[tuple[str, Sequence[str]]], source: str,
    images: Union[str, Callable[[int], bytes]], gaps: bool = False,
) -> RetrievalSet:
    """Return a retrieval set after checking its images and captions.

    Args:
        name: Name of the set.
        entries: Id and captions of each image.
        source: File with the captions, for messages.
        images: Folder with the ids as file names, which links must not leave; or the set's `read_image`.
        gaps: Ignore empty captions, and allow images without captions; otherwise both raise a ValueError.
    """
    captions: dict[str, list[str]] = {}
    for image, lines in entries:
        if image in captions:
            raise ValueError(f'{name}: image {image} occurs twice in {source}')
        texts = [check_text(line, f'{name}: image {image!r} in {source}').strip() for line in lines]
        captions[image] = [text for text in texts if text or not gaps]
        if not gaps and (not lines or not all(captions[image])):
            lack = 'an empty caption' if lines else 'no caption'
            raise ValueError(f'{name}: image {image} has {lack} in {source}')
    if not captions:
        raise ConfigError(f'{name}: there are no images in {source}')
    if not any(captions.values()):
        raise ConfigError(f'{name}: no image has a caption in {source}')
    ids = list(captions)
    if isinstance(images, str):
        images = ImageFiles.open(name, images, ids, source)
    return RetrievalSet(name, ids, list(captions.values()), images)
