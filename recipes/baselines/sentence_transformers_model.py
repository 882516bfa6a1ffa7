# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Models of sentence-transformers on Flickr8k, as commands of this module.

    base OUT                          write SmolLM2-135M to OUT/llm and the image tower to OUT/tower, as folders
    train TASK OUT FOLDER STEPS LOSS  train from them, and save the model in FOLDER/final
    score TASK FOLDER DATASET FILE    write a model's accuracies in % to FILE

TASK is `captions` (two captions of an image are a pair), `simcse` (a caption and itself, told apart by dropout, as in
the third step of LLM2Vec), or `images` (a caption and its image).
"""

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
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
from llm2clip.config.files import load_config
from llm2clip.data.schema import CAPTION, IMAGE, SAMPLE_ID, read_samples
from llm2clip.metrics.retrieval import caption_retrieval_accuracy, rank_both_ways
from llm2clip.models.towers import load_tower, tower_preprocessing
from llm2clip.teacher.llm import load_caption_tokenizer, load_llm
from recipes.baselines.run import RUN, SEED, SIZE

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


def captions_of(sample: dict[str, Any]) -> list[str]:
    return [text for key, text in sorted(sample.items()) if key.startswith(CAPTION) and text]


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
    tower = TimmWrapperModel(TimmWrapperConfig.from_dict({'architecture': vision.name, 'num_classes': 0,
                                                          'num_features': 1280, 'pretrained_cfg': {
        'architecture': vision.name, 'input_size': [3, SIZE, SIZE], 'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': pixels['mean'], 'std': pixels['std']}}))
    tower.timm_model.load_state_dict(load_tower(vision).trunk.state_dict())
    tower.save_pretrained(f'{out}/tower')


def language_model(out: str, dropout: float) -> Any:
    """Return the causal LLM with LoRA."""
    encoder = STAGE1.text_encoder
    llm: Any = Transformer(f'{out}/llm', max_seq_length=encoder.max_length, model_kwargs={
        'dtype': getattr(torch, encoder.dtype), 'attn_implementation': encoder.attn_implementation})
    # The GGUF tokenizer prepends a token, which would enter the mean; accuracy is better without it.
    llm.tokenizer.add_bos_token = False
    settings: Any = {**asdict(STAGE1.lora), 'target_modules': PROJECTIONS, 'lora_dropout': dropout}
    llm.model = get_peft_model(llm.model, LoraConfig(bias='none', **settings))
    for parameter in filter(lambda one: one.requires_grad, llm.parameters()):
        parameter.data = parameter.data.float()  # LoRA weights are float32 in peft and LLM2CLIP, too
    return llm


def train(task: str, out: str, folder: str, steps: str, loss: str) -> None:
    set_seed(SEED)  # the trainer sets the seed only after LoRA is initialised
    config = STAGE2 if task == 'images' else STAGE1
    llm = language_model(out, 0.3 if task == 'simcse' else 0.0)
    text = [llm, Pooling(llm.get_embedding_dimension(), 'mean')]
    if task == 'images':
        width, linear = STAGE2.model.embed_dim, torch.nn.Identity()
        tower = Transformer(f'{out}/tower', module_output_name='sentence_embedding', modality_config={
            'image': {'method': 'forward', 'method_output_name': 'pooler_output'}})
        text.append(Dense(llm.get_embedding_dimension(), width, activation_function=linear))
        image = [tower, Dense(tower.get_embedding_dimension(), width, activation_function=linear)]
        model = SentenceTransformer(modules=[Router({'text': text, 'image': image})], device='cpu')
    else:
        model = SentenceTransformer(modules=text, device='cpu')
    draw = random.Random(SEED)

    def pairs_of(sample: dict[str, Any]) -> list[Any]:
        captions = captions_of(sample)
        if task == 'images':
            return [(caption, f'{out}/images/{sample[SAMPLE_ID]}') for caption in captions]
        return [draw.sample(captions, 2) if task == 'captions' else (captions[0], captions[0])]

    anchors, positives = zip(*(pair for sample in read_samples(RUN / 'data/train') for pair in pairs_of(sample)))
    data = datasets.Dataset.from_dict({'anchor': anchors, 'positive': positives})
    if task == 'images':
        data = data.cast_column('positive', datasets.Image())
    optimizer = config.optimizer
    beta1, beta2 = optimizer.get('betas', (0.9, 0.999))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder, max_steps=int(steps), per_device_train_batch_size=config.global_train_batch_size, seed=SEED,
        learning_rate=optimizer['lr'], weight_decay=optimizer['weight_decay'], adam_beta1=beta1, adam_beta2=beta2,
        lr_scheduler_type='cosine' if task == 'images' else 'linear',
        warmup_steps=min(int(config.scheduler['t_warmup'].removesuffix('ba')), int(steps) // 2),
        batch_sampler=BatchSamplers.BATCH_SAMPLER if task == 'images' else BatchSamplers.NO_DUPLICATES,
        max_grad_norm=config.algorithms['gradient_clipping']['clipping_threshold'], use_cpu=True, save_strategy='no',
        dataloader_num_workers=config.train_data.num_workers, report_to='none',
        bf16=task == 'images' and STAGE1.text_encoder.dtype == 'bfloat16',  # autocast joins the LLM and its projection
        router_mapping={'anchor': 'text', 'positive': 'image'} if task == 'images' else None)
    scale = STAGE1.logit_scale if task != 'images' else 20.0  # the library's default
    # Images are trained in both directions, as by the other programs.
    both: Any = {'directions': ('query_to_doc', 'doc_to_query'), 'partition_mode': 'per_direction'}
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, callbacks=[StepLog(Path(folder, 'steps.txt'))], train_dataset=data,
        loss=getattr(losses, loss)(model, scale=scale, **(both if task == 'images' else {})))
    trainer.train()
    llm.model = llm.model.float().merge_and_unload()  # sentence-transformers saves no adapter inside a Router
    model.save_pretrained(f'{folder}/final')


def score(task: str, folder: str, dataset: str, file: str) -> None:
    from PIL import Image

    model, samples = SentenceTransformer(folder, device='cpu'), list(read_samples(dataset))
    if task == 'images':
        import io
        captions = [captions_of(sample) for sample in samples]
        images = [Image.open(io.BytesIO(sample[IMAGE])).convert('RGB') for sample in samples]
        of_images, of_texts = (model.encode(list(inputs), convert_to_tensor=True, normalize_embeddings=True)
                               for inputs in (images, [text for own in captions for text in own]))
        image_of_text = torch.tensor([i for i, own in enumerate(captions) for _ in own])
        found = rank_both_ways(of_images, of_texts, image_of_text).recalls()
    else:
        pairs = [own[:2] for own in map(captions_of, samples) if len(own) > 1]
        first, second = (model.encode([pair[side] for pair in pairs], convert_to_tensor=True) for side in range(2))
        found = {'cra': caption_retrieval_accuracy(first, second)}
    Path(file).write_text(json.dumps(found))


if __name__ == '__main__':
    {'base': base, 'train': train, 'score': score}[sys.argv[1]](*sys.argv[2:])
