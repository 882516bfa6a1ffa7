# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Near-copies within training data, and of evaluation sets' images:
python recipes/find_duplicates.py yamls/own/duplicates.yaml [key=value …]"""

from pathlib import Path
from typing import Any

from llm2clip.command import run_command
from llm2clip.config import DuplicatesConfig
from llm2clip.config.files import save_config


def main(config: DuplicatesConfig) -> None:
    from llm2clip.device import open_device
    from llm2clip.evaluation.duplicates import DUPLICATES_FILE, find_near_copies, write_near_copies
    from llm2clip.evaluation.duplicates_page import write_duplicates_page
    from llm2clip.evaluation.image_blocks import dataset_images, evaluation_images, hash_blocks, keep_features
    from llm2clip.evaluation.models import check_evaluated_model, load_evaluated_model

    if config.model is not None:
        check_evaluated_model(config.model, 'model')
    training = [dataset_images(name, dataset) for name, dataset in config.datasets.items()]
    sets, kept = evaluation_images(config), Path(config.out, 'images')
    hash_blocks([block for one in (*training, *sets) for block in one.blocks], kept, config.num_workers)
    features: dict[str, Any] = {}
    if config.model is not None:
        model = load_evaluated_model(config.model, kept / 'texts', open_device(config.device), 'model')
        name = keep_features([*training, *sets], kept, model, config.batch_size, config.num_workers)
        features = {'features': name, 'min_cosine': config.min_cosine, 'device': model.device}
    found = find_near_copies(training, sets, kept, config.max_distance, config.parts, **features,
                             num_workers=config.num_workers)
    found_by = {'max_distance': config.max_distance, 'parts': config.parts, 'min_cosine': features.get('min_cosine')}
    write_duplicates_page(found, training, sets, config.shown, Path(config.out, 'report.html'))
    write_near_copies(found, training, sets, found_by, config.out)
    save_config(config, config.out)
    print(f'{len(found.groups):,} groups of near-copies; {len(found.nearest):,} images of evaluation sets have one in '
          f'training; wrote {DUPLICATES_FILE} and report.html to {config.out}')


if __name__ == '__main__':
    run_command(DuplicatesConfig, main)
