"""What a dossier finds in its runs, and the folder that says so: report.md, curves.svg, dossier.json."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from niblick.bench.intervals import mean_interval, seed_noise
from niblick.bench.results_file import rounded
from niblick.model.files import write_atomically

Checksum = tuple[str, str]
"""A parameter's shape and dtype, and the SHA-256 of its values."""
FIRST = 10
"""Losses shown side by side."""
SHOWS = """\
**What this shows.** Both read the same batches in one order, so what batches differ in cancels in B less A. In all
that is {passes:.3g} times the training text.{again} The noise is that of A's seeds: the means of two sets of {k} runs
that differ in their seeds alone lie no farther apart than it in 95 % of cases, so at most 5 % of such pages say
"outside".

**What it does not show.** Nothing beyond {steps} steps: a difference that grows slowly, or one in the average of the
weights, in quantisation or in scoring, is not seen. "Inside" is no proof of equality: a true difference of up to
{bound:.5f} nats is not excluded. Steps are counted here, not seconds: what speed itself gains is another matter. The
intervals take the seeds' results as normally distributed, which so few of them cannot confirm."""
WARNING = " From the same seed they start from other weights."
AGAIN = " Some of it is\nread again, and the loss is not one on text unseen before."
PLACE = ("card", "driver", "torch", "triton", "cuda", "python", "attention", "compile", "commit", "date")


@dataclass(frozen=True)
class Findings:
    """In nats a token: B less A in the mean loss of the last `window` steps, paired by seed, with the half-width of its
    95 % interval; the noise of A's seeds, likewise 95 %, and their standard deviation. ms: medians, and B less A with
    its half-width, by step."""

    window: int
    difference: float
    half_width: float
    noise: float
    deviation: float
    per_seed: list[float]
    whole_curve: float
    whole_curve_half_width: float
    ms: dict[str, float]
    faster_ms: float
    faster_half_width_ms: float
    starts_that_differ: list[str]
    other_shapes: list[str]
    same_seeds: bool
    same_final_weights: bool
    place: str
    verdict: str


# ---- what is found --------------------------------------------------------------------------------------------------


def find(runs: dict[str, list], share: float) -> Findings:
    """From the runs of A and B, seed by seed; `share` of the steps, the last ones, is compared."""
    a, b = (np.array([run.losses for run in runs[label]]) for label in "AB")
    window = max(1, round(share * a.shape[1]))
    late_a, late_b = a[:, -window:].mean(1), b[:, -window:].mean(1)
    difference, half = mean_interval(late_b - late_a)
    curve, curve_half = mean_interval((b - a).mean(1))
    noise = seed_noise(late_a)
    pairs = list(zip(runs["A"], runs["B"], strict=True))
    ms = {label: float(np.median([run.ms for run in runs[label]])) for label in "AB"}
    faster, faster_half = mean_interval([float(np.median(np.subtract(y.ms, x.ms))) for x, y in pairs])
    starts = sorted({name for x, y in pairs for name in _unlike(x.initial, y.initial)})
    same_seeds = all(x.seed == y.seed for x, y in pairs)
    return Findings(
        window=window,
        difference=difference,
        half_width=half,
        noise=noise,
        deviation=float(late_a.std(ddof=1)),
        per_seed=(late_b - late_a).tolist(),
        whole_curve=curve,
        whole_curve_half_width=curve_half,
        ms=ms,
        faster_ms=faster,
        faster_half_width_ms=faster_half,
        starts_that_differ=starts,
        other_shapes=_of_other_shape(runs["A"][0].initial, runs["B"][0].initial),
        same_seeds=same_seeds,
        same_final_weights=all(x.final == y.final for x, y in pairs),
        place=place(difference, half, noise),
        verdict=verdict(difference, half, noise, same=np.array_equal(a, b)) + WARNING * (same_seeds and bool(starts)),
    )


def _unlike(a: dict[str, Checksum], b: dict[str, Checksum]) -> list[str]:
    """Parameters of one name and shape whose values differ."""
    return [name for name in a.keys() & b.keys() if a[name][0] == b[name][0] and a[name] != b[name]]


def _of_other_shape(a: dict[str, Checksum], b: dict[str, Checksum]) -> list[str]:
    """Parameters that only one of the two has in this shape."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name, ("",))[0] != b.get(name, ("",))[0])


def place(difference: float, half: float, noise: float) -> str:
    """Where the difference lies. Both must speak for "outside": A's noise, which few seeds may understate, and the
    interval, in which B's seeds count too."""
    if abs(difference) <= noise:
        return "inside"
    return "outside" if abs(difference) > half else "undecided"


def verdict(difference: float, half: float, noise: float, same: bool = False) -> str:
    """One line, of numbers in nats."""
    if same:
        return "Every loss of B is A's to the last bit: there is no difference."
    what = f"The difference, {difference:+.5f} ± {half:.5f} nats, lies"
    where = place(difference, half, noise)
    if where == "undecided":
        what += f" outside the seed noise of ± {noise:.5f}"
        return f"{what}, but its interval contains zero: undecided, more seeds would tell."
    zero = "contains" if abs(difference) <= half else "does not contain"
    return f"{what} {where} the seed noise of ± {noise:.5f}; its interval {zero} zero."


# ---- the folder -----------------------------------------------------------------------------------------------------


def write(folder: Path, facts: dict[str, object], runs: dict[str, list], found: Findings) -> None:
    """All three files; the report last, so that a report never stands without what it speaks of."""
    record = {**facts, "findings": asdict(found), "runs": {k: [asdict(run) for run in v] for k, v in runs.items()}}
    text = json.dumps(rounded(record), indent=1)
    write_atomically(folder / "dossier.json", lambda file: file.write(text.encode()))
    write_atomically(folder / "curves.svg", lambda file: draw(file, runs, found))
    write_atomically(folder / "report.md", lambda file: file.write(report(facts, runs, found).encode()))


def report(facts: dict[str, object], runs: dict[str, list], found: Findings) -> str:
    k, steps = len(runs["A"]), len(runs["A"][0].losses)
    bound = abs(found.difference) + found.half_width
    learning = [
        ("B less A, last steps, mean over seeds, 95 %", f"{found.difference:+.5f} ± {found.half_width:.5f}"),
        ("the same by seed", ", ".join(f"{x:+.5f}" for x in found.per_seed)),
        ("B less A, all steps", f"{found.whole_curve:+.5f} ± {found.whole_curve_half_width:.5f}"),
        (f"noise of A's seeds, means of {k}, 95 %", f"± {found.noise:.5f}"),
        ("standard deviation between A's seeds", f"{found.deviation:.5f}"),
    ]
    times = [
        ("A, median", f"{found.ms['A']:.3f}"),
        ("B, median", f"{found.ms['B']:.3f}"),
        ("B less A, by step, mean over seeds, 95 %", f"{found.faster_ms:+.3f} ± {found.faster_half_width_ms:.3f}"),
    ]
    passes = facts["passes"]
    limits = SHOWS.format(k=k, steps=steps, bound=bound, passes=passes, again=AGAIN if passes > 1 else "")
    parts = [
        "# Does B learn as A does?",
        f"**{found.verdict}**",
        f"- A: `{facts['A']}`\n- B: `{facts['B']}`",
        f"{k} seeds each, {steps} steps of {facts['tokens']:,} tokens, data `{facts['data']}`. Compared is"
        f" the mean training loss of the last {found.window} steps.",
        "![loss curves](curves.svg)",
        "## Learning",
        _table(("", "nats a token"), learning),
        limits,
        "## First losses",
        _first_losses(runs),
        "## Weights",
        *_weights(runs, found),
        "## Time of a step, in turns",
        _table(("", "ms"), times),
        "## Where",
        _table(("", ""), [(key, facts[key]) for key in PLACE]),
        f"Again: `{facts['command']}`",
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _first_losses(runs: dict[str, list]) -> str:
    a, b = runs["A"][0], runs["B"][0]
    rows = [
        (step + 1, f"{x:.6f}", f"{y:.6f}", f"{y - x:+.2e}")
        for step, (x, y) in enumerate(zip(a.losses[:FIRST], b.losses[:FIRST], strict=True))
    ]
    return _table(("step", f"A, seed {a.seed}", f"B, seed {b.seed}", "B less A"), rows)


def _weights(runs: dict[str, list], found: Findings) -> list[str]:
    rows = [
        (label, run.seed, f"`{_together(run.initial)}`", f"`{run.final[:16]}`") for label in "AB" for run in runs[label]
    ]
    parts = [_table(("", "seed", "SHA-256 of the initial weights", "of the final ones"), rows)]
    if found.starts_that_differ:
        why = "A and B start from other weights" + ("" if found.same_seeds else ", their seeds being others")
        parts.append(f"{why}: {', '.join(found.starts_that_differ)}.")
    else:
        parts.append("Every initial parameter that both have in one shape is the same to the last bit.")
    if found.other_shapes:
        parts.append(f"Not in both, or in another shape: {', '.join(found.other_shapes)}.")
    same = "the same to the last bit" if found.same_final_weights else "not the same bit by bit"
    return [*parts, f"The final weights are {same}."]


def _together(checksums: dict[str, Checksum]) -> str:
    return hashlib.sha256(repr(sorted(checksums.items())).encode()).hexdigest()[:16]


def draw(file, runs: dict[str, list], found: Findings) -> None:
    """Above, every run's loss; below, B less A: a line a seed, their mean, and the noise of A's seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    a, b = (np.array([run.losses for run in runs[label]]) for label in "AB")
    steps = np.arange(1, a.shape[1] + 1)
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for losses, label, colour in ((a, "A", "C0"), (b, "B", "C1")):
        for i, curve in enumerate(losses):
            above.plot(steps, curve, color=colour, lw=0.7, alpha=0.7, label=label if i == 0 else None)
    above.set(ylabel="loss, nats a token", yscale="log")
    above.legend(frameon=False)
    below.plot(steps, (b - a).T, color="0.75", lw=0.5)
    below.plot(steps, (b - a).mean(0), color="C1", lw=1, label="B less A, mean over seeds")
    below.axvspan(steps[-found.window], steps[-1], color="0.93", zorder=0)
    below.axhspan(-found.noise, found.noise, color="C0", alpha=0.25, lw=0, label="noise of A's seeds, late steps")
    late = np.abs((b - a)[:, len(steps) // 10 :]).max()
    below.set(xlabel="step", ylabel="nats", ylim=np.array([-1.1, 1.1]) * max(late, found.noise, 1e-9))
    below.legend(frameon=False, fontsize="small")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "niblick"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
