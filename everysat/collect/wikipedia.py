"""Articles of Wikipedia that say where they are: from the MediaWiki interface, or from dump files.

Texts are CC-BY-SA 4.0: whoever passes them on names the article (its address is kept with it) and shares alike. The interface is asked as
https://www.mediawiki.org/wiki/API:Etiquette wants it: one request at a time, with an address to reach you, ``maxlag``, and pauses that the server chooses.
"""

from __future__ import annotations

import bz2
import json
import math
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

from everysat.collect.polite import Busy, Server
from everysat.collect.records import Article, digest, distinct
from everysat.progress import Progress

LICENCE = "CC-BY-SA-4.0"
API = "https://{language}.wikipedia.org/w/api.php"
PAGE = "https://{language}.wikipedia.org/wiki/{title}"
MOST = 500
"""Articles that one search gives; where there are more, the circle is divided."""
LARGEST_M, SMALLEST_M = 10_000.0, 50.0
"""Radius of a search: the interface takes no larger one."""
MAXLAG_S = 5
INTROS = 20
"""Beginnings of articles that one request gives; of whole ones it gives one."""
METRES_PER_DEGREE = 111_195.0
_LATER = {
    "maxlag",
    "ratelimited",
    "readonly",
    "internal_api_error_DBQueryTimeoutError",
    "internal_api_error_DBUnexpectedError",
}
_HEADING = re.compile(r"^(={2,6})\s*(.+?)\s*\1\s*$", re.MULTILINE)


def judge(body: bytes) -> None:
    """The interface tells errors in answers of status 200: some ask to come back later."""
    try:
        told = json.loads(body)
    except ValueError as error:
        raise Busy(f"the answer is no JSON ({error})") from error
    wrong = told.get("error") if isinstance(told, dict) else None
    if wrong and wrong.get("code") in _LATER:
        raise Busy(f"Wikipedia says {wrong['code']}: {wrong.get('info', '')}")
    if wrong:
        raise OSError(f"Wikipedia refuses: {wrong.get('code')}: {wrong.get('info', '')}")


def around(
    bounds: tuple[float, float, float, float],
    cache: str | Path,
    *,
    contact: str,
    language: str = "en",
    whole: bool = False,
    url: str = "",
    radius_m: float = LARGEST_M,
    quiet: bool = False,
    **server: Any,
) -> Iterator[Article]:
    """Articles whose own coordinates lie in ``bounds`` (west, south, east, north in degrees), each text once.

    Args:
        bounds: where.
        cache: folder that keeps the answers, so that a second call goes on where the first one stopped.
        contact: see :class:`everysat.collect.polite.Server`, as is ``server``.
        language: of the Wikipedia, as in its address.
        whole: all sections, one request each; else what stands before the first heading, twenty an answer.
        url: of the interface, if it is another one.
        radius_m: of the searches, at most 10 km.

    Raises:
        ConnectionError, TimeoutError, OSError: Wikipedia cannot be reached or refuses. ValueError: an argument is wrong.
    """
    if not re.fullmatch(r"[a-z]{2,3}(-[a-z]+)*", language):
        raise ValueError(f"language={language!r} is none; give what the address begins with, such as en or zh-yue")
    if not SMALLEST_M <= radius_m <= LARGEST_M:
        raise ValueError(f"radius_m={radius_m} must be {SMALLEST_M:g} to {LARGEST_M:g}: the interface takes no other")
    asked = Server(url or API.format(language=language), cache, contact=contact, **server)
    pages: dict[int, Mapping[str, Any]] = {}
    circles = list(covering(bounds, radius_m))
    with Progress("Wikipedia, searches", len(circles), quiet=quiet) as bar:
        for lon, lat in circles:
            pages |= {page["pageid"]: page for page in _search(asked, lon, lat, radius_m) if _inside(page, bounds)}
            bar.advance(note=f"{len(pages)} articles")
    yield from distinct(_texts(asked, pages, language, whole, quiet))


def covering(bounds: tuple[float, float, float, float], radius_m: float) -> Iterator[tuple[float, float]]:
    """Middles (lonlat) of circles that together cover ``bounds``: squares within them, side by side."""
    west, south, east, north = bounds
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise ValueError(
            f"bounds={bounds} must be west, south, east, north in degrees, west below east; ask twice across the antimeridian"
        )
    side = radius_m * math.sqrt(2) * 0.98 / METRES_PER_DEGREE
    rows = math.ceil((north - south) / side)
    for row in range(rows):
        low, high = (south + (north - south) * (row + k) / rows for k in (0, 1))
        widest = math.cos(math.radians(0.0 if low < 0 < high else min(abs(low), abs(high))))
        columns = max(1, math.ceil((east - west) * widest / side))
        for column in range(columns):
            yield round(west + (east - west) * (column + 0.5) / columns, 6), round((low + high) / 2, 6)


def _inside(page: Mapping[str, Any], bounds: tuple[float, float, float, float]) -> bool:
    west, south, east, north = bounds
    return west <= page["lon"] <= east and south <= page["lat"] <= north


def _search(asked: Server, lon: float, lat: float, radius_m: float) -> list[Mapping[str, Any]]:
    """Articles around a point; a circle that holds more than one answer tells is divided into four."""
    told = _query(
        asked,
        list="geosearch",
        gscoord=f"{lat}|{lon}",
        gsradius=f"{radius_m:.0f}",
        gslimit=str(MOST),
        gsprop="type|dim",
    )
    hits = [each for part in told for each in part.get("geosearch", ())]
    if len(hits) < MOST or radius_m < 2 * SMALLEST_M:
        return hits
    step = radius_m / 2 * math.sqrt(0.5) / METRES_PER_DEGREE
    # Four circles of half the radius cover the square within the circle, which is what covering() relies on.
    found = list(hits)
    for dx, dy in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
        x = lon + dx * step / max(0.01, math.cos(math.radians(lat)))
        found += _search(asked, round(x, 6), round(lat + dy * step, 6), radius_m / 2)
    return found


def _query(asked: Server, **question: str) -> Iterator[dict[str, Any]]:
    """The parts of an answer, by its tokens ``continue``."""
    base = {"action": "query", "format": "json", "formatversion": "2", "maxlag": str(MAXLAG_S), **question}
    more: dict[str, str] = {}
    while True:
        told = json.loads(asked.ask({**base, **more}, judge))
        yield told.get("query", {})
        if "continue" not in told:
            return
        following = {key: str(value) for key, value in told["continue"].items()}
        if following == more:
            raise OSError(f"{asked.url} answers with the same continuation again and again: {following}")
        more = following


def _texts(
    asked: Server, pages: Mapping[int, Mapping[str, Any]], language: str, whole: bool, quiet: bool
) -> Iterator[Article]:
    """The texts of pages, and where they can be read."""
    numbers = sorted(pages)
    size = 1 if whole else INTROS
    extent = {"exlimit": "1"} if whole else {"exlimit": str(INTROS), "exintro": "1"}
    with Progress("Wikipedia, articles", len(numbers), quiet=quiet) as bar:
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            known: dict[int, dict[str, Any]] = {}
            ids = "|".join(map(str, some))
            for part in _query(
                asked,
                prop="extracts|info",
                pageids=ids,
                inprop="url",
                explaintext="1",
                exsectionformat="wiki",
                **extent,
            ):
                for page in part.get("pages", ()):
                    known.setdefault(page["pageid"], {}).update(page)
            for number in some:
                if known.get(number, {}).get("extract"):
                    yield _article(known[number], pages[number], language)
            bar.advance(len(some))


def _article(page: Mapping[str, Any], hit: Mapping[str, Any], language: str) -> Article:
    title = str(page["title"])
    dim = hit.get("dim")
    return Article(
        title, (float(hit["lon"]), float(hit["lat"])), sections(page["extract"]), str(page.get("pagelanguage", language)), LICENCE,
        str(page.get("canonicalurl") or page.get("fullurl") or _address(title, language)), str(page["pageid"]), str(page.get("lastrevid", "")),
        radius_m=float(dim) / 2 if dim else None, facts={"type": hit["type"]} if hit.get("type") else {},
    )  # fmt: skip


def _address(title: str, language: str) -> str:
    return PAGE.format(language=language, title=urllib.parse.quote(title.replace(" ", "_")))


def sections(text: str) -> tuple[tuple[str, str], ...]:
    """Heading and text of each section; what stands before the first heading has an empty one, and empty sections go."""
    pieces = _HEADING.split(text)
    pairs = [("", pieces[0]), *((pieces[i + 1], pieces[i + 2]) for i in range(1, len(pieces) - 2, 3))]
    return tuple((heading, re.sub(r"\n{3,}", "\n\n", body).strip()) for heading, body in pairs if body.strip())


# Dump files


def from_dump(
    path: str | Path,
    *,
    language: str,
    bounds: tuple[float, float, float, float] | None = None,
    after: int = 0,
    wanted: Sequence[str] = ("0",),
) -> Iterator[Article]:
    """Articles with coordinates of their own of a file ``*-pages-articles*.xml.bz2`` (or ``.xml``), read as a stream, in its order.

    Args:
        path: the file.
        language: of the Wikipedia that it is of.
        bounds: those alone that lie in west, south, east, north in degrees.
        after: go on behind the article of this number, as :attr:`Article.identity` tells it: dumps are sorted by it.
        wanted: name spaces.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no dump, or ends too early. ImportError: ``mwparserfromhell`` is not installed.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; dumps are at https://dumps.wikimedia.org")
    parser = _parser()
    with bz2.open(path) if path.suffix == ".bz2" else path.open("rb") as stream:
        for page in _pages(stream, path):
            if page["ns"] not in wanted or page["redirect"] or int(page["id"] or 0) <= after:
                continue
            # Most articles have no coordinates, and parsing is slow.
            if not re.search(r"\{\{\s*coord|\|\s*(?:lat|lon|breiten|NS)", page["text"], re.IGNORECASE):
                continue
            found = _wikitext(page, language, parser)
            if found is not None and (
                bounds is None or _inside({"lon": found.lonlat[0], "lat": found.lonlat[1]}, bounds)
            ):
                yield found


def _parser() -> Any:
    try:
        import mwparserfromhell
    except ImportError as error:
        raise ImportError("reading dumps needs more packages: pip install 'everysat[collect]'") from error
    return mwparserfromhell


def _pages(stream: IO[bytes], path: Path) -> Iterator[dict[str, str]]:
    """Title, number, name space, revision and text of every page; what was read is forgotten."""
    try:
        root: Any = None
        for event, element in ElementTree.iterparse(stream, events=("start", "end")):
            root = element if root is None else root
            if event == "end" and _plain(element.tag) == "page":
                yield _page(element)
                root.clear()
    except (ElementTree.ParseError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no dump of Wikipedia, or ends too early ({error}). Fetch it again") from error


def _plain(tag: str) -> str:
    return tag.rpartition("}")[2]


def _page(element: Any) -> dict[str, str]:
    page = {"title": "", "id": "", "ns": "0", "redirect": "", "revision": "", "text": ""}
    for child in element:
        name = _plain(child.tag)
        if name in ("title", "id", "ns"):
            page[name] = child.text or ""
        elif name == "redirect":
            page["redirect"] = child.get("title", "yes")
        elif name == "revision":
            page |= {
                {"id": "revision"}.get(_plain(c.tag), "text"): c.text or ""
                for c in child
                if _plain(c.tag) in ("id", "text")
            }
    return page


def _wikitext(page: Mapping[str, str], language: str, parser: Any) -> Article | None:
    code = parser.parse(page["text"])
    at = coordinates(code)
    if at is None:
        return None
    parts = [(_heading(part), _prose(part)) for part in code.get_sections(flat=True, include_lead=True)]
    kept = tuple((heading, text) for heading, text in parts if digest(text) != digest(""))
    if not kept:
        return None
    return Article(
        page["title"], at, kept, language, LICENCE, _address(page["title"], language), page["id"], page["revision"]
    )


def _heading(part: Any) -> str:
    return next((str(h.title.strip_code()).strip() for h in part.filter_headings()), "")


def _prose(part: Any) -> str:
    """The sentences of a section, without tables, references, files and templates."""
    for node in [
        *part.filter_headings(),
        *part.filter_tags(matches=lambda n: str(n.tag) in ("ref", "table", "gallery", "math")),
    ]:
        if part.contains(node):
            part.remove(node)
    for link in part.filter_wikilinks(matches=lambda n: re.match(r"\s*[^:|\]\s]+:", str(n.title)) is not None):
        if part.contains(link):
            part.remove(link)
    text = part.strip_code(normalize=True, collapse=True)
    text = re.sub(r"[ \t]*\(\s*[;,]?\s*\)", "", text)  # brackets that templates were taken out of
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]{2,}", " ", text)).strip()


def coordinates(code: Any) -> tuple[float, float] | None:
    """Longitude and latitude in degrees of what an article is about, by its templates; None if it tells none, or those of other things alone.

    ``{{coord}}`` with ``display=title``, or in an infobox; the German ``{{Coordinate}}`` of the whole article; ``latitude`` and ``longitude`` of an infobox.
    """
    templates = code.filter_templates()
    for template in templates:
        name = str(template.name).strip().lower()
        values = {str(p.name).strip(): str(p.value).strip() for p in template.params}
        if name == "coord" and _is_titles(values.get("display", "")) and (found := _coord(template)) is not None:
            return found
        if name == "coordinate" and (found := _lonlat(_degrees(values.get("EW", "")), _degrees(values.get("NS", "")))):
            return found
    boxes = [t for t in templates if str(t.name).strip().lower().startswith(("infobox", "taxobox", "geobox", "ficha"))]
    return next((found for box in boxes if (found := _infobox(box)) is not None), None)


def _is_titles(display: str) -> bool:
    """Whether coordinates stand at the title: ``title``, ``inline,title``, or by letters, ``t``, ``it``."""
    return "title" in display or ("t" in display and set(display) <= set("it, "))


def _infobox(template: Any) -> tuple[float, float] | None:
    for parameter in template.params:
        if str(parameter.name).strip().lower().startswith("coord"):
            for inner in parameter.value.filter_templates():
                if str(inner.name).strip().lower() == "coord" and (found := _coord(inner)) is not None:
                    return found
    values = {str(p.name).strip().lower(): str(p.value).strip() for p in template.params}
    lat, lon = (
        next((values[n] for n in names if values.get(n)), "")
        for names in (("latitude", "lat"), ("longitude", "lon", "long"))
    )
    return _lonlat(_degrees(lon), _degrees(lat))


def _coord(template: Any) -> tuple[float, float] | None:
    """``{{coord|43|39|N|79|23|W}}``, ``{{coord|43.65|-79.38}}`` and what lies between (https://en.wikipedia.org/wiki/Template:Coord)."""
    values = [str(p.value).strip() for p in template.params if not p.showkey]
    letters = [i for i, value in enumerate(values[:8]) if value.upper() in ("N", "S", "E", "W", "O")]
    if len(letters) >= 2:
        first, second = letters[:2]
        return _lonlat(_degrees("/".join(values[first + 1 : second + 1])), _degrees("/".join(values[: first + 1])))
    return _lonlat(_degrees(values[1]), _degrees(values[0])) if len(values) > 1 else None


def _degrees(text: str) -> float | None:
    """``48/8/14/N``, ``48.137``, ``-9.5``: degrees, minutes and seconds, signed by the letter or the sign."""
    parts = [part.strip() for part in text.replace("−", "-").split("/") if part.strip()]
    letter = parts.pop().upper() if parts and parts[-1].upper() in ("N", "S", "E", "W", "O") else "N"
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        return None
    if not 1 <= len(numbers) <= 3 or any(not 0 <= number < 60 for number in numbers[1:]):
        return None
    size = sum(abs(number) / 60**i for i, number in enumerate(numbers))
    return size * (-1 if letter in ("S", "W") or parts[0].startswith("-") else 1)


def _lonlat(lon: float | None, lat: float | None) -> tuple[float, float] | None:
    known = lon is not None and lat is not None and abs(lon) <= 180 and abs(lat) <= 90 and (lon, lat) != (0.0, 0.0)
    return (lon, lat) if known else None  # type: ignore[return-value]
