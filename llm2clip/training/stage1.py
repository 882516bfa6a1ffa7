# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 1: fine-tune the LLM into a text encoder (LLM2CLIP section 3.1)."""

from pathlib import Path
from typing import Any, Union

from composer import Evaluator
from composer.utils import reproducibility

from llm2clip.config import CaptionDataConfig, Stage1Config
from llm2clip.data.caption_pair_dataset import build_caption_pair_loader, drop_single_captions, stream_pairs
from llm2clip.data.masked_text_dataset import build_masked_text_loader
from llm2clip.errors import ConfigError, under
from llm2clip.modeling.text_encoder import CaptionTokenizer, TextEncoder
from llm2clip.models.caption_contrastive import CaptionContrastive
from llm2clip.models.masked_next_token import MaskedNextTokenPrediction
from llm2clip.ranks import is_first
from llm2clip.teacher.llm import (
    ENCODER_FILE,
    KIND,
    LORA_KIND,
    add_lora,
    build_text_encoder,
    load_caption_tokenizer,
    load_llm_and_head,
    save_teacher,
    set_attention_dropout,
)
from llm2clip.training.callbacks.monitors import TextMonitor
from llm2clip.training.config_checks import check_metrics, evaluated_metrics
from llm2clip.training.run_folder import is_complete
from llm2clip.training.trainer import Parts, initialize, run_training

Model = Union[CaptionContrastive, MaskedNextTokenPrediction]


def train(config: Stage1Config) -> None:
    """Train or resume a run, and write the teacher and its LoRA weights; a no-op after `max_duration`."""
    results = {Path(config.teacher_folder): KIND, Path(config.lora_folder): LORA_KIND}
    initialize(config, results)
    if is_complete(config, Path(config.teacher_folder, ENCODER_FILE)):
        return
    tokenizer = load_caption_tokenizer(config.text_encoder)
    parts = make_parts(config, tokenizer)
    encoder: Any = parts.model.text_encoder  # the trainer may wrap the model
    run_training(config, parts, results)
    save_teacher(encoder, tokenizer, config.lora, config.teacher_folder, config.lora_folder)
    if is_first():
        print(f'wrote the teacher to {config.teacher_folder} and its LoRA weights to {config.lora_folder}',
              flush=True)


def make_model(config: Stage1Config, on_meta: bool = False) -> Model:
    """Build the LLM with new LoRA weights and the configured objective.

    With `on_meta`, the LLM's weights are on the meta device, as on all ranks but the first under FSDP.
    """
    if config.objective == 'mntp':
        llm, head = load_llm_and_head(config.text_encoder, on_meta)
        with under('lora'):
            encoder = TextEncoder(add_lora(llm, config.lora), config.text_encoder)
        return MaskedNextTokenPrediction(encoder, head)
    encoder = build_text_encoder(config.text_encoder, config.lora, on_meta)
    set_attention_dropout(encoder.llm, config.attention_dropout)
    return CaptionContrastive(encoder, config.logit_scale, config.learn_logit_scale, config.symmetric,
                              config.mask_equal_texts)


def make_parts(config: Stage1Config, tokenizer: CaptionTokenizer) -> Parts:
    """Open the data and build the model; call `initialize` before."""
    reproducibility.seed_all(config.seed)
    batch = config.global_train_batch_size
    evaluators = []
    if config.objective == 'mntp':
        with under('train_data'):
            data = build_masked_text_loader(config.train_data, tokenizer, config.mntp, batch, config.seed,
                                            config.device_train_microbatch_tokens)
    else:
        _check_dropout(config.train_data, config.attention_dropout, config.lora.lora_dropout)
        with under('train_data'):
            data = build_caption_pair_loader(
                config.train_data, tokenizer, batch, config.seed, train=True,
                microbatch_tokens=config.device_train_microbatch_tokens)
        with under('eval_data'):
            eval_data = config.eval_data and drop_single_captions(config.eval_data)
            loader = eval_data and build_caption_pair_loader(
                eval_data, tokenizer, config.global_eval_batch_size, config.seed, train=False)
        if loader is not None:
            evaluators.append(Evaluator(label='eval', metric_names=[*CaptionContrastive.metrics],
                                        dataloader=loader))
    check_metrics(config, evaluated_metrics(evaluators))
    model = make_model(config, on_meta=config.fsdp is not None and not is_first())
    monitor = TextMonitor(config.text_encoder.max_length)
    return Parts(model, data, evaluators, callbacks=[monitor])


def _check_dropout(data: CaptionDataConfig, attention_dropout: float, lora_dropout: float) -> None:
    """Report pairs of a caption with itself; a ConfigError if no dropout makes their two vectors differ."""
    with under('train_data'):
        all_pairs = stream_pairs(data, train=True)
    for name, pairs in all_pairs.items():
        if any(pair.positive is None for pair in pairs):
            reason = (f'a caption of train_data.streams.{name} is paired with itself, and dropout makes two '
                      'vectors of it')
            if not attention_dropout and not lora_dropout:
                raise ConfigError(f'0, expected more, such as 0.1: {reason}', key='attention_dropout')
            if is_first():
                print(f'{reason} (unsupervised SimCSE)', flush=True)
