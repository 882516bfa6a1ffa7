# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0
