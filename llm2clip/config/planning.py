# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What a plan takes for granted."""

from dataclasses import dataclass
from typing import Annotated, Literal, Optional

from pydantic import Field

from llm2clip.config.ranges import Count, Positive, SampleCount, Text

__all__ = ['PlanConfig']


@dataclass
class PlanConfig:
    """What a run would need and what would go wrong: said in place of running it, on any machine, without GPU."""

    plan: bool = False
    """Print it, from the datasets' indexes and a dry run of a step, and stop."""
    plan_ranks: Optional[Count] = None
    """GPUs to plan for.  Unset: as many as the launcher starts."""
    plan_samples: Optional[SampleCount] = None
    """Samples per epoch, or to embed, for data that is not there yet; no dataset is then looked at."""
    plan_tokens: Optional[Count] = None
    """Mean number of tokens of a text, template included, for time and price.  Unset: estimated from the first shard
    that is there, by four characters per token, or else the longest that the encoder reads."""
    plan_llm: Optional[Text] = None
    """Folder with the `config.json` of the LLM, or of the one that the teacher will be: a plan then needs neither the
    network nor the teacher."""
    plan_gpu: Literal['A100', 'H100', 'H200', 'B200'] = 'H100'
    """GPU that the step has to fit."""
    plan_mfu: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of a GPU's peak at which the FLOPs of a step, recomputation included, are taken to be computed."""
    plan_price: Optional[Positive] = None
    """Price of one GPU-hour, in any currency."""
