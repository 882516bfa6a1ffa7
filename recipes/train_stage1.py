# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Caption-contrastive fine-tuning: composer [-n N] recipes/train_stage1.py yamls/stage1/….yaml [key=value …]"""

from pathlib import Path

from llm2clip.command import run_command
from llm2clip.config import Stage1Config


def main(config: Stage1Config) -> None:
    if config.plan:
        from llm2clip.planning.plan import plan_run, plan_stage1
        plan_run(config, plan_stage1)
        return

    from composer import Evaluator
    from composer.utils import dist, get_device, reproducibility

    from llm2clip.data.caption_pairs import build_caption_pair_loader
    from llm2clip.data.masked_texts import build_masked_text_loader
    from llm2clip.folders import check_replaceable
    from llm2clip.models.caption_contrastive import CaptionContrastive
    from llm2clip.models.mntp import MaskedNextTokenPrediction
    from llm2clip.teacher.folder import ADAPTER_KIND, ENCODER_FILE, KIND, save_teacher
    from llm2clip.teacher.llm import add_lora, load_llm, load_llm_and_head
    from llm2clip.teacher.text_encoder import TextEncoder, load_caption_tokenizer
    from llm2clip.training.trainer import build_optimizer, build_trainer, check_train_config, fit

    if Path(config.teacher_folder, ENCODER_FILE).is_file():
        print(f'{config.teacher_folder} is complete')
        return
    check_replaceable(config.teacher_folder, KIND)
    check_replaceable(config.adapter_folder, ADAPTER_KIND)
    dist.initialize_dist(get_device(config.device), config.dist_timeout)
    check_train_config(config)
    tokenizer = load_caption_tokenizer(config.text_encoder)
    reproducibility.seed_all(config.seed)
    on_meta = config.fsdp is not None and dist.get_global_rank() > 0
    evaluators = []
    if config.objective == 'mntp':
        train_data = build_masked_text_loader(
            config.train_data, tokenizer, config.mntp, config.global_train_batch_size, config.seed, 'train_data')
        llm, head = load_llm_and_head(config.text_encoder, on_meta)
        encoder = TextEncoder(add_lora(llm, config.lora), config.text_encoder)
        model = MaskedNextTokenPrediction(encoder, head)
    else:
        train_data = build_caption_pair_loader(
            config.train_data, tokenizer, config.global_train_batch_size, config.seed, True, 'train_data')
        if config.eval_data is not None:
            eval_data = build_caption_pair_loader(
                config.eval_data, tokenizer, config.global_eval_batch_size, config.seed, False, 'eval_data')
            evaluators.append(Evaluator(label='eval', dataloader=eval_data))
        encoder = TextEncoder(add_lora(load_llm(config.text_encoder, on_meta), config.lora), config.text_encoder)
        model = CaptionContrastive(
            encoder, config.loss_scale, config.learn_scale, config.symmetric, config.mask_equal_texts)
    trainer = build_trainer(config, model, build_optimizer(config.optimizer, model), train_data, evaluators)
    fit(trainer)
    trainer.close()
    save_teacher(encoder, tokenizer, config.lora, config.teacher_folder, config.adapter_folder)
    if dist.get_global_rank() == 0:
        print(f'wrote the teacher to {config.teacher_folder} and its adapter to {config.adapter_folder}', flush=True)


if __name__ == '__main__':
    run_command(Stage1Config, main)
