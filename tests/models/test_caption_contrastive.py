# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Stage 1's models with the settings of the shipped files: the official loss, SimCSE, MNTP, and their checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from parts import text_encoder_from_config
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import LlamaForCausalLM
from whole_matrix import unit

from llm2clip.config import LoraConfig, Stage1Config, TextEncoderConfig
from llm2clip.config.loading import load_config
from llm2clip.data.text_batches import split_packed
from llm2clip.modeling.text_encoder import TextEncoder
from llm2clip.models.caption_contrastive import CaptionContrastive
from llm2clip.models.masked_next_token import MaskedNextTokenPrediction, mntp_loss
from llm2clip.teacher.llm import load_caption_tokenizer, load_llm_and_head
from llm2clip.training.stage1 import make_model

ROOT = Path(__file__).parents[2]
TEXTS = ['a red square', 'a blue circle on a wall', 'a red square', 'a purple stripe']


def _config(*files: str, **options: Any) -> Stage1Config:
    return load_config(Stage1Config, [
        *(str(ROOT / f'yamls/{file}.yaml') for file in ('stage1/paper', 'parts/teacher/llama3_8b', *files)),
        *(f'{key}={value}' for key, value in options.items())])


@pytest.mark.parametrize('negatives', [False, True])
@pytest.mark.parametrize('files', [[], ['stage1/official_code']])
def test_the_loss_is_the_official_one(files: list[str], negatives: bool) -> None:
    """Written out: a query finds its positive among those of all, and all hard negatives, by cosine × 50."""
    query = unit(64, 32, 0)
    sides = {'query': 3 * query, 'positive': unit(64, 32, 1) + 0.3 * query}
    if negatives:
        sides['negative'] = unit(64, 32, 2) / 2
    config = _config(*files)
    ids = torch.arange(1, 193).view(3, 64)
    if files:
        # In the official code equal texts are each other's negatives, too.
        ids[:, 5], ids[1, 7], ids[2, 3] = ids[:, 9], ids[1, 8], ids[0, 3]
    model = CaptionContrastive(torch.nn.Identity(), config.logit_scale, config.learn_logit_scale, config.symmetric,
                               config.mask_equal_texts)
    batch = {f'{side}_text_id': id for side, id in zip(('query', 'positive', 'negative'), ids)}
    loss = model.loss({side: vectors.float() for side, vectors in sides.items()}, batch)
    query, *candidates = sides.values()
    scores = 50 * F.normalize(query, dim=1) @ F.normalize(torch.cat(candidates), dim=1).T
    assert loss.item() == pytest.approx((scores.logsumexp(1) - scores.diagonal()).mean().item(), rel=1e-6)
    # A scale that is trained is in log space.
    assert model.loss({**sides, 'logit_scale': torch.tensor([50.0]).log()}, batch).item() == pytest.approx(loss.item())


@pytest.mark.parametrize('packed', [False, True])
def test_simcse_makes_two_vectors_of_a_caption(packed: bool, llm_folder: Path) -> None:
    config = _config('stage1/captions_only', 'stage1/simcse', **{'text_encoder.pretrained': llm_folder})
    assert config.train_data.pairs[0].positive is None and config.attention_dropout == 0.3
    model = make_model(config)
    tokens = load_caption_tokenizer(config.text_encoder)(TEXTS)
    ids = torch.tensor([1, 2, 1, 3])
    batch: dict[str, Any] = {'index': torch.arange(4)}
    for side in ('query', 'positive'):
        batch |= {f'{side}_{name}': value for name, value in {**tokens, 'text_id': ids}.items()}
    if packed:
        batch, = split_packed(batch, 4)
    torch.manual_seed(0)
    model.train()
    outputs = model(batch)
    assert F.cosine_similarity(outputs['query'], outputs['positive']).max() < 0.999
    # The two captions that are equal are not each other's negatives, and each still has to find itself.
    scores = 20 * F.normalize(outputs['query'], dim=1) @ F.normalize(outputs['positive'], dim=1).T
    scores[0, 2] = scores[2, 0] = -torch.inf
    torch.testing.assert_close(model.loss(outputs, batch), F.cross_entropy(scores, torch.arange(4)))
    # LoRA begins without effect, so its dropout alone makes no difference, and none is left when embedding.
    without = make_model(_config('stage1/captions_only', 'stage1/simcse', **{
        'text_encoder.pretrained': llm_folder, 'attention_dropout': 0})).train()(batch)
    evaluated = model.eval()(batch)
    for same in (without, evaluated):
        torch.testing.assert_close(same['query'], same['positive'])
    assert model.text_encoder.llm.config.attention_dropout == 0.0


@pytest.mark.parametrize('softcap', [None, 5.0])
def test_a_masked_token_is_predicted_at_the_position_before_it(softcap: float | None) -> None:
    torch.manual_seed(0)
    states, head, labels = torch.randn(3, 6, 8), nn.Linear(8, 11, bias=False), torch.full((3, 6), -100)
    rows, positions, tokens = torch.tensor([[0, 0, 2], [2, 5, 1], [4, 7, 0]])
    labels[rows, positions] = tokens
    logits = states[rows, positions - 1] @ head.weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(mntp_loss(states, labels, head, softcap), F.cross_entropy(logits, tokens))


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


def _model(folder: Path, r: int = 4, learn_logit_scale: bool = True) -> CaptionContrastive:
    encoder, _ = text_encoder_from_config(TextEncoderConfig(pretrained=str(folder)), LoraConfig(r=r))
    return CaptionContrastive(encoder, learn_logit_scale=learn_logit_scale)


def test_a_state_dict_holds_the_trainable_weights(llm_folder: Path) -> None:
    model, other = _model(llm_folder), _model(llm_folder)
    state = get_model_state_dict(model)
    assert state.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert 'scale.logit_scale' in state and len(state) == 2 * 7 * 2 + 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    set_model_state_dict(other, get_model_state_dict(model), options=StateDictOptions(strict=False))
    for name, value in model.named_parameters():
        torch.testing.assert_close(dict(other.named_parameters())[name], value)
    # Composer asks for all of it when it hands the weights of rank 0 to the other ranks.
    model.should_save_peft_only = False
    assert len(model.state_dict()) > len(state)


def test_a_checkpoint_of_another_model_is_refused(llm_folder: Path) -> None:
    model = _model(llm_folder)
    state = get_model_state_dict(model)
    lacking = {name: value for name, value in state.items() if name != 'scale.logit_scale'}
    for other, wrong, message in (
            (model, lacking, r"lacks \['scale\.logit_scale'\]"), (_model(llm_folder, r=2), state, 'size mismatch'),
            (_model(llm_folder, learn_logit_scale=False), state, r"has \['scale\.logit_scale'\]")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            other.load_state_dict(wrong, strict=False)
