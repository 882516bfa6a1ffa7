# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Tiny real parts: a random Llama with a trained tokenizer, coloured pictures, MDS datasets, an embeddings dataset."""

import gc
import multiprocessing
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import launched
import pytest
import torch
from parts import make_samples, text_encoder_from_config, write_dataset, write_text_embeddings
from recipes_in_process import as_if_a_process_ended
from streaming.base.util import clean_stale_shared_memory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from towers import write_clip
from trained import trained
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from llm2clip.command import Stopped
from llm2clip.config import LoraConfig, TextEncoderConfig
from llm2clip.data.convert.samples import Sample
from llm2clip.export.hf import export_folder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.teacher.llm import save_teacher

# Folders, modules and tests that train, or load, export or plan many models or datasets, and take most of the time.
LONG = ('recipes/', 'data/convert/', 'export/', 'conversion/', 'planning/',
        *(f'{name}.py' for name in (
            'data/test_absent_captions', 'data/test_image_text_dataset',
            'evaluation/test_clip_benchmark', 'evaluation/test_comparison', 'evaluation/test_benchmarks',
            'evaluation/test_evaluated_models', 'models/test_vision_encoder', 'models/test_towers',
            'teacher/test_architectures', 'teacher/test_llm', 'test_damaged', 'test_no_code', 'test_yamls',
            'training/test_optim', 'training/test_runs')), 'test_pages.py::test_the_site',
        'models/test_llm2clip.py::test_an_export', 'models/test_llm2clip.py::test_features_are_the_first_values',
        'models/test_caption_contrastive.py::test_simcse', 'teacher/test_extraction.py::test_finished')
TEMPLATE = ("{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """As many as there are cores, where each can have shared memory of its own."""
    return len(os.sched_getaffinity(0)) if launched.may_have_own_memory() else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their place, and begin with the longest, so that no worker is left with one at the end."""
    seconds: dict[pytest.Item, float] = {}
    for item in items:
        place = f'{item.path.relative_to(Path(__file__).parent).as_posix()}::{item.name}'
        for mark, places in (('gpu', 'gpu/'), ('long', LONG)):
            if place.startswith(places):
                item.add_marker(mark)
        timeout = item.get_closest_marker('timeout')
        seconds[item] = max(300 if item.get_closest_marker('long') else 0, timeout.args[0] - 1 if timeout else 0)
    items.sort(key=lambda item: seconds[item], reverse=True)


def pytest_configure(config: pytest.Config) -> None:
    if 'PYTEST_XDIST_WORKER' in os.environ:
        # Streaming names shared memory and lock files by numbers, which workers would take from one another.
        launched.have_own_memory()
        os.environ['TMPDIR'] = tempfile.tempdir = tempfile.mkdtemp()
    # As many open files as a process may have on most systems, so that tests need no more on others.
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    # As Ctrl-C does, so that everything is torn down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """End the session, not only the test, when a recipe in this process took Ctrl-C for its own."""
    try:
        return (yield)
    except Stopped:
        raise KeyboardInterrupt from None


@pytest.fixture(autouse=True, scope='session')
def _offline_with_few_threads() -> None:
    torch.set_num_threads(1 if 'PYTEST_XDIST_WORKER' in os.environ else 2)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    os.environ['HF_HUB_OFFLINE'] = '1'
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # which it has read already
    gc.collect()  # many tests do so, which takes long among all that is imported
    gc.freeze()


@pytest.fixture(autouse=True, scope='module')
def _few_open_files() -> Iterator[None]:
    """Close what the tests of a module leave open, or there would be more files than a process may open."""
    with as_if_a_process_ended():
        yield


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """Streaming refuses a folder that another dataset of the process still has open."""
    yield
    before = signal.signal(signal.SIGCHLD, lambda *_: None)  # or PyTorch would raise an error
    for worker in multiprocessing.active_children():
        worker.kill()  # in place of waiting until those of a loader that has failed give up
    gc.collect()  # a dataset that is collected later would remove the memory of the next one, which has the same name
    signal.signal(signal.SIGCHLD, before)
    clean_stale_shared_memory()


@pytest.fixture(scope='session')
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama and a byte-level tokenizer with BOS and a chat template."""
    folder = tmp_path_factory.mktemp('llm')
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for sample in make_samples(40, images=False) for text in sample.captions.values()]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=['<s>', '</s>'],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token='<s>', eos_token='</s>')
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
                           initializer_range=0.2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def image_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pictures with short and long captions, in several shards."""
    out = tmp_path_factory.mktemp('data') / 'images'
    write_dataset(make_samples(64), out, size_limit='8kb')
    return out / 'train'


@pytest.fixture(scope='session')
def text_pairs_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 pairs of texts with hard negatives, some of them missing, and a plain text each."""
    samples = [Sample(f'{i}', {'query': f'question {i}', 'positive': f'answer {i} of many', 'text': f'a text of {i}',
                               'negative': f'another answer {i}' if i % 3 else ''}) for i in range(32)]
    out = tmp_path_factory.mktemp('data') / 'text_pairs'
    write_dataset(samples, out)
    return out / 'train'


@pytest.fixture(scope='session')
def teacher_folder(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('teacher') / 'teacher'
    encoder, tokenizer = text_encoder_from_config(TextEncoderConfig(pretrained=str(llm_folder), max_length=64))
    save_teacher(encoder, tokenizer, None, folder)
    return folder


@pytest.fixture(scope='session')
def embeddings(image_dataset: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('embeddings') / 'train'
    write_text_embeddings(image_dataset, out, teacher_folder)
    return out


@pytest.fixture(scope='session')
def clip(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp('clip'), llm_folder)


@pytest.fixture(scope='session')
def exported(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM2CLIP, Path]:
    of_run = trained('timm:test_efficientnet', [teacher_folder], image_size=32, embed_dim=16)
    export_folder(*of_run, out := tmp_path_factory.mktemp('export') / 'model')
    return of_run.model, out


@pytest.fixture(scope='session')
def embedder(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random sentence-transformers model: two layers of BERT, the mean of their tokens, scaled to length 1."""
    from sentence_transformers import SentenceTransformer, models

    folder = tmp_path_factory.mktemp('embedder')
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    tokenizer.pad_token, tokenizer.chat_template = '</s>', None
    tokenizer.save_pretrained(folder / 'bert')
    torch.manual_seed(1)
    BertModel(BertConfig(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, initializer_range=0.2)).save_pretrained(folder / 'bert')
    modules = [models.Transformer(str(folder / 'bert'), max_seq_length=12), models.Pooling(32), models.Normalize()]
    model = SentenceTransformer(modules=modules, prompts={'query': 'find: ', 'other': 'x '}, device='cpu')
    model.save(str(folder / 'model'), create_model_card=False)
    return folder / 'model'


def _teacher(llm_folder: Path, folder: Path, **options: Any) -> Path:
    config = TextEncoderConfig(pretrained=str(llm_folder), chat_template=False, **options)
    save_teacher(*text_encoder_from_config(config), None, folder)
    return folder


@pytest.fixture(scope='session')
def causal_teacher(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _teacher(llm_folder, tmp_path_factory.mktemp('causal') / 'teacher', bidirectional=False, pooling='last')


@pytest.fixture(scope='session')
def weighted_teacher(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _teacher(llm_folder, tmp_path_factory.mktemp('weighted') / 'teacher', pooling='weighted_mean', max_length=8)


@pytest.fixture(scope='session')
def lora_teacher(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM in bfloat16 with LoRA, which is stored beside the merged weights."""
    folder, lora = tmp_path_factory.mktemp('lora') / 'teacher', LoraConfig(r=4)
    config = TextEncoderConfig(pretrained=str(llm_folder), dtype='bfloat16')
    save_teacher(*text_encoder_from_config(config, lora, 0.1), lora, folder)
    return folder
