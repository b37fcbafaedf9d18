"""A plan as text."""

from typing import Any

from imagen_jax.planning.roofline import ASSUMPTIONS

HEADER = f"{'setting':58} {'GiB':>7} {'step s':>8} {'of peak':>8} {'images/s':>9}"


def row(setting: str, found: dict[str, Any]) -> str:
    """One line of a search, under `HEADER`."""
    gib = found["hbm_gib_per_chip"]
    shown = "?" if gib is None else f"{gib:.2f}"
    if not found["fits"]:
        return f"{setting:58} {shown:>7} does not fit"
    if found["step_seconds"] is None:
        return f"{setting:58} {shown:>7} of unknown speed"
    return (
        f"{setting:58} {shown:>7} {found['step_seconds']:8.3f} "
        f"{found['peak_share']:8.1%} {found['images_per_second']:9,.0f}"
    )


def report(found: dict[str, Any]) -> str:
    """The figures of one program, for people."""
    axes = ", ".join(f"{name} {size}" for name, size in found["mesh"].items())
    lines = [
        f"{found['stage']}, {found['what']}: {found['chips']} x {found['chip']}, "
        f"mesh {axes}; {found['batch_size']:,} pictures, "
        f"{found['batch_size'] / found['chips']:g} a chip",
        "",
        *_memory(found),
        "",
        *_work(found),
        "",
        *_time(found),
        "",
        f"compiled in {found['compile_seconds']:.0f} s after "
        f"{found['trace_seconds']:.0f} s of tracing, {found['host_memory_gib']:.1f} "
        "GiB of this machine's memory",
    ]
    return "\n".join(lines)


def _memory(found: dict[str, Any]) -> list[str]:
    limit = found["hbm_limit_gib"]
    of = f" of {limit:.2f}" if limit else ""
    fits = "" if not limit else "fits: " if found["fits"] else "does not fit: "
    rows = [f"  {name:36} {gib:9.3f}" for name, gib in found["memory_gib"].items()]
    return [
        f"{fits}{found['hbm_gib_per_chip']:.2f}{of} GiB of each chip's memory",
        *rows,
    ]


def _work(found: dict[str, Any]) -> list[str]:
    run = "step" if found["what"] == "train" else "call of the sampler"
    waste = found["padding_waste"]["of_bytes"]
    lines = [
        f"of each chip, a {run}",
        f"  {'matrix arithmetic':36} {found['flops_per_chip'] / 1e12:9.3f} TFLOP",
        f"  {'main memory read and written':36} {found['bytes_per_chip'] / 1e9:9.2f} GB"
        f", {waste:.1%} of it padding",
        f"  {'sent to other chips':36} "
        f"{found['collective_bytes_per_chip'] / 1e9:9.3f} GB",
    ]
    for kind, each in found["collectives"].items():
        lines.append(
            f"    {each['count']:6,.0f} {kind:27} {each['bytes'] / 1e9:9.3f} GB"
        )
    if found["loops_of_unknown_length"]:
        count = found["loops_of_unknown_length"]
        lines.append(f"  {count} loops of unknown length, counted once")
    if found["kernels_of_unknown_arithmetic"]:
        names = ", ".join(found["kernels_of_unknown_arithmetic"])
        lines.append(f"  without the arithmetic of the kernels {names}")
    return lines


def _time(found: dict[str, Any]) -> list[str]:
    if found["step_seconds"] is None:
        return [f"no data sheet of {found['chip']!r} is known: no times"]
    each = found["roofline"]
    total = found["seconds"] if found["what"] == "sample" else found["step_seconds"]
    lines = [
        "time by the data sheet (an estimate: nothing was run)",
        f"  {'arithmetic at the peak rate':36} {each['compute_seconds']:9.4g} s",
        f"  {'memory at its bandwidth':36} {each['memory_seconds']:9.4g} s",
        f"  {'exchanges':36} {each['interconnect_seconds']:9.4g} s",
        f"  {'all in order':36} {total:9.4g} s",
    ]
    cycles = each["by_the_compilers_cycles"]
    if cycles:
        text = "by the compiler's cycles instead"
        lines.append(f"  {text:36} {cycles:9.4g} s")
    lines += [
        f"  {found['peak_share']:.1%} of the peak{_by_cycles(found)}; "
        f"{found['images_per_second']:,.4g} images a second",
    ]
    if found["what"] == "sample":
        lines.append(
            f"  {found['step_seconds']:.4f} s a step of the sampler, "
            f"{found['chip_seconds_per_image']:.3f} chip-seconds a picture"
        )
    else:
        lines.append(
            f"  {found['days']:,.1f} days and {found['chip_hours']:,.0f} chip-hours to "
            "the last step" + _slower(found, cycles)
        )
    return [*lines, "  assumed:", *(f"  - {each}" for each in ASSUMPTIONS)]


def _by_cycles(found: dict[str, Any]) -> str:
    share = found["peak_share_by_cycles"]
    return f" ({share:.1%} by the compiler's cycles)" if share else ""


def _slower(found: dict[str, Any], cycles: float | None) -> str:
    if not cycles:
        return ""
    days = found["days"] * cycles / found["step_seconds"]
    hours = found["chip_hours"] * cycles / found["step_seconds"]
    return f" ({days:,.1f} and {hours:,.0f} by the compiler's cycles)"
