"""What is compiled for the step of the adapters is compiled for batches of any number of documents of any width."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from ranks import one_thread
from test_evaluation_phased import SHAPE, model, scores, small

from niblick.evaluation.lora import LoRA, adamw_
from niblick.model import layers

__all__ = ["one_thread"]


@pytest.fixture
def graphs(monkeypatch) -> Iterator[list[torch.fx.GraphModule]]:
    """All that is compiled; none of it is made faster."""
    found = []

    def counting(graph, inputs):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    layers.compiled.cache_clear()
    yield found
    layers.compiled.cache_clear()


def test_adamw_is_compiled_twice_at_most(graphs) -> None:
    """For one row, and for any number of them."""
    for documents in (9, 4):
        lora = LoRA(model(), small("pr1855", documents=documents))
        lora.adamw = layers.compiled(adamw_)
        for rows in range(documents, 0, -1):
            lora.step(rows)
    assert len(graphs) <= 2


def test_lanes_are_compiled_once(graphs, monkeypatch) -> None:
    """As on a GPU; a mix and a skip, whatever the rows, the width and the columns wanted."""
    monkeypatch.setattr(layers, "_alone", lambda x, weight: x.requires_grad and not weight.requires_grad)
    for name, value in {"num_layers": 7, "loop_extra_passes": 0, "parallel_start": 5}.items():
        monkeypatch.setitem(SHAPE, name, value)
    for documents in (3, 4):
        scores(model(), small("pr1855", documents=documents))
    assert len(graphs) == 2
