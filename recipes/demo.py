# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Open a page in the browser that searches a folder of images, and classifies images by labels that you type:
python recipes/demo.py model=runs/custom/export/llm2clip images=photos"""

import os
import socket
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

from llm2clip.command import run_command
from llm2clip.config import DemoConfig
from llm2clip.errors import ConfigError, missing_extra

# Limits of a query, since all visitors wait for it.
MAX_LABELS = 100
MAX_CHARACTERS = 10_000
PHONE = ('@media (max-width: 640px) '
         '{.grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important}}')


def main(config: DemoConfig) -> None:
    try:
        socket.create_server((config.host, config.port)).close()
    except OSError as error:
        raise ConfigError(f'{error}, expected an address of this machine and a free port',
                          key='host, port') from None
    # By default, Gradio reports its use, keeps a history of the queries, and connects to itself by a proxy.
    os.environ.update(GRADIO_ANALYTICS_ENABLED='False', GRADIO_RUN_HISTORY='False', no_proxy='*')
    try:
        from gradio.themes import Default, LocalFont
    except ImportError as error:
        raise missing_extra('the page', 'demo', error) from None
    from llm2clip.data.caption_files import read_captions
    from llm2clip.device import get_device, set_up_process
    from llm2clip.search import embed_images, load_model

    captions: dict[str, list[str]] = {}
    if config.captions is not None:
        captions, _ = read_captions(config.captions, config.image_column, config.caption_column)
    device = get_device(config.device)
    set_up_process(device, config.precision)
    model, fingerprint = load_model(config, device, ['a text'])
    paths, images = embed_images(config, model, fingerprint)
    font = LocalFont('Source Sans Pro', weights=(400, 700))
    theme = Default(primary_hue='blue', font=[font, 'sans-serif'])
    # Uploads, examples and thumbnails, the only files that are served.
    with TemporaryDirectory() as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        page = make_page(config, model, paths, images, captions)
        page.launch(server_name=config.host, server_port=config.port, share=False, quiet=True,
                    max_file_size='100mb', prevent_thread_lock=True, theme=theme, css=PHONE, footer_links=[])
        print(f'{len(paths):,} images: open {page.local_url}, Ctrl-C ends it', flush=True)
        with suppress(SystemExit):  # Ctrl-C or SIGTERM, the normal end
            page.block_thread()


def uploaded(payload: Any) -> Optional[str]:
    """Return the path of an upload or example, and None for any other one, which a request may contain."""
    folder = Path(os.environ['GRADIO_TEMP_DIR']).resolve()
    if payload and payload.path and Path(payload.path).resolve().is_relative_to(folder):
        return payload.path
    return None


async def refuse_url(url: str, cache_dir: str) -> str:
    raise ConfigError(f'{url} is a URL, expected an upload')


def make_page(
    config: DemoConfig, model: Any, paths: list[str], images: Any, captions: dict[str, list[str]]
) -> Any:
    """Return a Gradio page with three tabs: search by text, search by image, and zero-shot classification."""
    import gradio as gr
    from gradio import processing_utils

    from llm2clip.io.files import printable
    from llm2clip.search import classify, embed_query, nearest, thumbnail

    def search(query: Any) -> list[tuple[Any, str]]:
        results = []
        for i, score in nearest(images, embed_query(model, query), config.top):
            name = os.path.relpath(paths[i], config.images)
            label = ': '.join([f'{score:.3f}  {name}', *captions.get(name, [])[:1]])
            results.append((thumbnail(paths[i], 800), printable(label)))
        return results

    def search_text(text: str) -> Any:
        if not text.strip():
            raise ConfigError('Type a text first.')
        return search(text)

    def search_image(path: Any) -> list[tuple[Any, str]]:
        return search(Path(path)) if path else []

    def classify_image(path: Any, text: str) -> Any:
        separator = ','
        if '\n' in text.strip():
            separator = '\n'
        stripped = [label.strip() for label in text.split(separator)]
        labels = [*dict.fromkeys(label for label in stripped if label)]
        if not path:
            raise ConfigError('Choose an image first.')
        if not 2 <= len(labels) <= MAX_LABELS:
            raise ConfigError(f'Type 2 to {MAX_LABELS} labels.')
        return classify(model, Path(path), labels)

    def event(answer: Any, inputs: list[Any], output: Any) -> dict[str, Any]:
        """Arguments of an event that shows an answer, or instead the message of an error."""
        def answer_or_message(*values: Any) -> Any:
            try:
                if any(len(value or '') > MAX_CHARACTERS for value in values):
                    raise ConfigError(f'Type at most {MAX_CHARACTERS:,} characters.')
                return answer(*values)
            except (OSError, ValueError) as error:
                gr.Warning(printable(str(error)))

        return dict(fn=answer_or_message, inputs=inputs, outputs=output, concurrency_id='model',
                    api_visibility='private')

    def image_input() -> Any:
        with gr.Column(min_width=280):
            image = gr.Image(label='Image', sources=['upload', 'clipboard'], format='png', height=240,
                             buttons=[])
            gr.Examples(examples, image, label='From the folder')
        image.preprocess = uploaded  # `search` decodes it, or says why it cannot
        return image

    examples = [[thumbnail(path, 800)] for path in paths[::-(-len(paths) // 6)]]
    gallery: dict[str, Any] = dict(show_label=False, columns=5, object_fit='cover', height='max-content',
                                   buttons=[], format='jpeg')
    # Gradio would download a URL in a request before `uploaded` sees it.
    processing_utils.async_ssrf_protected_download = refuse_url
    with gr.Blocks(title='LLM2CLIP') as page:
        gr.Markdown(f'# LLM2CLIP\nSearch the {len(paths):,} images of `{config.images}` by a text or an '
                    'image, or let the model choose which of your labels fits an image best. Model: '
                    f'`{config.model}`. If it was trained on these images, it finds them more easily than '
                    'new ones.')
        with gr.Tab('By text'):
            with gr.Row(equal_height=True):
                text = gr.Textbox(label='Text', show_label=False, placeholder='a dog on the beach', scale=6)
                button = gr.Button('Search', variant='primary', min_width=96)
            gr.on([text.submit, button.click], **event(search_text, [text], gr.Gallery(**gallery)))
        with gr.Tab('By image'), gr.Row():
            image = image_input()
            with gr.Column(scale=3):
                image.change(**event(search_image, [image], gr.Gallery(**gallery)))
        with gr.Tab('Classify'), gr.Row():
            image = image_input()
            with gr.Column(scale=2):
                labels = gr.Textbox(label='What may be in the image? Separate labels by commas or lines',
                                    placeholder='dog, cat', lines=3)
                button = gr.Button('Classify', variant='primary')
                button.click(**event(classify_image, [image, labels], gr.Label(label='Probabilities')))
    return page


if __name__ == '__main__':
    run_command(DemoConfig, main)
