"""Writes what the demo found: tables, a picture, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Table = tuple[Sequence[str], Sequence[Sequence[str]]]

REFERENCE_COLOUR, FASTGRU_COLOUR = "#9aa5b1", "#d1495b"


def speed_table(record: dict[str, Any]) -> Table:
    """Speed of training and of generation, nn.GRU against fastgru."""
    rows = []
    for key, name, unit in (("training", "training", "step"), ("generation", "generation", "character")):
        speed = record[key]
        per = 1 if unit == "step" else speed["characters_per_round"]
        rows += [
            [
                f"{name}, ms per {unit}",
                f"{speed['baseline_s'] * 1e3 / per:.3g}",
                f"{speed['candidate_s'] * 1e3 / per:.3g}",
                f"{speed['speedup']:.2f}x",
                f"{speed['speedup_q1']:.2f}-{speed['speedup_q3']:.2f}",
            ],
            [
                f"{name}, characters/s",
                f"{speed['baseline_characters_per_s']:,.0f}",
                f"{speed['candidate_characters_per_s']:,.0f}",
                "",
                "",
            ],
        ]
    return ["", "nn.GRU", "fastgru", "speed-up", "quartiles"], rows


def check_table(record: dict[str, Any]) -> Table:
    """The comparisons that decide the exit code, all of them relative differences."""
    rows = [
        [item["name"], f"{item['measured']:.2g}", f"{item['allowed']:.2g}", "PASS" if item["passed"] else "FAIL"]
        for item in record["checks"]
    ]
    return ["comparison", "difference", "allowed", ""], rows


def remarks(record: dict[str, Any]) -> list[str]:
    """What the tables do not say, one sentence each."""
    loss, agreement, generation = record["loss"], record["loss"]["agreement"], record["generation"]
    same = (
        f"Both models wrote the same {generation['characters']} characters."
        if generation["identical_characters"] == generation["characters"]
        else f"Both models wrote the same first {generation['identical_characters']} of "
        f"{generation['characters']} characters, then rounding tipped one draw."
    )
    return [
        f"Over all {record['settings']['steps']} steps the two losses differ by at most "
        f"{agreement['max_absolute_difference']:.2g} (at step {agreement['max_absolute_difference_at_step']}), "
        f"relative {agreement['max_relative_difference']:.2g}: both round, differently, and training amplifies it.",
        f"Loss on unseen text: {loss['test_fastgru']:.4f} nats per character, "
        f"and {loss['test_checkpoint_in_reference']:.4f} with the checkpoint in nn.GRU.",
        same,
    ]


def facts(record: dict[str, Any]) -> Table:
    """Where the numbers come from."""
    machine, versions, settings = record["machine"], record["versions"], record["settings"]
    on_gpu = settings["device"].startswith("cuda")
    rows = [
        ["machine", f"{machine['cpu']}, {machine['threads']} thread(s), load {machine['load_average']}"],
        ["GPU", ", ".join(machine["cuda_devices"])] if on_gpu else ["instruction set", str(machine["isa"] or "-")],
        ["backend", record["backend"]],
        ["versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)],
        ["commit", record["commit"] or "installed package"],
        ["text", f"{record['text']['source']}, {record['text']['train_characters']:,} characters for training"],
        ["model", f"{record['parameters']:,} parameters; " + ", ".join(f"{k} {v}" for k, v in settings.items())],
    ]
    return ["", ""], rows


def smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """An exponential moving average that starts unbiased."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(average / weight)
    return result


def draw(record: dict[str, Any]) -> bytes:
    """Loss curves on the left, speed on the right, as PNG."""
    import matplotlib

    # No display is needed to draw into a file.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    ):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), dpi=150, layout="constrained")

        loss = record["loss"]
        steps = range(1, len(loss["reference"]) + 1)
        left.plot(steps, smooth(loss["reference"]), color=REFERENCE_COLOUR, linewidth=5, label="nn.GRU")
        left.plot(steps, smooth(loss["fastgru"]), color=FASTGRU_COLOUR, linewidth=1.5, label="fastgru")
        left.set(title="Training loss", xlabel="training step", ylabel="cross-entropy, nats per character")
        left.grid(axis="y", alpha=0.25)
        left.legend(frameon=False)

        for place, key in enumerate(("training", "generation")):
            speed = record[key]
            bars = (
                (place - 0.19, 1.0, REFERENCE_COLOUR, f"{speed['baseline_characters_per_s']:,.0f} char/s"),
                (
                    place + 0.19,
                    speed["speedup"],
                    FASTGRU_COLOUR,
                    f"{speed['candidate_characters_per_s']:,.0f} char/s   {speed['speedup']:.2f}x",
                ),
            )
            for y, width, colour, label in bars:
                right.barh(y, width, height=0.34, color=colour)
                right.text(width, y, "  " + label, va="center")
        longest = max(1.0, record["training"]["speedup"], record["generation"]["speedup"])
        right.set(title="Speed", xlabel="speed, nn.GRU = 1", xlim=(0, longest * 1.75))
        right.set_yticks([0, 1], ["training", "generation"])
        right.tick_params(axis="y", length=0)
        right.invert_yaxis()

        settings, machine = record["settings"], record["machine"]
        where = ", ".join(machine["cuda_devices"]) if settings["device"].startswith("cuda") else machine["cpu"]
        figure.supxlabel(
            f"hidden {settings['hidden']}, batch {settings['batch']}, {settings['seq']} characters per window; "
            f"{where}, {machine['threads']} thread(s), torch {record['versions']['torch']}",
            fontsize=9,
            color="#666666",
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        plt.close(figure)
    return buffer.getvalue()


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
td.number, th.number { text-align: right }
.PASS { color: #2b7a3d } .FAIL { color: #c00; font-weight: bold }
img { max-width: 100% } pre { background: #f5f5f5; padding: 1rem; white-space: pre-wrap } .prompt { color: #888 }
"""


def page(record: dict[str, Any], picture: bytes) -> str:
    """The report as one HTML page with the picture inside."""
    sample = record["sample"]
    body = [
        f'<img alt="Loss curves and speed" src="data:image/png;base64,{base64.b64encode(picture).decode()}">',
        "<h2>Speed</h2>",
        "<p>Medians; the two models train and write in turn, and the speed-up is taken within each turn.</p>",
        html_table(speed_table(record), numbers=(1, 2, 3, 4)),
        "<h2>Same numbers?</h2>",
        "<p>Relative differences between nn.GRU and fastgru.</p>",
        html_table(check_table(record), numbers=(1, 2)),
        *(f"<p>{html.escape(line)}</p>" for line in remarks(record)),
        "<h2>Written by the trained model</h2>",
        f'<pre><span class="prompt">{html.escape(sample["prompt"])}</span>{html.escape(sample["text"])}</pre>',
        "<h2>Where the numbers come from</h2>",
        html_table(facts(record)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>fastgru demo</title>'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>fastgru against torch.nn.GRU</h1>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def html_table(table: Table, numbers: Sequence[int] = ()) -> str:
    """The table as HTML, with the columns listed in ``numbers`` aligned to the right."""
    columns, rows = table

    def line(tag: str, cells: Sequence[str]) -> str:
        parts = []
        for i, cell in enumerate(cells):
            name = "number" if i in numbers else cell if cell in ("PASS", "FAIL") else ""
            attribute = f' class="{name}"' if name else ""
            parts.append(f"<{tag}{attribute}>{html.escape(cell)}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    head = [line("th", columns)] if any(columns) else []
    return "\n".join(["<table>", *head, *(line("td", row) for row in rows), "</table>"])


def write(out: Path, record: dict[str, Any]) -> None:
    """Write ``demo.png`` and ``report.html``."""
    picture = draw(record)
    (out / "demo.png").write_bytes(picture)
    (out / "report.html").write_text(page(record, picture), encoding="utf-8")
