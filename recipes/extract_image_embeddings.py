# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Embed images with a frozen vision tower:
python recipes/extract_image_embeddings.py yamls/custom_data/steps.yaml"""

from llm2clip.command import run_command
from llm2clip.config import ExtractImagesConfig


def main(config: ExtractImagesConfig) -> None:
    if config.plan:
        from llm2clip.planning.planners import plan_run
        plan_run(config)
        return
    from functools import partial

    from llm2clip.models.frozen_tower import load_frozen_tower
    from llm2clip.teacher.extraction import run_extraction

    run_extraction(config, partial(load_frozen_tower, config), 8 * config.batch_size, of_images=True,
                   settings={'precision': config.precision})


if __name__ == '__main__':
    run_command(ExtractImagesConfig, main)
