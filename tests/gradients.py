# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Loss and gradients of one Composer training step.  `composer -n 2 tests/gradients.py LLM CLIP OUT` writes two ranks'.

The global batch is the same whatever the ranks: hard negatives, texts of different lengths, one sample without a
negative, two that share a text.
"""

import sys
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from composer import Callback, DataSpec, State, Trainer
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import dist, get_device
from parts import text_encoder_from_config
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from llm2clip.config import (
    AdapterConfig,
    ClipTextConfig,
    FsdpConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    TextEncoderConfig,
    VisionConfig,
)
from llm2clip.data.captions import text_id
from llm2clip.data.image_text_dataset import split_columns
from llm2clip.data.text_batches import split_packed
from llm2clip.models.adapter_folder import build_adapter
from llm2clip.models.caption_contrastive import CaptionContrastive
from llm2clip.models.inherited_adapter import ComposerInheritance
from llm2clip.models.joint import JointLLM2CLIP
from llm2clip.models.llm2clip import LLM2CLIP, ComposerLLM2CLIP
from llm2clip.models.sharding import compile_blocks, fsdp2_config, set_up_units, unwrapped_name
from llm2clip.teacher.clip_text import load_clip_text, load_clip_tokenizer
from llm2clip.training.algorithms.grad_cache import GradCache, with_rows
from llm2clip.training.algorithms.weights import AverageGlooGradients

N = 10
QUERIES = [f'a {"very " * (i % 4)}red square number {i}' for i in range(N - 1)] + ['a red square number 0']
POSITIVES = [f'number {i}, {"painted " * (i * 5 % 7)}on a wall' for i in range(N)]
NEGATIVES = ['', *(f'a blue circle {"or so " * (i % 3)}{i}' for i in range(1, N))]
# So many tokens per microbatch that the first of two ranks needs two, and the second three.
TOKENS = 124
# Trained text encoders in stage 2: the LLM by LoRA, CLIP's own text tower.
JOINT: dict[str, dict[str, Any]] = {'lora': {'captions': 3}, 'clip': {'lora': False}}
PREFIXES = LossConfig(matryoshka_dims=[2, 8, 16], mask_equal_texts=True, block_size=3)
CUSTOM = LossConfig('user_losses:Bilinear', {'dim': 16})
Result = dict[str, torch.Tensor]


def modules(model: torch.nn.Module, kind: type) -> list[str]:
    """Names of those that FSDP2 shards one by one (FSDPModule), or that are recomputed (CheckpointWrapper)."""
    return [unwrapped_name(name) for name, module in model.named_modules() if isinstance(module, kind)]


class Way(NamedTuple):
    """How a step is taken."""

    fsdp: Optional[FsdpConfig] = None
    compiled: bool = False
    """Without any graph break, but for the attention of packed texts."""


COPIES = 2 if torch.__version__ >= '2.8' else 1  # gloo of torch 2.7 refuses to average over copies of a model
WAYS = {'ddp': Way(), 'fsdp': Way(FsdpConfig(activation_checkpointing=True))}
HSDP = Way(FsdpConfig(activation_checkpointing=True, replicate=COPIES))
COMPILED = {name: way._replace(compiled=True) for name, way in WAYS.items()}


class _InOneGraph(ComposerModel):
    """The naive computation with the cache's microbatches, and so with its dropout: all of them in one graph."""

    microbatch_size = 1
    split = staticmethod(split_packed)
    feature_names: tuple[str, ...]

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        parts = self.split(with_rows(batch, self.feature_names), self.microbatch_size)
        outputs = [super(_InOneGraph, self).forward(part) for part in parts]
        result = dict(outputs[0])
        for name in self.feature_names:
            order = torch.cat([part[f'{name}_row'] for part in parts]).argsort()
            result[name] = torch.cat([output[name] for output in outputs])[order]
        return result


class InOneGraph(_InOneGraph, CaptionContrastive):
    pass


class JointInOneGraph(_InOneGraph, JointLLM2CLIP):
    split = staticmethod(split_columns)


def _rows() -> slice:
    share = N // dist.get_world_size()
    return slice(dist.get_global_rank() * share, (dist.get_global_rank() + 1) * share)


def caption_step(
    llm: str, microbatch_size: int, dropout: float, kind: str, way: Way = WAYS['ddp'], max_tokens: Optional[int] = None,
) -> Result:
    """One step of stage 1; `kind` is ``plain``, of padded texts, ``cached`` or ``in_one_graph``."""
    torch.manual_seed(0)
    encoder, tokenizer = text_encoder_from_config(
        TextEncoderConfig(pretrained=llm), LoraConfig(r=4, lora_dropout=dropout), 0.1)
    model = (InOneGraph if kind == 'in_one_graph' else CaptionContrastive)(encoder, 20.0, True, True)
    model.microbatch_size = microbatch_size
    batch: dict[str, Any] = {'index': torch.arange(N)[_rows()]}
    for side, texts in (('query', QUERIES), ('positive', POSITIVES), ('negative', NEGATIVES)):
        tokens = [tokenizer.tokenize([text])[0] if text else tokenizer.placeholder() for text in texts]
        batch.update({f'{side}_{k}': v[_rows()] for k, v in tokenizer.pad(tokens).items()})
        batch[f'{side}_text_id'] = torch.tensor([text_id(text) for text in texts])[_rows()]
    return _step(model, batch, microbatch_size if kind == 'cached' else None,
                 partial(split_packed, max_tokens=max_tokens) if kind == 'cached' else lambda batch, _: [batch], way)


def image_step(
    microbatch_size: Optional[int], way: Way = WAYS['ddp'], tower: str = 'test_efficientnet', captions: int = 1,
    loss: Optional[LossConfig] = None, distilled: bool = False,
) -> Result:
    """One step of stage 2, with the cache unless `microbatch_size` is None."""
    torch.manual_seed(0)
    config = ModelConfig(VisionConfig(tower, False, image_size=32), AdapterConfig(depth=1), embed_dim=16)
    model = ComposerLLM2CLIP(LLM2CLIP(config, 8), loss)
    texts = (N,) if captions == 1 else (N, captions)
    batch = {'index': torch.arange(N), 'pixel_values': torch.randn(N, 3, 32, 32),
             'text_embedding': torch.randn(*texts, 8), 'text_id': torch.arange(N * captions).view(texts) % 23}
    if distilled:
        batch['initial_image_features'] = F.normalize(torch.randn(N, 16), dim=1)
        model.loss_config.block_size = 2
    return _step(model, {k: v[_rows()] for k, v in batch.items()}, microbatch_size, None, way)


def joint_step(
    llm: str, clip: str, microbatch_size: int, kind: str, way: Way = WAYS['ddp'], lora: bool = True,
    captions: int = 1, dropout: float = 0.3,
) -> Result:
    """One step of stage 2 with a trained text encoder, the LLM with `lora` or CLIP's text tower; `kind` as of
    `caption_step`, and texts are padded where a microbatch has all."""
    torch.manual_seed(0)
    adapter = AdapterConfig('residual' if lora else 'identity', depth=1)
    config = ModelConfig(VisionConfig('test_vit', False, image_size=32), adapter, embed_dim=32)
    if lora:
        encoder, tokenizer = text_encoder_from_config(TextEncoderConfig(pretrained=llm),
                                                      LoraConfig(r=4, lora_dropout=dropout), 0.1)
        tokenize = tokenizer if microbatch_size == N else tokenizer.packed
    else:
        one = ClipTextConfig(clip)
        encoder, tokenize = load_clip_text(one), load_clip_tokenizer(one)
    kinds = JointInOneGraph if kind == 'in_one_graph' else JointLLM2CLIP
    model = kinds(LLM2CLIP(config, 32), encoder, tokenize, LossConfig(mask_equal_texts=True))
    model.microbatch_size = microbatch_size
    columns = [QUERIES, POSITIVES, NEGATIVES][:captions]
    texts = (N,) if captions == 1 else (N, captions)
    batch: dict[str, Any] = {'index': torch.arange(N), 'pixel_values': torch.randn(N, 3, 32, 32),
                             'text_id': torch.arange(N * captions).view(texts) % 23}
    batch = {k: v[_rows()] for k, v in batch.items()}
    batch['caption'] = columns[0][_rows()] if captions == 1 else [column[_rows()] for column in columns]
    return _step(model, batch, microbatch_size if kind == 'cached' else None, split_columns, way)


def inheritance_step(microbatch_size: Optional[int], way: Way = WAYS['ddp']) -> Result:
    """One step of inheritance, in which two samples of the first rank and one of the second do not count."""
    torch.manual_seed(0)
    model = ComposerInheritance(build_adapter(AdapterConfig(depth=2), 8, 16), 1.0, 2.0, block_size=2)
    batch = {'index': torch.arange(N), 'text_embedding': torch.randn(N, 8), 'target': torch.randn(N, 16),
             'counted': torch.tensor([i not in (1, 4, 7) for i in range(N)])}
    return _step(model, {k: v[_rows()] for k, v in batch.items()}, microbatch_size, None, way)


class _Keep(Callback):

    units: dict[str, list[str]] = {}
    """What FSDP2 sharded and recomputed in the last step."""

    def __init__(self) -> None:
        self.result: Result = {}

    def after_train_batch(self, state: State, logger: Logger) -> None:
        for name, parameter in state.model.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                self.result[unwrapped_name(name)] = grad.clone()

    def batch_end(self, state: State, logger: Logger) -> None:
        self.result['loss'] = torch.tensor(state.total_loss_dict['loss/train/total'])
        self.result['random'] = torch.rand(3)
        self.units.update(sharded=modules(state.model, FSDPModule),
                          recomputed=modules(state.model, CheckpointWrapper))


def _step(model: Any, batch: dict[str, Any], microbatch_size: Optional[int], split: Any, way: Way) -> Result:
    if way.compiled:
        compile_blocks(model, backend='aot_eager', fullgraph=not isinstance(model, CaptionContrastive))
    data = DataSpec([batch], get_num_samples_in_batch=lambda b: len(b['index']), split_batch=split)
    keep = _Keep()
    cache = [GradCache(data.split_batch)] if microbatch_size else []
    trainer = Trainer(
        model=model, train_dataloader=data, max_duration='1ba', device='cpu', precision='fp32', callbacks=[keep],
        optimizers=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0),
        algorithms=[*cache, AverageGlooGradients()], device_train_microbatch_size=microbatch_size or N, seed=7,
        parallelism_config={'fsdp': fsdp2_config(way.fsdp)} if way.fsdp else None, progress_bar=False)
    if way.fsdp is not None:
        set_up_units(trainer.state.model)
        meshes = {parameter.device_mesh.shape for parameter in trainer.state.model.parameters()}
        assert meshes == {(2,) if way.fsdp.replicate == 1 else (2, 1)}
    trainer.fit()
    trainer.close()
    return keep.result


def main(llm: str, clip: str, out: str) -> None:
    dist.initialize_dist(get_device('cpu'), 120)
    results: dict[str, Any] = {}
    for name, way in WAYS.items():
        for size in (5, 2):
            results[f'captions/{name}/{size}'] = caption_step(llm, size, 0.0, 'cached', way)
        results[f'captions/{name}/tokens'] = caption_step(llm, N, 0.0, 'cached', way, TOKENS)
        for kind in ('cached', 'in_one_graph'):
            results[f'dropout/{name}/{kind}'] = caption_step(llm, 3, 0.3, kind, way)
        results[f'captions/{name}/units'] = dict(_Keep.units)
        results[f'images/{name}/3 captions, distilled'] = image_step(2, way, captions=3, distilled=True)
        results[f'images/{name}/prefixes'] = image_step(2, way, captions=3, loss=PREFIXES)
        for size in (None, 2):
            results[f'images/{name}/custom/{size}'] = image_step(size, way, captions=3, loss=CUSTOM)
        results[f'inheritance/{name}'] = inheritance_step(2, way)
        results[f'inheritance/{name}/units'] = dict(_Keep.units)
        for case, of in JOINT.items():
            results[f'joint/{name}/{case}'] = joint_step(llm, clip, 2, 'cached', way, dropout=0.0, **of)
        results[f'images/{name}'] = image_step(2, way)
        results[f'images/{name}/units'] = dict(_Keep.units)
    results['captions/hsdp/2'] = caption_step(llm, 2, 0.0, 'cached', HSDP)
    results['images/hsdp'] = image_step(2, HSDP)
    results['compiled'] = image_step(N // 2, COMPILED['fsdp'], 'test_vit')  # other sizes would be compiled again
    if dist.get_global_rank() == 0:
        torch.save(results, out)


if __name__ == '__main__':
    main(*sys.argv[1:])
