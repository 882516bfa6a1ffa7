# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Post-training of a vision tower: composer [-n N] recipes/train_stage2.py yamls/stage2/….yaml [key=value …]"""

from llm2clip.command import run_command
from llm2clip.config import ConfigError, Stage2Config


def main(config: Stage2Config) -> None:
    if config.plan:
        from llm2clip.planning.plan import plan_run, plan_stage2
        plan_run(config, plan_stage2)
        return

    from composer import Evaluator
    from composer.utils import dist, get_device, reproducibility

    from llm2clip.data.image_embeddings import build_image_loader, check_same_teacher, sidecar_teacher
    from llm2clip.imports.initial import load_initial_weights
    from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
    from llm2clip.models.towers import tower_preprocessing
    from llm2clip.teacher.caption_teacher import teacher_fingerprint
    from llm2clip.training.algorithms.online_teacher import load_online_teacher
    from llm2clip.training.runs import save_teacher_fingerprint
    from llm2clip.training.trainer import build_optimizer, build_trainer, check_train_config, fit

    dist.initialize_dist(get_device(config.device), config.dist_timeout)
    check_train_config(config)
    preprocessing = tower_preprocessing(config.model.vision)
    online = config.online.enabled
    train_data = build_image_loader(config.train_data, preprocessing, config.global_train_batch_size, config.seed, True,
                                    'train_data', online=online)
    evaluators = []
    if config.eval_data is not None:
        eval_data = build_image_loader(config.eval_data, preprocessing, config.global_eval_batch_size, config.seed,
                                       False, 'eval_data', online=online)
        evaluators.append(Evaluator(label='eval', dataloader=eval_data))
    algorithms = []
    if online:
        if config.teacher is None:
            raise ConfigError('teacher: required but not set, since online.enabled is true')
        in_the_loop = load_online_teacher(config.teacher, get_device(config.device), config.online.batch_tokens,
                                          config.online.precision, config.online.sharded)
        algorithms.append(in_the_loop)
        teacher, llm_embed_dim = teacher_fingerprint(config.teacher), in_the_loop.encoder.llm_embed_dim
    else:
        teacher, llm_embed_dim = sidecar_teacher(train_data)
        if config.teacher is not None:
            check_same_teacher(teacher, teacher_fingerprint(config.teacher), 'the sidecar of train_data',
                               config.teacher)
        for evaluator in evaluators:
            check_same_teacher(sidecar_teacher(evaluator.dataloader)[0], teacher, 'eval_data', 'train_data')
    if dist.get_global_rank() == 0:
        save_teacher_fingerprint(teacher, llm_embed_dim, config.save_folder)
    reproducibility.seed_all(config.seed)
    towers = LLM2CLIP(config.model, llm_embed_dim, load_weights=config.initial_weights is None)
    if config.initial_weights is not None:
        load_initial_weights(towers, config.model, teacher, config.initial_weights)
    model = ComposerLLM2CLIP(towers, config.loss)
    optimizer = build_optimizer(config.optimizer, model, config.lr_scale, config.layer_decay)
    trainer = build_trainer(config, model, optimizer, train_data, evaluators, algorithms)
    fit(trainer)
    trainer.close()
    if dist.get_global_rank() == 0:
        print(f'wrote the model to {config.checkpoint_folder}', flush=True)


if __name__ == '__main__':
    run_command(Stage2Config, main)
