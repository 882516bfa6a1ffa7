# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Building blocks of ablations: variants of one training, with several seeds each,
evaluated on the same tests."""

from typing import NamedTuple, Optional


class Step(NamedTuple):
    """Prerequisite of a variant."""

    file: str
    """It exists when the step is done."""
    command: tuple[str, ...]
    """Arguments of the Python interpreter."""


class Variant(NamedTuple):
    """Training that differs from the first variant in one respect."""

    train: tuple[str, ...] = ()
    """Overrides of the training."""
    encoder: tuple[str, ...] = ()
    """Keys below `models.<name>` with the teacher for `evaluate`, if the training's configuration has
    none."""
    needs: tuple[Step, ...] = ()
    warm_start: tuple[str, ...] = ()
    """Stage 1 only: overrides of a preceding training.  The variant starts with its LoRA weights merged."""
    run: Optional[str] = None
    """If set, nothing is trained, and this run, which one of the `needs` has trained, is evaluated."""
    also: dict[str, tuple[str, ...]] = {}
    """Further evaluations of the same training: name -> keys below `models.<name>` for `evaluate`."""


class Ablation(NamedTuple):
    """Comparison of variants; the first is the best one according to the paper."""

    statement: str
    paper: str
    variants: tuple[str, ...]


class Suite(NamedTuple):
    """Ablations on one kind of data."""

    folder: str
    """Output folder."""
    made_first: str
    """Target that `make` builds first."""
    train: tuple[str, ...]
    """YAML files and overrides that all variants share."""
    variants: dict[str, Variant]
    tests: dict[str, str]
    """Name -> evaluation set on which variants are compared."""
    ablations: tuple[Ablation, ...]
    evaluate: str = ''
    """YAML file with the evaluation sets of stage 2; without one, stage 1 is trained."""
    captions: str = ''
    """Evaluation set `test` of stage 1, a dataset in which the first two captions of an image should retrieve
    each other."""


def extraction(out: str, datasets: dict[str, str], *teacher: str) -> Step:
    """Return the step that embeds datasets (name -> folder) with the teacher that the arguments describe."""
    return Step(f'{out}/config.yaml', (
        'recipes/extract_embeddings.py', *teacher, f'out={out}', 'batch_tokens=1024',
        'precision=${if_bf16:amp_bf16,fp32}',
        *(f'datasets.{name}.local={folder}' for name, folder in datasets.items())))


def clip_text_tower(folder: str) -> tuple[Step, tuple[str, ...]]:
    """Return the tokenizer's step, and the overrides that train a CLIP text tower from scratch in place of
    the LLM.

    The tower has CLIP's architecture (causal transformer, end-of-text pooling, linear projection) and 6
    layers of width 256.  Its tokenizer is SmolLM2's, in which `<|endoftext|>` has the id 0.
    """
    architecture = ('{model_type: clip_text_model, vocab_size: 49152, hidden_size: 256, intermediate_size: '
                    '1024, num_hidden_layers: 6, num_attention_heads: 4, max_position_embeddings: 64, '
                    "projection_dim: '${model.embed_dim}', bos_token_id: 0, eos_token_id: 0, pad_token_id: "
                    "0}")
    return (Step(f'{folder}/tokenizer.json', ('-m', 'recipes.ablations.make_data', 'clip_tokenizer', folder)),
            ('teacher=null', 'model.adapter.name=identity',
             f'trainable_text.clip={{name: {folder}, pretrained: false, architecture: {architecture}}}'))
