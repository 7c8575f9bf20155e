"""What a STAC catalogue has of a place and a period: from a search of its API, or from its files where it is static.

STAC 1.0 and 1.1 (https://stacspec.org), read with pystac and pystac-client.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode, urlsplit

from everysat.find import suggest
from everysat.io import dates, remote
from everysat.io.catalogue import Box, Catalogue, Collection, Item
from everysat.io.dates import Span
from everysat.io.folder import overlap

_MISSING = "reading from STAC catalogues needs more packages: pip install 'everysat[stac]'"


def items(catalogue: Catalogue, collection: Collection, boxes: Sequence[Box], span: Span | None) -> list[Item]:
    """Items of ``collection`` whose bounds touch one of ``boxes`` and whose time touches ``span``, each once.

    Raises:
        ImportError: the packages for this are not installed.
        LookupError: the catalogue has no such collection.
        OSError: it cannot be reached, refuses, fails, or sends what is no STAC.
    """
    root = open_catalogue(catalogue)
    listed = collection_names(catalogue)
    if collection.name not in listed:
        raise LookupError(
            f"{catalogue.given} has no collection {collection.name!r}. {suggest(collection.name, listed)} Describe it in a .toml, "
            "see everysat.io.catalogue"
        )
    found: dict[str, Any] = {}
    with _naming(catalogue):
        for box in boxes:
            for item in _search(root, collection, box, span) if _is_api(root) else _walk(root, collection, box, span):
                found[item.id] = item
        made = [_item(catalogue, item) for item in found.values()]
    return [item for item in made if overlap(item.time if collection.dated else None, span)]


def _search(root: Any, collection: Collection, box: Box, span: Span | None) -> Iterator[Any]:
    when = None
    if span is not None and collection.dated:
        when = "/".join(dates.iso(t)[:19] + "Z" for t in span)
    yield from root.search(collections=[collection.name], bbox=list(box), datetime=when, limit=250).items()


def _walk(root: Any, collection: Collection, box: Box, span: Span | None) -> Iterator[Any]:
    """Items of a static catalogue; branches whose extent lies elsewhere are not read."""
    for node in root.get_all_collections():
        if node.id != collection.name:
            continue
        bounds = node.extent.spatial.bboxes if node.extent else []
        if bounds and not any(touches(_flat(b), box) for b in bounds):
            continue
        for item in node.get_items(recursive=True):
            if item.bbox is None or touches(_flat(item.bbox), box):
                yield item


def touches(one: Box, other: Box) -> bool:
    """Whether two boxes share a point; 179 and -181 degrees are the same longitude."""
    if one[1] > other[3] or other[1] > one[3]:
        return False
    return any(one[0] + turn <= other[2] and other[0] <= one[2] + turn for turn in (-360, 0, 360))


def _flat(bounds: Sequence[float]) -> Box:
    """West, south, east, north of bounds that may have heights, and may cross the antimeridian."""
    west, south, east, north = bounds if len(bounds) == 4 else (*bounds[:2], *bounds[3:5])
    return float(west), float(south), float(east + 360 if east < west else east), float(north)


def _item(catalogue: Catalogue, item: Any) -> Item:
    version = str(item.properties.get("updated") or item.properties.get("created") or "")
    assets = {}
    for key, asset in item.assets.items():
        href = asset.get_absolute_href() or asset.href
        if "://" not in href or href.startswith(("s3://", "gs://", "file://", "http://", "https://")):
            sign = catalogue.sign.get("token", "") if _is_signed(catalogue, href) else ""
            assets[key] = remote.address(href, sign=sign, version=version), _band_names(asset.extra_fields)
    facts = {**item.properties, "everysat:version": version}
    return Item(item.id, assets, _time(item.properties), None if item.bbox is None else _flat(item.bbox), facts)


def _is_signed(catalogue: Catalogue, href: str) -> bool:
    return bool(catalogue.sign) and (urlsplit(href).hostname or "").endswith(catalogue.sign.get("host", ""))


def _band_names(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of an asset's bands, common ones where there are others, by STAC 1.0 or 1.1."""
    bands = fields.get("eo:bands") or fields.get("bands") or ()
    names = [band.get("common_name") or band.get("eo:common_name") or band.get("name") for band in bands]
    return tuple(str(name) for name in names) if all(names) else ()


def _time(properties: Mapping[str, Any]) -> Span | None:
    if properties.get("start_datetime") and properties.get("end_datetime") and not properties.get("datetime"):
        return dates.span((properties["start_datetime"], properties["end_datetime"]))
    return dates.span(str(properties["datetime"])) if properties.get("datetime") else None


def collection_names(catalogue: Catalogue) -> tuple[str, ...]:
    """Names of the collections that a catalogue says it has."""
    root = open_catalogue(catalogue)
    if not hasattr(root, "everysat_collections"):
        with _naming(catalogue):
            every = root.get_collections() if _is_api(root) else root.get_all_collections()
            root.everysat_collections = tuple(dict.fromkeys(each.id for each in every))
    return root.everysat_collections


_OPEN: dict[tuple[str, str], Any] = {}


def open_catalogue(catalogue: Catalogue) -> Any:
    """The pystac object of a catalogue's root; one in this process."""
    key = catalogue.stac, json.dumps(dict(catalogue.headers), sort_keys=True)
    if key not in _OPEN:
        try:
            import pystac
            from pystac_client import Client
        except ImportError as error:
            raise ImportError(_MISSING) from error
        with _naming(catalogue):
            static, api = _readers(catalogue)
            told = json.loads(static.read_text(catalogue.stac))
            if any(link.get("rel") == "search" for link in told.get("links", ())):
                _OPEN[key] = Client.open(catalogue.stac, stac_io=api)
            else:
                _OPEN[key] = pystac.read_file(catalogue.stac, stac_io=static)
    return _OPEN[key]


def _is_api(root: Any) -> bool:
    return hasattr(root, "search")


def _readers(catalogue: Catalogue) -> tuple[Any, Any]:
    """How pystac, and pystac-client, get at files: with this package's retries, timeouts and errors."""
    from pystac.stac_io import DefaultStacIO
    from pystac_client.stac_api_io import StacApiIO

    host = urlsplit(catalogue.stac).netloc

    def fetched(href: str, method: str | None = None, headers: Any = None, parameters: Any = None) -> str:
        sent = {**(catalogue.headers if urlsplit(href).netloc == host else {}), **(headers or {})}
        if (method or "GET").upper() == "POST":
            sent["Content-Type"] = "application/json"
            return remote.request(href, "POST", headers=sent, body=json.dumps(parameters or {}).encode())[0].decode()
        if parameters:
            href += ("&" if "?" in href else "?") + urlencode({k: v for k, v in parameters.items() if v is not None})
        return remote.request(href, headers=sent)[0].decode()

    class Static(DefaultStacIO):
        def read_text_from_href(self, href: str, *_: Any, **__: Any) -> str:
            return fetched(href) if remote.is_remote(href) else super().read_text_from_href(href)

    class Api(StacApiIO):
        def request(self, href: str, method: Any = None, headers: Any = None, parameters: Any = None) -> str:
            return fetched(href, method, headers, parameters)

    return Static(), Api()


class _naming:
    """Errors of what is no STAC, with the catalogue's name; pystac's warnings about details are not the user's to mend."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def __enter__(self) -> None:
        self._quiet = warnings.catch_warnings()
        self._quiet.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._quiet.__exit__(kind, error, trace)
        if error is None or isinstance(error, (OSError, ImportError)):
            return
        from pystac import STACError, STACTypeError
        from pystac_client.exceptions import APIError

        if isinstance(error, (STACError, STACTypeError, APIError, ValueError, KeyError, TypeError, AttributeError)):
            raise OSError(
                f"{self._catalogue.stac} does not answer as a STAC catalogue should ({type(error).__name__}: {error}). "
                "Is it the address of an API's landing page, or of a catalog.json?"
            ) from error


def names_of(items: Iterable[Item]) -> str:
    """The first few items, for messages."""
    some = [item.name for item in items]
    return ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
