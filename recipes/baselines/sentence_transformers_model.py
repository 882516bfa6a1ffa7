# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 1 and extraction with sentence-transformers, as commands of this module.

    base FOLDER                               save SmolLM2-135M, the start of both trainings, as a folder
    train BASE DATASET OUT LOSS STEPS PAIRS WARMUP
                                              train LoRA on BASE and save the model in OUT/final
    accuracy FOLDER DATASET OUT               write the caption retrieval accuracy of a model, in %, to OUT
    encode FOLDER DATASET OUT                 write the vectors of all captions to OUT.npy
"""

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import TrainerCallback, set_seed

from llm2clip.data.schema import CAPTION, read_samples
from llm2clip.metrics.retrieval import caption_retrieval_accuracy
from llm2clip.teacher.llm import load_caption_tokenizer, load_llm
from recipes.baselines.setting import SEED, stage1_config

# The seven projections to which LLM2CLIP adds LoRA, too.
PROJECTIONS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


class StepLog(TrainerCallback):
    """Callback that writes one line per step to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.path.open('a') as file:
            file.write(f'step {state.global_step}\n')


def captions_of(dataset: str) -> list[list[str]]:
    return [[text for key, text in sorted(sample.items()) if key.startswith(CAPTION) and text]
            for sample in read_samples(dataset)]


def base(folder: str) -> None:
    config = stage1_config().text_encoder
    config.dtype = 'float32'
    load_llm(config).save_pretrained(folder)
    tokenizer = load_caption_tokenizer(config).tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = None  # newer releases of sentence-transformers would apply it to every text
    tokenizer.save_pretrained(folder)


def load(folder: str, **options: Any) -> SentenceTransformer:
    """Load the causal LLM with mean pooling; `options` are passed to transformers."""
    model = SentenceTransformer(folder, model_kwargs=options, device='cpu')
    model.max_seq_length = stage1_config().text_encoder.max_length
    # The GGUF tokenizer prepends a token, which would enter the mean; accuracy is better without it.
    model.tokenizer.add_bos_token = False
    return model


def train(llm: str, dataset: str, out: str, loss: str, steps: str, pairs: str, warmup: str) -> None:
    config = stage1_config()
    encoder = config.text_encoder
    set_seed(SEED)  # the trainer sets the seed only after LoRA is initialised
    model = load(llm, dtype=getattr(torch, encoder.dtype), attn_implementation=encoder.attn_implementation)
    lora = asdict(config.lora)
    model.add_adapter(LoraConfig(bias='none', **{**lora, 'target_modules': PROJECTIONS}))
    for parameter in filter(lambda one: one.requires_grad, model.parameters()):
        parameter.data = parameter.data.float()  # LoRA weights are float32 in peft and LLM2CLIP, too
    draw = random.Random(SEED)
    drawn = [draw.sample(own, 2) for own in captions_of(dataset) if len(own) > 1]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=out, max_steps=int(steps), per_device_train_batch_size=int(pairs), seed=SEED,
        learning_rate=config.optimizer['lr'], weight_decay=config.optimizer['weight_decay'],
        adam_beta1=config.optimizer['betas'][0], adam_beta2=config.optimizer['betas'][1],
        lr_scheduler_type='linear', warmup_steps=int(warmup), batch_sampler=BatchSamplers.NO_DUPLICATES,
        max_grad_norm=config.algorithms['gradient_clipping']['clipping_threshold'], use_cpu=True,
        save_strategy='no', dataloader_num_workers=config.train_data.num_workers,
        report_to='none')
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, callbacks=[StepLog(Path(out, 'steps.txt'))],
        train_dataset=Dataset.from_dict({'anchor': [a for a, _ in drawn], 'positive': [b for _, b in drawn]}),
        loss=getattr(losses, loss)(model, scale=config.logit_scale))
    trainer.train()
    model.save_pretrained(f'{out}/final')


def accuracy(folder: str, dataset: str, out: str) -> None:
    model = load(folder)
    pairs = [own[:2] for own in captions_of(dataset) if len(own) > 1]
    first, second = (model.encode([pair[side] for pair in pairs], convert_to_tensor=True) for side in range(2))
    Path(out).write_text(json.dumps(caption_retrieval_accuracy(first, second)))


def encode(folder: str, dataset: str, out: str) -> None:
    texts = [text for own in captions_of(dataset) for text in own]
    model = SentenceTransformer(folder, device='cpu', trust_remote_code=True)
    np.save(out, model.encode(texts, show_progress_bar=True))


if __name__ == '__main__':
    {'base': base, 'train': train, 'accuracy': accuracy, 'encode': encode}[sys.argv[1]](*sys.argv[2:])
