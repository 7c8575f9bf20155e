"""What files the hosts of published datasets have, as their own interfaces list them: Zenodo, Hugging Face, Google storage, S3.

``origins("https://zenodo.org/records/5735646")[0].files()`` lists paths, sizes and checksums; nothing of the files is fetched.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode, urljoin
from xml.etree import ElementTree

from everysat.io import remote

ENDPOINTS = {
    "zenodo": "https://zenodo.org",
    "huggingface": "https://huggingface.co",
    "google": "https://storage.googleapis.com",
    "s3": "https://{bucket}.s3.amazonaws.com",
}
"""Where each host answers; ``HF_ENDPOINT`` in the environment names a mirror of Hugging Face."""
_NAMED = {
    "zenodo": re.compile(r"zenodo\.org/records?/(\d+)|10\.5281/zenodo\.(\d+)"),
    "huggingface": re.compile(r"huggingface\.co/datasets/([\w.-]+/[\w.-]*\w)"),
    "google": re.compile(r"gs://([\w.-]+(?:/[\w./-]*\w)?)"),
    "s3": re.compile(r"s3://([\w.-]+(?:/[\w./-]*\w)?)"),
}
_PAGES = {
    "zenodo": "https://zenodo.org/records/{}",
    "huggingface": "https://huggingface.co/datasets/{}",
    "google": "gs://{}",
    "s3": "s3://{}",
}


@dataclass(frozen=True)
class File:
    """One file of a dataset at its host.

    ``path`` is relative, with slashes; ``size`` in bytes; ``checksum`` is ``md5:``, ``sha256:`` or ``git:`` (SHA-1 of a git
    blob) and the hexadecimal digest, or empty where the host tells none.
    """

    path: str
    url: str
    size: int
    checksum: str = ""


@dataclass(frozen=True)
class Listing:
    """The files of a dataset. ``licence`` as the host has it, ``headers`` what their download needs."""

    page: str
    licence: str
    files: tuple[File, ...]
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Origin:
    """A dataset at a host: a record number, ``owner/name``, or a bucket with a prefix."""

    host: str
    name: str

    @property
    def page(self) -> str:
        """The address that a person visits."""
        return _PAGES[self.host].format(self.name)

    def files(self) -> Listing:
        """What the host has now.

        Raises:
            FileNotFoundError: it has no such dataset. PermissionError: it wants a token. ConnectionError, TimeoutError: it
            cannot be reached. OSError: its answer is not what is documented.
        """
        try:
            listing = _LISTERS[self.host](self)
        except (KeyError, TypeError, AttributeError, ValueError, ElementTree.ParseError) as error:
            raise OSError(f"{self.page}: the host did not answer with a list of files ({error!r}). Visit it") from error
        if not listing.files:
            raise FileNotFoundError(f"{self.page} lists no files. Visit it: they may be restricted")
        return listing


def origins(text: str) -> tuple[Origin, ...]:
    """The hosts with such an interface that ``text`` (the source of a dataset) names, in its order."""
    found = {
        match.start(): Origin(host, next(group for group in match.groups() if group))
        for host, pattern in _NAMED.items()
        for match in pattern.finditer(text)
    }
    return tuple(dict.fromkeys(found[at] for at in sorted(found)))


def _zenodo(origin: Origin) -> Listing:
    """The records interface; a number that stands for all versions leads to the latest."""
    record = _parsed(f"{ENDPOINTS['zenodo']}/api/records/{origin.name}")[0]
    files = tuple(File(f["key"], f["links"]["self"], int(f["size"]), f["checksum"]) for f in record.get("files", ()))
    return Listing(origin.page, (record["metadata"].get("license") or {}).get("id", ""), files)


def _huggingface(origin: Origin) -> Listing:
    """The tree interface, at one commit, so that files of two versions are never mixed."""
    base = os.environ.get("HF_ENDPOINT") or ENDPOINTS["huggingface"]
    token = os.environ.get("HF_TOKEN", "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    facts = _parsed(f"{base}/api/datasets/{origin.name}", headers)[0]
    commit = facts["sha"]
    entries = _pages(f"{base}/api/datasets/{origin.name}/tree/{commit}?recursive=true", headers)
    files = tuple(
        File(
            entry["path"],
            f"{base}/datasets/{origin.name}/resolve/{commit}/{quote(entry['path'])}",
            int(entry["lfs"]["size"] if entry.get("lfs") else entry["size"]),
            f"sha256:{entry['lfs']['oid']}" if entry.get("lfs") else f"git:{entry['oid']}",
        )
        for page in entries
        for entry in page
        if entry["type"] == "file" and entry["path"] != ".gitattributes"
    )
    licence = (facts.get("cardData") or {}).get("license", "")
    return Listing(origin.page, licence if isinstance(licence, str) else ", ".join(licence), files, headers)


def _google(origin: Origin) -> Listing:
    """The JSON interface of Google storage. Objects that were put together from parts have no MD5."""
    bucket, _, prefix = origin.name.partition("/")
    base = ENDPOINTS["google"]
    query = {"prefix": f"{prefix}/" if prefix else "", "fields": "nextPageToken,items(name,size,md5Hash)"}
    files: list[File] = []
    more: dict[str, str] = {}
    while True:
        told = _parsed(f"{base}/storage/v1/b/{bucket}/o?{urlencode({**query, **more})}")[0]
        for item in told.get("items", ()):
            digest = base64.b64decode(item["md5Hash"]).hex() if item.get("md5Hash") else ""
            url = f"{base}/{bucket}/{quote(item['name'])}"
            files.append(_object(item["name"], url, item["size"], digest, prefix))
        if "nextPageToken" not in told:
            return Listing(origin.page, "", _real(files))
        more = {"pageToken": told["nextPageToken"]}


def _s3(origin: Origin) -> Listing:
    """The listing of a public bucket. The tag of an object that was sent in parts is no MD5."""
    bucket, _, prefix = origin.name.partition("/")
    base = ENDPOINTS["s3"].format(bucket=bucket)
    files: list[File] = []
    more: dict[str, str] = {}
    while True:
        query = urlencode({"list-type": "2", "prefix": f"{prefix}/" if prefix else "", **more})
        told = ElementTree.fromstring(remote.request(f"{base}/?{query}")[0])
        space = told.tag.partition("}")[0] + "}" if told.tag.startswith("{") else ""
        for item in told.iter(f"{space}Contents"):
            name, size, tag = (item.findtext(f"{space}{part}", "") for part in ("Key", "Size", "ETag"))
            digest = tag.strip('"') if re.fullmatch(r'"?[0-9a-f]{32}"?', tag) else ""
            files.append(_object(name, f"{base}/{quote(name)}", size, digest, prefix))
        following = told.findtext(f"{space}NextContinuationToken")
        if not following:
            return Listing(origin.page, "", _real(files))
        more = {"continuation-token": following}


_LISTERS: dict[str, Callable[[Origin], Listing]] = {
    "zenodo": _zenodo,
    "huggingface": _huggingface,
    "google": _google,
    "s3": _s3,
}


def _object(name: str, url: str, size: str, digest: str, prefix: str) -> File:
    """A file of a bucket, its path below the prefix."""
    return File(name.removeprefix(f"{prefix}/"), url, int(size), f"md5:{digest}" if digest else "")


def _real(files: list[File]) -> tuple[File, ...]:
    """Without the empty objects that stand for folders."""
    return tuple(file for file in files if file.path and not file.path.endswith("/"))


def _parsed(url: str, headers: Mapping[str, str] | None = None) -> tuple[Any, Mapping[str, str]]:
    body, told = remote.request(url, headers=headers)
    return json.loads(body), told


def _pages(url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """This page and those that the header ``Link`` names as the next."""
    while url:
        content, told = _parsed(url, headers)
        yield content
        following = re.search(r'<([^>]+)>;\s*rel="next"', told.get("Link", ""))
        url = urljoin(url, following[1]) if following else ""
