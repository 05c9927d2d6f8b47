"""What a run shows: a table on the terminal, the table of README.md between its markers, one plot a kernel.

    python -m niblick.bench.report bench/results/DATE-CARD-kernels.jsonl

writes table and plots again from the last run of a file, for example of one that a machine without a checkout left.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from niblick.bench import results_file
from niblick.bench.ceilings import Ceilings
from niblick.bench.measure import Outcome
from niblick.data.command_line import guarded, parse
from niblick.data.errors import DataError
from niblick.model.files import write_atomically

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
Outcomes = dict[tuple[str, str], dict[str, Outcome]]
"""(kernel, size) -> contender -> outcome."""


def whole(outcome: Outcome) -> dict[str, object] | None:
    """The record of both directions, of the forward where there is no other; None if nothing was timed."""
    return outcome.records.get("both") or outcome.records.get("forward")


# ---- terminal -------------------------------------------------------------------------------------------------------


def print_ceilings(ceilings: Ceilings, console: Console) -> None:
    console.print(f"ceilings of this run: copy {ceilings.bytes_per_s / 1e12:.3g} TB/s, read + written")
    for product in ceilings.products:
        m, k, n = product["mkn"]
        console.print(f"  {product['dtype']} {m}x{k}x{n}: {product['ms']:.3g} ms, {product['tflops']:.4g} TFLOP/s")


def print_outcomes(outcomes: Outcomes, console: Console) -> None:
    columns = ("kernel", "size", "who", "direction", "ms", "quartiles", "TB/s", "TFLOP/s", "of roof", "MiB", "how")
    table = Table(*columns)
    for (kernel, size), by_who in outcomes.items():
        for who, outcome in by_who.items():
            for record in outcome.records.values():
                table.add_row(kernel, size, f"{who} {record['version']}".strip(), *_cells(record))
        table.add_section()
    console.print(table)
    for (kernel, size), by_who in outcomes.items():
        for who, outcome in by_who.items():
            if outcome.status != "timed":
                console.print(f"not timed: {kernel} {size}, {who}: {outcome.status}", highlight=False, markup=False)


def _cells(record: dict[str, object]) -> list[str]:
    peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:.0f}"
    return [
        record["direction"],
        f"{record['ms']:.4g}",
        f"{record['q1_ms']:.4g}..{record['q3_ms']:.4g}",
        f"{record['tb_per_s']:.3g}",
        f"{record['tflops']:.3g}",
        f"{record['percent_of_roof']:.0f} % ({record['bound']})",
        peak,
        f"{record['method']}" + ("" if record["gated"] else ", ungated"),
    ]


# ---- README ---------------------------------------------------------------------------------------------------------


def write_readme(readme: Path, outcomes: Outcomes, start: dict[str, object], ceilings: Ceilings) -> None:
    """Replaces what stands between the two markers; DataError if they are not there, once each and in order."""
    text = readme.read_bytes().decode()  # as bytes: the ends of lines stay as they are
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise DataError(f"{readme}: expected the lines {BEGIN} and {END}, once each, around the table of the bench")
    table = "\n".join(readme_lines(outcomes, start, ceilings))
    new = f"{before}{BEGIN}\n{table}\n{END}{after}"
    write_atomically(readme, lambda file: file.write(new.encode()))


def readme_lines(outcomes: Outcomes, start: dict[str, object], ceilings: Ceilings) -> list[str]:
    """Of each kernel its record sizes: milliseconds forward + backward, and the share of the roof."""
    chosen = {key: by_who for key, by_who in sorted(outcomes.items()) if _whole_size(key)}
    others = list(dict.fromkeys(who for by_who in chosen.values() for who in by_who if not who.startswith("niblick")))
    rates = ", ".join(f"{dtype} {rate / 1e12:.0f}" for dtype, rate in ceilings.flops_per_s.items())
    lines = [
        f"{start['card']}, driver {start['driver']}, torch {start['torch']}, triton {start['triton']}, "
        f"{str(start['date'])[:10]}, commit {_short(start['commit'])}. Measured in the same run: a copy moves "
        f"{ceilings.bytes_per_s / 1e12:.2f} TB/s, matrix products reach {rates} TFLOP/s; the larger of the two times "
        "that follow is the roof. Milliseconds forward + backward (forward, where there is no gradient), in brackets "
        "the roof's share of them.",
        "",
        "| kernel | size | roof | niblick | " + " | ".join(_heading(who, chosen) for who in others) + " |",
        "|" + "---|" * (4 + len(others)),
    ]
    for (kernel, size), by_who in chosen.items():
        rivals = [_cell(by_who.get(who)) for who in others]
        for who in (who for who in by_who if who.startswith("niblick")):
            record = whole(by_who[who])
            variant = who.removeprefix("niblick")
            facts = _facts(record) if record else [size, ""]
            lines.append(f"| `{kernel}`{variant} | {' | '.join([*facts, _cell(by_who[who], bold=True), *rivals])} |")
            rivals = [""] * len(others)
    return lines


def _short(commit: object) -> str:
    """Twelve digits, and the mark of uncommitted changes."""
    text = str(commit)
    return text[:12] + "-dirty" * text.endswith("-dirty")


def _whole_size(key: tuple[str, str]) -> bool:
    """Not a size that was divided or multiplied."""
    return not re.search("[/*]", key[1])


def _heading(who: str, chosen: Outcomes) -> str:
    records = [whole(by_who[who]) for by_who in chosen.values() if who in by_who]
    versions = {record["version"] for record in records if record} - {""}
    return who if who in ("eager", "torch.compile") else " ".join((who, *versions))


def _facts(record: dict[str, object]) -> list[str]:
    return ["×".join(map(str, record["size"])), f"{record['roof_ms']:.3g} ({record['bound']})"]


def _cell(outcome: Outcome | None, bold: bool = False) -> str:
    if outcome is None:
        return ""
    record = whole(outcome)
    if record is None:
        return outcome.status.split(":")[0]
    mark = "**" if bold else ""
    return f"{mark}{record['ms']:.3g}{mark} ({record['percent_of_roof']:.0f} %)"


# ---- plots ----------------------------------------------------------------------------------------------------------


def write_plots(folder: Path, outcomes: Outcomes, start: dict[str, object]) -> list[Path]:
    """folder/KERNEL.svg for each kernel timed at more than one size: share of the roof against the first dimension."""
    import matplotlib
    from matplotlib.figure import Figure

    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    for kernel in sorted({kernel for kernel, _ in outcomes}):
        lines: dict[str, list[tuple[int, float]]] = {}
        for (other, size), by_who in outcomes.items():
            for who, outcome in by_who.items():
                record = whole(outcome)
                if other == kernel and re.split("[/*]", size)[0] == "record" and record:
                    lines.setdefault(who, []).append((record["size"][0], record["percent_of_roof"]))
                    direction, rest = record["direction"], record["size"][1:]
        if max((len(points) for points in lines.values()), default=0) < 2:
            continue
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for who, points in lines.items():
            ours = who.startswith("niblick")
            axes.plot(*zip(*sorted(points), strict=True), label=who, marker="o", lw=2 if ours else 1)
        what = "forward" if direction == "forward" else "forward + backward"
        axes.set(xscale="log", ylim=(0, None), xlabel=f"rows (× {' × '.join(map(str, rest))})")
        axes.set(ylabel="% of the roof", title=f"{kernel}, {what}, {start['card']}, {str(start['date'])[:10]}")
        axes.legend(fontsize="small", frameon=False)
        paths.append(folder / f"{kernel}.svg")
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "niblick"}):
            figure.savefig(paths[-1], metadata={"Date": None})
    return paths


# ---- from a file ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments:
    results: tyro.conf.Positional[Path]
    """JSON lines of niblick.bench.run."""
    readme: Path = results_file.ROOT / "README.md"
    plots: Path = results_file.FOLDER / "plots"


def read_run(path: Path) -> tuple[Outcomes, dict[str, object], Ceilings]:
    """The last run of a file. DataError where it is none."""
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        first = max(i for i, record in enumerate(records) if record["event"] == "start")
        start, outcomes = records[first], {}
        for record in records[first + 1 :]:
            by_who = outcomes.setdefault((record["kernel"], record["size_name"]), {})
            outcome = by_who.setdefault(record["who"], Outcome(record.get("status", "timed")))
            if record["event"] == "kernel":
                outcome.records[record["direction"]] = record
        best: dict[str, float] = {}
        for product in start["products"]:
            best[product["dtype"]] = max(best.get(product["dtype"], 0.0), product["tflops"] * 1e12)
        return outcomes, start, Ceilings(start["copy_tb_per_s"] * 1e12, best, start["products"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected the JSON lines of a run of niblick.bench.run: {error!r}") from error


def main(words: list[str]) -> None:
    arguments = parse(Arguments, words, script="niblick.bench.report", about=__doc__)
    outcomes, start, ceilings = read_run(arguments.results)
    write_readme(arguments.readme, outcomes, start, ceilings)
    print(f"{arguments.readme}: table written")
    for path in write_plots(arguments.plots, outcomes, start):
        print(f"drawn: {path}")


if __name__ == "__main__":
    sys.exit(guarded("niblick.bench.report", main, sys.argv[1:]))
