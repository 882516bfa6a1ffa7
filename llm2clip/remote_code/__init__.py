# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""Modules that are copied into exported models; they import nothing else from this package."""
