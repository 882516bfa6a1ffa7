# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Code that comes with data never runs, on no way that loads it, unless the user's own words say so."""

import builtins
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import timm
import torch
import transformers.modeling_utils
from damage import CPU, TEXTS, WAYS, Damage, edited, is_one_line
from official_parts import HALF, eva_state
from parts import text_encoder_from_config
from sentence_transformers import SentenceTransformer
from trained import Trained, save_run_config, trained

from llm2clip.config import (
    EvaluatedModelConfig,
    LLMTeacherConfig,
    LoraConfig,
    SearchConfig,
    SentenceTransformersTeacherConfig,
    TextEncoderConfig,
    VisionConfig,
)
from llm2clip.errors import ConfigError
from llm2clip.evaluation.evaluated_models import check_evaluated_model, load_evaluated_model
from llm2clip.export.hf import export_folder
from llm2clip.export.sentence_model import export_sentence_transformers
from llm2clip.modeling import modeling_llm2clip
from llm2clip.models.towers import load_tower, tower_preprocessing
from llm2clip.official.llm2vec import import_teacher
from llm2clip.official.official_weights import import_checkpoint
from llm2clip.search import load_model
from llm2clip.teacher.llm import load_llm, load_teacher, save_teacher, teacher_fingerprint
from llm2clip.teacher.sources import FrozenLLM, SentenceTransformerModel, TeacherFolder
from llm2clip.training.runs import Stage2Run, load_checkpoint_model, load_initial_weights

AUTO_MAP = {name: 'evil.Evil' for name in (
    'AutoConfig', 'AutoModel', 'AutoModelForCausalLM', 'AutoImageProcessor', 'AutoProcessor')}
TOKENIZER_MAP = {'AutoTokenizer': ['evil.Evil', 'evil.Evil']}


@pytest.fixture(autouse=True)
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that code would write; nobody is asked whether to run it, and kernels of the Hub count as code."""
    path = tmp_path / 'ran'
    asked: list[Any] = []
    monkeypatch.setattr(builtins, 'input', lambda *args: asked.append(args) or 'y')
    for name in ('load_and_register_kernel', 'lazy_import_flash_attention'):  # of transformers 4 and 5
        monkeypatch.setattr(transformers.modeling_utils, name, lambda name, **options: path.touch(), raising=False)
    monkeypatch.chdir(tmp_path)
    yield path
    assert not asked and not path.exists()


def plant(folder: Path) -> None:
    """Code in a folder, and in a module that can be imported, of every name by which data might ask for it."""
    code = f"""open({str(Path.cwd() / 'ran')!r}, 'w').close()
class Evil:
    def __init__(self, *args, **kwargs): pass
    @classmethod
    def load(cls, *args, **kwargs): return cls()
    from_pretrained = register_for_auto_class = load
"""
    for name in ('evil', 'modeling_evil', 'tokenization_evil'):
        (folder / f'{name}.py').write_text(code)


def plant_maps(folder: Path) -> None:
    plant(folder)
    for name, auto_map in (('config.json', AUTO_MAP), ('tokenizer_config.json', TOKENIZER_MAP),
                           ('preprocessor_config.json', AUTO_MAP), ('processor_config.json', AUTO_MAP)):
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**content, 'auto_map': auto_map}))


def unknown_class(folder: Path) -> None:
    plant_maps(folder)
    edited(model_type='evil', architectures=['Evil'])(folder / 'config.json')
    edited(tokenizer_class='Evil')(folder / 'tokenizer_config.json')


def consenting(folder: Path) -> None:
    plant_maps(folder)
    for name in ('config', 'tokenizer_config', 'text_encoder'):
        if (path := folder / f'{name}.json').is_file():
            edited(trust_remote_code=True)(path)


def kernel(folder: Path) -> None:
    edited(attn_implementation='evil/kernel', _attn_implementation_internal='evil/kernel')(folder / 'config.json')


def pickled(folder: Path) -> None:
    for path in folder.glob('*.safetensors'):
        path.unlink()
    for name in ('pytorch_model.bin', 'adapter_model.bin'):
        write_pickle(folder / name)


def write_pickle(path: Path) -> None:
    torch.save({**eva_state(), 'x': _Code()}, path)


class _Code:

    def __reduce__(self) -> Any:
        return os.mkdir, ('ran',)


PLANTS = {'auto_map': plant_maps, 'unknown class': unknown_class, 'consent in data': consenting, 'kernel': kernel,
          'pickle': pickled}


def attempt(load: Callable[[], object]) -> None:
    """It may work without the code, or say in one line what is wrong."""
    try:
        load()
    except ValueError as error:
        assert is_one_line(error), error


@pytest.fixture(scope='module')
def model(teacher_folder: Path) -> Trained:
    return trained('clip_vision_model', [teacher_folder])


@pytest.fixture(scope='module')
def whole(model: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('export') / 'whole'
    export_folder(*model, folder)
    return folder


OF_TEACHERS: dict[str, Callable[[Path, Trained], object]] = {
    'extraction': lambda folder, _: TeacherFolder(folder).load(CPU).embed(TEXTS),
    'online training': lambda folder, _: load_teacher(folder, in_float32=True),
    'fingerprint': lambda folder, _: teacher_fingerprint(folder),
    'export': lambda folder, model: export_folder(
        model.model, model.config, model.record, [folder], folder.parent / 'out'),
    'export of the teacher': lambda folder, _: export_sentence_transformers(folder, folder.parent / 'out'),
    'remote code': lambda folder, model: modeling_llm2clip.load_teacher(
        folder, model.record.teacher.teachers[0], modeling_llm2clip.checksums(folder))(
            TEXTS, torch.device('cpu')),
    'any LLM': lambda folder, _: FrozenLLM(LLMTeacherConfig(str(folder))).load(CPU),
    'stage 1': lambda folder, _: text_encoder_from_config(TextEncoderConfig(str(folder)), LoraConfig()),
    'import': lambda folder, _: import_teacher(LLMTeacherConfig(str(folder)), 'none', folder.parent / 'out'),
    'baseline': lambda folder, _: load_evaluated_model(
        EvaluatedModelConfig(pretrained=str(folder)), folder.parent / 'cache', CPU),
    'tower': lambda folder, _: load_tower(VisionConfig(str(folder), pretrained=True, **HALF)),
    'pixels': lambda folder, _: tower_preprocessing(VisionConfig(str(folder))),
}


@pytest.mark.parametrize('planted', ['consent in data', 'kernel', 'pickle'])
@pytest.mark.parametrize('way', OF_TEACHERS)
def test_a_teacher_runs_no_code(way: str, planted: str, model: Trained, teacher_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / 'folder')
    PLANTS[planted](folder)
    attempt(lambda: OF_TEACHERS[way](folder, model))


def test_code_of_a_tokenizer_runs_only_by_the_users_word(teacher_folder: Path, tmp_path: Path, marker: Path) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / 'folder')
    plant_maps(folder)
    with suppress(AttributeError, ValueError):  # it is no tokenizer
        text_encoder_from_config(TextEncoderConfig(str(folder), trust_remote_code=True))
    assert marker.exists()
    marker.unlink()


def _in_model(*path: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        plant(folder)
        content = inner = json.loads((folder / 'config.json').read_text())
        for key in ('model', *path):
            inner = inner.setdefault(key, {})
        inner.update(fields)
        (folder / 'config.json').write_text(json.dumps(content))

    return change


OF_EXPORT = {
    'its own auto_map': lambda folder: (plant(folder), edited(auto_map=AUTO_MAP)(folder / 'config.json')),
    'auto_map of the tower': _in_model('vision', 'architecture', auto_map=AUTO_MAP),
    'auto_map inside the tower': _in_model('vision', 'architecture', 'text_config', auto_map=AUTO_MAP),
    'a kernel of the tower': _in_model('vision', 'architecture', attn_implementation='evil/kernel'),
    'a value to compute': _in_model('vision', name='${oc.env:HOME}'),
    'pickle': pickled,
    **{f'teacher: {name}': lambda folder, change=change: change(folder / 'teacher')
       for name, change in PLANTS.items()},
}


@pytest.mark.parametrize('planted', OF_EXPORT)
@pytest.mark.parametrize('way', [*WAYS, 'initial weights', 'sentence-transformers'])
def test_an_export_runs_no_code(way: str, planted: str, model: Trained, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / 'folder')
    OF_EXPORT[planted](folder)
    load: Callable[[], object] = {
        **{name: partial(read, folder) for name, read in WAYS.items()},
        'initial weights': lambda: load_initial_weights(model.model, model.config, model.record.teacher, folder),
        'sentence-transformers': lambda: SentenceTransformer(str(folder), device='cpu').encode(TEXTS)}[way]
    if 'tower' in planted or 'compute' in planted:
        with pytest.raises(ValueError, match=r'config\.json: model: .* names code'):
            load()
    else:
        attempt(load)


@pytest.mark.parametrize('planted', PLANTS)
def test_a_tower_runs_no_code(planted: str, clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip, tmp_path / 'folder')
    PLANTS[planted](folder)
    attempt(lambda: load_tower(VisionConfig(str(folder), pretrained=True, image_size=32, **HALF)))
    attempt(lambda: import_checkpoint(folder, VisionConfig(str(folder), image_size=32, **HALF)))


def test_a_tower_of_timm_runs_no_code(tmp_path: Path) -> None:
    write_pickle(tmp_path / 'tower.pth')
    attempt(lambda: load_tower(VisionConfig('test_vit', checkpoint=str(tmp_path / 'tower.pth'))))
    timm.models.save_for_hf(timm.create_model('test_vit'), str(tmp_path / 'local'))
    pickled(tmp_path / 'local')
    attempt(lambda: load_tower(VisionConfig(f'local-dir:{tmp_path}/local', pretrained=True)))


@pytest.mark.parametrize('edit', [
    edited(auto_mapping={'base_model_class': 'Evil', 'parent_library': 'evil'}), edited(peft_type='evil'),
    edited(megatron_config={'x': 1}, megatron_core='evil'), lambda path: pickled(path.parent)])
def test_adapters_run_no_code(edit: Damage, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lora = tmp_path / 'adapter', LoraConfig(r=4)
    teacher = text_encoder_from_config(TextEncoderConfig(str(llm_folder)), lora)
    save_teacher(*teacher, lora, tmp_path / 'teacher', folder)
    plant(folder)
    monkeypatch.syspath_prepend(folder)
    edit(folder / 'adapter_config.json')
    attempt(lambda: load_llm(TextEncoderConfig(str(llm_folder), adapters=[str(folder)])))
    edited(base_model_name_or_path=str(llm_folder))(folder / 'adapter_config.json')
    attempt(lambda: import_teacher(LLMTeacherConfig(str(folder)), 'none', tmp_path / 'out'))


def _with_module(embedder: Path, folder: Path, kind: str = 'evil.Evil') -> None:
    shutil.copytree(embedder, folder)
    *modules, last = json.loads((folder / 'modules.json').read_text())
    (folder / 'modules.json').write_text(json.dumps([*modules, {**last, 'path': 'last', 'type': kind}]))
    (folder / 'last').mkdir()


NAMES_A_CLASS = r'names the class evil\.Evil, expected one of sentence-transformers'
MODULES = {
    'foreign module': ('evil.Evil', {}),
    'activation': ('sentence_transformers.models.Dense',
                   {'in_features': 32, 'out_features': 4, 'activation_function': 'evil.Evil'}),
    'router': ('sentence_transformers.models.Router', {'types': {'a': 'evil.Evil'}, 'structure': {'query': ['a']}}),
    'tokenizer of words': ('sentence_transformers.models.WordEmbeddings', {'tokenizer_class': 'evil.Evil'}),
}


@pytest.mark.parametrize('module', MODULES)
def test_modules_of_sentence_transformers_run_no_code(
    module: str, embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: Path
) -> None:
    folder = tmp_path / 'folder'
    kind, fields = MODULES[module]
    _with_module(embedder, folder, kind)
    for name in ('config.json', 'router_config.json', 'wordembedding_config.json'):
        (folder / 'last' / name).write_text(json.dumps(fields))
    plant(folder)
    monkeypatch.syspath_prepend(folder)
    config = SentenceTransformersTeacherConfig(str(folder))
    with pytest.raises(ValueError, match=NAMES_A_CLASS):
        SentenceTransformerModel(config).load(CPU)
    assert not marker.exists()
    if module == 'foreign module':
        config.trust_remote_code = True
        with pytest.raises(Exception):  # noqa: B017 - it is no module
            SentenceTransformerModel(config).load(CPU).embed(TEXTS)
        assert marker.exists()
        marker.unlink()


def test_an_exported_sentence_transformer_runs_no_code(
    embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: Path
) -> None:
    folder = tmp_path / 'folder'
    _with_module(embedder, folder)
    plant(folder)
    monkeypatch.syspath_prepend(folder)
    of_run = trained('clip_vision_model', [SentenceTransformerModel(SentenceTransformersTeacherConfig(str(folder)))])
    export_folder(*of_run, export := tmp_path / 'export')
    remote = modeling_llm2clip.LLM2CLIPModel.from_pretrained
    ways: list[Callable[[bool], Any]] = [
        lambda trusted: load_model(SearchConfig(str(export), trusted), CPU)[0].text_features(TEXTS),
        lambda trusted: load_evaluated_model(EvaluatedModelConfig(export=str(export), trust_remote_code=trusted),
                                             tmp_path / 'cache', CPU).text_features(TEXTS),
        lambda trusted: remote(export, trust_remote_code=trusted).get_text_features(TEXTS)]
    for embed in ways:
        with pytest.raises(ValueError, match=NAMES_A_CLASS):
            embed(False)
    assert not marker.exists()
    for embed in ways:
        with pytest.raises(Exception) as error:  # it is no module
            embed(True)
        assert 'names the class' not in str(error.value)
    marker.unlink()


def test_the_consent_of_a_run_is_not_that_of_the_user(embedder: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / 'folder', tmp_path / 'run'
    plant(tmp_path)  # which is the current folder
    _with_module(embedder, folder)
    of_run = trained('timm:test_vit', [SentenceTransformerModel(SentenceTransformersTeacherConfig(str(folder)))])
    save_run_config(run, of_run.config, optimizer={'name': 'evil:Evil', 'lr': 1e-5}, callbacks={'evil:Evil': {}},
                    teacher=SentenceTransformersTeacherConfig(str(folder), trust_remote_code=True))
    of_run.record.write(run)
    (evaluated, _), = check_evaluated_model(EvaluatedModelConfig(run=str(run)))
    exported, = Stage2Run(run).teachers()
    for source in (evaluated, exported):
        with pytest.raises(ValueError, match=NAMES_A_CLASS):
            source.load(CPU)


@pytest.mark.parametrize('planted', PLANTS)
def test_the_llm_of_sentence_transformers_runs_no_code(planted: str, embedder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(embedder, tmp_path / 'folder')
    edited(model_args={'trust_remote_code': True, 'weights_only': False}, tokenizer_args={'trust_remote_code': True},
           config_args={'trust_remote_code': True})(folder / 'sentence_bert_config.json')
    edited(dtype=None)(folder / 'config.json')  # transformers would look for it in the weights
    PLANTS[planted](folder)
    attempt(lambda: SentenceTransformerModel(SentenceTransformersTeacherConfig(str(folder))).load(CPU).embed(TEXTS))


@pytest.mark.parametrize('options', [
    {'model_args': {'attn_implementation': 'evil/kernel'}}, {'config_kwargs': {'attn_implementation': 'evil/kernel'}},
    {'model_kwargs': {'use_kernels': True}}, {'model_args': {'kernel_config': {'RMSNorm': 'evil/kernel:RMSNorm'}}},
    {'model_args': {'attn_implementation': {'': 'evil/kernel'}, 'allow_all_kernels': True}},
    {'model_args': {'gguf_file': 'evil.gguf'}}])
def test_options_of_sentence_transformers_fetch_no_kernel(
    options: dict[str, Any], embedder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(embedder, tmp_path / 'folder')
    edited(**options)(folder / 'sentence_bert_config.json')
    with pytest.raises(ValueError, match=r'sentence_bert_config\.json.* names code'):
        SentenceTransformerModel(SentenceTransformersTeacherConfig(str(folder))).load(CPU)


def write_gguf(folder: Path) -> None:
    """A Llama of one layer, quantized."""
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / 'llm.gguf', 'llama')
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(40)
    writer.add_token_list([f't{i}' for i in range(40)])
    shapes = {'token_embd': (40, 32), 'blk.0.ffn_gate': (64, 32), 'blk.0.ffn_up': (64, 32), 'blk.0.ffn_down': (32, 64)}
    shapes |= {f'blk.0.attn_{name}': (32, 32) for name in ('q', 'k', 'v', 'output')}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        writer.add_tensor(f'{name}.weight', gguf.quantize(np.ones(shape, np.float32), kind), raw_dtype=kind)
    for name in ('output_norm', 'blk.0.attn_norm', 'blk.0.ffn_norm'):
        writer.add_tensor(f'{name}.weight', np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_in_gguf_fetch_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: Path) -> None:
    """And they are unpacked, also where the package that fetches kernels is installed."""
    write_gguf(tmp_path / 'llm')
    monkeypatch.setattr('transformers.utils.import_utils.is_kernels_available', lambda: True)
    for name in ('quantizers.quantizer_gguf.get_gguf_kernel', 'integrations.gguf.kernels.kernelize_ggml_layers',
                 'integrations.hub_kernels.get_kernel'):
        with suppress(AttributeError, ImportError):  # transformers 4 has none
            monkeypatch.setattr(f'transformers.{name}', lambda *args, **options: marker.touch())
    llm = load_llm(TextEncoderConfig(str(tmp_path / 'llm'), gguf_file='llm.gguf'))
    assert all(weight.dtype == torch.float32 for weight in llm.parameters())


def test_values_of_the_environment_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('SECRET', 'hunter2')
    (tmp_path / 'config.yaml').write_text(r'checkpoint_folder: "\x24{oc.env:SECRET}"')
    with pytest.raises(ConfigError) as error:
        load_checkpoint_model(tmp_path)
    assert error.value.key == 'checkpoint_folder' and 'hunter2' not in str(error.value)
    with pytest.raises(ValueError, match='vision names code'):
        modeling_llm2clip.LLM2CLIPConfig(model={'vision': {'name': 'v', 'mean': ['${oc.env:SECRET}'] * 3}})
