# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What the configuration of a recipe says about its run: what it writes, and how it resumes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Optional


@dataclass(frozen=True)
class Output:
    """Folder that a recipe writes, and that only one process at a time may write."""

    folder: str
    recipe: Optional[str] = None
    """Name of the recipe that the folder belongs to.  Unset: the recipe that runs."""
    names: Optional[Sequence[str]] = None
    """Files that the recipe writes.  Unset: all in the folder."""
    part: int = 0
    """Index of this process among those that share the folder."""
    is_replaced: bool = False
    """The recipe replaces the folder as a whole, instead of adding files over time."""


class RecipeConfig:
    """Configuration of a recipe; by default, of one process that begins again after a stop."""

    output_key: ClassVar[str] = 'out'
    """Key of the folder that the recipe writes."""
    records_duration: ClassVar[bool] = True
    """Whether the recipe adds its duration to seconds.json in its output folder."""
    resumes: ClassVar[bool] = False
    """Whether the same command keeps what a stopped one has finished."""
    uses_ranks: ClassVar[bool] = False
    """Whether Composer's launcher may start several processes of the recipe."""
    plan = False
    """Whether the recipe only prints a plan; a setting of `PlanConfig`."""

    @property
    def destination(self) -> str:
        """Where the results go, in words."""
        return 'a plan' if self.plan else getattr(self, self.output_key)

    def outputs(self) -> list[Output]:
        """Return the folders to lock while the recipe runs."""
        return [] if self.plan else [Output(getattr(self, self.output_key))]

    def step_folder(self) -> Optional[str]:
        """Return the folder in which the duration is recorded; None if it is not."""
        if self.plan or not self.records_duration:
            return None
        return getattr(self, self.output_key)

    def resume_hint(self) -> str:
        """Return how the same command resumes after a stop; empty if it begins again."""
        if self.plan or not self.resumes:
            return ''
        return 'the same command resumes with what is missing'

    def check(self) -> None:
        """Raise a ConfigError if settings conflict."""

    def check_resumed_run(self) -> None:
        """Raise a ConfigError if the recipe would resume a run that was begun with other settings."""
