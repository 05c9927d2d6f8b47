"""The step of the adapters: one compiled function for batches of any number of documents."""

import torch
from test_evaluation_phased import model, small

from niblick.evaluation.lora import LoRA, adamw_


def test_adamw_is_compiled_twice_at_most() -> None:
    """For one row, and for any number of them, of buffers of any size."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for documents, rank in ((9, 2), (4, 3)):
        lora = LoRA(model(), small("pr1855", documents=documents, rank=rank))
        lora.adamw = torch.compile(adamw_, dynamic=True, backend=counting)
        for rows in range(documents, 0, -1):
            lora.step(rows)
    assert len(graphs) <= 2
