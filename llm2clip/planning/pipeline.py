# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Plans of several recipes, which run one after another, and their sum."""

import dataclasses
from typing import Any

from llm2clip.config import (
    ExtractConfig,
    ExtractImagesConfig,
    InheritanceConfig,
    PipelineConfig,
    Stage1Config,
    Stage2Config,
)
from llm2clip.config.loading import load_config
from llm2clip.errors import ConfigError
from llm2clip.planning.dry_run import fake_ranks
from llm2clip.planning.plan import Plan, sum_of
from llm2clip.planning.planners import make_plan

_SCHEMAS: dict[str, Any] = {
    'train_stage1': Stage1Config, 'extract_embeddings': ExtractConfig,
    'extract_image_embeddings': ExtractImagesConfig, 'train_inheritance': InheritanceConfig,
    'train_stage2': Stage2Config}


def plan_pipeline(config: PipelineConfig) -> None:
    """Print the plan of each step, and then the sum.

    Raises:
        ConfigError: A step is no recipe that can be planned, or its configuration is invalid.
        SystemExit: With status 1 if something will stop a step.
    """
    steps: dict[str, Any] = {}
    for recipe, arguments in config.steps.items():
        if recipe not in _SCHEMAS:
            raise ConfigError(f'expected one of {", ".join(_SCHEMAS)}', key=f'steps.{recipe}')
        try:
            step = load_config(_SCHEMAS[recipe], arguments)
        except ConfigError as error:
            error.add_note(f'in steps.{recipe}')
            raise
        shared: dict[str, Any] = {}  # keys of the plan that are set for all steps
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if value != field.default and hasattr(step, field.name):
                shared[field.name] = value
        steps[recipe] = dataclasses.replace(step, **shared)
    plans: dict[str, Plan] = {}
    with fake_ranks(config.plan_ranks):
        for recipe, step in steps.items():
            plans[recipe] = make_plan(step)
            print(f'{recipe}\n{plans[recipe]}\n', flush=True)
    if any(plan.errors for plan in plans.values()):
        raise SystemExit(1)
    print(sum_of(plans))
