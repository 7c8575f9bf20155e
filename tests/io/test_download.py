"""Datasets from their hosts: what is listed, what goes wrong on the way, and that a second call goes on."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from loopback import Loopback, serving

from everysat.io import download as downloads
from everysat.io import hosts, remote
from everysat.io.download import RECORD, download
from everysat.io.hosts import File, Listing, Origin, origins

FILES = {
    "README.md": b"about\n",
    "DATA_S2/S2_1.npy": bytes(range(256)) * 90,
    "DATA_S2/S2_2.npy": b"\1" * 7001,
    "empty.txt": b"",
}


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "CHUNK", 4000)
    monkeypatch.setattr(remote, "BACKOFF_S", 0.01)
    monkeypatch.setattr(remote, "TRIES", 3)
    monkeypatch.setattr(remote, "TIMEOUT_S", 5.0)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests in order, so that it is known which one fails."""
    monkeypatch.setattr(downloads, "THREADS", 1)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Loopback]:
    folder = tmp_path / "host"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with serving(folder) as site:
        yield site


def listing(site: Loopback, **checksums: str) -> Listing:
    md5 = {name: f"md5:{hashlib.md5(content).hexdigest()}" for name, content in FILES.items()} | checksums
    return Listing(
        "https://host/set", "cc", tuple(File(n, f"{site.url}/{n}", len(c), md5[n]) for n, c in FILES.items())
    )


def get(site: Loopback, to: Path, **options: Any) -> downloads.Done:
    return download(listing(site), to, quiet=True, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != RECORD
    }


def test_everything_arrives_and_a_second_call_asks_for_nothing(site: Loopback, tmp_path: Path) -> None:
    done = get(site, tmp_path / "to")
    assert content(tmp_path / "to") == FILES
    assert (len(done.fetched), len(done.there), done.fetched_bytes) == (4, 0, sum(map(len, FILES.values())))
    asked = len(site.log)
    again = get(site, tmp_path / "to")
    assert (len(again.fetched), len(again.there), again.fetched_bytes, len(site.log)) == (0, 4, 0, asked)


def test_patterns_choose_a_part(site: Loopback, tmp_path: Path) -> None:
    get(site, tmp_path / "to", files=["DATA_S2/*1.npy", "README.md"])
    assert set(content(tmp_path / "to")) == {"README.md", "DATA_S2/S2_1.npy"}
    with pytest.raises(LookupError, match=r"no file matches '\*.zip'"):
        get(site, tmp_path / "to", files=["*.zip"])


@pytest.mark.parametrize("trouble", [500, 429, "cut", "short"])
def test_what_passes_is_tried_again(site: Loopback, tmp_path: Path, trouble: Any) -> None:
    site.plans["S2_1"] = [None, trouble, None, trouble]
    if trouble == "short":  # an answer to a range that holds less than it says is noticed by its head
        site.plans["S2_1"] = [trouble]
    get(site, tmp_path / "to")
    assert content(tmp_path / "to") == FILES


def test_what_was_stopped_goes_on_from_there(site: Loopback, tmp_path: Path, one_by_one: None) -> None:
    site.plans["S2_1"] = [None, None, *[500] * 99]
    with pytest.raises(ConnectionError, match=r"500.*the same command goes on from there"):
        get(site, tmp_path / "to")
    found = content(tmp_path / "to")
    assert "DATA_S2/S2_1.npy" not in found
    part = next(name for name in found if name.endswith(".part"))
    assert found[part] == FILES["DATA_S2/S2_1.npy"][: len(found[part])]
    assert len(found[part]) == 8000
    site.plans.clear()
    site.log.clear()
    done = get(site, tmp_path / "to")
    assert content(tmp_path / "to") == FILES
    assert done.fetched_bytes == sum(map(len, FILES.values())) - 8000 - len(FILES["README.md"])
    assert site.asked("S2_1") == -(-(len(FILES["DATA_S2/S2_1.npy"]) - 8000) // 4000)


def test_a_part_of_another_version_is_not_used(site: Loopback, tmp_path: Path, one_by_one: None) -> None:
    site.plans["S2_1"] = [None, *[500] * 99]
    with pytest.raises(ConnectionError):
        get(site, tmp_path / "to")
    site.plans.clear()
    other = b"2" * 9000
    (site.folder / "DATA_S2/S2_1.npy").write_bytes(other)
    file = File("DATA_S2/S2_1.npy", f"{site.url}/DATA_S2/S2_1.npy", 9000, f"md5:{hashlib.md5(other).hexdigest()}")
    download(Listing("p", "", (file,)), tmp_path / "to", quiet=True)
    assert content(tmp_path / "to") == {"README.md": FILES["README.md"], "DATA_S2/S2_1.npy": other}


def test_a_checksum_that_does_not_fit_leaves_nothing(site: Loopback, tmp_path: Path) -> None:
    wrong = listing(site, **{"DATA_S2/S2_1.npy": "md5:" + "0" * 32})
    with pytest.raises(OSError, match=r"S2_1.npy arrived damaged: md5 \w+, the host has 0000"):
        download(wrong, tmp_path / "to", quiet=True)
    assert content(tmp_path / "to") == {"README.md": FILES["README.md"]}


def test_damage_to_a_part_is_noticed(site: Loopback, tmp_path: Path, one_by_one: None) -> None:
    site.plans["S2_1"] = [None, *[500] * 99]
    with pytest.raises(ConnectionError):
        get(site, tmp_path / "to")
    site.plans.clear()
    part = next((tmp_path / "to").rglob("*.part"))
    part.write_bytes(b"x" + part.read_bytes()[1:])
    with pytest.raises(OSError, match="damaged"):
        get(site, tmp_path / "to")
    get(site, tmp_path / "to")
    assert content(tmp_path / "to") == FILES


def test_a_file_that_is_there_is_compared_and_never_overwritten(site: Loopback, tmp_path: Path) -> None:
    mine = tmp_path / "to" / "DATA_S2" / "S2_2.npy"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(FILES["DATA_S2/S2_2.npy"])
    assert [p.name for p in get(site, tmp_path / "to").there] == ["S2_2.npy"]
    assert site.asked("S2_2") == 0
    mine.write_bytes(b"\2" * 7001)
    with pytest.raises(FileExistsError, match=r"S2_2.npy is there with other content: md5 .* Move or delete it"):
        get(site, tmp_path / "to")
    mine.write_bytes(b"\2")
    with pytest.raises(FileExistsError, match="1 bytes, the host has 7001"):
        get(site, tmp_path / "to")
    assert mine.read_bytes() == b"\2"


def test_too_small_a_disk_is_refused_before_anything_is_fetched(
    site: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000))
    with pytest.raises(OSError, match=r"4 files of https://host/set need 0.00 GB, the disk of .* has 0.00 GB free"):
        get(site, tmp_path / "to")
    assert not site.log
    get(site, tmp_path / "to", files=["S2_2.npy"])


def test_a_disk_that_fills_up_keeps_what_was_fetched(
    site: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path.open

    def full(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name.endswith(".part") and arguments == ("ab",) and self.exists() and self.stat().st_size >= 8000:
            raise OSError(28, "No space left on device")
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=r"the disk is full at .*S2_1.npy. Make room. What was fetched stays"):
        get(site, tmp_path / "to")
    monkeypatch.setattr(Path, "open", whole)
    assert get(site, tmp_path / "to").fetched_bytes == sum(map(len, FILES.values())) - 8000 - len(FILES["README.md"])
    assert content(tmp_path / "to") == FILES


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", ""])
def test_names_that_lead_out_of_the_folder_are_refused(site: Loopback, tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match="leads out of the folder"):
        download(Listing("page", "", (File(name, f"{site.url}/README.md", 6),)), tmp_path / "to", quiet=True)
    assert not site.log


def test_a_file_that_was_replaced_meanwhile_is_noticed(site: Loopback, tmp_path: Path) -> None:
    (site.folder / "DATA_S2/S2_2.npy").write_bytes(b"\1" * 7002)
    with pytest.raises(OSError, match="has 7002 bytes, but is listed with 7001: it was replaced"):
        get(site, tmp_path / "to")


def test_servers_without_ranges_send_files_whole(
    site: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = remote.request
    monkeypatch.setattr(
        remote,
        "request",
        lambda url, headers=None: ask(url, headers={k: v for k, v in headers.items() if k != "Range"}),
    )
    get(site, tmp_path / "to")
    assert content(tmp_path / "to") == FILES


def test_a_refusal_asks_for_a_token(site: Loopback, tmp_path: Path) -> None:
    site.plans["S2_1"] = [403]
    with pytest.raises(PermissionError, match="token"):
        get(site, tmp_path / "to")


# --- what hosts list -------------------------------------------------------------------------------------------------


def test_hosts_are_found_in_what_a_dataset_says_of_its_source() -> None:
    text = "https://zenodo.org/records/57 (R; doi:10.5281/zenodo.57), https://huggingface.co/datasets/IGNF/PASTIS-HD. See gs://a-b/c/d)"
    assert origins(text) == (
        Origin("zenodo", "57"), Origin("huggingface", "IGNF/PASTIS-HD"), Origin("google", "a-b/c/d"),
    )  # fmt: skip
    assert origins("s3://bucket/one/two, https://example.org/page") == (Origin("s3", "bucket/one/two"),)
    assert origins("https://github.com/a/b (doi:10.14459/2018mp1483140)") == ()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Answers by the beginning of an address, as functions of its query; everything asked for is in ``asked``."""
    answers: dict[str, Any] = {"asked": []}

    def request(url: str, headers: Any = None) -> tuple[bytes, dict[str, str]]:
        parts = urlsplit(url)
        answers["asked"].append((url, headers))
        made = answers[f"{parts.scheme}://{parts.netloc}{unquote(parts.path)}"]
        body, told = made({k: v[0] for k, v in parse_qs(parts.query).items()})
        return (body if isinstance(body, bytes) else json.dumps(body).encode()), told

    monkeypatch.setattr(remote, "request", request)
    return answers


def test_zenodo_tells_md5(host: dict[str, Any]) -> None:
    record = {
        "id": 57, "metadata": {"title": "t", "license": {"id": "cc-by-4.0"}, "access_right": "open"},
        "files": [{"id": "x", "key": "PASTIS-R.zip", "size": 54_000_000_000, "checksum": "md5:" + "a" * 32,
                   "links": {"self": "https://zenodo.org/api/records/57/files/PASTIS-R.zip/content"}}],
    }  # fmt: skip
    host["https://zenodo.org/api/records/57"] = lambda _: (record, {})
    found = Origin("zenodo", "57").files()
    assert (found.licence, found.page) == ("cc-by-4.0", "https://zenodo.org/records/57")
    url = "https://zenodo.org/api/records/57/files/PASTIS-R.zip/content"
    assert found.files == (File("PASTIS-R.zip", url, 54_000_000_000, "md5:" + "a" * 32),)


def test_a_restricted_record_lists_no_files(host: dict[str, Any]) -> None:
    host["https://zenodo.org/api/records/57"] = lambda _: ({"metadata": {"access_right": "restricted"}}, {})
    with pytest.raises(FileNotFoundError, match=r"records/57 lists no files. Visit it"):
        Origin("zenodo", "57").files()


def test_hugging_face_lists_one_commit_in_pages(host: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    base, commit = "https://huggingface.co/api/datasets/IGNF/PASTIS-HD", "c0ffee"
    host[base] = lambda _: ({"sha": commit, "cardData": {"license": "etalab-2.0"}}, {})
    big = {"type": "file", "path": "DATA S2.zip", "size": 130, "oid": "b" * 40,
           "lfs": {"oid": "d" * 64, "size": 9_000, "pointerSize": 130}}  # fmt: skip
    small = {"type": "file", "path": "README.md", "size": 6, "oid": "e" * 40}
    folder = {"type": "directory", "path": "x", "size": 0, "oid": "f" * 40}

    def tree(query: dict[str, str]) -> Any:
        assert query["recursive"] == "true"
        following = f'<{base}/tree/{commit}?recursive=true&cursor=Zm>; rel="next"'
        return ([small], {}) if "cursor" in query else ([folder, big], {"Link": following})

    host[f"{base}/tree/{commit}"] = tree
    found = Origin("huggingface", "IGNF/PASTIS-HD").files()
    resolve = "https://huggingface.co/datasets/IGNF/PASTIS-HD/resolve/c0ffee"
    assert found.files == (
        File("DATA S2.zip", f"{resolve}/DATA%20S2.zip", 9_000, "sha256:" + "d" * 64),
        File("README.md", f"{resolve}/README.md", 6, "git:" + "e" * 40),
    )
    assert found.licence == "etalab-2.0"
    assert found.headers == {"Authorization": "Bearer secret"}
    assert "secret" not in repr(found)
    assert all(headers == found.headers for _, headers in host["asked"])


def test_google_storage_lists_in_pages_and_tells_md5_where_it_has_one(host: dict[str, Any]) -> None:
    digest = hashlib.md5(b"x").digest()

    def objects(query: dict[str, str]) -> Any:
        assert query["prefix"] == "v1.1/"
        if "pageToken" in query:
            return {"items": [{"name": "v1.1/composed.tif", "size": "7"}]}, {}
        items = [
            {"name": "v1.1/", "size": "0"},
            {"name": "v1.1/a/b.tif", "size": "1", "md5Hash": base64.b64encode(digest).decode()},
        ]
        return {"items": items, "nextPageToken": "more"}, {}

    host["https://storage.googleapis.com/storage/v1/b/sen1floods11/o"] = objects
    url = "https://storage.googleapis.com/sen1floods11/v1.1"
    assert Origin("google", "sen1floods11/v1.1").files().files == (
        File("a/b.tif", f"{url}/a/b.tif", 1, f"md5:{digest.hex()}"),
        File("composed.tif", f"{url}/composed.tif", 7),
    )


def test_s3_lists_in_pages_and_a_tag_of_parts_is_no_checksum(host: dict[str, Any]) -> None:
    def objects(query: dict[str, str]) -> Any:
        rows = (
            [("p/one.tar.gz", "5", "a" * 32)]
            if "continuation-token" not in query
            else [("p/two.tif", "6", "b" * 32 + "-3")]
        )
        more = "" if "continuation-token" in query else "<NextContinuationToken>t/1=</NextContinuationToken>"
        entries = "".join(
            f"<Contents><Key>{k}</Key><ETag>&quot;{t}&quot;</ETag><Size>{s}</Size></Contents>" for k, s, t in rows
        )
        return (
            f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{more}{entries}</ListBucketResult>'.encode(),
            {},
        )

    host["https://bucket.s3.amazonaws.com/"] = objects
    base = "https://bucket.s3.amazonaws.com/p"
    assert Origin("s3", "bucket/p").files().files == (
        File("one.tar.gz", f"{base}/one.tar.gz", 5, "md5:" + "a" * 32),
        File("two.tif", f"{base}/two.tif", 6),
    )


@pytest.mark.parametrize("answer", [b"<html>captcha", {"error": "no"}, [1], {"metadata": {}, "files": [{"key": "a"}]}])
def test_an_answer_that_is_no_list_names_the_page(host: dict[str, Any], answer: Any) -> None:
    host["https://zenodo.org/api/records/5"] = lambda _: (answer, {})
    with pytest.raises(OSError, match=r"https://zenodo.org/records/5"):
        Origin("zenodo", "5").files()


def test_checksums_of_git_and_sha256_are_checked(site: Loopback, tmp_path: Path) -> None:
    git = hashlib.sha1(b"blob 6\0about\n").hexdigest()
    sha256 = hashlib.sha256(FILES["DATA_S2/S2_1.npy"]).hexdigest()
    right = listing(site, **{"README.md": f"git:{git}", "DATA_S2/S2_1.npy": f"sha256:{sha256}"})
    download(right, tmp_path / "to", quiet=True)
    assert content(tmp_path / "to") == FILES
    wrong = listing(site, **{"README.md": "git:" + "1" * 40})
    with pytest.raises(OSError, match=f"git {git}, the host has 111"):
        download(wrong, tmp_path / "other", quiet=True)
    assert hosts.ENDPOINTS["zenodo"].startswith("https://")
