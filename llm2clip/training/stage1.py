# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 1, put together: the LLM is fine-tuned into a text encoder (LLM2CLIP section 3.1)."""

from pathlib import Path
from typing import Union

from composer import DataSpec, Evaluator, Trainer
from composer.utils import dist, reproducibility

from llm2clip.config import ConfigError, Stage1Config
from llm2clip.data.texts import build_caption_pair_loader, build_masked_text_loader, pairs_of_streams, with_two_captions
from llm2clip.folders import check_replaceable
from llm2clip.models.caption_contrastive import CRA_METRICS, CaptionContrastive
from llm2clip.models.mntp import MaskedNextTokenPrediction
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer, TextEncoder
from llm2clip.teacher.folder import ADAPTER_KIND, ENCODER_FILE, KIND, save_teacher
from llm2clip.teacher.llm import (
    add_lora,
    build_text_encoder,
    load_caption_tokenizer,
    load_llm_and_head,
    set_attention_dropout,
)
from llm2clip.training.resumption import is_complete, write_settings
from llm2clip.training.trainer import begin, build_optimizer, build_trainer, check_metrics, fit

__all__ = ['make_loaders', 'make_model', 'make_trainer', 'possible_metrics', 'train']

Model = Union[CaptionContrastive, MaskedNextTokenPrediction]


def make_loaders(config: Stage1Config, tokenizer: CaptionTokenizer) -> tuple[DataSpec, list[Evaluator]]:
    """The training data, and what is measured while training."""
    batch = config.global_train_batch_size
    if config.objective == 'mntp':
        return build_masked_text_loader(config.train_data, tokenizer, config.mntp, batch, config.seed, 'train_data'), []
    for name, pairs in zip(config.train_data.streams, pairs_of_streams(config.train_data, True, 'train_data')[0]):
        if any(pair.positive is None for pair in pairs):
            said = f'a caption of train_data.streams.{name} is paired with itself, and dropout makes two vectors of it'
            if not config.attention_dropout and not config.lora.lora_dropout:
                raise ConfigError(f'attention_dropout: 0, expected a value above 0, such as 0.1: {said}')
            if dist.get_global_rank() == 0:
                print(f'{said} (unsupervised SimCSE)', flush=True)
    data = build_caption_pair_loader(config.train_data, tokenizer, batch, config.seed, True, 'train_data')
    evaluated = None if config.eval_data is None else with_two_captions(config.eval_data, 'eval_data')
    if evaluated is None:
        return data, []
    eval_data = build_caption_pair_loader(
        evaluated, tokenizer, config.global_eval_batch_size, config.seed, False, 'eval_data')
    return data, [Evaluator(label='eval', dataloader=eval_data, metric_names=[*CRA_METRICS])]


def possible_metrics(config: Stage1Config) -> dict[str, list[str]]:
    """Label of each evaluator -> its metrics."""
    return {} if config.eval_data is None else {'eval': [*CRA_METRICS]}


def make_model(config: Stage1Config, on_meta: bool = False) -> Model:
    """The LLM with new LoRA weights, under the objective of the configuration.

    Args:
        config: The run's.
        on_meta: Leave the LLM without memory for its weights.  Under FSDP every rank but the first does so.
    """
    if config.objective == 'mntp':
        llm, head = load_llm_and_head(config.text_encoder, on_meta)
        return MaskedNextTokenPrediction(TextEncoder(add_lora(llm, config.lora), config.text_encoder), head)
    encoder = build_text_encoder(config.text_encoder, config.lora, on_meta)
    set_attention_dropout(encoder.llm, config.attention_dropout)
    return CaptionContrastive(encoder, config.loss_scale, config.learn_scale, config.symmetric, config.mask_equal_texts)


def make_trainer(config: Stage1Config, tokenizer: CaptionTokenizer) -> tuple[Trainer, Model]:
    """Everything that a run needs, and the model, which the trainer may have wrapped; `begin` comes before."""
    reproducibility.seed_all(config.seed)
    data, evaluators = make_loaders(config, tokenizer)
    check_metrics(config, possible_metrics(config) if evaluators else {})
    model = make_model(config, on_meta=config.fsdp is not None and dist.get_global_rank() > 0)
    return build_trainer(config, model, build_optimizer(config, model), data, evaluators), model


def train(config: Stage1Config) -> None:
    """Train, or go on where a run was stopped, and write the teacher and its adapter; a complete run is left as it is,
    unless it is to be longer.

    Raises:
        ConfigError: The configuration or the data is not what was expected, or a complete run had other settings.
    """
    results = {Path(config.teacher_folder): KIND, Path(config.adapter_folder): ADAPTER_KIND}
    for folder, kind in results.items():
        check_replaceable(folder, kind)
    begin(config)
    if is_complete(config, Path(config.teacher_folder, ENCODER_FILE)):
        if dist.get_global_rank() == 0:
            print(f'{config.teacher_folder} is complete')
        return
    tokenizer = load_caption_tokenizer(config.text_encoder)
    trainer, model = make_trainer(config, tokenizer)
    write_settings(config, trainer.state.timestamp, results)
    fit(trainer, config)
    trainer.close()
    save_teacher(model.text_encoder, tokenizer, config.lora, config.teacher_folder, config.adapter_folder)
    if dist.get_global_rank() == 0:
        print(f'wrote the teacher to {config.teacher_folder} and its adapter to {config.adapter_folder}', flush=True)
