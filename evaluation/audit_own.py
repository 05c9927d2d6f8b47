"""This package's own evaluation as a scorer for the audit: the entry point that evaluate.py calls, with its losses
recorded."""

import numpy as np
import torch

from niblick.data.tokenizer import ByteTable
from niblick.evaluation.audit_protocol import Log, Total
from niblick.evaluation.hints import token_hints
from niblick.evaluation.run import ValidationSet, evaluate_model, windows_of
from niblick.evaluation.score import pack
from niblick.model.config import EvalConfig, GPTConfig, TiltVersion
from niblick.model.gpt import GPT


class ModelScorer:
    """A model under a method of evaluation; what is offered is in audit_protocol. table: bytes per token."""

    warms_up = False

    def __init__(
        self, model: GPT, config: EvalConfig, *, tilt: TiltVersion | None = None, table: ByteTable | None = None
    ) -> None:
        self.model, self.config, self.tilt, self.table, self.log = model, config, tilt, table, Log()
        if table is None:
            self.byte_counts = None  # type: ignore[method-assign]
        shape = model.config
        sees_across = shape.smear != "none" and not shape.smear_bos_mask
        self.isolates_documents = shape.attention_span == "documents" and not sees_across and not tilt

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        self._evaluate(tokens)
        return self._losses

    def _evaluate(self, tokens: np.ndarray) -> Total:
        self.log, self._losses = Log(), np.full(len(tokens), np.nan)
        result = evaluate_model(self.model, self._data(tokens), self.config, tilt=self.tilt, record=self._record)
        return Total(result.nll, result.n_targets, result.n_bytes if self.table is not None else None)

    def _record(self, targets: np.ndarray, losses: np.ndarray) -> None:
        self._losses[targets] = losses
        self.log.scored(targets, losses)

    def _data(self, tokens: np.ndarray) -> ValidationSet:
        counts = np.zeros(len(tokens), np.int16) if self.table is None else self.byte_counts(tokens)
        return ValidationSet(tokens, counts)

    def total(self, tokens: np.ndarray) -> Total:
        return self._evaluate(tokens)

    def byte_counts(self, tokens: np.ndarray) -> np.ndarray:
        counts = np.zeros(len(tokens), np.int16)
        counts[1:] = self.table.bytes(tokens[:-1], tokens[1:])
        return counts

    def state(self, stage: str, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters and the random state. There is no warm-up: nothing lies between "loaded" and "warm"."""
        if stage == "scored":
            self(tokens)
        tensors = {**self.model.state_dict(), "random state": torch.get_rng_state()}
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}

    @torch.no_grad()
    def distributions(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The probabilities by their definition, in float64, window by window."""
        softcaps, rows = [float(cap) for cap in self.model.softcaps], np.full((len(tokens), 0), np.nan)
        for window in windows_of(self.config, len(tokens)):
            packed = pack(tokens, [window], self.model.config)
            logits = self.model.head(self.model.hidden(packed.ids, packed.cu_seqlens)[packed.rows]).double()
            capped = [cap * torch.tanh(logits / cap) for cap in (softcaps[0], softcaps[-1])]
            p = torch.softmax(torch.where(logits > 0, *capped), -1).numpy()
            rows = np.full((len(tokens), p.shape[1]), np.nan) if not rows.shape[1] else rows
            rows[packed.targets] = p
        return (_tilted(rows, tokens, self.tilt) if self.tilt else rows)[positions]


def _tilted(p: np.ndarray, tokens: np.ndarray, version: TiltVersion) -> np.ndarray:
    hints = token_hints(tokens, version)
    hinted = np.flatnonzero(hints.tokens >= 0)
    p[hinted, hints.tokens[hinted]] *= np.exp(hints.betas[hinted].astype(np.float64))
    return p / p.sum(1, keepdims=True)


def tiny_model(vocab_size: int = 64, *, bos_id: int = 1, seed: int = 0, **options: object) -> GPT:
    """A small model in eval mode in which nothing is zero, so that each mechanism moves the score. In float64: sums of
    other lengths then differ by less than an audit sees.

    options: other fields of GPTConfig.
    """
    references = {f"{name}_impl": "reference" for name in ("loss", "embed", "residual", "qk", "xsa", "mlp")}
    sizes = {"num_layers": 4, "model_dim": 128, "num_heads": 4, "num_kv_heads": 2, "mlp_hidden": 128, "max_segment": 16}
    loops = {"xsa_last_layers": 4, "loop_start": 1, "loop_end": 2, "loop_extra_passes": 1, "parallel_start": 3}
    fields = {"vocab_size": vocab_size, "bos_id": bos_id, **sizes, **loops, **references, **options}
    model, generator = GPT(GPTConfig(**fields), seed=seed), torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()
