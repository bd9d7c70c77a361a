"""What PyTorch asks of its own state while a forward is traced; what forwards ask is tested in ``test_plan.py``."""

from __future__ import annotations

import threading

import torch
from torch import is_grad_enabled as gradients_are_on

from fusedres.patch.asked import state_unasked

from .blocks import Layers, check_patched


def test_what_pytorch_asks_for_itself_is_no_matter():
    """Entering a context asks for the one outside."""

    class Block(Layers):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                scale = 2.0
            return self.branch(x) * scale

    assert check_patched(Block()).coverage == 1.0
    assert torch.is_grad_enabled is gradients_are_on


def test_other_threads_may_ask():
    answers = []
    with state_unasked([Layers]):
        thread = threading.Thread(target=lambda: answers.append((torch.is_grad_enabled(), gradients_are_on())))
        thread.start()
        thread.join()
    assert answers == [(True, True)]
