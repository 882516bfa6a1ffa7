# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Small evaluation sets in the files as they are published, 2 to 4 images each."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import webdataset as wds
from parts import make_samples, picture, write_dataset

Arguments = dict[str, Any]


def write_images(folder: Path, names: Iterable[str]) -> None:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))


def tar(*members: Union[tarfile.TarInfo, tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def write_json_lines(path: Path, records: Iterable[Any]) -> None:
    path.write_text(''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records))


def write_karpathy(folder: Path, dataset: str, images: str, records: Iterable[Any]) -> Arguments:
    """Write Karpathy's file of images with a split, captions and more fields each."""
    content = [{**more, 'sentences': [{'raw': raw} for raw in captions], 'split': split, 'filename': file}
               for file, split, captions, more in records]
    path = folder / f'dataset_{dataset}.json'
    path.write_text(json.dumps({'images': content, 'dataset': dataset}))
    return {'images': f'{folder}/{images}', 'annotations': str(path)}


def five(about: str) -> list[str]:
    return [f'{about}, caption {i}.' for i in range(5)]


# Flickr8k: image -> split, officially and by Karpathy.
FLICKR8K = {'1000268201_693b08cb0e.jpg': 'train', '1001773457_577c3a7d70.jpg': 'test',
            '1002674143_1b742ab4b8.jpg': 'val', '1003163366_44323f5815.jpg': 'train',
            '1007129816_e794419615.jpg': 'test', '1007320043_627395c3d8.jpg': ''}


def flickr8k_captions(name: str) -> list[str]:
    return [f'A dog , a "red" ball and {name[:4]} .', '"Stop" , says the sign', f'{name[:7]} is here', 'Dogs .', 'A']


def flickr8k(folder: Path) -> Arguments:
    """The official files, with the damaged name that is in them."""
    write_images(folder / 'Flicker8k_Dataset', FLICKR8K)
    rows = [(name, i, caption) for name in FLICKR8K for i, caption in enumerate(flickr8k_captions(name))]
    rows += [('2258277193_586949ec62.jpg.1', i, 'people at a crossing .') for i in range(5)]
    (folder / 'Flickr8k.token.txt').write_text(''.join(f'{name}#{i}\t{caption}\n' for name, i, caption in rows))
    for split, official in (('train', 'train'), ('val', 'dev'), ('test', 'test')):
        names = [name for name, of in FLICKR8K.items() if of == split]
        (folder / f'Flickr_8k.{official}Images.txt').write_text('\n'.join(names) + '\n')
    return {'images': f'{folder}/Flicker8k_Dataset', 'annotations': f'{folder}/Flickr8k.token.txt'}


def flickr8k_karpathy(folder: Path) -> Arguments:
    write_images(folder / 'Flicker8k_Dataset', FLICKR8K)
    records = [(name, split, flickr8k_captions(name), {}) for name, split in FLICKR8K.items() if split]
    return write_karpathy(folder, 'flickr8k', 'Flicker8k_Dataset', records)


def flickr8k_kaggle(folder: Path) -> Arguments:
    write_images(folder / 'Images', FLICKR8K)
    with open(folder / 'captions.txt', 'w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerows([('image', 'caption'), *((name, caption) for name in FLICKR8K
                                                  for caption in flickr8k_captions(name))])
    return {'images': f'{folder}/Images', 'annotations': f'{folder}/captions.txt'}


def flickr30k(folder: Path) -> Arguments:
    names = {'1000092795.jpg': 'train', '1007129816.jpg': 'test', '10002456.jpg': 'val', '1009434119.jpg': 'test'}
    write_images(folder / 'flickr30k-images', names)
    records = [(name, split, five(name), {}) for name, split in names.items()]
    return write_karpathy(folder, 'flickr30k', 'flickr30k-images', records)


def coco(folder: Path) -> Arguments:
    rows = [('val2014', 391895, 'test', 6), ('train2014', 57870, 'train', 5), ('val2014', 522418, 'restval', 5),
            ('val2014', 60623, 'test', 5)]
    files = [f'COCO_{place}_{number:012}.jpg' for place, number, _, _ in rows]
    write_images(folder / 'coco', [f'{row[0]}/{file}' for row, file in zip(rows, files)])
    records = [(file, split, [f'picture {number}, {k}' for k in range(n)], {'filepath': place, 'cocoid': number})
               for file, (place, number, split, n) in zip(files, rows)]
    return write_karpathy(folder, 'coco', 'coco', records)


def sharegpt4v(folder: Path) -> Arguments:
    images = ['sam/images/sa_545504.jpg', 'coco/train2017/000000000009.jpg',
              'llava/llava_pretrain/images/00000/000000010.jpg', 'sam/images/sa_7.jpg']
    write_images(folder / 'data', images[:3])
    file = folder / 'share-captioner_coco_lcs_sam_1246k_1107.json'
    question = {'from': 'human', 'value': '<image>\nWhat is this photo about?'}
    file.write_text(json.dumps([{'id': Path(image).stem, 'image': image, 'conversations': [
        question, {'from': 'gpt', 'value': f'In the photo, {i}.\nIt is "so".'}]} for i, image in enumerate(images)]))
    return {'images': f'{folder}/data', 'annotations': str(file), 'first': 3}


def urban1k(folder: Path) -> Arguments:
    write_images(folder / 'Urban1k/image', [f'{i}.jpg' for i in (1, 2, 10)])
    (folder / 'Urban1k/image/.DS_Store').touch()
    (folder / 'Urban1k/caption').mkdir()
    for i in (10, 1, 2):
        (folder / f'Urban1k/caption/{i}.txt').write_text(f'A street, number {i}.\nA second line.\n')
    return {'folder': f'{folder}/Urban1k'}


def docci(folder: Path) -> Arguments:
    ids = ['train_00000', 'test_00000', 'qual_dev_00000', 'test_00001']
    write_images(folder / 'images', [f'{name}.jpg' for name in ids])
    write_json_lines(folder / 'docci_descriptions.jsonlines', [
        {'example_id': name, 'split': name[:-6], 'image_file': f'{name}.jpg', 'description': f'A view of {name}.'}
        for name in ids])
    return {'images': f'{folder}/images', 'annotations': f'{folder}/docci_descriptions.jsonlines'}


def flickr_cn(folder: Path) -> Arguments:
    write_images(folder / 'flickr30k-images', ['1009692167.jpg', '1021439420.jpg'])
    lines = [f'{number}#zhm#{k}\t第{k}条狗坐在{number}。\n' for k in range(5) for number in (1009692167, 1021439420)]
    (folder / 'flickr30k_cn_test.txt').write_text(''.join(lines))
    return {'images': f'{folder}/flickr30k-images', 'annotations': f'{folder}/flickr30k_cn_test.txt'}


def coco_cn(folder: Path) -> Arguments:
    ids = ['COCO_train2014_000000503310', 'COCO_val2014_000000461245', 'COCO_train2014_000000573854']
    write_images(folder / 'coco', [f'{name.split("_")[1]}/{name}.jpg' for name in ids])
    package = folder / 'coco-cn-version1805v1.1'
    package.mkdir()
    (package / 'coco-cn_test.txt').write_text(f'{ids[1]}\n{ids[0]}\n')
    (package / 'coco-cn_train.txt').write_text(f'{ids[2]}\n')
    (package / 'imageid.human-written-caption.txt').write_text(
        f'{ids[2]}#0\t飞机正准备起飞。\n{ids[0]}#0\t座位空空的。\n{ids[1]}#0\t一群长颈鹿。\n{ids[1]}#1\t一群长颈鹿站在树边\n')
    return {'images': f'{folder}/coco', 'annotations': str(package)}


def xm3600(folder: Path) -> Arguments:
    keys = ['000411001ff7dd4f', '000ef8db2c7dd84a']
    write_images(folder / 'images', [f'{key}.jpg' for key in keys])

    def captions(texts: list[str]) -> dict[str, list[str]]:
        return {'caption': texts, 'caption/tokenized': texts, 'caption/tokenized/lowercase': texts}

    write_json_lines(folder / 'captions.jsonl', [
        {'image/key': key, 'image/locale': 'bn', 'de': captions([f'Bild {key}', 'ein zweites']),
         'no': captions([f'bilde {key}'])} for key in keys])
    return {'images': f'{folder}/images', 'annotations': f'{folder}/captions.jsonl'}


def image_folder(folder: Path) -> Arguments:
    write_images(folder / 'photos', ['a.png', 'b/c.png'])
    (folder / 'captions.csv').write_text('image,caption\na.png,"red, round"\nb/c.png,blue\na.png,a ball\n')
    return {'images': f'{folder}/photos', 'captions': f'{folder}/captions.csv'}


WDS_CLASSES = ['a missile', 'cat', '', 'dog', 'a missile', 'owl']
# Of nine images, a 1 or a 0 for each class.
SEVERAL_CLASSES = [[int((3 * i + c * c) % 5 < 2) for c in range(len(WDS_CLASSES))] for i in range(9)]


def write_wds(folder: Path, labels: Sequence[Union[int, Sequence[int]]], tars: int = 2) -> None:
    """CLIP_benchmark's layout: an image per label, which is the position of a class, or a 1 or a 0 for each of them."""
    (folder / 'test').mkdir(parents=True)
    (folder / 'classnames.txt').write_text('\n'.join(WDS_CLASSES) + '\n')
    (folder / 'zeroshot_classification_templates.txt').write_text('a photo of {c}.\nsome {c}\n')
    (folder / 'test/nshards.txt').write_text(f'{tars}\n')
    several = not isinstance(labels[0], int)
    if several:
        (folder / 'dataset_type.txt').write_text('multilabel\n')
    for tar in range(tars):
        with wds.TarWriter(f'{folder}/test/{tar}.tar') as writer:
            for i in range(tar, len(labels), tars):
                label = {'npy': np.array(labels[i], np.float32)} if several else {'cls': labels[i]}
                writer.write({'__key__': f's{i:07}', 'png': picture(i), **label})


WRITERS: dict[str, Callable[[Path], Arguments]] = {writer.__name__: writer for writer in (
    coco, coco_cn, docci, flickr30k, flickr8k, flickr_cn, image_folder, sharegpt4v, urban1k, xm3600)}


def write_custom_sets(folder: Path) -> None:
    """Twelve pictures with captions, the same in one folder per class, and prompts."""
    write_dataset(make_samples(12), folder / 'photos')
    for i in range(12):
        of_class = folder / 'classes' / ('cat', 'dog')[i % 2]
        of_class.mkdir(parents=True, exist_ok=True)
        (of_class / f'{i}.png').write_bytes(picture(i))
    (folder / 'templates.txt').write_text('a photo of a {}\na {}\n')


def custom_sets(folder: Path) -> list[str]:
    source = f'{{name: imagenet_folder, images: {folder}/classes}}'
    return [f'retrieval.flickr30k.local={folder}/photos/train',
            f'zeroshot.pets.source={source}', f'zeroshot.pets.templates={folder}/templates.txt',
            f'linear_probe.pets.train={source}', f'linear_probe.pets.test={source}']
