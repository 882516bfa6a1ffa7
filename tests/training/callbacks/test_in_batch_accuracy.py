# Copyright 2026 llm2clip authors
# SPDX-License-Identifier: Apache-2.0

"""How many queries find their partner, ties and other ranks' candidates included."""

import torch

from llm2clip.training.callbacks.in_batch_accuracy import share_found


def test_share_found_is_that_of_queries_whose_partner_is_the_only_best() -> None:
    candidates = torch.eye(5)
    assert share_found(candidates[2:4], candidates, 2).item() == 1
    assert share_found(candidates[2:4], candidates, 1).item() == 0
    assert share_found(torch.stack([candidates[2], torch.ones(5)]), candidates, 2).item() == 0.5
