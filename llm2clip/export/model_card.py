# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Model cards: the README.md of an exported folder, filled in from the run."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from markupsafe import Markup
from omegaconf import OmegaConf

from llm2clip.config import ImageDataConfig, ModelConfig, Stage1Config, Stage2Config
from llm2clip.config.loading import read_config
from llm2clip.data.loader import positive_weights
from llm2clip.errors import ConfigError
from llm2clip.io.files import read_json
from llm2clip.teacher.fingerprint import Fingerprint


def _escaped(value: Any) -> str:
    """Escape a value for Markdown and HTML, in one line; return `Markup` unchanged."""
    if isinstance(value, Markup):
        return value
    words = ' '.join(str(value).split())
    line = ''.join(character for character in words if character.isprintable())
    return re.sub(r'([\\`*~\[\]<>&|]|\b_|_\b)', r'\\\1', line)


def _card(template: str, data: ModelCardData, **parts: Any) -> ModelCard:
    """Render a template of `templates/`; values other than `Markup` are escaped, and `data` becomes YAML."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader('llm2clip.export'), finalize=_escaped)
    return ModelCard(environment.get_template(template).render(card_data=Markup(data.to_yaml()), **parts))


def language_model(teacher: Union[str, Path]) -> str:
    """Return the name of the LLM that stage 1 trained; if unknown, the name and model type of the teacher."""
    try:
        return public_name(read_config(Stage1Config, Path(teacher).parent).text_encoder.pretrained)
    except ConfigError:  # not a stage 1 teacher, or moved out of its run folder
        path = Path(teacher, 'config.json')
        if not path.is_file():
            return public_name(str(teacher))
        return f'{path.parent.name} ({read_json(path, dict).get("model_type")})'


def model_card(
    config: ModelConfig, teacher: Optional[Fingerprint], run: Optional[Stage2Config] = None,
    wise_ft_alpha: float = 1.0, *, template: str = 'model.md.j2', title: str = 'LLM2CLIP',
    library_name: str = 'transformers', pipeline_tag: Optional[str] = None, teachers: Sequence[str] = (),
    **parts: Any,
) -> ModelCard:
    """Return a card with metadata for the Hub.

    It names datasets and towers, but not their folders and buckets.

    Args:
        config: Configuration of the model.
        teacher: Fingerprint of its teacher or teachers; None for a CLIP with its own text tower.
        run: Configuration of the run that trained it.
        wise_ft_alpha: Weight of the trained weights in the WiSE-FT average.
        template: File in `templates/` that describes the model and how to load it.
        title, library_name, pipeline_tag: Heading, library that loads the model, and task on the Hub.
        teachers: Folders or names of the LLMs that the export contains.
        parts: Other values of the template.
    """
    data = ModelCardData(library_name=library_name, pipeline_tag=pipeline_tag, license='other',
                         tags=['llm2clip', 'clip', 'vision', 'arxiv:2411.04997'])
    language_models = [language_model(name) for name in teachers]
    towers = ' and '.join(public_name(tower.name) for tower in [config.vision, *config.vision.beside])
    facts: dict[str, Any] = {}
    if language_models:
        facts['language model'] = ', '.join(language_models)
    facts['vision tower'] = towers
    facts['image size'] = config.vision.image_size
    facts['adapter'] = config.adapter.name
    if config.adapter.name == 'residual':
        facts['adapter'] += f', {config.adapter.depth} blocks'
    facts['dimensions of the joint space'] = str(config.embed_dim)
    streams: list[tuple[str, str, str]] = []
    training = ''
    if run is not None:
        streams = _streams(run.train_data)
        training = _training(run)
        if config.embed_dim < run.model.embed_dim:
            facts['dimensions of the joint space'] += f', the first of {run.model.embed_dim}'
        shorter = [str(dim) for dim in run.loss.matryoshka_dims if dim < config.embed_dim]
        if shorter:
            facts['dimensions of the joint space'] += (
                f'; the first {", ".join(shorter)}, scaled to length 1, were trained to be features, too')
        if wise_ft_alpha != 1:
            averaged = 'of the vision tower ' if run.initial_weights is None else ''
            facts['weights'] = Markup(
                f'{averaged}{1 - wise_ft_alpha:g} · initial + {wise_ft_alpha:g} · trained '
                '([WiSE-FT](https://arxiv.org/abs/2109.01903))')
    return _card(template, data, title=title, facts=facts, teacher=teacher, streams=streams,
                 training=training, licensed=' and '.join([*language_models, towers]),
                 library_name=library_name, **parts)


def teacher_card(teacher: Union[str, Path], fingerprint: Fingerprint, has_code: bool) -> ModelCard:
    """Return the card of a teacher that is exported as a sentence-transformers model."""
    name = language_model(teacher)
    data = ModelCardData(library_name='sentence-transformers', pipeline_tag='sentence-similarity',
                         license='other', tags=['llm2clip', 'arxiv:2411.04997'])
    return _card('teacher.md.j2', data, title='Text encoder of LLM2CLIP', licensed=name,
                 facts={'language model': name}, teacher=fingerprint, streams=None, has_code=has_code)


def public_name(name: str) -> str:
    """Return a hub name unchanged, or the last part of a local path."""
    path = Path(name.removeprefix('local-dir:'))
    if name.startswith('local-dir:') or path.is_absolute() or path.exists():
        return path.name
    return name


def _streams(data: ImageDataConfig) -> list[tuple[str, str, str]]:
    rows = []
    for name, stream in data.streams.items():
        share = 'all'
        if stream.proportion is not None:
            share = f'{stream.proportion:g} of the epoch'
        elif stream.repeat is not None:
            share = f'{stream.repeat:g} times'
        mix = positive_weights(stream.caption_weights, data.caption_weights)
        total = sum(mix.values())
        captions = ', '.join(f'{key} {100 * weight / total:.3g} %' for key, weight in mix.items())
        rows.append((name, share, captions))
    return rows


def _tower(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a vision tower that are set, without folders."""
    settings = {key: value for key, value in values.items() if value not in (None, {}, [])}
    for key in settings.keys() & {'name', 'checkpoint'}:
        settings[key] = public_name(settings[key])
    return settings


def _training(run: Stage2Config) -> Markup:
    """The part of the configuration that decides the weights, as a YAML block."""
    values = dataclasses.asdict(run)
    keys = ('max_duration', 'global_train_batch_size', 'seed', 'precision', 'loss', 'optimizer', 'scheduler',
            'lr_scale', 'layer_decay', 'algorithms', 'model')
    chosen = {key: values[key] for key in keys if values[key] not in (None, {}, [])}
    vision = _tower(values['model']['vision'])
    if 'beside' in vision:
        vision['beside'] = [*map(_tower, vision['beside'])]
    chosen['model']['vision'] = vision
    texts = run.trainable_text
    if texts.lora is not None:
        chosen['trainable_text'] = {'lora': values['trainable_text']['lora']}
    if texts.clip is not None:
        chosen['trainable_text'] = {
            'clip': {'name': public_name(texts.clip.name), 'pretrained': texts.clip.pretrained}}
    chosen['crops'] = {key: getattr(run.train_data, key)
                       for key in ('crop_scale', 'color_jitter', 'grayscale')}
    text = OmegaConf.to_yaml(OmegaConf.create(chosen)).rstrip()
    longest = max(map(len, re.findall('`+', text)), default=0)
    fence = '`' * max(3, longest + 1)  # no value can close it
    return Markup(f'{fence}yaml\n{text}\n{fence}')
