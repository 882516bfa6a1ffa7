# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Import of caption-contrastive LLMs from LLM2Vec as teacher folders.

LLM2Vec embeds captions like our text encoder: attention is bidirectional, and pooling averages the caption
and the end token of the template.  BOS and the template's header are read but not pooled.  Its templates are
shorter than those of the tokenizers (Llama 3.1's adds a system prompt), so the imported tokenizer gets them
as its chat template.

Two differences remain.  Captions beyond `max_length` lose their last tokens here; LLM2Vec drops whole words
beyond 512 tokens, then cuts off the end token and pools the template's header too.  And LLM2Vec tokenises
caption and template together, so that a line break at the start of a caption merges with the template's.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Optional, Union

from llm2clip.config import LLMTeacherConfig
from llm2clip.errors import ConfigError
from llm2clip.io.files import read_json, reading
from llm2clip.modeling.loaders import load_tokenizer
from llm2clip.modeling.text_encoder import CaptionTokenizer
from llm2clip.teacher.llm import build_text_encoder, save_teacher

# Text that LLM2Vec puts before and after a caption, without BOS.
TEMPLATES = {
    'llama3': ('<|start_header_id|>user<|end_header_id|>\n\n', '<|eot_id|>'),
    'chatml': ('<|im_start|>user\n', '<|im_end|>'),
    'none': ('', ''),
}
# Template -> pattern of the names of the LLMs to which LLM2Vec applies it.
_NAMES = {'llama3': 'Llama-3.*Instruct', 'chatml': 'Qwen2-.*Instruct'}
_POOLINGS = {'mean': 'mean', 'weighted_mean': 'weighted_mean', 'eos_token': 'last', 'last_token': 'last'}


def import_teacher(config: LLMTeacherConfig, template: Optional[str], folder: Union[str, Path]) -> None:
    """Write an LLM that LLM2Vec trained as a teacher folder.

    Args:
        config: The LLM; `adapters` lists LLM2Vec's adapters that are not merged into it, in order.
            `pretrained` may be an adapter's folder; that adapter then comes first, on the LLM that it names.
        template: Key of `TEMPLATES`.  Unset, it follows from the LLM's name, as in LLM2Vec.
        folder: Output folder.

    Raises:
        ConfigError: The LLM or an adapter does not fit, the template is unknown,
            or the saved settings disagree.
    """
    if config.chat_template is not None:
        raise ConfigError('LLM2Vec has templates of its own; say which by `template`',
                          'teacher.chat_template')
    path = Path(config.pretrained, 'adapter_config.json')
    if path.is_file():
        with reading(path, 'the LLM of an adapter under the key base_model_name_or_path'):
            base = str(read_json(path, dict)['base_model_name_or_path'])
        config = dataclasses.replace(config, pretrained=base, adapters=[config.pretrained, *config.adapters])
    # Saved with the last adapter or, without adapters, with the LLM.
    path = Path([config.pretrained, *config.adapters][-1], 'llm2vec_config.json')
    if path.is_file():
        saved = read_json(path, dict)
        pooling = saved.get('pooling_mode', 'mean')
        expected = {'pooling': _POOLINGS.get(pooling, pooling), 'max_length': saved.get('max_length', 512)}
        for key, value in expected.items():
            if getattr(config, key) != value:
                raise ConfigError(f'{getattr(config, key)!r}, but {path} says {value!r}', f'teacher.{key}')
        if not saved.get('skip_instruction', True):
            raise ConfigError(f'{path}: skip_instruction is false: it would pool the header of the template, '
                              'which no setting here does')
    template = template or _template_by_name(config)
    tokenizer = load_tokenizer(config.pretrained, config.trust_remote_code)
    tokenizer.chat_template = None
    before, after = TEMPLATES[template]
    if before:
        missing = [token for token in re.findall(r'<\|\w+\|>', before + after)
                   if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
        if missing:
            raise ConfigError(f'the tokenizer has no {" and no ".join(missing)}', 'template')
        if tokenizer.bos_token_id in tokenizer('').input_ids:
            before = tokenizer.bos_token + before
        caption = f"{json.dumps(before)} + messages[0]['content'].rstrip() + {json.dumps(after)}"
        tokenizer.chat_template = f'{{{{ {caption} }}}}'
    config = dataclasses.replace(config, chat_template=template != 'none')
    save_teacher(build_text_encoder(config), CaptionTokenizer(tokenizer, config), None, folder)


def _template_by_name(config: LLMTeacherConfig) -> str:
    names = config.pretrained
    path = Path(config.pretrained, 'config.json')
    if path.is_file():
        names += f'\n{read_json(path, dict).get("_name_or_path")}'
    for template, pattern in _NAMES.items():
        if re.search(pattern, names):
            return template
    raise ConfigError(f'which one LLM2Vec used cannot be told from the name {config.pretrained}; say one of '
                      f'{", ".join(TEMPLATES)}', 'template')
