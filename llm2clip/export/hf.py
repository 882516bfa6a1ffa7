# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Export of a trained model as a Hugging Face folder, and the class that loads it."""

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional, Union

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    SiglipVisionModel,
)

from llm2clip.config import ModelConfig, Stage2Config
from llm2clip.config.loading import check_values
from llm2clip.errors import under
from llm2clip.export.check import check_pictures, check_same, noise
from llm2clip.export.model_card import model_card, public_name
from llm2clip.io.files import read_json, reading, write_json
from llm2clip.io.folders import atomic_folder
from llm2clip.modeling import copy_code, modeling_llm2clip
from llm2clip.modeling.image_processing_llm2clip import LLM2CLIPImageProcessor
from llm2clip.modeling.loaders import checksum, checksums, keep_readable, load_tokenizer
from llm2clip.models.llm2clip import LLM2CLIP, projection_kind
from llm2clip.models.towers import copy_registration
from llm2clip.teacher.caption_teacher import TeacherSource
from llm2clip.teacher.fingerprint import Fingerprint, TeacherRecord
from llm2clip.teacher.sources import TeacherFolder

KIND = 'LLM2CLIP model'
_REMOTE_CODE = {'AutoConfig': 'modeling_llm2clip.LLM2CLIPConfig',
                'AutoModel': 'modeling_llm2clip.LLM2CLIPModel',
                'AutoModelForZeroShotImageClassification': 'modeling_llm2clip.LLM2CLIPModel',
                'AutoImageProcessor': 'image_processing_llm2clip.LLM2CLIPImageProcessor'}
# The processor of transformers for any image processor with any tokenizer.
_PROCESSOR = 'VisionTextDualEncoderProcessor'
# Settings by which sentence-transformers' own module calls the model; they name no code of the folder.
_MODALITIES = {'text': 'get_text_features', 'image': 'get_image_features',
               'image+text': 'get_multimodal_features'}
_SENTENCE_TRANSFORMERS: dict[str, Any] = {
    'modules.json': [
        {'idx': 0, 'name': '0', 'path': '',
         'type': 'sentence_transformers.base.modules.transformer.Transformer'}],
    'config_sentence_transformers.json': {'model_type': 'SentenceTransformer',
                                          'similarity_fn_name': 'cosine'},
    'sentence_bert_config.json': {
        'transformer_task': 'feature-extraction',
        'module_output_name': 'sentence_embedding',
        'modality_config': {
            name: {'method': method, 'method_output_name': None} for name, method in _MODALITIES.items()},
    },
}
_CAPTION = "It's 9 o'clock , isn't it?  Ça va, 犬 🐶"


class LLM2CLIPConfig(modeling_llm2clip.LLM2CLIPConfig):
    """Configuration of the remote code, with typed access to the model and the teachers."""

    # transformers 5 would generate an `__init__` here, which skips the checks in the inherited one.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def model_config(self) -> ModelConfig:
        path = f'{self.name_or_path}/config.json'
        with reading(path, 'a config.json that export_hf wrote'):
            merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), self.model)
            with under(f'{path}: model'):
                check_values(ModelConfig, OmegaConf.to_container(merged))
            return OmegaConf.to_object(merged)  # type: ignore[return-value]

    def teachers(self) -> Fingerprint:
        """Return the fingerprint of the teachers in this folder; raise a FileError if there is none."""
        with reading(f'{self.name_or_path}/config.json',
                     'the fingerprint of a teacher under the key teacher'):
            if not self.teacher:
                raise ValueError('there is none')
            return Fingerprint.from_json(self.teacher)


class LLM2CLIPModel(modeling_llm2clip.LLM2CLIPModel):
    """Model of the remote code, built from the training modules."""

    config_class = LLM2CLIPConfig

    def _make_towers(self) -> LLM2CLIP:
        return LLM2CLIP(self.config.model_config(), self.config.llm_embed_dim, load_weights=False)


def _caption_tokenizer(teachers: Fingerprint, folder: Path) -> Any:
    """Return the tokenizer of a single teacher, if it is lossless, or else one of bytes.

    The model decodes `input_ids` to captions, which needs a lossless tokenizer.
    """
    options: Any = {'model_input_names': ['input_ids', 'attention_mask'], 'split_special_tokens': True}
    if teachers.kinds == ['llm']:
        tokenizer = load_tokenizer(folder, **options)
        if LLM2CLIPModel.read_tokens(tokenizer, tokenizer([_CAPTION]).input_ids) == [_CAPTION]:
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            return tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token='<pad>', model_max_length=1 << 20,
                                   **options)


def is_exported(folder: Union[str, Path]) -> bool:
    """Whether `export_folder` wrote a folder, according to its config.json."""
    path = Path(folder, 'config.json')
    return path.is_file() and read_json(path, dict).get('model_type') == LLM2CLIPConfig.model_type


def export_folder(
    model: LLM2CLIP, config: ModelConfig, record: TeacherRecord,
    teachers: Sequence[Union[str, Path, TeacherSource]], out: Union[str, Path], *,
    run: Optional[Stage2Config] = None, wise_ft_alpha: float = 1.0,
) -> None:
    """Write a folder for `AutoModel.from_pretrained`; without this module,
    that needs ``trust_remote_code=True``.

    `AutoProcessor`, the pipeline ``zero-shot-image-classification`` and `SentenceTransformer` can load it
    too.  It is read back, and appears only if it gives the features of `model`, which is in evaluation mode.

    Args:
        model, config: Trained model and its configuration.
        record: Record of the teachers in training.
        teachers: Teachers to copy into the export, several if their vectors were concatenated; a path is a
            folder that stage 1 wrote.
        out: Output folder.
        run, wise_ft_alpha: Configuration of the run and weight in the WiSE-FT average, for the model card.

    Raises:
        ConfigError: The export does not give the model's features.
        ValueError: The teachers are not those of training.
    """
    sources: list[TeacherSource] = [
        TeacherFolder(source) if isinstance(source, (str, Path)) else source for source in teachers]
    hf_config = LLM2CLIPConfig(model=portable(model, config), llm_embed_dim=record.llm_embed_dim)
    hf_config.auto_map = _REMOTE_CODE
    exported = LLM2CLIPModel(hf_config)
    exported.model.load_state_dict(model.state_dict())
    preprocessing = model.vision_encoder.preprocessing
    with atomic_folder(out, KIND) as partial:
        teacher_folder, = LLM2CLIPModel.teacher_folders(partial)
        fingerprints = []
        for i, (source, fingerprint) in enumerate(zip(sources, record.teacher, strict=True)):
            folder = teacher_folder / str(i) if len(sources) > 1 else teacher_folder
            fingerprints.append(source.save(folder, fingerprint))
        saved = Fingerprint.concatenate(fingerprints)
        hf_config.teacher = saved.to_json()
        hf_config.learned_from = record.teacher.to_json()
        hf_config.teacher_files = [checksums(folder) for folder in LLM2CLIPModel.teacher_folders(partial)]
        exported.save_pretrained(partial, safe_serialization=True, state_dict=_published(exported))
        hf_config.weight_files = {path.name: checksum(path) for path in sorted(partial.glob('*.safetensors'))}
        hf_config.save_pretrained(partial)
        _caption_tokenizer(saved, teacher_folder).save_pretrained(partial)
        keep_readable(partial)
        write_json(partial / 'processor_config.json', {'processor_class': _PROCESSOR})
        for name, content in _SENTENCE_TRANSFORMERS.items():
            write_json(partial / name, content)
        image_processor = LLM2CLIPImageProcessor(preprocessing.image_size, preprocessing.mean,
                                                 preprocessing.std)
        image_processor.save_pretrained(partial)
        copy_code(modeling_llm2clip.CODE, partial)
        if copy_registration(model.vision_encoder.trunk, partial):
            with (partial / 'modeling_llm2clip.py').open('a') as code:
                code.write('\n\nfrom .vision_tower import *  # registers it with timm\n')
        card = model_card(config, saved, run, wise_ft_alpha, pipeline_tag='zero-shot-image-classification',
                          teachers=[source.name for source in sources])
        card.save(partial / 'README.md')
        for kind in (LLM2CLIPModel, modeling_llm2clip.LLM2CLIPModel):
            _check_export(kind, partial, model, record.llm_embed_dim)


def _published(exported: LLM2CLIPModel) -> dict[str, torch.Tensor]:
    """State dict with names that transformers 4 and 5 read.

    Only in 4, CLIP and SigLIP towers are a submodule of their class.
    """
    state = exported.state_dict()
    for path, trunk in exported.named_modules():
        if isinstance(trunk, (CLIPVisionModel, SiglipVisionModel)) and not hasattr(trunk, 'vision_model'):
            inner = f'{path}.vision_model.'
            state = {name.replace(f'{path}.', inner): value for name, value in state.items()}
    return state


def _check_export(kind: Any, folder: Path, model: LLM2CLIP, llm_embed_dim: int) -> None:
    device = model.logit_scale.device
    preprocessing = model.vision_encoder.preprocessing
    loaded = kind.from_pretrained(folder).eval().to(device)
    images = noise(2, 3, preprocessing.image_size, preprocessing.image_size).to(device)
    check_same(loaded.get_image_features, model.get_image_features, images, f'{kind.__module__}, images')
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    check_pictures(
        lambda image: loaded.get_image_features(**processor(image, return_tensors='pt').to(device)),
        lambda pixels: model.get_image_features(pixels.to(device)), preprocessing, kind.__module__)
    check_same(lambda vectors: loaded.get_text_features(text_embedding=vectors), model.get_text_features,
               noise(2, llm_embed_dim).to(device), f'{kind.__module__}, texts')


def portable(model: LLM2CLIP, config: ModelConfig) -> dict[str, Any]:
    """Return the configuration of a model without the source of its initial weights, but with all values read
    from there."""
    fields = dataclasses.asdict(config.merged)
    fields['visual_projection'] = projection_kind(model.visual_projection)
    vision = model.vision_encoder
    fields['vision'].update(mean=list(vision.preprocessing.mean), std=list(vision.preprocessing.std))
    for tower, encoder in zip([fields['vision'], *fields['vision']['beside']], [vision, *vision.beside]):
        # A timm model from a folder or the Hub is rebuilt from the name of its architecture.
        name = public_name(tower['name'])
        if ':' in tower['name']:
            pretrained_cfg: Any = encoder.trunk.pretrained_cfg
            name = pretrained_cfg['architecture']
        tower.update(name=name, pretrained=False, checkpoint=None, remap=False,
                     architecture=encoder.tower.architecture())
    return fields


AutoConfig.register('llm2clip', LLM2CLIPConfig)
AutoModel.register(LLM2CLIPConfig, LLM2CLIPModel)
AutoModelForZeroShotImageClassification.register(LLM2CLIPConfig, LLM2CLIPModel)
# transformers 4 calls image processors slow if they do not derive from its torchvision class, and accepts no
# others as fast; transformers 5 warns if a model has only a slow one.
processors: dict[str, Any] = {'slow_image_processor_class': LLM2CLIPImageProcessor}
if version('transformers') >= '5':
    processors['fast_image_processor_class'] = LLM2CLIPImageProcessor
AutoImageProcessor.register(LLM2CLIPConfig, **processors)
