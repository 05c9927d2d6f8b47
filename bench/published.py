"""What published runs say of the worth of a step: steps in 600 s, and the bits per byte that they ended with.

Every run is one seed on eight H100 for 600 s, from the logs of the named pull request of the Parameter Golf challenge;
the score is the final one, after quantisation and test-time training. #1423 is left out: it trained on validation data.
Inside one system the seed changes the weights' start alone; the number of steps follows from how fast the host was.
"""

from dataclasses import dataclass

import numpy as np

from niblick.bench.intervals import t_quantile

RUNS: dict[str, list[tuple[int, float]]] = {
    "#1413": [(5082, 1.08210), (5082, 1.08315), (5083, 1.08314)],
    "#1477": [(5068, 1.08261339), (5069, 1.08222600), (5073, 1.08169930)],
    "#1493": [(4550, 1.08079), (4557, 1.08103), (4555, 1.08118)],
    "#1514": [(4911, 1.07928348), (4915, 1.07996676), (4909, 1.08024795)],
    "#1530": [(4867, 1.07258), (4845, 1.07325), (4847, 1.07426)],
    "#1736": [(4843, 1.06473), (4854, 1.06610), (4847, 1.06563)],
    "#1787": [(4957, 1.06308), (4961, 1.06400), (4964, 1.06297)],
    "#1797, first": [(4948, 1.06181), (4954, 1.06083), (4948, 1.06209)],
    "#1797, later": [(4878, 1.06319), (4883, 1.06307), (4655, 1.06610)],
    "#1855": [(4945, 1.05989454), (4932, 1.06124613), (4917, 1.06208695)],
    "#1868, first": [(4960, 1.06087), (4958, 1.06220)],
    "#1868, reserve 8 s": [(4942, 1.06083), (4921, 1.06091), (4902, 1.06249)],
    "#1934": [(4984, 1.05932556), (4974, 1.05993748), (4981, 1.06051274)],
}
"""(steps, final bits per byte) of each seed."""


@dataclass(frozen=True)
class Worth:
    """Bits per byte that one more step changes (negative: better), the half-width of its 95 % interval, and on what it
    rests: runs, systems, the share of the evidence (squared distance in steps) that the single farthest run gives."""

    bits_per_step: float
    half_width: float
    runs: int
    systems: int
    largest_share: float


def worth_of_a_step(runs: dict[str, list[tuple[int, float]]] = RUNS) -> Worth:
    """Least squares: one slope for all systems, one level for each."""
    steps, bits = [], []
    for rows in runs.values():
        own = np.array(rows)
        centred = own - own.mean(0)
        steps.append(centred[:, 0])
        bits.append(centred[:, 1])
    x, y = np.concatenate(steps), np.concatenate(bits)
    weight = float(x @ x)
    slope = float(x @ y) / weight
    dof = len(x) - len(runs) - 1
    error = float(np.sqrt(((y - slope * x) ** 2).sum() / dof / weight))
    # Without run i of a system of m, the system's own sum of squares falls by m / (m - 1) times its squared distance.
    shares = [float(x_i**2) * len(own) / (len(own) - 1) / weight for own in steps for x_i in own]
    return Worth(slope, t_quantile(dof) * error, len(x), len(runs), max(shares))


def without_farthest(runs: dict[str, list[tuple[int, float]]] = RUNS) -> dict[str, list[tuple[int, float]]]:
    """The same, less the run that lies farthest from the mean steps of its system."""
    distance = {
        (system, i): abs(row[0] - np.mean([steps for steps, _ in rows]))
        for system, rows in runs.items()
        for i, row in enumerate(rows)
    }
    farthest = max(distance, key=distance.get)
    return {system: [row for i, row in enumerate(rows) if (system, i) != farthest] for system, rows in runs.items()}


def range_of_steps() -> tuple[int, int]:
    """Where the fit may speak: between the published runs, and a fifth beyond."""
    steps = [steps for rows in RUNS.values() for steps, _ in rows]
    return round(min(steps) / 1.2), round(max(steps) * 1.2)


def describe(steps: float) -> list[str]:
    """What so many more steps are worth, in words, with what the fit does not know."""
    all_runs, less_one = worth_of_a_step(), worth_of_a_step(without_farthest())
    change, half = steps * all_runs.bits_per_step, abs(steps) * all_runs.half_width
    other, other_half = steps * less_one.bits_per_step, abs(steps) * less_one.half_width
    return [
        f"{change:+.5f} ± {half:.5f} bits per byte (95 %; {all_runs.runs} published runs of {all_runs.systems} systems "
        f"on eight H100: {1e6 * all_runs.bits_per_step:+.1f} ± {1e6 * all_runs.half_width:.1f} millionths a step)",
        f"  few points: one run, on a slow host, gives {100 * all_runs.largest_share:.0f} % of the evidence; without "
        f"it {other:+.5f} ± {other_half:.5f}, from steps that hardly differ",
    ]
