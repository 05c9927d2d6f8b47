"""This package's own evaluation as a scorer for the audit: the entry point that evaluate.py calls, with its losses and
steps recorded."""

import copy
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from niblick.data.tokenizer import ByteTable
from niblick.evaluation import ranks
from niblick.evaluation.audit_protocol import Interval, Log, Total
from niblick.evaluation.clock import Clock
from niblick.evaluation.hints import token_hints
from niblick.evaluation.run import METHODS, evaluate_model, rehearse, windows_of
from niblick.evaluation.score import Record, Score, pack
from niblick.evaluation.validation import ValidationSet
from niblick.evaluation.windows import Window
from niblick.model.config import EvalConfig, GPTConfig, TiltVersion
from niblick.model.gpt import GPT

PATIENCE = timedelta(seconds=60)


class Recording:
    """What an evaluation of tokens (N,) says while it goes on: losses (N,), a log, and parameters after its last step.
    Every step makes a new state."""

    def __init__(self, model: GPT, n_tokens: int) -> None:
        self.model, self.log, self.losses = model, Log(), np.full(n_tokens, np.nan)
        self.state, self.adapted = 0, None

    def __call__(self, targets: np.ndarray, losses: np.ndarray) -> None:
        self.losses[targets] = losses
        self.log.scored(targets, losses, self.state)

    def updated(self, targets: np.ndarray) -> None:
        self.log.updated(targets, self.state, self.state + 1)
        self.state, self.adapted = self.state + 1, _arrays(self.model.state_dict())


class ModelScorer:
    """A model under a method of evaluation; what is offered is in audit_protocol. table: bytes per token."""

    warms_up = True

    def __init__(
        self, model: GPT, config: EvalConfig, *, tilt: TiltVersion | None = None, table: ByteTable | None = None
    ) -> None:
        self.model, self.config, self.tilt, self.table, self.log = model, config, tilt, table, Log()
        if table is None:
            self.byte_counts = None  # type: ignore[method-assign]
        shape, adapts = model.config, METHODS[config.method].adapts
        sees_across = shape.smear != "none" and not shape.smear_bos_mask
        self.isolates_documents = shape.attention_span == "documents" and not (sees_across or tilt or adapts)
        self.levers = tuple(name for name, _ in model.named_parameters()) if adapts else ()
        self.uses_length = adapts  # its learning rate falls over the chunks that the stream has

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        self._recorded(tokens)
        return self._recording.losses

    def _recorded(self, tokens: np.ndarray) -> Score:
        self._recording = Recording(self.model, len(tokens))
        self.log, self._clock = self._recording.log, Clock(self.config.budget_s)
        return self._evaluate(self.model, tokens, self._recording, self._clock)

    def _evaluate(self, model: GPT, tokens: np.ndarray, record: Record | None, clock: Clock | None) -> Score:
        counts = np.zeros(len(tokens), np.int16) if self.table is None else self.byte_counts(tokens)
        stream = ValidationSet(tokens, counts)
        return evaluate_model(model, stream, self.config, tilt=self.tilt, record=record, clock=clock)

    def total(self, tokens: np.ndarray) -> Total:
        result = self._recorded(tokens)
        return Total(result.nll, result.n_targets, result.n_bytes if self.table is not None else None)

    def byte_counts(self, tokens: np.ndarray) -> np.ndarray:
        counts = np.zeros(len(tokens), np.int16)
        counts[1:] = self.table.bytes(tokens[:-1], tokens[1:])
        return counts

    def state(self, stage: str, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters and the random state; when "scored", the parameters that the last targets were scored with."""
        if stage == "warm":
            rehearse(self.model, self.config, tilted=self.tilt is not None)
        if stage == "scored":
            self(tokens)
        adapted = self._recording.adapted if stage == "scored" else None
        return (adapted or _arrays(self.model.state_dict())) | _arrays({"random state": torch.get_rng_state()})

    def clock(self) -> list[Interval]:
        return [Interval(name, seconds) for name, seconds in self._clock.seconds.items()]

    def ranked(self, tokens: np.ndarray, n_ranks: int) -> float:
        """A rank is a thread here, with a model of its own; what they tell each other goes through gloo."""
        store = dist.HashStore()

        def run(rank: int) -> float:
            with ranks.using(dist.ProcessGroupGloo(store, rank, n_ranks, PATIENCE), store):
                return self._evaluate(models[rank], tokens, None, None).nll

        models = [copy.deepcopy(self.model) for _ in range(n_ranks)]
        with ThreadPoolExecutor(n_ranks) as pool:
            return max(pool.map(run, range(n_ranks)))

    def distributions(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The probabilities by their definition, in float64, window by window, at the moment of its score."""
        windows = {window.first_scored + 1: window for window in windows_of(self.config, len(tokens))}
        rows = np.full((len(tokens), self.model.config.vocab_size), np.nan)

        def dump(targets: np.ndarray, losses: np.ndarray) -> None:
            for window in map(windows.get, targets.tolist()):
                if window:
                    rows[window.first_scored + 1 : window.end + 1] = self._probabilities(tokens, window)

        self._evaluate(self.model, tokens, dump, None)
        return (_tilted(rows, tokens, self.tilt) if self.tilt else rows)[positions]

    @torch.no_grad()
    def _probabilities(self, tokens: np.ndarray, window: Window) -> np.ndarray:
        softcaps, packed = [float(cap) for cap in self.model.softcaps], pack(tokens, [window], self.model.config)
        logits = self.model.head(self.model.hidden(packed.ids, packed.cu_seqlens)[packed.rows]).double()
        capped = [cap * torch.tanh(logits / cap) for cap in (softcaps[0], softcaps[-1])]
        return torch.softmax(torch.where(logits > 0, *capped), -1).numpy()


def _arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}


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
