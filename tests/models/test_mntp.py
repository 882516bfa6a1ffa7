# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""The MNTP loss against a loop, and that every position is predicted from the one before it."""

from pathlib import Path

import pytest
import torch
import torch.nn as nn
from transformers import LlamaForCausalLM

from llm2clip.config import TextEncoderConfig
from llm2clip.data.loader import split_packed
from llm2clip.models.stage1 import MaskedNextTokenPrediction, mntp_loss
from llm2clip.remote_code.text_encoder_llm2clip import TextEncoder
from llm2clip.teacher.llm import load_llm_and_head


@pytest.mark.parametrize('softcap', [None, 5.0])
def test_loss_equals_a_loop(softcap: float | None) -> None:
    torch.manual_seed(0)
    states, head = torch.randn(3, 6, 8), nn.Linear(8, 11, bias=False)
    labels = torch.full((3, 6), -100)
    labels[0, 2], labels[0, 5], labels[2, 1] = 4, 7, 0
    total = 0.0
    for row, position, token in ((0, 2, 4), (0, 5, 7), (2, 1, 0)):
        logits = head.weight @ states[row, position - 1]
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        total = total - logits[token] + logits.logsumexp(0)
    torch.testing.assert_close(mntp_loss(states, labels, head, softcap), total / 3)


def test_the_head_is_the_llms_own(llm_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    full = LlamaForCausalLM.from_pretrained(llm_folder)
    full.save_pretrained(tmp_path)
    config = TextEncoderConfig(pretrained=str(tmp_path), bidirectional=False)
    llm, head = load_llm_and_head(config)
    model = MaskedNextTokenPrediction(TextEncoder(llm, config), head).eval()
    ids = torch.randint(2, 400, (2, 7))
    batch = {'input_ids': ids, 'attention_mask': torch.ones_like(ids), 'labels': torch.full_like(ids, -100)}
    batch['labels'][0, 3] = 9
    expected = torch.log_softmax(full.eval()(ids).logits[0, 2], 0)[9]
    torch.testing.assert_close(model.loss(model(batch), batch), -expected)
    # Beside a shorter text, padded and packed in a row.
    batch['attention_mask'][1, 4:] = 0
    batch['labels'][1, 2] = 5
    packed, = split_packed({'index': torch.arange(2), **batch}, 2)
    torch.testing.assert_close(model.loss(model(packed), packed), model.loss(model(batch), batch))
    assert not head.weight.requires_grad
