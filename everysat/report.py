"""One HTML file with tables and pictures, nothing loaded from elsewhere, readable in light and dark."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from everysat.table import Table

CLASS_COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#e08a3c", "#8c7b6b", "#999933", "#882255", "#44aa99", "#bbbbbb",
)  # fmt: skip
"""Told apart with colour-blind eyes as far as twelve colours can be (after Paul Tol's bright and muted schemes)."""
LINE_COLOURS = ("#2563eb", "#dc6803", "#0e9384", "#9333ea", "#64748b", "#be123c", "#65a30d")
NATURAL = {
    "water": "#3b82c4", "wetland": "#3fa796", "forest": "#1f6b3a", "wood": "#1f6b3a", "tree": "#1f6b3a", "scrub": "#8a9a3b",
    "shrub": "#8a9a3b", "meadow": "#a8d05a", "grass": "#6fbf73", "farm": "#ecc667", "crop": "#ecc667", "orchard": "#c98bb9",
    "vineyard": "#8e4585", "residential": "#d1495b", "built": "#d1495b", "urban": "#d1495b", "industrial": "#8d6a9f",
    "commercial": "#b5739d", "road": "#6b7280", "bare": "#b08968", "quarry": "#a07855", "snow": "#dbeafe", "ice": "#dbeafe",
}  # fmt: skip
"""Colours that readers of land-cover maps expect, by a word of the class's name."""
NOTHING = "#e5e7eb"
INK, PAPER, GRID = "#1f2937", "#ffffff", "#e5e7eb"


class Report:
    """Collects sections in order and writes them as one page.

    ``report = Report("Land use", "eight classes from few polygons"); report.add_table(table); report.save("report.html")``
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._body: list[str] = []

    def add_heading(self, text: str) -> Report:
        self._body.append(f"<h2>{html.escape(text)}</h2>")
        return self

    def add_text(self, text: str) -> Report:
        """Paragraphs, parted by empty lines."""
        self._body += [f"<p>{html.escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip()]
        return self

    def add_numbers(self, numbers: Mapping[str, str]) -> Report:
        """A row of large figures, each over its label."""
        cells = "".join(
            f"<div><strong>{html.escape(v)}</strong><span>{html.escape(k)}</span></div>" for k, v in numbers.items()
        )
        self._body.append(f'<div class="numbers">{cells}</div>')
        return self

    def add_table(self, table: Table, *, bold: Sequence[int] = ()) -> Report:
        """``bold``: rows to stress."""
        right = [' class="n"' if n else "" for n in table.numeric()]
        head = "".join(f"<th{r}>{html.escape(c)}</th>" for c, r in zip(table.columns, right, strict=True))
        rows = "".join(
            f"<tr{' class=bold' if i in bold else ''}>"
            + "".join(f"<td{r}>{_stressed(cell)}</td>" for cell, r in zip(row, right, strict=True))
            + "</tr>"
            for i, row in enumerate(table.shown())
        )
        notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in table.notes)
        self._body.append(
            f"<figure><figcaption>{html.escape(table.title)}</figcaption><div class=scroll><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{rows}</tbody></table></div>{notes}</figure>"
        )
        return self

    def add_figure(self, figure: Any, caption: str = "", *, alt: str = "", wide: bool = True) -> Report:
        """A matplotlib figure, or the path of a PNG file."""
        if isinstance(figure, str | Path):
            content = Path(figure).read_bytes()
        else:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
            content = buffer.getvalue()
        picture = base64.b64encode(content).decode()
        self._body.append(
            f'<figure class="{"wide" if wide else "half"}"><img alt="{html.escape(alt or caption, quote=True)}" '
            f'src="data:image/png;base64,{picture}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        )
        return self

    def add_facts(self, facts: Mapping[str, Any], title: str = "About this run") -> Report:
        """Versions, seeds, timings: a list behind a fold."""
        rows = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
        self._body.append(f"<details><summary>{html.escape(title)}</summary><dl>{rows}</dl></details>")
        return self

    def html(self) -> str:
        title, subtitle = html.escape(self.title), html.escape(self.subtitle)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
            f"<body><main><header><h1>{title}</h1><p>{subtitle}</p></header>\n"
            + "\n".join(self._body)
            + "\n</main></body></html>\n"
        )

    def save(self, path: str | Path) -> Path:
        """Written beside and renamed."""
        path = Path(path)
        beside = path.with_name(f".{path.name}.part")
        beside.write_text(self.html(), encoding="utf-8")
        beside.replace(path)
        return path


def _stressed(cell: str) -> str:
    """A cell as HTML; ``**text**`` is bold, as in Markdown."""
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(cell))


def stretched(image: np.ndarray, low: float = 2.0, high: float = 98.0, gamma: float = 0.85) -> np.ndarray:
    """Bands [3, y, x] as colours [y, x, 3] in 0-1: each band between its percentiles, NaN white."""
    image = np.asarray(image, dtype=np.float32)
    out = np.ones((*image.shape[1:], 3), dtype=np.float32)
    for band in range(3):
        seen = np.isfinite(image[band])
        if seen.any():
            bottom, top = np.percentile(image[band][seen], [low, high])
            scaled = np.clip((image[band][seen] - bottom) / max(top - bottom, 1e-9), 0, 1)
            out[..., band][seen] = scaled**gamma
    return out


def colours(classes: Sequence[str]) -> list[str]:
    """A colour per class: the usual one of its land cover if the names say it and no two are alike, else by position."""
    natural = [next((c for word, c in NATURAL.items() if word in name.lower()), "") for name in classes]
    if all(natural) and len(set(natural)) == len(natural):
        return natural
    return [CLASS_COLOURS[i % len(CLASS_COLOURS)] for i in range(len(classes))]


def maps_figure(
    panels: Sequence[tuple[str, Any, Mapping[str, Any]]], classes: Sequence[str] = (), columns: int = 2
) -> Any:
    """Pictures side by side: ``(title, image, options)``.

    An image [y, x, 3] is shown as it is. An image [y, x] is a class map (integers, negative where there is nothing), or with
    ``{"kind": "confidence"}`` values in 0-1, NaN where there is nothing. One legend for all class maps.
    """
    plt = _pyplot()
    from matplotlib.patches import Patch

    rows = -(-len(panels) // columns)
    height, width = np.asarray(panels[0][1]).shape[:2]
    each = 12.0 / columns
    fig, axes = plt.subplots(
        rows, columns, figsize=(12, rows * (each * height / width + 0.35)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, image, options) in zip(axes.flat, panels, strict=False):
        _draw(fig, axis, np.asarray(image), options, classes)
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    if classes:
        patches = [Patch(color=c, label=name) for name, c in zip(classes, colours(classes), strict=True)]
        fig.legend(handles=patches, loc="outside lower center", ncols=min(len(classes), 8), frameon=False, fontsize=10)
    return fig


def _draw(fig: Any, axis: Any, image: np.ndarray, options: Mapping[str, Any], classes: Sequence[str]) -> None:
    from matplotlib.colors import ListedColormap

    if image.ndim == 3:
        axis.imshow(image, interpolation="nearest")
        return
    if options.get("kind") == "confidence":
        from matplotlib import colormaps

        shown = axis.imshow(
            np.ma.masked_invalid(image),
            cmap=colormaps["viridis"].with_extremes(bad=NOTHING),
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        bar = fig.colorbar(shown, ax=axis, fraction=0.04, pad=0.015, shrink=0.9)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, length=0)
        return
    table = ListedColormap(colours(classes)).with_extremes(bad=NOTHING)
    axis.imshow(np.ma.masked_less(image, 0), cmap=table, vmin=-0.5, vmax=len(classes) - 0.5, interpolation="nearest")


def curves_figure(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float] | None]],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    ticks: Mapping[float, str] | None = None,
    diagonal: bool = False,
    highlight: str = "",
) -> Any:
    """Lines ``{name: (x, y, error or None)}``; errors are drawn as bars. ``highlight`` names the line to stress."""
    plt = _pyplot()
    fig, axis = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for index, (name, (xs, ys, errors)) in enumerate(series.items()):
        strong = name == highlight or not highlight
        style: dict[str, Any] = {
            "color": LINE_COLOURS[index % len(LINE_COLOURS)],
            "label": name,
            "zorder": 3 if strong else 2,
        }
        style |= {"linewidth": 2.4 if name == highlight else 1.6, "alpha": 1.0 if strong else 0.8}
        if errors is None:
            axis.plot(xs, ys, **style)
        else:
            shift = 1.0 + 0.012 * (index - len(series) / 2) if log_x else 1.0  # so that bars do not hide each other
            moved = [value * shift for value in xs]
            axis.errorbar(moved, ys, yerr=errors, marker="o", markersize=4.5, capsize=2.5, elinewidth=1.1, **style)
    if diagonal:
        axis.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (4, 4)), alpha=0.5, zorder=1)
    if log_x:
        axis.set_xscale("log")
    if ticks:
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.minorticks_off()
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if len(series) > 6:  # beside the lines, which many names would hide
        fig.set_figwidth(10.5)
        fig.legend(loc="outside right center", frameon=False, fontsize=8.5)
    elif any(series):
        axis.legend(frameon=False, fontsize=9)
    return fig


def risk_figure(curves: Mapping[str, Any], *, risk: str = "share of errors among those kept") -> Any:
    """Curves of :func:`everysat.nn.risk.risk_coverage` by name, each with the area under it (AURC, less is better)."""
    series = {}
    for name, curve in curves.items():
        step = max(1, len(curve.risk) // 200)
        coverage, at = (x.tolist()[::-1][::step][::-1] for x in (curve.coverage, curve.risk))
        series[f"{name} (AURC {curve.aurc:.3g})"] = (coverage, at, None)
    return curves_figure(series, x="share kept, most confident first", y=risk)


def intervals_figure(rows: Mapping[str, Mapping[str, Any]], *, x: str) -> Any:
    """Scores (``mean``, ``low``, ``high``) of each row as dots with bars, a colour for each inner name."""
    plt = _pyplot()
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    fig, axis = plt.subplots(figsize=(8.4, 0.8 + 0.26 * len(rows)), layout="constrained")
    for index, name in enumerate(names):
        there = [(at, row[name]) for at, row in enumerate(rows.values()) if name in row]
        means = np.array([score.mean for _, score in there])
        bars = np.array([[score.mean - score.low, score.high - score.mean] for _, score in there]).T.clip(min=0)
        at = [-row + 0.16 * (index - (len(names) - 1) / 2) for row, _ in there]
        colour = LINE_COLOURS[index % len(LINE_COLOURS)]
        axis.errorbar(means, at, xerr=bars, fmt="o", markersize=4, capsize=2, elinewidth=1.1, color=colour, label=name)
    axis.set_yticks([-i for i in range(len(rows))], list(rows), fontsize=8.5)
    axis.set_xlabel(x)
    fig.legend(loc="outside upper right", ncols=len(names), frameon=False, fontsize=8.5)
    return fig


def matrix_figure(matrix: Any, classes: Sequence[str]) -> Any:
    """A confusion matrix [label, prediction] as shares of each label's samples."""
    plt = _pyplot()
    counts = np.asarray(matrix, dtype=float)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(classes) <= 16
    side = 1.8 + (0.55 if few else 0.24) * len(classes)
    fig, axis = plt.subplots(figsize=(side + 0.6, side), layout="constrained")
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(classes) if few else 0):  # numbers of many classes could not be read
        for j in range(len(classes)):
            text = f"{100 * share[i, j]:.0f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if share[i, j] > 0.55 else INK)
    size = 10 if few else 7.5
    axis.set_xticks(
        range(len(classes)), classes, rotation=40 if few else 90, ha="right" if few else "center", fontsize=size
    )
    axis.set_yticks(range(len(classes)), classes, fontsize=size)
    axis.tick_params(length=0)
    axis.set_xlabel("predicted")
    axis.set_ylabel("label")
    axis.grid(False)
    axis.spines[:].set_visible(False)
    return fig


def _pyplot() -> Any:
    """matplotlib without a display, in the report's style; figures are not kept by pyplot."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'everysat[report]'") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.close("all")
    plt.rcParams.update(
        {
            "font.size": 10, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#9ca3af",
            "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
            "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8, "figure.facecolor": PAPER, "axes.facecolor": PAPER,
        }
    )  # fmt: skip
    return plt


_STYLE = """
:root{color-scheme:light dark;--ink:#1f2937;--soft:#6b7280;--paper:#fff;--panel:#f8fafc;--line:#e2e8f0;--accent:#2563eb}
@media(prefers-color-scheme:dark){:root{--ink:#e5e7eb;--soft:#9ca3af;--paper:#0f172a;--panel:#1e293b;--line:#334155;--accent:#7aa7ff}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
header{border-bottom:1px solid var(--line);margin-bottom:1.5rem;padding-bottom:1rem}
h1{font-size:2rem;line-height:1.2;margin:0 0 .3rem;letter-spacing:-.02em}header p{margin:0;color:var(--soft);font-size:1.05rem}
h2{font-size:1.3rem;margin:2.6rem 0 .6rem;letter-spacing:-.01em}p{max-width:46rem;margin:.6rem 0}
figure{margin:1.4rem 0;padding:0}figcaption{color:var(--soft);font-size:.9rem;margin:.5rem 0;max-width:52rem}
figure img{display:block;max-width:100%;height:auto;background:#fff;border:1px solid var(--line);border-radius:8px;padding:8px}
figure.half{display:inline-block;width:calc(50% - .6rem);vertical-align:top;margin:1rem .3rem 1rem 0}
@media(max-width:760px){figure.half{width:100%}}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .55rem;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
th{background:var(--panel);font-weight:600;white-space:normal}td:first-child{white-space:normal;min-width:9rem}tbody tr:last-child td{border-bottom:0}tbody tr:hover{background:var(--panel)}
.n{text-align:right}tr.bold td{font-weight:650;color:var(--accent)}.note{color:var(--soft);font-size:.82rem;margin:.4rem 0;max-width:none}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.8rem;margin:1.4rem 0}
.numbers div{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem}
.numbers strong{display:block;font-size:1.6rem;line-height:1.2;letter-spacing:-.02em}.numbers span{color:var(--soft);font-size:.85rem}
details{margin-top:2.5rem;border-top:1px solid var(--line);padding-top:1rem}summary{cursor:pointer;font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.5rem;font-size:.9rem}dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
"""
