# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Export of a teacher as a sentence-transformers folder, without code where standard modules suffice."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch

from llm2clip.errors import missing_extra
from llm2clip.export.model_card import teacher_card
from llm2clip.io.files import remove_folder, write_json
from llm2clip.io.folders import atomic_folder, check_replaceable
from llm2clip.modeling import copy_code
from llm2clip.modeling.loaders import keep_readable
from llm2clip.modeling.text_encoder import save_llm
from llm2clip.teacher.llm import load_caption_tokenizer, teacher_config, teacher_fingerprint

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import WordWeights

    from llm2clip.modeling.caption_encoder import CaptionEncoder
except ImportError as error:
    raise missing_extra('this export', 'sentence-transformers', error) from None

KIND = 'sentence-transformers model'
# These names of classes and fields are older than version 5; it reads them, and so do other programs.
_CLASSES = 'sentence_transformers.models.'
_POOLING_FIELDS = {'mean': 'pooling_mode_mean_tokens', 'last': 'pooling_mode_lasttoken'}
_TEXTS = ['a', 'A red square on a wall.', 'Ein Café, 3 × 4 m: “schön”', 'a text that is truncated ' * 300]


def export_sentence_transformers(
    teacher: Union[str, Path], out: Union[str, Path], prompts: Optional[Mapping[str, str]] = None
) -> None:
    """Write a folder for `SentenceTransformer(out)`, which does not need this package.

    If the modules of sentence-transformers do not give the teacher's vectors, the folder holds code for
    ``trust_remote_code=True`` instead, and the reason is printed.

    Args:
        teacher: Folder that stage 1 wrote.
        out: Output folder.
        prompts: Name -> instruction.  Unset, ``query`` is the teacher's own instruction, if it has one.

    Raises:
        ConfigError: The folder is not a teacher, or `out` holds something else.
        LoadError: The teacher is damaged.
    """
    check_replaceable(out, KIND)
    config = teacher_config(teacher)
    if prompts is None:
        prompts = {'query': config.instruction} if config.instruction else {}
    fingerprint = teacher_fingerprint(teacher)
    with atomic_folder(out, KIND) as partial:
        if not load_caption_tokenizer(config).tokenizer.is_fast:
            reason = 'its tokenizer cannot add the tokens around a text'
        elif config.pooling == 'weighted_mean':
            reason = 'the module Pooling has other weights than weighted_mean'
        elif config.pooling == 'mean' and prompts:
            reason = 'the module Pooling cannot exclude prompts from the mean exactly'
        else:
            _save_modules(teacher, prompts, partial)
            reason = _differs(teacher, partial)
        if reason:
            print(f'{out} needs trust_remote_code=True: {reason}', flush=True)
            remove_folder(partial)
            partial.mkdir()
            model = SentenceTransformer(modules=[CaptionEncoder.load(str(teacher))], prompts=dict(prompts),
                                        similarity_fn_name='cosine', device='cpu')
            model.save(str(partial), create_model_card=False)
            copy_code(['caption_encoder', 'loaders', 'text_encoder'], partial)
            write_json(partial / 'modules.json', [{
                'idx': 0, 'name': '0', 'path': '', 'type': 'caption_encoder.CaptionEncoder'}])
        teacher_card(teacher, fingerprint, has_code=bool(reason)).save(partial / 'README.md')


def _save_modules(teacher: Union[str, Path], prompts: Mapping[str, str], folder: Path) -> None:
    """Write a teacher as modules of sentence-transformers.

    The mean excludes the header: the module WordWeights gives its tokens, which no text has, the weight 0.
    """
    model = CaptionEncoder.load(str(teacher))
    config, tokenizer = model.encoder.config, copy.copy(model.caption_tokenizer)
    fast: Any = copy.deepcopy(tokenizer.tokenizer)
    fast.chat_template = None  # sentence-transformers would apply it
    tokenizer.tokenizer = fast
    prompts = {name: f'{prompt.strip()} ' for name, prompt in prompts.items()}
    modules = ['Transformer']
    if config.pooling == 'mean' and tokenizer.header:
        tokenizer.header = _copy_tokens(model.encoder.llm, fast, tokenizer.header)
        modules.append('WordWeights')
        words = [str(i) for i in range(model.encoder.llm.config.vocab_size)]
        (folder / '1_WordWeights').mkdir()
        WordWeights(words, {str(i): 0.0 for i in tokenizer.header}).save(str(folder / '1_WordWeights'))
    modules.append('Pooling')
    save_llm(model.encoder.llm, config.bidirectional, folder)
    tokenizer.save(folder)
    keep_readable(folder)
    write_json(folder / 'modules.json', [
        {'idx': i, 'name': str(i), 'path': f'{i}_{name}' if i else '', 'type': _CLASSES + name}
        for i, name in enumerate(modules)])
    write_json(folder / 'sentence_bert_config.json', {
        'max_seq_length': config.max_length, 'do_lower_case': False})
    pooling = folder / f'{len(modules) - 1}_Pooling'
    pooling.mkdir()
    write_json(pooling / 'config.json', {
        'word_embedding_dimension': model.encoder.llm_embed_dim, _POOLING_FIELDS[config.pooling]: True,
        'include_prompt': True})
    write_json(folder / 'config_sentence_transformers.json', {
        'prompts': prompts, 'default_prompt_name': None, 'similarity_fn_name': 'cosine'})


def _copy_tokens(llm: Any, tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Add tokens that the LLM reads like `ids`, and that stand for no text; return their ids."""
    names = [f'\u2063header {i}\u2063' for i in range(len(ids))]
    tokenizer.add_tokens(names, special_tokens=True)
    copies: list[int] = tokenizer.convert_tokens_to_ids(names)
    # The matrix may have rows beyond the tokenizer's tokens.
    llm.resize_token_embeddings(max(llm.config.vocab_size, copies[-1] + 1), mean_resizing=False)
    with torch.no_grad():
        weights = llm.get_input_embeddings().weight
        weights[copies] = weights[ids]
    return copies


def _differs(teacher: Union[str, Path], folder: Path) -> str:
    """Say that the modules in a folder give other vectors than the teacher; empty if they give the same."""
    options: Any = {'convert_to_tensor': True}
    encoder = CaptionEncoder.load(str(teacher))
    tokenizer = encoder.caption_tokenizer
    texts = [*_TEXTS, f'{tokenizer.tokenizer.decode(tokenizer.header)} as a text']
    expected = SentenceTransformer(modules=[encoder], device='cpu').encode(texts, **options)
    model = SentenceTransformer(str(folder), device='cpu')
    vectors = model.encode(texts, **options).float()
    error = float((vectors - expected).abs().max() / expected.abs().max())
    tolerance = 1e-5 if model.dtype == torch.float32 else 2e-2
    if error > tolerance:
        return f'its own modules compute other vectors here (a relative difference of {error:.1g})'
    return ''
