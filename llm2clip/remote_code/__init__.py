# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""What exports with remote code hold copies of: modules that import nothing of this package but one another."""
