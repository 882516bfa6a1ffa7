# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Caption-contrastive LLMs in LLM2Vec's layout -> our teacher folders.

LLM2Vec embeds a caption like our text encoder: every token sees every token, the mean is taken over the caption and the
end token of the template, BOS and the template's header are read but not pooled.  Its templates are its own, shorter
than those of the tokenizers (Llama 3.1's would add a system prompt), so the imported tokenizer gets them as its chat
template.  Two differences remain.  A caption that does not fit into `max_length` loses its last tokens here; LLM2Vec
drops whole words beyond 512 tokens, then cuts off the end token and pools the template's header too.  And it tokenises
caption and template at once, so that a line break at a caption's beginning melts into one with the template's.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Optional, Union

from llm2clip.config import ConfigError, LLMTeacherConfig
from llm2clip.files import read_json, reading
from llm2clip.remote_code.checks_llm2clip import load_tokenizer
from llm2clip.remote_code.text_encoder_llm2clip import CaptionTokenizer
from llm2clip.teacher.llm import build_text_encoder, save_teacher

__all__ = ['import_teacher']

# What LLM2Vec puts before and after a caption, BOS apart.
TEMPLATES = {
    'llama3': ('<|start_header_id|>user<|end_header_id|>\n\n', '<|eot_id|>'),
    'chatml': ('<|im_start|>user\n', '<|im_end|>'),
    'none': ('', ''),
}
_POOLINGS = {'mean': 'mean', 'weighted_mean': 'weighted_mean', 'eos_token': 'last', 'last_token': 'last'}


def import_teacher(config: LLMTeacherConfig, template: Optional[str], folder: Union[str, Path]) -> None:
    """Write an LLM that LLM2Vec trained as a teacher of ours.

    Args:
        config: The LLM, and in `adapters` those of LLM2Vec's adapters that are not merged into it, first one first.
            `pretrained` may itself be an adapter's folder, which then comes before them, on the LLM that it names.
        template: A key of `TEMPLATES`; unset, by the LLM's name, as LLM2Vec does.
        folder: Where to.

    Raises:
        ConfigError: The LLM or an adapter does not fit, the template is not known, or `llm2vec_config.json` says that
            the LLM was trained to encode otherwise.
    """
    if config.chat_template is not None:
        raise ConfigError('teacher.chat_template: LLM2Vec has templates of its own; say which by `template`')
    for key, name in (('pretrained', config.pretrained), *(('adapters', name) for name in config.adapters)):
        if Path(name).is_absolute() and not Path(name).is_dir():
            raise ConfigError(f'teacher.{key}: there is no folder {name}')
    if (path := Path(config.pretrained, 'adapter_config.json')).is_file():
        with reading(path, 'the LLM of an adapter under the key base_model_name_or_path'):
            base = str(read_json(path, dict)['base_model_name_or_path'])
        config = dataclasses.replace(config, pretrained=base, adapters=[config.pretrained, *config.adapters])
    _check_llm2vec_config(config)
    template = template or _template_by_name(config)
    if template not in TEMPLATES:
        raise ConfigError(f'template: {template!r} is not one of {", ".join(TEMPLATES)}')
    tokenizer = load_tokenizer(config.pretrained, config.trust_remote_code)
    tokenizer.chat_template = _chat_template(tokenizer, *TEMPLATES[template])
    config = dataclasses.replace(config, chat_template=template != 'none')
    save_teacher(build_text_encoder(config), CaptionTokenizer(tokenizer, config), None, folder)


def _chat_template(tokenizer: Any, before: str, after: str) -> Optional[str]:
    """As Jinja; None where there is nothing to put around a caption."""
    if not before:
        return None
    missing = [token for token in re.findall(r'<\|\w+\|>', before + after)
               if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
    if missing:
        raise ConfigError(f'template: the tokenizer has no {" and no ".join(missing)}')
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer('').input_ids
    before = json.dumps((tokenizer.bos_token if adds_bos else '') + before)
    return f"{{{{ {before} + messages[0]['content'].rstrip() + {json.dumps(after)} }}}}"


def _check_llm2vec_config(config: LLMTeacherConfig) -> None:
    """Compare with what the last adapter, or the LLM, was saved with."""
    path = Path([config.pretrained, *config.adapters][-1], 'llm2vec_config.json')
    if not path.is_file():
        return
    saved = read_json(path, dict)
    pooling = saved.get('pooling_mode', 'mean')
    for key, found, expected in (
            ('pooling', config.pooling, _POOLINGS.get(pooling, pooling)),
            ('max_length', config.max_length, saved.get('max_length', 512))):
        if found != expected:
            raise ConfigError(f'teacher.{key}: {found!r}, but {path} says {expected!r}')
    if not saved.get('skip_instruction', True):
        raise ConfigError(f'{path}: skip_instruction is false: it would pool the header of the template, which no '
                          'setting here does')


def _template_by_name(config: LLMTeacherConfig) -> str:
    names = [config.pretrained]
    if (path := Path(config.pretrained, 'config.json')).is_file():
        names.append(str(read_json(path, dict).get('_name_or_path', '')))
    for name in names:
        if 'Llama-3' in name and 'Instruct' in name:
            return 'llama3'
        if 'Qwen2-' in name and 'Instruct' in name:
            return 'chatml'
    raise ConfigError(f'template: which one LLM2Vec used cannot be told from the name {config.pretrained}; say one of '
                      f'{", ".join(TEMPLATES)}')
