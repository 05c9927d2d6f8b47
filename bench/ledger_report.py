"""What niblick.bench.step prints: tables and lines, from its records."""

from collections.abc import Iterator

from rich.table import Table

from niblick.bench import published
from niblick.bench.ledger import Projection
from niblick.bench.phases import WHOLE
from niblick.model.config import ScheduleConfig

Record = dict[str, object]


def lines(
    begin: Record,
    steps: list[Record],
    waits: dict[str, tuple[float, float]],
    profiled: list[Record],
    projected: list[Projection | str],
    schedule: ScheduleConfig,
    versus: list[Record],
    history: Record,
) -> Iterator[Table | str]:
    settings = " ".join(begin["settings"])
    yield (
        f"{begin['preset']} {settings}".strip() + f": {begin['ranks']} x {begin['card']}, {begin['tokens']:,} tokens "
        f"a rank, attention {begin['attention']}, {begin['precision']}, torch {begin['torch']}"
    )
    if begin["weights"] == "init":
        yield "Fresh weights, forward and backward only: no step, so nothing is projected."
    yield phase_table(steps)
    yield from card_lines(steps)
    if waits:
        for loop, (wait, ms) in waits.items():
            yield f"loader wait, loop {loop}: {wait:.3f} ms of the host a step of {ms:.2f} ms on the training's clock"
    else:
        why = ": synthetic batches (--data SOURCE)" if begin["data"] == "synthetic" else ""
        yield f"loader wait: not measured{why}"
    if begin["ranks"] == 1:
        yield "collectives: none on one rank (torchrun --nproc-per-node N -m niblick.bench.step measures them)"
    for record in profiled:
        yield kernel_table(record)
        yield from kernel_lines(record)
    if projected:
        yield from projection_lines(projected, schedule)
    if versus:
        yield versus_table(versus, begin)
    yield history_line(history)


def phase_table(steps: list[Record]) -> Table:
    table = Table("phase, ms", *(f"{record['variant']}, loop {record['loop']}" for record in steps))
    names = list(dict.fromkeys(name for record in steps for name in record["phases"] if name != WHOLE))
    for name in names:
        table.add_row(name, *(f"{record['phases'].get(name, 0.0):.3f}" for record in steps))
    table.add_section()
    table.add_row(WHOLE, *(f"{record['phases'][WHOLE]:.3f}" for record in steps))
    table.add_row("quartiles of steps", *(f"{r['q1_ms']:.2f}..{r['q3_ms']:.2f}, n {r['n']}" for r in steps))
    return table


def card_lines(steps: list[Record]) -> Iterator[str]:
    for record in steps:
        where = f"{record['variant']}, loop {record['loop']}"
        if record["peak_bytes"] is not None:
            yield f"{where}: peak memory {record['peak_bytes'] / 2**30:.2f} GiB"
        if record["telemetry"]:
            yield f"{where}: " + ", ".join(f"{value:.0f} {unit}" for unit, value in record["telemetry"].items())


# ---- the device's time ----------------------------------------------------------------------------------------------


def kernel_table(record: Record) -> Table:
    busy = record["span_ms"] - record["idle_ms"]
    table = Table("kernels", "ms a step", "% of the time busy", "number", title=f"loop {record['loop']}, profiled")
    for label, ms in record["ms"].items():
        table.add_row(label, f"{ms:.3f}", f"{100 * ms / busy:.1f}", f"{record['count'][label]:.0f}")
    return table


def kernel_lines(record: Record) -> Iterator[str]:
    yield (
        f"  span {record['span_ms']:.2f} ms a step, idle {record['idle_ms']:.3f} ms "
        f"({100 * record['idle_share']:.1f} %), "
        f"kernels side by side {record['overlap_ms']:.3f} ms"
    )
    for what, roof in record["roofs"].items():
        share = f"{100 * roof['roof_ms'] / roof['ms']:.0f} % of it" if roof["ms"] else "no such kernel ran"
        yield f"  {what}: {roof['ms']:.2f} ms, roof {roof['roof_ms']:.2f} ms ({share})"
    if "no_roofs" in record:
        yield f"  roofs not known: {record['no_roofs']}"
    for name, ms in record["other"]:
        yield f"  other: {ms:.3f} ms {name[:100]}"


# ---- steps in the budget --------------------------------------------------------------------------------------------


def projection_lines(projected: list[Projection | str], schedule: ScheduleConfig) -> Iterator[str]:
    yield (
        f"steps in {schedule.budget_s:g} s less {schedule.reserve_s:g} s of reserve, loop from "
        f"{100 * schedule.loop_at:g} % of it on:"
    )
    for one in projected:
        if isinstance(one, str):
            yield f"  {one}"
            continue
        loop = "" if one.loop_from is None else f", loop from step {one.loop_from:,}"
        ms = " / ".join(f"{value:.1f}" for value in one.ms.values())
        yield f"  {one.what}: {one.steps:,} steps of {ms} ms{loop}; 1 ms less a step: {one.steps_per_ms:+.3g} steps"
    record = next((p for p in projected if isinstance(p, Projection) and p.what.startswith("8 GPUs")), None)
    few, many = published.range_of_steps()
    if record and schedule.budget_s == 600.0 and few <= record.steps <= many:
        bits, *rest = published.describe(record.steps_per_ms)
        yield f"  worth of 1 ms on 8 GPUs: {bits}"
        yield from rest
    else:
        yield f"  worth in bits per byte: not known (the published runs speak for {few:,} to {many:,} steps on 8 GPUs)"


# ---- comparisons ----------------------------------------------------------------------------------------------------


def versus_table(versus: list[Record], begin: Record) -> Table:
    """B less A."""
    title = f"B ({' '.join(begin['versus']).strip()}) less A, by round, 95 %"
    table = Table("loop", "phase", "ms", "rounds", title=title)
    for record in versus:
        cell = f"{record['difference_ms']:+.3f} ± {record['half_width_ms']:.3f}"
        table.add_row(record["loop"], record["phase"], cell, str(record["rounds"]))
    return table


def history_line(history: Record) -> str:
    before = history["before"]
    if before is None:
        return "history: no run of the same card, preset and settings to compare with"
    parts = [f"loop {loop} {percent:+.1f} %" for loop, percent in history["percent"].items()]
    return f"history: against {before['date']}, commit {str(before['commit'])[:12]}: " + ", ".join(parts)


def regression(history: Record, fail_over: float) -> str:
    """One line for a step that has become longer than allowed."""
    worst = max(history["percent"], key=history["percent"].get)
    before = history["before"]
    return (
        f"the step with the loop {worst} takes {history['percent'][worst]:.1f} % longer than the "
        f"{before['ms'][worst]:.2f} ms of {before['date']}: expected at most {fail_over:g} % (--fail-over)"
    )
