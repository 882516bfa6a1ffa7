# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""A finished folder on the Hugging Face Hub."""

import os
from pathlib import Path
from typing import Union

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from llm2clip.config import ConfigError
from llm2clip.folders import MANIFEST

__all__ = ['open_hub', 'upload']

TOKEN = 'HF_TOKEN'
# Of an earlier upload: transformers would load the old weights, if the new ones are in files of other names.
_STALE = ['*.safetensors', '*.safetensors.index.json']


def open_hub(repo: str, private: bool) -> HfApi:
    """Access to the Hub, asked for before there is anything to upload.

    Args:
        repo: ``owner/name`` of the repository that is to be written to.
        private: Nobody else is to see it.

    Raises:
        ConfigError: The environment has no token, the Hub cannot be reached or does not accept it, the token may not
            write there, or the repository is public and should be private.
    """
    owner, _, name = repo.partition('/')
    if not owner or not name:
        raise ConfigError(f'push_to_hub: expected owner/name, got {repo}')
    token = os.environ.get(TOKEN)
    if not token:
        raise ConfigError(f'push_to_hub: set {TOKEN} in the environment to a token of the Hub that may write')
    api = HfApi(token=token)
    try:
        user = api.whoami()
        public = api.repo_exists(repo) and not api.model_info(repo).private
    except HFValidationError as error:
        raise ConfigError(f'push_to_hub: {error}') from None
    except OSError as error:
        raise ConfigError(f'push_to_hub: {api.endpoint} gives no access with the token in {TOKEN}: {error}') from None
    role = user.get('auth', {}).get('accessToken', {}).get('role')
    owners = [user['name'], *(org['name'] for org in user.get('orgs', []))]
    if role == 'read':
        raise ConfigError(f'push_to_hub: the token in {TOKEN} may only read')
    # A fine-grained token may be for repositories of others.
    if role == 'write' and owner not in owners:
        raise ConfigError(f'push_to_hub: the token in {TOKEN} may write for {", ".join(owners)}, not for {owner}')
    if public and private:
        raise ConfigError(f'private: {repo} exists and is public')
    return api


def upload(api: HfApi, folder: Union[str, Path], repo: str, private: bool) -> str:
    """Upload a folder as one commit, which also removes weights that are no longer in it.

    Args:
        api: From `open_hub`.
        folder: What to upload.
        repo: ``owner/name``, made if there is none.
        private: Whether a new one is.

    Returns:
        The repository's address.

    Raises:
        ConfigError: It was not uploaded.
    """
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message='Upload an LLM2CLIP model',
                          ignore_patterns=[MANIFEST], delete_patterns=_STALE)
    except OSError as error:
        raise ConfigError(f'push_to_hub: {folder} is complete, but could not be uploaded: {error}; try again by '
                          f'hf upload {repo} {folder}') from None
    return str(url)
