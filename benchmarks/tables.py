"""The tables of docs/benchmarks.md, made of the files in benchmarks/results.

The other benchmarks write those files with `--json`. `make docs` writes the tables into the page,
each between `<!-- measured: NAME -->` and `<!-- end of measured -->`, where NAME is the name of its
file. A new benchmark needs a function here and an entry in TABLES.
"""

import json
import re
import statistics
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def is_text(column: tuple) -> bool:
    """Whether all cells of a column begin with a letter."""
    return all(str(cell)[:1].isalpha() for cell in column)


def table(header: tuple, rows: list) -> str:
    """Write a table in Markdown. Numbers are aligned right, text and the first column left."""
    alignment = [":---"]
    for column in list(zip(*rows, strict=True))[1:]:
        alignment.append(":---" if is_text(column) else "---:")
    lines = []
    for cells in (header, alignment, *rows):
        lines.append(f"| {' | '.join(map(str, cells))} |\n")
    return "".join(lines)


def named_rows(figures: dict) -> dict[str, dict]:
    """The figures that are rows of a table, as opposed to single numbers beside it."""
    return {name: found for name, found in figures.items() if isinstance(found, dict)}


def step(figures: dict) -> str:
    rows = []
    for objective, found in named_rows(figures).items():
        row = (
            objective,
            f"{found['tokens_per_second']:,.0f}",
            f"{found['utilization']:.0%}",
            f"{found['ratio']:.3f}",
            f"{max(found['waiting'], 0):.1%}",
        )
        rows.append(row)
    return table(("objective", "tokens/s", "utilization", "loop / step", "waiting"), rows)


def host(figures: dict) -> str:
    rows = []
    for objective, found in figures.items():
        row = (
            objective,
            f"{found['tokenizer'] / 1e6:.2f}",
            f"{found['prepared'] / 1e6:.2f}",
            f"{found['share']:.0%}",
            f"{found['batches'] / 1e6:.1f}",
            f"{found['batches_by_rows'] / 1e6:.2f}",
        )
        rows.append(row)
    return table(("objective", "tokenizer", "prepared", "share", "batches", "by rows"), rows)


def startup(figures: dict) -> str:
    runs = named_rows(figures)
    first_run = next(iter(runs.values()))
    columns = list(first_run)
    rows = []
    for name, found in runs.items():
        cells = [f"{found[column]:.1f}" for column in columns]
        rows.append((name, *cells))
    return table(("run, cache", *columns), rows)


def scaling(figures: list) -> str:
    rows = []
    for found in figures:
        devices_per_process = found["devices"] // found["processes"]
        row = (
            f"{found['processes']} x {devices_per_process}",
            f"{found['bare_ms']:.0f}",
            f"{found['ratio']:.3f}",
        )
        rows.append(row)
    return table(("processes x devices", "step, ms", "loop / step"), rows)


def whole_run(figures: dict) -> str:
    rows = []
    for vocab_size, found in figures.items():
        medians = []
        for seconds in found["seconds"].values():
            medians.append(f"{sorted(seconds)[len(seconds) // 2]:.1f}")
        row = (
            f"{int(vocab_size):,}",
            *medians,
            f"{found['ratio']:.2f}",
            f"{min(found['ratios']):.2f} to {max(found['ratios']):.2f}",
        )
        rows.append(row)
    return table(("vocabulary", "script, s", "plain, s", "ratio, median", "ratio, range"), rows)


def mlm_step(figures: dict) -> str:
    rows = []
    for model, measured_model in figures.items():
        for name, found in measured_model["steps"].items():
            # Its ratios to itself are 1.
            if name == "script":
                continue
            low, high = found["quartiles_of_ratios"]
            row = (
                f"{model}, {name}",
                f"{found['median_of_ratios']:.2f}",
                f"{low:.2f} to {high:.2f}",
            )
            rows.append(row)
    return table(("model, step", "time / the script's", "quartiles"), rows)


def save(figures: dict) -> str:
    row = (
        f"{figures['gigabytes']:.2f} GB",
        f"{figures['copy']:.2f}",
        f"{figures['stopped']:.2f}",
        f"{figures['written']:.2f}",
    )
    return table(("state", "plain copy, s", "loop stopped, s", "written, s"), [row])


def inference(figures: dict) -> str:
    names = {
        "script, float32": "float32",
        "script, bfloat16": "bfloat16",
        "plain, bfloat16": "bfloat16, Flax's products",
    }
    # Speed is that relative to float32.
    ratios = {
        "script, float32": [1.0],
        "script, bfloat16": figures["script, ratios"],
        "plain, bfloat16": figures["plain, ratios"],
    }
    rows = []
    for key, name in names.items():
        found = figures[key]
        row = (
            name,
            f"{found['examples/s']:.1f}",
            f"{found['tokens/s']:,.0f}",
            f"{found['median ms']:,.0f}",
            f"{found['95% ms']:,.0f}",
            f"{found['GFLOP/s']:.0f}",
            f"{found['% of a product']:.0f}%",
            f"{statistics.median(ratios[key]):.2f}",
        )
        rows.append(row)
    header = (
        "precision",
        "examples/s",
        "tokens/s",
        "median, ms",
        "95%, ms",
        "GFLOP/s",
        "of a large product",
        "speed",
    )
    return table(header, rows)


def accelerators(rows: list[dict]) -> str:
    """The plans of the compilers, each beside that of the plain step."""
    steps = {}
    for row in rows:
        key = (row["target"], row["objective"], row["dtype"])
        steps.setdefault(key, {"size": f"{row['rows']} x {row['length']}"})
        steps[key][row["step"]] = row["figures"]
    lines = []
    for (target, objective, dtype), found in steps.items():
        train = found["train"]
        plain = found.get("plain", {})
        line = [
            target,
            f"{objective}, {found['size']}",
            dtype,
            f"{train['state'] / 1e9:.1f}",
            f"{train['temporaries'] / 1e9:.1f}",
        ]
        if "needed" in plain:
            line.append(f"does not fit: {plain['needed'] / 1e9:.1f}")
        else:
            line.append(f"{plain['temporaries'] / 1e9:.1f}" if plain else "")
        for name, unit, digits in (("flops", 1e12, 1), ("bytes", 1e9, 0)):
            cells = [f"{side[name] / unit:.{digits}f}" for side in (train, plain) if name in side]
            line.append(" / ".join(cells))
        lines.append(line)
    header = ("device", "step", "dtype", "state", "temporaries", "plain", "TFLOP", "GB moved")
    return table(header, lines)


def batches(rows: list[dict]) -> str:
    """The batches that GPUs can hold, in proportion to the plan for an H100 in bfloat16."""
    lines = []
    for row in rows:
        if (row["target"], row["dtype"], row["step"]) != ("h100", "bfloat16", "train"):
            continue
        figures = row["figures"]
        line = [f"{row['objective']}, {row['length']} tokens"]
        for gigabytes in (24, 40, 80):
            free = 0.75 * gigabytes * 1e9 - figures["state"]
            fitting = free / (figures["temporaries"] / row["rows"])
            line.append(f"{int(fitting) // 8 * 8}")
        lines.append(line)
    return table(("step, bfloat16", "24 GB", "40 GB", "80 GB"), lines)


def both_sides(runs: dict, name: str, unit: float, digits: int) -> str:
    """The medians of the script and of PyTorch, such as "32.3 / 17.0"."""
    medians = []
    for side in ("script", "pytorch"):
        medians.append(statistics.median(run[name] for run in runs[side]) / unit)
    return " / ".join(f"{value:.{digits}f}" for value in medians)


def pytorch(figures: list[dict]) -> str:
    """The script / PyTorch's Trainer."""
    lines = []
    for row in figures:
        runs = row["runs"]
        pairs = zip(runs["script"], runs["pytorch"], strict=True)
        ratios = [ours["steps_per_second"] / theirs["steps_per_second"] for ours, theirs in pairs]
        line = [
            f"{row['objective']}, {row['size']}, {row['dtype']}",
            f"{statistics.median(ratios):.2f}",
            both_sides(runs, "steps_per_second", 1, 2),
            both_sides(runs, "first_step", 1, 0),
            both_sides(runs, "run", 1, 0),
            both_sides(runs, "memory", 1e9, 1),
            both_sides(runs, "eval_loss", 1, 2),
        ]
        lines.append(line)
    header = ("model", "ratio", "steps/s", "first step, s", "run, s", "memory, GB", "eval loss")
    return table(header, lines)


def learning(figures: list[dict]) -> str:
    """Evaluation losses of the script and of PyTorch, and how far they are apart."""
    from learning import summary

    rows = []
    for runs in figures:
        numbers = summary(runs)
        cells = [f"{loss:.3f}" for loss in numbers[:3]]
        cells += [f"{difference:.2g}" for difference in numbers[3:]]
        rows.append((runs["objective"], *cells))
    header = ("objective", "script", "other seed", "PyTorch")
    differences = ("seeds differ by", "PyTorch differs by", "without dropout by")
    return table((*header, *differences), rows)


def operations(figures: dict) -> str:
    """Where the time of a step goes, as fractions of the time of all operations."""
    rows = []
    for name, found in figures.items():
        shares = [f"{found[kind]:.0%}" for kind in ("products", "copies", "others")]
        rows.append((name, *shares))
    return table(("step", "products", "copies", "others"), rows)


def products(figures: dict) -> str:
    """GFLOP/s of XLA / PyTorch, a layer in each row."""
    cells = {}
    for name, found in figures.items():
        layer, product = name.rsplit(", ", 1)
        rates = [f"{statistics.median(found[library]):.0f}" for library in ("XLA", "PyTorch")]
        cells.setdefault(layer, {})[product] = f"{' / '.join(rates)} ({found['ratio']:.2f})"
    names = list(next(iter(cells.values())))
    return table(("layer", *names), [(layer, *row.values()) for layer, row in cells.items()])


def large_text(figures: dict) -> str:
    rows = []
    for name, found in figures.items():
        both = f"{found['both']:,.0f}" if name.endswith("two") else ""
        memory = [f"{found[column]:,.0f}" for column in ("own", "pages")]
        rows.append((name, *memory, both, f"{found['seconds']:.0f}"))
    return table(("text, start", "own, MB", "files, MB", "both, MB", "seconds"), rows)


# The name of a benchmark, and the function that makes its table.
TABLES = {
    "step": step,
    "host": host,
    "startup": startup,
    "scaling": scaling,
    "whole_run": whole_run,
    "mlm_step": mlm_step,
    "save": save,
    "inference": inference,
    "accelerators": accelerators,
    "batches": batches,
    "pytorch": pytorch,
    "learning": learning,
    "operations": operations,
    "products": products,
    "large_text": large_text,
}


def measured(name: str) -> str:
    """Make the table of a file, and the lines that say how it was measured, one for each command.

    For another table of the same file the name is FILE/TABLE.
    """
    file, _, other_table = name.partition("/")
    report = json.loads((RESULTS / f"{file}.json").read_text())
    commands = report["command"]
    if isinstance(commands, str):
        commands = [commands]
    benchmark = re.search(r"python benchmarks/(\w+)\.py", commands[0])[1]
    parts = [f"`{command}`" for command in commands]
    parts[-1] += f": {report['processor']}, JAX {report['jax']}."
    lines = [
        textwrap.fill(part, 103, break_on_hyphens=False, break_long_words=False) for part in parts
    ]
    table_text = TABLES[other_table or benchmark](report["figures"])
    return "\n\n".join([table_text.rstrip("\n"), *lines])
