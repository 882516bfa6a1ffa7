# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What the configuration of a recipe says about its run: what it writes, and how it resumes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Optional

from llm2clip.config.ranges import Text


@dataclass(frozen=True)
class Output:
    """Folder that a recipe writes, and that only one process at a time may write."""

    folder: str
    recipe: Optional[str] = None
    """Name of the recipe that the folder belongs to.  Unset: the recipe that runs."""
    names: Optional[Sequence[str]] = None
    """Files that the recipe writes.  Unset: all in the folder."""
    part: Optional[int] = None
    """Index of this process among those that share the folder.  Unset: there are no others."""
    is_replaced: bool = False
    """The recipe replaces the folder as a whole, instead of adding files over time."""


@dataclass
class RecipeConfig:
    """Settings of every recipe.  By default, it is one process that begins again after a stop."""

    output_key: ClassVar[str] = 'out'
    """Key of the folder that the recipe writes."""
    records_duration: ClassVar[bool] = True
    """Whether the recipe adds its duration to seconds.json in its output folder."""
    resumes: ClassVar[bool] = False
    """Whether the same command keeps what a stopped one has finished."""
    repeats: ClassVar[bool] = False
    """Whether the same command does everything again when all is finished, in minutes."""
    uses_ranks: ClassVar[bool] = False
    """Whether Composer's launcher may start several processes of the recipe."""
    plan = False
    """Whether the recipe only prints a plan; a setting of `PlanConfig`."""
    places = dict[str, str]()
    """Key -> file and line that set it, or the command line."""
    modules: list[Text] = field(default_factory=list, kw_only=True)
    """Python modules of yours to import first, from the Python path or the current folder, such as one that
    registers a vision tower with timm."""

    @property
    def output_folder(self) -> str:
        """Folder that the recipe writes."""
        return getattr(self, self.output_key)

    def outputs(self) -> list[Output]:
        """Return the folders to lock while the recipe runs."""
        return [Output(self.output_folder)]

    def resume_hint(self) -> str:
        """Return how the same command resumes after a stop; empty if it begins again."""
        return 'the same command resumes with what is missing' if self.resumes else ''

    def check(self) -> None:
        """Raise a ConfigError if settings conflict."""
