# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""LLM2CLIP as transformers loads it: the adapter, the model's methods, and what else it takes without this package.

Exports with remote code hold a copy of this file, which ``trust_remote_code=True`` runs, and of those it imports.
So it imports nothing else of this package, and no more than torch, transformers and, if the vision tower is one of
timm's, timm; if the teacher is one of sentence-transformers, that as well.  Here, `llm2clip.export.hf.LLM2CLIPModel`
puts the tower and the teacher of training into the same model, and every export compares the features of both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

# Relative, since the copies in an export are no package of this name.
from .checks_llm2clip import (
    LoadError,
    check_no_code,
    check_weight_files,
    checksums,
    load_checked,
    load_encoder,
    load_tokenizer,
    read_encoding,
)
from .sentence_transformer_llm2clip import encode_sentences, load_sentence_transformer
from .text_encoder_llm2clip import CaptionTokenizer, encode_texts

try:  # transformers asks for every package that is imported outside of a try block
    import timm
except ImportError:
    timm = None

__all__ = ['Adapter', 'LLM2CLIPConfig', 'LLM2CLIPModel']

_TEACHER_FOLDER = 'teacher'


class LLM2CLIPConfig(PretrainedConfig):
    """Configuration of `LLM2CLIPModel`.

    Args:
        model: Vision tower, adapter and `embed_dim`.
        llm_embed_dim: Width of the teacher's vectors.
        teacher: Fingerprint of the teacher.
        learned_from: Fingerprint of the teacher as training knew it.  A frozen LLM is saved anew here, and so has
            another one in `teacher`.
        teacher_files: Of each teacher, the checksums of its files.
        weight_files: Checksums of the files of this model's weights, as they were exported.
        **kwargs: Passed to PretrainedConfig.
    """

    model_type = 'llm2clip'

    def __init__(
        self, model: Optional[dict[str, Any]] = None, llm_embed_dim: int = 0, teacher: Optional[dict[str, Any]] = None,
        learned_from: Optional[dict[str, Any]] = None, teacher_files: Sequence[dict[str, int]] = (),
        weight_files: Optional[dict[str, int]] = None, **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model = model or {}
        self.llm_embed_dim = llm_embed_dim
        self.teacher = teacher or {}
        self.learned_from = learned_from or {}
        self.teacher_files = list(teacher_files)
        self.weight_files = weight_files or {}
        for key in ('model', 'teacher', 'learned_from'):
            if not isinstance(getattr(self, key), dict):
                raise LoadError(f'config.json: {key} is {str(getattr(self, key))[:60]!r}, expected an object')
        self.recorded_teachers()
        check_no_code(self.model, 'config.json: model')

    def recorded_teachers(self) -> list[dict[str, Any]]:
        """Fingerprint of each teacher that the model learned from."""
        teachers = self.teacher.get('concatenated', [self.teacher])
        if not isinstance(teachers, list) or not all(isinstance(one, dict) for one in teachers):
            raise LoadError(f'config.json: teacher is {str(self.teacher)[:60]!r}, expected fingerprints')
        return teachers


class _VisionEncoder(nn.Module):
    """A tower of transformers or timm without its classifier: ``(B, 3, H, W)`` -> ``(B, width)``."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        self.of_transformers = bool(vision['architecture'])
        if self.of_transformers:
            fields = dict(vision['architecture'])
            architecture = AutoConfig.for_model(fields.pop('model_type'), **fields)
            extra = {'add_pooling_layer': False} if architecture.model_type in ('vit', 'deit', 'beit') else {}
            self.trunk: Any = AutoModel.from_config(architecture, dtype=torch.float32, trust_remote_code=False, **extra)
            self.width: int = getattr(architecture, 'hidden_size', None) or architecture.hidden_sizes[-1]
        else:
            if timm is None:
                raise ImportError(f'the vision tower {vision["name"]} is a timm model: pip install timm')
            known = timm.get_pretrained_cfg(vision['name'])
            size = {'img_size': vision['image_size']} if known is not None and known.fixed_input_size else {}
            self.trunk = timm.create_model(vision['name'], pretrained=False, **size)
            self.trunk.reset_classifier(0)
            self.width = self.trunk.num_features

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        outputs = self.trunk(pixel_values)
        if not self.of_transformers:
            return outputs
        pooled = getattr(outputs, 'pooler_output', None)
        return outputs.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


def _fill_tables(model: PreTrainedModel) -> None:
    """Compute anew what timm's towers compute in their constructors and do not save; transformers may have lost it."""
    module: Any
    for module in model.modules():
        if hasattr(module, 'init_non_persistent_buffers'):
            for name in module._non_persistent_buffers_set:
                table = module._buffers[name]
                if table is not None and table.is_meta:
                    module._buffers[name] = torch.empty_like(table, device=model.device)
            module.init_non_persistent_buffers()  # pyright: ignore[reportCallIssue]


class ResidualMLP(nn.Module):
    """``x + down(gelu(up(norm(x))))``, a block of the adapter of one width, and `expansion` times that inside."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class LatentTransformer(nn.Module):
    """A vector attends to latents, and an MLP with a gate follows: a block of the adapter.

    It is the latent attention of NV-Embed-v2 (Lee et al. 2024, section 3.1.1), which LLM2CLIP's transformer adaptor
    follows, with heads that share the width, of a caption's vector in place of its tokens' states.

    Args:
        width: Of its input and output.
        expansion: Hidden width of the MLP over `width`.
        heads: Of the attention; they divide `width`.
        latents: How many there are.
    """

    def __init__(self, width: int, expansion: int, heads: int, latents: int) -> None:
        super().__init__()
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.norm, self.norm_latents, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(…, width)`` -> ``(…, width)``."""
        queries = self.query(self.norm(x)).view(-1, self.heads, x.shape[-1] // self.heads).transpose(0, 1)
        # (latents, 2 * width) -> twice (heads, latents, width / heads)
        keys, values = self.key_value(self.norm_latents(self.latents)).unflatten(1, (2, self.heads, -1)).permute(
            1, 2, 0, 3)
        found = F.scaled_dot_product_attention(queries[None], keys[None], values[None])[0]
        x = x + self.output(found.transpose(0, 1).reshape(x.shape))
        hidden, gate = self.up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.down(hidden * F.gelu(gate))


class Adapter(nn.Module):
    """L2-normalise (unless told not to), `depth` blocks, LayerNorm, linear projection.

    Args:
        llm_embed_dim: Width of the teacher's vector.
        embed_dim: Width of the joint space.
        depth: Blocks: residual MLPs, as in the official code's text adaptor, or with `heads`, transformers.
        expansion: Hidden width of a block over its width.
        normalize: Whether the vector is scaled to length 1 first.
        heads: Of a transformer's attention.
        latents: Of a transformer.
    """

    def __init__(
        self, llm_embed_dim: int, embed_dim: int, depth: int = 4, expansion: int = 2, normalize: bool = True,
        heads: Optional[int] = None, latents: int = 512,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.blocks = nn.Sequential(*(
            ResidualMLP(llm_embed_dim, expansion) if heads is None else
            LatentTransformer(llm_embed_dim, expansion, heads, latents) for _ in range(depth)))
        self.norm = nn.LayerNorm(llm_embed_dim)
        self.projection = nn.Linear(llm_embed_dim, embed_dim)

    def forward(self, text_embedding: torch.Tensor) -> torch.Tensor:
        """``(…, llm_embed_dim)`` -> ``(…, embed_dim)``, not normalised."""
        if self.normalize:
            text_embedding = F.normalize(text_embedding, dim=-1)
        return self.projection(self.norm(self.blocks(text_embedding)))

    @staticmethod
    def is_block(module: nn.Module) -> bool:
        """Whether a module is one of the blocks."""
        return isinstance(module, (ResidualMLP, LatentTransformer))


class _Towers(nn.Module):
    """The trained weights, under the names that they have in training."""

    def __init__(self, model: dict[str, Any], llm_embed_dim: int) -> None:
        super().__init__()
        adapter, embed_dim = dict(model['adapter']), model['embed_dim']
        kinds = {'residual': Adapter, 'transformer': Adapter, 'linear': nn.Linear, 'identity': nn.Identity}
        self.vision_encoder = _VisionEncoder(model['vision'])
        projection = model.get('visual_projection', 'linear')
        self.visual_projection = kinds['identity' if projection == 'identity' else 'linear'](
            self.vision_encoder.width, embed_dim, bias=projection == 'affine')
        name = adapter.pop('name')
        if name == 'residual':
            adapter = {**adapter, 'heads': None}
        self.adapter = kinds[name](llm_embed_dim, embed_dim, **(adapter if kinds[name] is Adapter else {}))
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = None if model['logit_bias'] is None else nn.Parameter(torch.zeros(1))


def load_teacher(
    folder: Path, recorded: dict[str, Any], files: Optional[dict[str, int]] = None, trust_remote_code: bool = False,
    precision: str = 'fp32',
) -> Callable[[Sequence[str], torch.device], torch.Tensor]:
    """The frozen teacher in a folder: captions -> ``(N, llm_embed_dim)`` in float32 on the CPU, not normalised.

    Args:
        folder: LLM, tokenizer and ``text_encoder.json``, or a sentence-transformers model.
        recorded: Fingerprint of the teacher that the model learned from; a ``prompt`` is put before every caption.
        files: Checksums of that teacher's files; None, they are not compared.
        trust_remote_code: Whether code that comes with a sentence-transformers model is run.
        precision: ``fp32``, or ``amp_bf16`` for autocast.

    Raises:
        LoadError: The folder holds no teacher, or one that encodes otherwise.
    """
    how = {} if 'prompt' in recorded else read_encoding(folder / 'text_encoder.json', recorded)
    if files is not None:
        found = checksums(folder)
        for name in sorted({*found, *files}):
            if found.get(name) != files.get(name):
                fault = 'is missing' if name not in found else 'is not the file that was exported'
                raise LoadError(f'{folder / name}: {fault}, expected the teacher that the model learned from')
    if not how:
        model, prompt = load_sentence_transformer(folder, trust_remote_code), str(recorded['prompt'])
        return lambda texts, device: encode_sentences(model.to(device), texts, prompt, precision=precision)[0].cpu()
    tokenizer = CaptionTokenizer(load_tokenizer(folder), SimpleNamespace(**how))
    encoder = load_encoder(folder, SimpleNamespace(**how))

    def embed(texts: Sequence[str], device: torch.device) -> torch.Tensor:
        # Few CPUs are fast in bfloat16; float32 keeps its values.
        encoder.to(device=device, dtype=torch.float32 if device.type == 'cpu' else None)
        return encode_texts(encoder, tokenizer, texts, precision=precision)

    return embed


@dataclass
class LLM2CLIPOutput(ModelOutput):
    """Features ``(B, embed_dim)`` of each side, L2-normalised, and ``logits_per_image`` ``(B_images, B_texts)``."""

    image_features: Optional[torch.Tensor] = None
    text_features: Optional[torch.Tensor] = None
    logits_per_image: Optional[torch.Tensor] = None


class LLM2CLIPModel(PreTrainedModel):
    """Vision tower, adapter and, on demand, the teacher (or teachers) in the folder's ``teacher/``."""

    config_class = LLM2CLIPConfig
    main_input_name = 'pixel_values'
    trust_remote_code = False
    """Whether code that comes with a teacher of sentence-transformers is run."""
    teacher_precision = 'fp32'
    """In which teachers compute; ``amp_bf16`` for autocast."""
    revision: Optional[str] = None
    """Of a model on the Hub, from which its teacher comes as well."""

    def __init__(self, config: LLM2CLIPConfig) -> None:
        super().__init__(config)
        self.model = self._make_towers()
        self._teachers: Optional[tuple[Any, ...]] = None
        self._tokenizer: Any = None
        self.post_init()

    def _make_towers(self) -> Any:
        return _Towers(self.config.model, self.config.llm_embed_dim)

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from the folder."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As of every model of transformers, but a LoadError unless the weights are all there, finite, and those that
        were exported.

        With ``trust_remote_code=True``, code that comes with a teacher of sentence-transformers is run when it embeds.
        """
        if Path(str(pretrained_model_name_or_path), 'config.json').is_file():
            check_weight_files(Path(pretrained_model_name_or_path))
        # No export has pickled weights.
        options = {'use_safetensors': True, **kwargs}
        model, info = load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **options)
        _fill_tables(model)
        model.trust_remote_code = bool(kwargs.get('trust_remote_code'))
        # transformers 4 writes into the configuration what it has loaded; 5 asks for that by its name.
        model.revision = getattr(model.config, '_commit_hash', None) or kwargs.get('revision')
        model.config.weight_files = {}  # they may be others when this model is saved again
        return (model, info) if output_loading_info else model

    @staticmethod
    def teacher_folders(folder: Path) -> list[Path]:
        """Where the teacher, or the teachers, of an exported folder lie."""
        # A sentence-transformers model has folders such as 1_Pooling.
        several = [path for path in (folder / _TEACHER_FOLDER).glob('[0-9]*') if path.name.isdecimal()]
        return sorted(several, key=lambda path: int(path.name)) or [folder / _TEACHER_FOLDER]

    @staticmethod
    def read_tokens(tokenizer: Any, input_ids: torch.Tensor) -> list[str]:
        """The texts of which a tokenizer made ``(B, T)`` tokens, padded on either side."""
        return tokenizer.batch_decode(input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(B, 3, H, W)`` from the image processor -> ``(B, embed_dim)``, L2-normalised."""
        pooled = self.model.vision_encoder(pixel_values.to(self.dtype))
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def get_text_features(
        self, texts: Optional[Sequence[str]] = None, text_embedding: Optional[torch.Tensor] = None,
        input_ids: Optional[torch.Tensor] = None, attention_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """``(B, embed_dim)``, L2-normalised, of one of the first three.

        Args:
            texts: B captions; a string is one.
            text_embedding: The teacher's vectors ``(B, llm_embed_dim)``.
            input_ids: ``(B, T)``, which the folder's tokenizer made of captions.  They are read back and tokenised as
                the teacher was trained, with its template and length.
            attention_mask: Not used, since padding is read back as nothing.
        """
        if sum(given is not None for given in (texts, text_embedding, input_ids)) != 1:
            raise ValueError('give either texts or text_embedding or input_ids')
        if input_ids is not None:
            self._tokenizer = self._tokenizer or load_tokenizer(self.name_or_path or '.', revision=self.revision)
            texts = self.read_tokens(self._tokenizer, input_ids)
        if texts is not None:
            text_embedding = self.embed_texts(texts)
        assert text_embedding is not None
        # In the weights' type, where training computes in float32.
        return F.normalize(self.model.adapter(text_embedding.to(self.device, self.dtype)).float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """The vectors ``(B, llm_embed_dim)`` of B captions (a string is one) by the teacher, which the first call
        loads."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if self._teachers is None:
            name = self.name_or_path or '.'
            folder = Path(name)
            if not folder.is_dir():
                folder = Path(snapshot_download(name, revision=self.revision, allow_patterns=f'{_TEACHER_FOLDER}/*'))
            # In a tuple, so that they are no submodules and not saved with this model.
            folders, recorded = self.teacher_folders(folder), self.config.recorded_teachers()
            files = self.config.teacher_files or [None] * len(recorded)
            if not len(folders) == len(recorded) == len(files):
                raise LoadError(f'{folder}: has {len(folders)} teachers, expected {len(recorded)} as config.json says')
            self._teachers = tuple(load_teacher(*teacher, self.trust_remote_code, self.teacher_precision)
                                   for teacher in zip(folders, recorded, files))
        vectors = [teacher(texts, self.device) for teacher in self._teachers]
        return vectors[0] if len(vectors) == 1 else torch.cat([F.normalize(v, dim=-1) for v in vectors], dim=-1)

    def forward(
        self, pixel_values: torch.Tensor, text_embedding: Optional[torch.Tensor] = None,
        input_ids: Optional[torch.Tensor] = None, attention_mask: Optional[torch.Tensor] = None,
    ) -> LLM2CLIPOutput:
        """Features and logits; arguments as of `get_image_features` and `get_text_features`."""
        image_features = self.get_image_features(pixel_values)
        text_features = self.get_text_features(None, text_embedding, input_ids, attention_mask)
        logits = self.model.logit_scale.exp() * image_features @ text_features.T
        if self.model.logit_bias is not None:
            logits = logits + self.model.logit_bias
        return LLM2CLIPOutput(image_features, text_features, logits)
