"""Pages made from the code with every build, so that they cannot grow stale: the sensor tables and the API reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from everysat import sensors
from everysat.data.catalogue import entries
from everysat.sensors import UNITS, Band, Sensor

PACKAGE = Path(sensors.__file__).resolve().parent.parent


def sensors_page() -> str:
    """All sensor tables as Markdown."""
    known = [sensors.get(name) for name in sensors.names()]
    head = ["| name | kind | bands | pixel | |", "|---|---|---|---|---|", *map(_summary, known)]
    units = [f"- `{unit}`: {meaning}" for unit, meaning in UNITS.items()]
    text = [
        "# Sensors",
        "",
        f"{len(known)} tables, written out from the TOML files in `everysat/sensors/`. A file holds digital numbers; the "
        "physical value is number × scale + offset, in the unit. Bands are found by name or alias, in any letter case. How to "
        "describe a sensor of your own is told in the [tutorial](tutorial.md#a-sensor-of-your-own).",
        "",
        *head,
        "",
        "## Units",
        "",
        *units,
        "",
    ]
    return "\n".join([*text, *(line for sensor in known for line in _section(sensor))]) + "\n"


def datasets_table() -> str:
    """All datasets that are published, as Markdown."""
    rows = ["| name | | layers | parts | licence | source |", "|---|---|---|---|---|---|"]
    for entry in entries():
        if not entry.source:
            continue
        source = re.sub(r"(?<![\w.])(https://[^\s;,)]+)", r"<\1>", entry.source)
        title = entry.title.replace("|", "\\|")
        cells = f"`{entry.name}`", title, ", ".join(entry.layers), ", ".join(entry.splits), entry.licence, source
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _summary(sensor: Sensor) -> str:
    sizes = sorted({band.gsd_m for band in sensor.bands})
    return f"| [{sensor.name}](#{sensor.name}) | {sensor.kind} | {len(sensor.bands)} | {', '.join(f'{s:g} m' for s in sizes)} | {sensor.title} |"


def _section(sensor: Sensor) -> list[str]:
    lines = [f"## {sensor.name}", "", f"{sensor.title}. *Source: {sensor.source}.*", ""]
    for baseline, offset in sensor.baseline_offsets.items():
        lines += [f"From processing baseline {baseline} on, {offset:g} is added to the reflectance.", ""]
    bands = list(sensor.bands)
    if len(bands) > 40:
        lines += [f"The first five and the last five of {len(bands)} bands:", ""]
        bands = bands[:5] + bands[-5:]
    lines += [
        "| band | also | pixel | centre, width | unit | scale, offset | no data | plausible | |",
        "|" + "---|" * 9,
    ]
    lines += [_row(band) for band in bands]
    for band in sensor.bands:
        if band.classes:
            lines += ["", f"{band.name}: " + "; ".join(f"{code} {label}" for code, label in band.classes.items())]
    return [*lines, ""]


def _row(band: Band) -> str:
    wave = "" if band.wavelength_um is None else f"{band.wavelength_um:g}"
    if band.wavelength_um is not None and band.wavelength_um > 1000:
        wave = f"{band.wavelength_um / 1e4:.3g} cm"
    elif wave:
        wave += (f", {band.width_um:g}" if band.width_um else "") + " µm"
    cells = (
        band.name,
        ", ".join(band.aliases),
        f"{band.gsd_m:g} m",
        wave,
        band.unit,
        f"{band.scale:g}, {band.offset:g}",
        "" if band.nodata is None else f"{band.nodata:g}",
        "" if band.range is None else f"{band.range[0]:g} to {band.range[1]:g}",
        "; ".join(part for part in (band.orbit, band.description) if part),
    )
    return "| " + " | ".join(cells) + " |"


def modules() -> list[str]:
    """All modules of the package with a docstring, by dotted name."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = [*file.relative_to(PACKAGE.parent).with_suffix("").parts]
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts) and file.read_text(encoding="utf-8").startswith('"""'):
            found.append(".".join(parts))
    return found


def on_config(config: Any) -> Any:
    """Lists the API pages in the navigation, by part of the package."""
    parts: dict[str, list[dict[str, str]]] = {}
    for module in modules():
        parts.setdefault(".".join(module.split(".")[:2]), []).append({module: f"api/{module}.md"})
    config.nav.append({"API": [pages[0] if len(pages) == 1 else {part: pages} for part, pages in parts.items()]})
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Puts the table of datasets where a page asks for it."""
    return markdown.replace("<!-- datasets -->", datasets_table()) if "<!-- datasets -->" in markdown else markdown


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages to those that lie in this folder."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "sensors.md", content=sensors_page()))
    for module in modules():
        files.append(File.generated(config, f"api/{module}.md", content=f"::: {module}\n"))
    return files
