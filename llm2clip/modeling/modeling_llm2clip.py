# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""LLM2CLIP for transformers: configuration, vision tower, text adapter and teacher.

Exported models contain a copy of this file, which ``trust_remote_code=True`` runs with the files that it
imports.  They need only torch and transformers, timm for a timm vision tower, and sentence-transformers for
such a teacher.  In this package, `llm2clip.export.hf.LLM2CLIPModel` builds the model as training does, whose
classes derive from those here; each export compares both.
"""

import importlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

# Relative, since the copies in an exported model are not part of a package `llm2clip`.
from .adapter import make_adapter, make_heads, make_projection
from .loaders import (
    LoadError,
    check_no_code,
    check_weight_files,
    checksums,
    load_checked,
    load_encoder,
    load_tokenizer,
    read_encoding,
)
from .sentence_transformer import encode_sentences, load_sentence_transformer
from .text_encoder import CaptionTokenizer, encode_texts

# Modules that an exported folder carries, this one included.
CODE = ('modeling_llm2clip', 'adapter', 'loaders', 'image_processing_llm2clip', 'sentence_transformer',
        'text_encoder')
_TEACHER_FOLDER = 'teacher'
# Pretrained weights of these types have no pooler, which would be initialised at random.
TRUNK_OPTIONS: dict[str, Any] = dict.fromkeys(('vit', 'deit', 'beit'), {'add_pooling_layer': False})


class LLM2CLIPConfig(PretrainedConfig):
    """Configuration of `LLM2CLIPModel`.

    Args:
        model: Vision tower, adapter and `embed_dim`.
        llm_embed_dim: Width of the teacher's vectors.
        teacher: Fingerprint of the teacher in this folder.
        learned_from: Fingerprint of the teacher in training; for an LLM without stage 1 it differs from
            `teacher`.
        teacher_files: Checksums of the files of each teacher.
        weight_files: Checksums of this model's weight files at export.
        **kwargs: Passed to PretrainedConfig.
    """

    model_type = 'llm2clip'

    def __init__(
        self, model: Mapping[str, Any] = {}, llm_embed_dim: int = 0, teacher: Mapping[str, Any] = {},
        learned_from: Mapping[str, Any] = {}, teacher_files: Sequence[dict[str, int]] = (),
        weight_files: Mapping[str, int] = {}, **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model = dict(model)
        self.llm_embed_dim = llm_embed_dim
        self.teacher = dict(teacher)
        self.learned_from = dict(learned_from)
        self.teacher_files = list(teacher_files)
        self.weight_files = dict(weight_files)
        check_no_code(self.model, 'config.json: model')

    @property
    def projection_dim(self) -> int:
        """`embed_dim`, by its name in a CLIPConfig, which sentence-transformers reads."""
        return self.model.get('embed_dim', 0)


def new_trunk(architecture: PretrainedConfig) -> Any:
    """Build a tower of transformers in the default dtype: that of an exported model while it loads."""
    return AutoModel.from_config(architecture, dtype=torch.get_default_dtype(), trust_remote_code=False,
                                 **TRUNK_OPTIONS.get(architecture.model_type, {}))


class VisionEncoder(nn.Module):
    """Vision tower from transformers or timm without its classifier: ``(B, 3, H, W)`` -> ``(B, width)``.

    With `levels`, the means of a timm model's last feature maps follow the pooled features.  Maps have no
    scale in common, so each part is L2-normalised.  The features of the towers `beside` this one come last.
    """

    def __init__(self, trunk: Any, levels: int = 0, beside: Sequence['VisionEncoder'] = ()) -> None:
        super().__init__()
        self.trunk: Any = trunk
        self.levels = levels
        self.beside = nn.ModuleList(beside)
        if isinstance(trunk, PreTrainedModel):
            # Towers of several stages have a width per stage.
            self.width: int = getattr(trunk.config, 'hidden_size', None) or trunk.config.hidden_sizes[-1]
        else:
            self.width = trunk.head_hidden_size
        if levels:
            self.width += sum(level['num_chs'] for level in list(self.trunk.feature_info)[-levels:])
        self.width += sum(encoder.width for encoder in beside)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self._features(pixel_values)
        if not self.beside:
            return features
        return torch.cat([features, *(encoder(pixel_values) for encoder in self.beside)], dim=-1)

    def _features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.levels:
            last, maps = self.trunk.forward_intermediates(pixel_values, indices=self.levels)
            parts = [self.trunk.forward_head(last), *(feature_map.mean((2, 3)) for feature_map in maps)]
            return torch.cat([F.normalize(part.float(), dim=-1) for part in parts], dim=-1)
        outputs = self.trunk(pixel_values)
        if isinstance(outputs, torch.Tensor):
            return outputs
        pooled = getattr(outputs, 'pooler_output', None)
        if pooled is None:
            return outputs.last_hidden_state[:, 0]
        return pooled.flatten(1)


class Towers(nn.Module):
    """The trained modules: `llm2clip.models.llm2clip.LLM2CLIP` in training, and these in an export."""

    def __init__(
        self, vision_encoder: VisionEncoder, visual_projection: nn.Module, adapter: nn.Module,
        logit_scale: float = 0.0, logit_bias: Optional[float] = None,
    ) -> None:
        super().__init__()
        self.vision_encoder: Any = vision_encoder
        self.visual_projection = visual_projection
        self.adapter = adapter
        # One-dimensional, since FSDP2 cannot shard a scalar.
        self.logit_scale = nn.Parameter(torch.full((1,), logit_scale))
        self.logit_bias: Optional[nn.Parameter] = None
        if logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.full((1,), float(logit_bias)))


def _exported_encoder(vision: Mapping[str, Any]) -> VisionEncoder:
    beside = [_exported_encoder(tower | {'image_size': vision['image_size']})
              for tower in vision.get('beside', [])]
    return VisionEncoder(_exported_trunk(vision), vision.get('feature_levels', 0), beside)


def _exported_trunk(vision: Mapping[str, Any]) -> Any:
    if vision['architecture']:
        fields = dict(vision['architecture'])
        return new_trunk(AutoConfig.for_model(fields.pop('model_type'), **fields))
    # No `import`: transformers would require the package for every exported model.
    timm: Any = importlib.import_module('timm')
    size: dict[str, Any] = {}
    if getattr(timm.get_pretrained_cfg(vision['name']), 'fixed_input_size', False):
        size['img_size'] = vision['image_size']
    trunk = timm.create_model(vision['name'], pretrained=False, **size)
    trunk.reset_classifier(0)
    return trunk


def load_teacher(
    folder: Path, recorded: Mapping[str, Any], files: Mapping[str, int],
    trust_remote_code: bool = False, precision: str = 'fp32',
) -> Callable[[Sequence[str], torch.device], torch.Tensor]:
    """Load a teacher as a function of captions and device.

    The function returns vectors ``(N, llm_embed_dim)`` in float32 on the CPU, not normalised.

    Args:
        folder: LLM, tokenizer and ``text_encoder.json``, or a sentence-transformers model.
        recorded: Fingerprint of the teacher in config.json; a ``prompt`` is put before every caption.
        files: Expected checksums of the teacher's files.
        trust_remote_code: Whether to run code that comes with a sentence-transformers model.
        precision: ``fp32``, or ``amp_bf16`` for autocast.

    Raises:
        LoadError: The folder has no teacher, or other files than exported.
    """
    differing = sorted(dict(checksums(folder).items() ^ files.items()))
    if differing:
        raise LoadError(f'{folder / differing[0]}: is missing or not the file that was exported, expected '
                        'the teacher that the model learned from')
    if 'prompt' in recorded:
        model = load_sentence_transformer(folder, trust_remote_code)
        prompt = str(recorded['prompt'])

        def embed_sentences(texts: Sequence[str], device: torch.device) -> torch.Tensor:
            return encode_sentences(model.to(device), texts, prompt, precision=precision)[0].cpu()

        return embed_sentences
    encoding = SimpleNamespace(**read_encoding(folder / 'text_encoder.json'))
    tokenizer = CaptionTokenizer(load_tokenizer(folder), encoding)
    encoder = load_encoder(folder, encoding)

    def embed(texts: Sequence[str], device: torch.device) -> torch.Tensor:
        # Few CPUs are fast in bfloat16; the cast to float32 is exact.
        encoder.to(device=device, dtype=torch.float32 if device.type == 'cpu' else None)
        return encode_texts(encoder, tokenizer, texts, precision=precision)

    return embed


@dataclass
class LLM2CLIPOutput(ModelOutput):
    """L2-normalised features ``(B, embed_dim)`` of images and texts;
    ``logits_per_image`` ``(B_images, B_texts)``."""

    image_features: Optional[torch.Tensor] = None
    text_features: Optional[torch.Tensor] = None
    logits_per_image: Optional[torch.Tensor] = None


class LLM2CLIPModel(PreTrainedModel):
    """Vision tower and text adapter; the teacher (or teachers) in the folder's ``teacher/`` is loaded on
    demand."""

    config_class = LLM2CLIPConfig
    main_input_name = 'pixel_values'
    # With `device_map='auto'`, all towers are on one device.
    _no_split_modules = ['Towers', 'LLM2CLIP']
    trust_remote_code = False
    """Whether to run code that comes with a sentence-transformers teacher."""
    teacher_precision = 'fp32'
    """Precision of the teachers: ``fp32``, or ``amp_bf16`` for autocast."""
    hub_options: dict[str, Any] = {}
    """Revision of a model on the Hub, token and cache folder, used for its teacher and tokenizer too."""

    def __init__(self, config: LLM2CLIPConfig) -> None:
        super().__init__(config)
        self.model = self._make_towers()
        self._teachers: Optional[tuple[Any, ...]] = None
        self._tokenizer: Any = None
        self.post_init()

    def _make_towers(self) -> Any:
        model = self.config.model
        vision_encoder = _exported_encoder(model['vision'])
        heads = model.get('heads', 1)
        dim = model['embed_dim'] // heads
        projection = make_heads(heads, lambda: make_projection(
            vision_encoder.width, dim, model.get('visual_projection', 'linear'),
            model.get('visual_projection_expansion', 0)))
        adapter = make_heads(heads, lambda: make_adapter(self.config.llm_embed_dim, dim, **model['adapter']))
        return Towers(vision_encoder, projection, adapter, logit_bias=model['logit_bias'])

    def _init_weights(self, module: nn.Module) -> None:
        """No-op: all weights come from the folder."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load the model; raise a LoadError if weights are missing, unexpected,
        not finite or changed since export.

        With ``trust_remote_code=True``, code of a sentence-transformers teacher is also run, when it embeds.
        """
        if Path(str(pretrained_model_name_or_path), 'config.json').is_file():
            check_weight_files(Path(pretrained_model_name_or_path))
        kwargs.setdefault('use_safetensors', True)  # exports have no pickled weights
        model, info = load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
        for module in model.modules():
            # timm's non-persistent buffers: checkpoints lack them, and transformers may have dropped them.
            if hasattr(module, 'init_non_persistent_buffers'):
                for name in module._non_persistent_buffers_set:
                    table = module._buffers[name]
                    if table is not None and table.is_meta:
                        module._buffers[name] = torch.empty_like(table, device=model.device)
                module.init_non_persistent_buffers()
        model.trust_remote_code = bool(kwargs.get('trust_remote_code'))
        model.hub_options = {name: kwargs.get(name) for name in ('revision', 'token', 'cache_dir')}
        # transformers 4 stores the loaded commit in the configuration; 5 does not.
        model.hub_options['revision'] = getattr(model.config, '_commit_hash', None) or kwargs.get('revision')
        model.config.weight_files = {}  # outdated once this model is saved again
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save the model, with the teacher and code of the folder that it was loaded from."""
        if kwargs.get('push_to_hub'):
            raise ValueError('push_to_hub would leave out the teacher, expected none: save without it, then '
                             'publish the folder with hf upload')
        if self.name_or_path and kwargs.get('is_main_process', True):
            source = self._folder()
            target = Path(save_directory)
            if source.resolve() != target.resolve() and (source / _TEACHER_FOLDER).is_dir():
                shutil.copytree(source / _TEACHER_FOLDER, target / _TEACHER_FOLDER, dirs_exist_ok=True)
                for path in source.glob('*.py'):
                    shutil.copy(path, target)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, *args: Any, **kwargs: Any
    ) -> Any:
        """Publish the model with its teacher; a ValueError for several teachers, and for others with folders,
        which transformers cannot upload."""
        if list((self._folder() / _TEACHER_FOLDER).glob('*/')):
            raise ValueError('push_to_hub cannot upload the folders in teacher/, expected files: publish '
                             'the folder that export_hf wrote with hf upload')
        return super().push_to_hub(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Other processes, such as those of `SentenceTransformer.encode(device=[…])`, load their own teachers.
        return vars(self) | {'_teachers': None}

    def _folder(self) -> Path:
        """Return the folder that this model was loaded from, or its teacher's from the Hub."""
        name = str(self.name_or_path)
        if not Path(name).is_dir():
            name = snapshot_download(name, allow_patterns=f'{_TEACHER_FOLDER}/*', **self.hub_options)
        return Path(name)

    @staticmethod
    def teacher_folders(folder: Path) -> list[Path]:
        """Return the folder of the teacher, or of each teacher, in an exported folder."""
        # Only whole numbers: a sentence-transformers model has folders such as 1_Pooling.
        several: list[Path] = []
        for path in (folder / _TEACHER_FOLDER).glob('[0-9]*'):
            if path.name.isdecimal():
                several.append(path)
        several.sort(key=lambda path: int(path.name))
        return several or [folder / _TEACHER_FOLDER]

    @staticmethod
    def read_tokens(tokenizer: Any, input_ids: torch.Tensor) -> list[str]:
        """Decode tokens ``(B, T)``, padded on either side, to texts."""
        return tokenizer.batch_decode(input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return L2-normalised features ``(B, embed_dim)`` of ``(B, 3, H, W)`` from the image processor."""
        pooled = self.model.vision_encoder(pixel_values.to(self.dtype))
        return F.normalize(self.model.visual_projection(pooled.to(self.dtype)).float(), dim=-1)

    def get_text_features(
        self, texts: Optional[Sequence[str]] = None, text_embedding: Optional[torch.Tensor] = None,
        input_ids: Optional[torch.Tensor] = None, attention_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Return L2-normalised features ``(B, embed_dim)`` of exactly one of the first three arguments.

        Args:
            texts: B captions, or one string.
            text_embedding: The teacher's vectors ``(B, llm_embed_dim)``.
            input_ids: Tokens ``(B, T)`` from the folder's tokenizer.  They are decoded and tokenised again
                with the teacher's template and maximum length.
            attention_mask: Not used, since decoding drops padding.

        Raises:
            ValueError: None or several of the first three are given.
        """
        if sum(given is not None for given in (texts, text_embedding, input_ids)) != 1:
            raise ValueError('give either texts or text_embedding or input_ids')
        if input_ids is not None:
            self._tokenizer = self._tokenizer or load_tokenizer(
                str(self.name_or_path), config=self.config, **self.hub_options)
            texts = self.read_tokens(self._tokenizer, input_ids)
        if texts is not None:
            text_embedding = self.embed_texts(texts)
        assert text_embedding is not None
        # Compute in the dtype of the weights; training computes this in float32.
        return F.normalize(self.model.adapter(text_embedding.to(self.device, self.dtype)).float(), dim=-1)

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return `get_image_features`, by the name that open_clip and CLIP_benchmark call."""
        return self.get_image_features(pixel_values)

    def encode_text(self, texts: Union[torch.Tensor, Sequence[str]]) -> torch.Tensor:
        """Return `get_text_features` of tokens ``(B, T)`` or captions, by the name that open_clip and
        CLIP_benchmark call."""
        if isinstance(texts, torch.Tensor):
            return self.get_text_features(input_ids=texts)
        return self.get_text_features(texts)

    def get_multimodal_features(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the sum of each image's and its text's features, L2-normalised: ``(B, embed_dim)``."""
        image_features = self.get_image_features(pixel_values)
        text_features = self.get_text_features(input_ids=input_ids)
        return F.normalize(image_features + text_features, dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return vectors ``(B, llm_embed_dim)`` of B captions, or of one string, in float32 on the CPU.

        The first call loads the teacher.  Vectors of several teachers are L2-normalised and concatenated.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return torch.empty(0, self.config.llm_embed_dim)
        if self._teachers is None:
            folder = self._folder()
            folders = self.teacher_folders(folder)
            recorded = self.config.teacher.get('concatenated', [self.config.teacher])
            files = self.config.teacher_files
            if not len(folders) == len(recorded) == len(files):
                raise LoadError(f'{folder}: has {len(folders)} teachers, expected {len(recorded)} as '
                                'config.json says')
            # A tuple, so that they are not submodules and are not saved with this model.
            self._teachers = tuple(load_teacher(*teacher, self.trust_remote_code, self.teacher_precision)
                                   for teacher in zip(folders, recorded, files))
        vectors = [teacher(texts, self.device) for teacher in self._teachers]
        if len(vectors) == 1:
            return vectors[0]
        return torch.cat([F.normalize(part, dim=-1) for part in vectors], dim=-1)

    def forward(
        self, pixel_values: torch.Tensor, text_embedding: Optional[torch.Tensor] = None,
        input_ids: Optional[torch.Tensor] = None, attention_mask: Optional[torch.Tensor] = None,
    ) -> LLM2CLIPOutput:
        """Return features and logits; see `get_image_features` and `get_text_features` for the arguments."""
        image_features = self.get_image_features(pixel_values)
        text_features = self.get_text_features(None, text_embedding, input_ids, attention_mask)
        logits = self.model.logit_scale.exp() * image_features @ text_features.T
        if self.model.logit_bias is not None:
            logits = logits + self.model.logit_bias
        return LLM2CLIPOutput(image_features, text_features, logits)
