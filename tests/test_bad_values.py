# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Values that make no sense: each is refused by its key, whichever recipe it is for, before anything is read."""

import re
from pathlib import Path

import pytest
from recipes_in_process import REQUIRED, SCHEMAS

from llm2clip.config import ConfigError
from llm2clip.config.files import load_config
from llm2clip.training.trainer import check_train_config

BOTH = ('train_stage1', 'train_stage2')
PARTS = ('optimizer.', 'scheduler.', 'algorithms.', 'callbacks.', 'loggers.')
NUMBERS = ['0', '-1', '1.5', 'many', 'nan']
# Recipes, key, and values of which each is refused.
BAD: list[tuple[tuple[str, ...], str, list[str]]] = [
    (BOTH, 'max_duration', ['-1ep', '0ba', '1', 'ep', '1epoch', '1.5ep', '0.5dur', 'nanep', '']),
    (BOTH, 'eval_interval', ['0ba', '-2ep', '2dur', 'often']),
    (BOTH, 'eval_first', ['perhaps', '[true]']),
    (BOTH, 'save_interval', ['0ba', '0ep', '1e-3ba', '5 ba']),
    (BOTH, 'console_log_interval', ['0ba']),
    (BOTH, 'save_num_checkpoints_to_keep', ['0', '-2', '1.5']),
    (BOTH, 'global_train_batch_size', NUMBERS),
    (BOTH, 'global_eval_batch_size', ['0']),
    (BOTH, 'device_train_microbatch_size', ['0', '-4', '9']),
    (BOTH, 'seed', ['-1', '4294967296', 'x']),
    (BOTH, 'device', ['cuda', '0']),
    (BOTH, 'precision', ['fp8', 'bf16', 'amp_fp8']),
    (BOTH, 'dist_timeout', ['0', 'nan', '-1', 'inf']),
    (BOTH, 'plan_ranks', ['0']),
    (BOTH, 'save_folder', ["''", '[a]']),
    (BOTH, 'checkpoint_folder', ["''", 's3://me:secret@host/bucket']),
    (BOTH, 'autoresume', ['perhaps']),
    (BOTH, 'train_data.streams', ['{}', '[a]', "{'': {local: a}}"]),
    (BOTH, 'train_data', ['a', '[a]']),
    (BOTH, 'train_data.streams.s', ['a', '[a]']),
    (BOTH, 'train_data.streams.s.local', ["''", '[1]']),
    (BOTH, 'train_data.streams.s.repeat', ['0', '-1', 'nan', 'inf']),
    (BOTH, 'train_data.streams.s.proportion', ['0', '-0.5', 'nan']),
    (BOTH, 'train_data.num_workers', ['-3', '0.5']),
    (BOTH, 'train_data.shuffle_seed', ['-1']),
    (BOTH, 'train_data.num_canonical_nodes', ['0', '-1']),
    (BOTH, 'train_data.download_retry', ['0', '-1']),
    (BOTH, 'train_data.download_timeout', ['0', 'nan']),
    (BOTH, 'train_data.cache_limit', ['0gb', 'much', '-1gb', '10xb']),
    (BOTH, 'optimizer.lr', ['-1', 'nan', 'fast', 'null']),
    (BOTH, 'optimizer.weight_decay', ['-1', 'x']),
    (BOTH, 'optimizer.betas', ['[0.9]', '[0.9, 1.5]', '0.9', '[a, b]']),
    (BOTH, 'optimizer.eps', ['-1']),
    (BOTH, 'optimizer.name', ['adam', '3', 'null']),
    (BOTH, 'scheduler.name', ['cosin', '[a]']),
    (BOTH, 'scheduler', ['{name: cosine, t_max: soon}', '{name: cosine_with_warmup}', '{name: linear, alpha_f: x}',
                         '{name: constant, alpha: [1]}']),
    (BOTH, 'callbacks.speed_monitor.window_size', ['x', '[1]']),
    (BOTH, 'callbacks.early_stopper', ['{monitor: cra}', '{monitor: a, dataloader_label: eval, patience: soon}',
                                       '{monitor: a, dataloader_label: eval, comp: better}']),
    (('train_stage2',), 'callbacks.save_best', ['{metric: [a]}', '{dataloader_label: 3}', '{label: eval}']),
    (BOTH, 'algorithms.clamp_logit_scale.maximum', ['0', '-1', 'nan', 'x']),
    (BOTH, 'algorithms.ema', ['{half_life: 1xy}', '{half_life: 5ba, smoothing: 0.9}', '{decay: 0.9}']),
    (BOTH, 'algorithms.gradient_clipping', ['{clipping_type: none, clipping_threshold: 1}', '{clipping_type: norm}',
                                            '{clipping_type: norm, clipping_threshold: x}']),
    (BOTH, 'loggers.wandb.project', ['[a]']),
    (BOTH, 'loggers.wandbb', ['{}']),
    (BOTH, 'fsdp', ['true', '[a]']),
    (BOTH, 'fsdp.activation_checkpointing', ['maybe']),
    (BOTH, 'fsdp.activation_cpu_offload', ['some']),
    (BOTH, 'fsdp.state_dict_type', ['[full]', 'local']),
    (BOTH, 'fsdp.mixed_precision', ['bf16', 'full']),
    (BOTH, 'fsdp.reshard_after_forward', ['maybe', '1.5', '0', '-1', '2', 'null']),
    (BOTH, 'fsdp.replicate', ['0', '3', 'all']),
    (BOTH, 'fsdp.prefetch', ['0', '-1', '1.5']),
    (BOTH, 'compile', ['true', '[]']),
    (BOTH, 'compile.fullgraph', ['1', 'maybe']),
    (BOTH, 'compile.model', ['x']),
    (('train_stage1',), 'objective', ['mlm', "''"]),
    (('train_stage1',), 'loss_scale', ['0', '-50', 'nan', 'inf']),
    (('train_stage1',), 'text_encoder.pooling', ['max', 'MEAN']),
    (('train_stage1',), 'text_encoder.layout', ['whole', 'null', 'true']),
    (('train_stage1',), 'text_encoder.max_length', ['0', '-1']),
    (('train_stage1',), 'text_encoder.dtype', ['fp16', 'int8']),
    (('train_stage1',), 'text_encoder.attn_implementation', ['flash']),
    (('train_stage1',), 'text_encoder.pretrained', ["''"]),
    (('train_stage1',), 'lora.r', ['0', '-16']),
    (('train_stage1',), 'lora.lora_alpha', ['0']),
    (('train_stage1',), 'lora.lora_dropout', ['1', '-0.1', 'nan']),
    (('train_stage1',), 'attention_dropout', ['1', '-0.1', 'nan', 'null']),
    (('train_stage1',), 'lora.target_modules', ['[]', "['']"]),
    (('train_stage1',), 'mntp.mask_probability', ['0', '1', '-0.2', 'nan']),
    (('train_stage1',), 'mntp.mask_token', ["''"]),
    (('train_stage1',), 'train_data.pairs', ['[{query: [], positive: [a]}]', "[{query: [a], positive: ['']}]",
                                             '[{query: [a], positive: [b], weight: 0}]',
                                             '[{query: [a], positive: [b], weight: nan}]', '[{query: [a]}]', 'a', '[a]',
                                             '{a: b}']),
    (('train_stage1',), 'train_data.texts', ['{a: 0}', '{a: -1}', '{a: nan}', '{a: inf}']),
    (('train_stage1',), 'train_data.streams.s.texts', ['{a: 0}']),
    (('train_stage1',), 'teacher_folder', ["''"]),
    (('train_stage2',), 'train_data.caption_mix', ['{a: nan}', '{a: -1, b: 2}', '{a: 0, b: 0}', '{a: much}', '[a]']),
    (('train_stage2',), 'train_data.streams.s.caption_mix', ['{a: nan}']),
    (('train_stage2',), 'train_data.crop_scale', ['[2, 1]', '[1, 0.5]', '[0, 1]', '[0.5]', '[0.1, 0.2, 0.3]', '[a, b]',
                                                  '0.9']),
    (('train_stage2',), 'train_data.color_jitter', ['-0.1', '3', 'nan']),
    (('train_stage2',), 'train_data.grayscale', ['1.5', '-0.1', 'nan']),
    (('train_stage2',), 'model.embed_dim', ['0', '-8']),
    (('train_stage2',), 'model.adapter.depth', ['-1', '2.5']),
    (('train_stage2',), 'model.adapter.expansion', ['0']),
    (('train_stage2',), 'model.adapter.name', ['mlp']),
    (('train_stage2',), 'model.adapter.heads', ['0']),
    (('train_stage2',), 'model.adapter.latents', ['0', '-1']),
    (('train_stage2',), 'trained_text.lora.r', ['0']),
    (('train_stage2',), 'trained_text.clip.name', ["''"]),
    (('train_stage2',), 'trained_text.clip', ['{pretrained: true}', 'a']),
    (('train_stage2',), 'trained_text.method', ['a', 'B']),
    (('train_stage2',), 'model.visual_projection', ['none']),
    (('train_stage2',), 'model.visual_projection_init', ['random', 'null']),
    (('train_stage2',), 'model.logit_scale', ['0', '-1', 'nan', 'inf']),
    (('train_stage2',), 'model.logit_bias', ['nan', 'inf']),
    (('train_stage2',), 'model.vision.image_size', ['0', '-224']),
    (('train_stage2',), 'model.vision.mean', ['[0.5]', '[0.5, 0.5, 2]', '[0.5, 0.5, nan]']),
    (('train_stage2',), 'model.vision.std', ['[0, 0, 0]', '[0.5, 0.5]', '[-1, 1, 1]']),
    (('train_stage2',), 'model.vision.lock_blocks', ['-1']),
    (('train_stage2',), 'loss.name', ['cosine']),
    (('train_stage2',), 'loss.label_smoothing', ['-0.1', '1.1', 'nan']),
    (('train_stage2',), 'loss.block_size', ['0', '-2']),
    (('train_stage2',), 'loss.dims', ['[0, 4]', '[4, 4]', '[8, 4]', '[4, 2000]', '4', '[a]', '[1.5]', '{a: 4}']),
    (('train_stage2',), 'layer_decay', ['-1', '0', '1.5', 'nan']),
    (('train_stage2',), 'lr_scale', ['{adapter: -1}', '{adapter: nan}', '{adapter: inf}']),
    (('train_stage2',), 'eval_zeroshot', ['a', '[a]', '{a: b}', '{a: {}}', "{'': {source: {name: x}}}",
                                          '{a: {source: x}}']),
    (('train_stage2',), 'eval_zeroshot.a', ["{source: {name: x}, templates: ''}"]),
    (('train_stage2',), 'online.batch_tokens', ['0', '-1']),
    (('train_stage2',), 'online.precision', ['amp_fp16']),
    (('train_stage2',), 'algorithms.patch_dropout.rate', ['1', '-0.5', 'nan']),
    (('prepare_data',), 'out', ["''"]),
    (('prepare_data',), 'size_limit', ['0mb', 'big', '-1mb', '64qb']),
    (('prepare_data',), 'compression', ['zip', 'zstd:high', "''"]),
    (('prepare_data',), 'max_dropped', ['-0.1', '2', 'nan']),
    (('prepare_data',), 'image_max_side', ['0', '-1']),
    (('prepare_data',), 'image_quality', ['0', '900']),
    (('prepare_data',), 'num_workers', ['-3', '0']),
    (('prepare_data',), 'machine', ['-1', '1']),
    (('prepare_data',), 'machines', ['0', '-2']),
    (('prepare_data', 'extract_embeddings'), 'engine', ['slurm', '3']),
    (('extract_embeddings',), 'worker_cpus', ['0', '1.5']),
    (('prepare_data',), 'require_any_caption', ["['']"]),
    (('prepare_data',), 'leave_out', ["''", '[a]']),
    (('prepare_data',), 'extend', ['true', 'perhaps']),
    (('extract_embeddings',), 'datasets', ['{}', '{../../x: {local: d}}', '{a/b: {local: d}}', '{.a: {local: d}}',
                                           "{'': {local: d}}", '{..: {local: d}}', '{a: {}}']),
    (('extract_embeddings',), 'storage', ['float32', 'int4']),
    (('evaluate.models.m', 'export_hf', 'search'), 'dim', ['0', '-1', '1.5', '[64]']),
    (('extract_embeddings', 'evaluate.cra'), 'batch_tokens', ['0', '-5']),
    (('extract_embeddings', 'evaluate.cra', 'evaluate.models.m'), 'precision', ['fp8', 'bf16']),
    (('extract_embeddings', 'evaluate', 'search'), 'device', ['cuda']),
    (('extract_embeddings',), 'dist_timeout', ['0']),
    (('evaluate',), 'models', ['{}', '[a]', '{m: a}']),
    (('evaluate.models.m',), 'text', ['llms', "''"]),
    (('evaluate',), 'cra', ['true']),
    (('evaluate',), 'compare', ['m', 'n', "''"]),
    (('evaluate',), 'averages.a', ['[]', 'retrieval.r', '[retrieval]', '[zeroshot.r]', '[retrieval.r, retrieval.r]']),
    (('evaluate',), 'zeroshot.z.metric', ['top5', 'null']),
    (('evaluate',), 'retrieval', ['{}']),
    (('evaluate',), 'composition', ['[a]', '{a: b}', '{a: {}}', "{'': {source: {name: sugarcrepe}}}"]),
    (('evaluate.models.m', 'export_hf', 'export_vision'), 'weights', ['newest', "''"]),
    (('evaluate.models.m', 'export_hf', 'export_vision'), 'interpolate', ['-0.1', '1.1', 'nan', 'half', '[0, 1]']),
    (('evaluate', 'search'), 'batch_size', ['0', '-1']),
    (('evaluate', 'search'), 'num_workers', ['-1']),
    (('extract_embeddings', 'train_stage2', 'train_inheritance', 'export_hf'), 'prompt', ['x', '[a]']),
    (('extract_embeddings', 'evaluate.models.m', 'export_hf'), 'prompt_name', ["''"]),
    (('train_stage2', 'evaluate.models.m', 'export_hf'), 'sentence_transformer', ["''", '[a]']),
    (('extract_embeddings', 'evaluate.models.m', 'search'), 'trust_remote_code', ['perhaps']),
    (('evaluate',), 'bootstrap', ['-1', '1.5']),
    (('evaluate',), 'gallery', ['-1']),
    (('evaluate.cra',), 'caption_keys', ['[a]', '[a, a]', '[a, b, c]', "['', b]", 'a']),
    (('evaluate.cra',), 'limit', ['0', '-1']),
    (('export_hf', 'export_vision'), 'push_to_hub', ['model', 'a/b/c', 'a b/c', "''"]),
    (('export_hf', 'export_vision', 'export_sentence_transformers', 'import_official', 'report'), 'out', ["''"]),
    (('import_official',), 'template', ['llama2']),
    (('import_official',), 'teacher', ['null']),
    (('import_official',), 'vision', ['{name: x, mean: [1]}']),
    (('report',), 'steps', ['{}', "{a: ''}"]),
    (('search',), 'top', ['0', '-1', 'all']),
    (('search',), 'index', ["''"]),
]
# All values of a key by one recipe, and the first by the others that have the same key.
CASES = [(recipe, f'{below}.{key}' if below else key, value) for recipes, key, values in BAD
         for i, (recipe, _, below) in enumerate(name.partition('.') for name in recipes)
         for value in (values[:1] if i else values)]


@pytest.mark.parametrize(('recipe', 'key', 'value'), CASES)
def test_a_bad_value_is_refused_by_its_key(recipe: str, key: str, value: str) -> None:
    extra = ['cra.captions=c'] if key.startswith('cra.') else []
    with pytest.raises(ConfigError) as error:
        required = [arg for arg in REQUIRED[recipe] if not arg.startswith((f'{key}=', f'{key}.'))]
        config = load_config(SCHEMAS[recipe], [*required, *extra, f'{key}={value}'])
        assert recipe in BOTH, 'the configuration alone decides'
        check_train_config(config)
    # Of a part's argument the key may be that of the part.
    part = key.rsplit('.', 1)[0] if key.startswith(PARTS) else key
    assert re.match(rf'(required but not set: )?{re.escape(part)}[ .:[]', str(error.value)), error.value
    assert 'secret' not in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('recipe', REQUIRED)
def test_what_it_needs_alone_is_accepted(recipe: str) -> None:
    load_config(SCHEMAS[recipe], REQUIRED[recipe])


YAMLS = {
    'binary': (b'\x89PNG\r\n\x1a\n\x00\xff', 'cannot be read .*expected a YAML file'),
    'latin-1': ('title: Zürich'.encode('latin-1'), 'cannot be read .*expected a YAML file'),
    'utf-16': ('title: a'.encode('utf-16'), 'cannot be read .*expected a YAML file'),
    'cut': (b'title: [a', 'expected YAML'),
    'a tab': (b'title:\n\t- a', 'expected YAML'),
    'a list': (b'- title', 'expected a mapping'),
    'a text': (b'title', 'expected a mapping|expected YAML'),
    'a key twice': (b'title: a\ntitle: b', 'expected YAML'),
    'an object': (b'title: !!python/object/apply:os.system [ls]', 'expected YAML'),
    'an unknown interpolation': (b'title: ${nowhere}', 'title .*nowhere'),
    'an unknown resolver': (b'title: ${env:HOME}', 'title .*env'),
    'an unclosed interpolation': (b'title: ${nowhere', 'expected YAML|title'),
    'a circle': (b'title: ${results}\nresults: ${title}', 'title|results'),
    'an alias bomb': (b'a: &a [x, x]\nb: &b [*a, *a]\ntitle: *b', ''),
    'a missing package': (b'title: ${package:nowhere}', 'package nowhere is not installed'),
    'a number as key': (b'1: a', r'^1 \(.*bad.yaml:1\)'),
    'a key twice that is no text': (b'no: a\nno: b', 'expected YAML'),
    'a bottomless list': (b'title: ' + b'[' * 9000, 'expected YAML'),
    'a text for a mapping': (b'title: a\nsteps: b\ngalleries: []',
                             r"^steps \(.*bad.yaml:2\): 'b', expected a mapping of keys to values$"),
    'a mapping for a list': (b'title: a\ngalleries: {a: b}', r"^galleries \(.*:2\): \{'a': 'b'\}, expected a list$"),
}


@pytest.mark.parametrize('name', YAMLS)
def test_a_bad_file_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    content, message = YAMLS[name]
    (tmp_path / 'bad.yaml').write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(SCHEMAS['report'], [str(tmp_path / 'bad.yaml'), 'out=o', 'steps.a=b', *(
            [] if name == 'a circle' else ['results=r'])])
    assert 'bad.yaml' in str(error.value) and '\n' not in str(error.value)
