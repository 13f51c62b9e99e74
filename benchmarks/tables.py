#!/usr/bin/env python
"""The README's tables of measurements, from the files that benchmarks/*.py have written into benchmarks/results.

    python benchmarks/tables.py

Each stands between `<!-- measured: NAME -->` and `<!-- end of measured -->`, NAME being that of the file. tests/
test_benchmarks.py makes sure that the README holds what the files say.
"""

import json
import re
import statistics
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- measured: (\S+) -->\n).*?(<!-- end of measured -->)", re.DOTALL)


def table(header: tuple, rows: list) -> str:
    """Markdown: the first column to the left, the others to the right."""
    lines = [header, (":---", *["---:"] * (len(header) - 1)), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def step(figures: dict) -> str:
    objectives = [(name, found) for name, found in figures.items() if isinstance(found, dict)]
    rows = [
        (
            name,
            f"{found['tokens_per_second']:,.0f}",
            f"{found['utilization']:.0%}",
            f"{found['ratio']:.3f}",
            f"{max(found['waiting'], 0):.1%}",
        )
        for name, found in objectives
    ]
    return table(("objective", "tokens/s", "utilization", "loop / step", "waiting"), rows)


def host(figures: dict) -> str:
    rows = [
        (
            name,
            *(f"{found[kind] / 1e6:.2f}" for kind in ("tokenizer", "prepared")),
            f"{found['share']:.0%}",
            *(f"{found[kind] / 1e6:.1f}" for kind in ("batches", "batches_by_rows")),
        )
        for name, found in figures.items()
    ]
    return table(("objective", "tokenizer", "prepared", "share", "batches", "by rows"), rows)


def startup(figures: dict) -> str:
    runs = {name: found for name, found in figures.items() if isinstance(found, dict)}
    columns = list(next(iter(runs.values())))
    rows = [(name, *(f"{found[column]:.1f}" for column in columns)) for name, found in runs.items()]
    return table(("model, cache", *columns), rows)


def scaling(figures: list) -> str:
    rows = [
        (
            f"{x['processes']} x {x['devices'] // x['processes']}",
            f"{x['bare_ms']:.0f}",
            f"{x['ratio']:.3f}",
        )
        for x in figures
    ]
    return table(("processes x devices", "step, ms", "loop / step"), rows)


def whole_run(figures: dict) -> str:
    rows = [
        (
            f"{int(name):,}",
            *(f"{sorted(seconds)[len(seconds) // 2]:.1f}" for seconds in found["seconds"].values()),
            f"{found['ratio']:.2f}",
            f"{min(found['ratios']):.2f} to {max(found['ratios']):.2f}",
        )
        for name, found in figures.items()
    ]
    return table(("vocabulary", "script, s", "simple, s", "ratio", "of the pairs"), rows)


def mlm_step(figures: dict) -> str:
    rows = [
        (
            f"{model}, {name}",
            f"{found['median_of_ratios']:.2f}",
            "{:.2f} to {:.2f}".format(*found["quartiles_of_ratios"]),
        )
        for model, measured in figures.items()
        for name, found in measured["steps"].items()
        if name != "script"
    ]
    return table(("model, step", "time / the script's", "quartiles"), rows)


def save(figures: dict) -> str:
    times = [f"{figures[name]:.2f}" for name in ("copy", "stopped", "written")]
    return table(
        ("state", "plain copy, s", "loop stopped, s", "written, s"),
        [(f"{figures['gigabytes']:.2f} GB", *times)],
    )


def inference(figures: dict) -> str:
    names = {
        "script, float32": "float32",
        "script, bfloat16": "bfloat16",
        "plain, bfloat16": "bfloat16, Flax's products",
    }
    ratios = {"script, float32": [1.0], "script, bfloat16": figures["script, ratios"]}
    rows = []
    for key, name in names.items():
        examples, tokens, median, slow, rate, share, _ = figures[key].values()
        found = ratios.get(key, figures["plain, ratios"])
        cells = (
            f"{examples:.1f}",
            f"{tokens:,.0f}",
            f"{median:,.0f}",
            f"{slow:,.0f}",
            f"{rate:.0f}",
            f"{share:.0f}%",
        )
        rows.append((name, *cells, f"{statistics.median(found):.2f}"))
    header = (
        "precision",
        "examples/s",
        "tokens/s",
        "median, ms",
        "95%, ms",
        "GFLOP/s",
        "of a product's",
        "speed",
    )
    return table(header, rows)


TABLES = {
    function.__name__: function
    for function in (step, host, startup, scaling, whole_run, mlm_step, save, inference)
}


def measured(name: str) -> str:
    """The table of a file, and how it came about."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    kind = re.match(r"python benchmarks/(\w+)\.py", found["command"])[1]
    about = f"`{found['command']}`: {found['processor']}, JAX {found['jax']}."
    about = textwrap.fill(about, 103, break_on_hyphens=False, break_long_words=False)
    return f"\n{TABLES[kind](found['figures'])}\n{about}\n\n"


def fill(text: str) -> str:
    """The README's text with the tables of today's files."""
    return BLOCK.sub(lambda match: match[1] + measured(match[2]) + match[3], text)


if __name__ == "__main__":
    README.write_text(fill(README.read_text("utf-8")), encoding="utf-8")
