# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What claims consist of: variants of one training, each trained with several seeds, measured on the same tests."""

from typing import NamedTuple, Optional


class Step(NamedTuple):
    """Something that has to be made before a variant can be trained."""

    file: str
    """It is there when the step is done."""
    script: str
    arguments: tuple[str, ...]


class Variant(NamedTuple):
    """A training of stage 2 that differs from the first variant in one thing."""

    train: tuple[str, ...] = ()
    """What differs, as overrides."""
    encoder: tuple[str, ...] = ()
    """Keys below `models.<name>` that tell `evaluate` of a teacher which the training's configuration does not name."""
    needs: tuple[Step, ...] = ()
    clip_text_tower: bool = False
    """In place of the teacher, a text tower is trained from scratch."""
    results: Optional[str] = None
    """Nothing is trained: `results.json` of what the others begin with, which one of their `needs` writes."""
    also: dict[str, tuple[str, ...]] = {}
    """Further variants of the same training: name -> keys below `models.<name>` that tell `evaluate` of them."""


class Claim(NamedTuple):
    """The first variant is what the paper says is best."""

    statement: str
    paper: str
    variants: tuple[str, ...]
    tests: tuple[str, ...]
    """Names of those of the suite on which the variants are compared."""


class Suite(NamedTuple):
    """Claims on one kind of data."""

    folder: str
    """Where everything goes."""
    made_first: str
    """What `make` has to make before."""
    train: tuple[str, ...]
    """YAML files of the training that is varied."""
    evaluate: str
    """YAML file with the evaluation sets."""
    seeds: tuple[int, ...]
    variants: dict[str, Variant]
    tests: dict[str, tuple[str, ...]]
    """Name -> evaluation sets whose mean is compared."""
    claims: tuple[Claim, ...]
    plane: Optional[tuple[str, str]] = None
    """Two tests, for a picture of the first claim's variants that has one along either axis."""

    @property
    def measured(self) -> list[str]:
        """All that numbers are found for."""
        return [row for name, variant in self.variants.items() for row in (name, *variant.also)]


def extraction(out: str, datasets: dict[str, str], *teacher: str) -> Step:
    """Sidecars of datasets, name -> folder, by the teacher that the arguments describe."""
    return Step(f'{out}/config.yaml', 'recipes/extract_embeddings.py', (
        *teacher, f'out={out}', 'batch_tokens=1024', 'precision=${if_bf16:amp_bf16,fp32}',
        *(f'datasets.{name}.local={folder}' for name, folder in datasets.items())))
