# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What ablations consist of: variants of one training, each with several seeds, that are measured on the same tests."""

from typing import NamedTuple, Optional

__all__ = ['Ablation', 'Step', 'Suite', 'Variant', 'clip_text_tower', 'extraction']


class Step(NamedTuple):
    """Something that has to be made before a variant can be trained."""

    file: str
    """It is there when the step is done."""
    command: tuple[str, ...]
    """Arguments of Python."""


class Variant(NamedTuple):
    """A training that differs from the first variant in one thing."""

    train: tuple[str, ...] = ()
    """What differs, as overrides."""
    encoder: tuple[str, ...] = ()
    """Keys below `models.<name>` that tell `evaluate` of a teacher which the training's configuration does not name."""
    needs: tuple[Step, ...] = ()
    warm_start: tuple[str, ...] = ()
    """Of stage 1: overrides of a training before it, whose adapter is merged."""
    results: Optional[str] = None
    """Nothing is trained: `results.json` of what the others begin with, which one of their `needs` writes."""
    also: dict[str, tuple[str, ...]] = {}
    """Further variants of the same training: name -> keys below `models.<name>` that tell `evaluate` of them."""


class Ablation(NamedTuple):
    """Variants that are compared; the first is what the paper says is best."""

    statement: str
    paper: str
    variants: tuple[str, ...]
    tests: tuple[str, ...]
    """Names of those of the suite on which the variants are compared."""


class Suite(NamedTuple):
    """Ablations on one kind of data."""

    folder: str
    """Where everything goes."""
    made_first: str
    """What `make` has to make before."""
    train: tuple[str, ...]
    """YAML files and overrides of the training that is varied."""
    variants: dict[str, Variant]
    tests: dict[str, tuple[str, ...]]
    """Name -> evaluation sets whose mean is compared."""
    ablations: tuple[Ablation, ...]
    evaluate: Optional[str] = None
    """YAML file with the evaluation sets of stage 2; without one, stage 1 is trained."""
    captions: dict[str, str] = {}
    """Evaluation sets of stage 1: datasets whose first two captions of an image should find each other."""
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def measured(self) -> list[str]:
        """All that numbers are found for."""
        return [row for name, variant in self.variants.items() for row in (name, *variant.also)]


def extraction(out: str, datasets: dict[str, str], *teacher: str) -> Step:
    """Text embeddings of datasets, name -> folder, by the teacher that the arguments describe."""
    return Step(f'{out}/config.yaml', (
        'recipes/extract_embeddings.py', *teacher, f'out={out}', 'batch_tokens=1024',
        'precision=${if_bf16:amp_bf16,fp32}',
        *(f'datasets.{name}.local={folder}' for name, folder in datasets.items())))


def clip_text_tower(folder: str) -> tuple[Step, tuple[str, ...]]:
    """CLIP's own text tower, trained from scratch in place of the LLM: its tokenizer in a folder, and the overrides.

    It has CLIP's architecture (causal transformer, end-of-text pooling, linear projection), 6 layers of width 256, and
    the tokenizer of SmolLM2, whose `<|endoftext|>` is 0.
    """
    architecture = ('{model_type: clip_text_model, vocab_size: 49152, hidden_size: 256, intermediate_size: 1024, '
                    'num_hidden_layers: 6, num_attention_heads: 4, max_position_embeddings: 64, '
                    "projection_dim: '${model.embed_dim}', bos_token_id: 0, eos_token_id: 0, pad_token_id: 0}")
    return (Step(f'{folder}/tokenizer.json', ('-m', 'recipes.ablations.make_data', 'clip_tokenizer', folder)),
            ('teacher=null', 'model.adapter.name=identity',
             f'trainable_text.clip={{name: {folder}, pretrained: false, architecture: {architecture}}}'))
