# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Models of sentence-transformers on Flickr8k, as commands of this module.

    base OUT                          write SmolLM2-135M to OUT/llm and the image tower to OUT/tower
    train TASK OUT FOLDER STEPS LOSS  train from them, and save the model in FOLDER/final
    score TASK FOLDER DATASET FILE    write a model's accuracies in % to FILE

TASK is `captions` (two captions of an image are a pair), `simcse` (a caption and itself, told apart by
dropout, as in the third step of LLM2Vec), or `images` (a caption and its image).
"""

import io
import itertools
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Dense, Router, Transformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import TimmWrapperConfig, TimmWrapperModel, TrainerCallback, set_seed

from llm2clip.config import Stage1Config, Stage2Config
from llm2clip.config.loading import load_config
from llm2clip.data.schema import IMAGE, SAMPLE_ID, read_samples
from llm2clip.metrics.retrieval import caption_retrieval_accuracy
from llm2clip.models.towers import load_tower, tower_preprocessing
from llm2clip.teacher.llm import load_caption_tokenizer, load_llm
from recipes.baselines.run import RUN, SEED, SIZE, captions_of, recalls_of

STAGE1 = load_config(Stage1Config, ['yamls/flickr8k/stage1.yaml'])
STAGE2 = load_config(Stage2Config, ['yamls/flickr8k/stage2.yaml'])
# The seven projections to which LLM2CLIP adds LoRA, too.
PROJECTIONS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


class StepLog(TrainerCallback):
    """Callback that writes one line per step to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.path.open('a') as file:
            file.write(f'step {state.global_step}\n')


def base(out: str) -> None:
    encoder, vision = STAGE1.text_encoder, STAGE2.model.vision
    encoder.dtype = 'float32'
    quantized: Any = load_llm(encoder)
    del quantized.config.quantization_config  # transformers saves no model that comes from a GGUF file
    llm = type(quantized)(quantized.config)
    llm.load_state_dict(quantized.state_dict())
    llm.save_pretrained(f'{out}/llm')
    tokenizer = load_caption_tokenizer(encoder).tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = None  # newer releases of sentence-transformers would apply it to every text
    tokenizer.save_pretrained(f'{out}/llm')
    pixels = asdict(tower_preprocessing(vision))
    preprocessing = {'architecture': vision.name, 'input_size': [3, SIZE, SIZE], 'crop_pct': 1.0,
                     'interpolation': 'bicubic', 'mean': pixels['mean'], 'std': pixels['std']}
    tower = TimmWrapperModel(TimmWrapperConfig.from_dict({
        'architecture': vision.name, 'num_classes': 0, 'num_features': 1280,
        'pretrained_cfg': preprocessing}))
    tower.timm_model.load_state_dict(load_tower(vision).trunk.state_dict())
    tower.save_pretrained(f'{out}/tower')


def language_model(out: str, dropout: float) -> Any:
    """Return the causal LLM with LoRA."""
    encoder = STAGE1.text_encoder
    llm: Any = Transformer(f'{out}/llm', max_seq_length=encoder.max_length, model_kwargs={
        'dtype': getattr(torch, encoder.dtype), 'attn_implementation': encoder.attn_implementation})
    # The GGUF tokenizer prepends a token, which would enter the mean; accuracy is better without it.
    llm.tokenizer.add_bos_token = False
    settings: Any = asdict(STAGE1.lora) | {'target_modules': PROJECTIONS, 'lora_dropout': dropout}
    llm.model = get_peft_model(llm.model, LoraConfig(bias='none', **settings))
    for parameter in llm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # LoRA weights are float32 in peft and LLM2CLIP, too
    return llm


def train(task: str, out: str, folder: str, steps: str, loss: str) -> None:
    set_seed(SEED)  # the trainer sets the seed only after LoRA is initialised
    config: Any = STAGE1
    llm = language_model(out, 0.3 if task == 'simcse' else 0.0)
    text = [llm, Pooling(llm.get_embedding_dimension(), 'mean')]
    options: dict[str, Any] = {'lr_scheduler_type': 'linear', 'batch_sampler': BatchSamplers.NO_DUPLICATES}
    loss_options: dict[str, Any] = {'scale': STAGE1.logit_scale}
    data = training_pairs(task, out)
    if task == 'images':
        config = STAGE2
        data = data.cast_column('positive', datasets.Image())
        width = config.model.embed_dim
        linear = torch.nn.Identity()
        tower = Transformer(f'{out}/tower', module_output_name='sentence_embedding', modality_config={
            'image': {'method': 'forward', 'method_output_name': 'pooler_output'}})
        text.append(Dense(llm.get_embedding_dimension(), width, activation_function=linear))
        image = [tower, Dense(tower.get_embedding_dimension(), width, activation_function=linear)]
        model = SentenceTransformer(modules=[Router({'text': text, 'image': image})], device='cpu')
        options = {'lr_scheduler_type': 'cosine', 'batch_sampler': BatchSamplers.BATCH_SAMPLER,
                   # autocast joins the LLM and its projection
                   'bf16': STAGE1.text_encoder.dtype == 'bfloat16',
                   'router_mapping': {'anchor': 'text', 'positive': 'image'}}
        # The library's default scale.  Images are trained in both directions, as by the other programs.
        loss_options = {'scale': 20.0, 'directions': ('query_to_doc', 'doc_to_query'),
                        'partition_mode': 'per_direction'}
    else:
        model = SentenceTransformer(modules=text, device='cpu')
    optimizer = config.optimizer
    beta1, beta2 = optimizer.get('betas', (0.9, 0.999))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder, max_steps=int(steps), per_device_train_batch_size=config.global_train_batch_size,
        seed=SEED, learning_rate=optimizer['lr'], weight_decay=optimizer['weight_decay'], adam_beta1=beta1,
        adam_beta2=beta2, warmup_steps=min(int(config.scheduler['t_warmup'].removesuffix('ba')),
                                           int(steps) // 2),
        max_grad_norm=config.algorithms['gradient_clipping']['clipping_threshold'], use_cpu=True,
        save_strategy='no', dataloader_num_workers=config.train_data.num_workers, report_to='none', **options)
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, callbacks=[StepLog(Path(folder, 'steps.txt'))], train_dataset=data,
        loss=getattr(losses, loss)(model, **loss_options))
    trainer.train()
    llm.model = llm.model.float().merge_and_unload()  # sentence-transformers saves no adapter inside a Router
    model.save_pretrained(f'{folder}/final')


def training_pairs(task: str, out: str) -> datasets.Dataset:
    draw = random.Random(SEED)
    anchors: list[str] = []
    positives: list[str] = []
    for sample in read_samples(RUN / 'data/train'):
        captions = captions_of(sample)
        if task == 'images':
            anchors += captions
            positives += [f'{out}/images/{sample[SAMPLE_ID]}'] * len(captions)
        else:
            anchor, positive = draw.sample(captions, 2) if task == 'captions' else captions[:1] * 2
            anchors.append(anchor)
            positives.append(positive)
    return datasets.Dataset.from_dict({'anchor': anchors, 'positive': positives})


def score(task: str, folder: str, dataset: str, file: str) -> None:
    model = SentenceTransformer(folder, device='cpu')
    samples = read_samples(dataset)
    captions = [captions_of(sample) for sample in samples]
    if task == 'images':
        images: list[Any] = [Image.open(io.BytesIO(sample[IMAGE])).convert('RGB') for sample in samples]
        texts = list(itertools.chain.from_iterable(captions))
        image_features = model.encode(images, convert_to_tensor=True, normalize_embeddings=True)
        text_features = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
        scores = recalls_of(image_features, text_features, captions)
    else:
        pairs = [texts[:2] for texts in captions if len(texts) > 1]
        first = model.encode([pair[0] for pair in pairs], convert_to_tensor=True)
        second = model.encode([pair[1] for pair in pairs], convert_to_tensor=True)
        scores = {'cra': caption_retrieval_accuracy(first, second)}
    Path(file).write_text(json.dumps(scores))


if __name__ == '__main__':
    {'base': base, 'train': train, 'score': score}[sys.argv[1]](*sys.argv[2:])
