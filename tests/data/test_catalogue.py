"""Datasets by the names under which they are published, and where their files come from."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import everysat
from everysat.data import catalogue, pastis, synthetic, treesatai
from everysat.find import find, names
from everysat.io import hosts


@pytest.mark.parametrize("name", [*names("data"), *catalogue.PUBLISHED_AS])
def test_every_name_leads_to_a_module_in_any_spelling(name: str) -> None:
    here = catalogue.resolve(name)
    module, variant = find("data", here)
    assert not variant or variant in module.VARIANTS
    spellings = {name.upper(), name.replace("-", "_"), name.replace("_", "-"), name.replace("-", "")}
    assert {catalogue.resolve(spelling) for spelling in spellings} == {here}


def test_names_that_mean_a_host_lead_to_it() -> None:
    for name, host in catalogue.HOSTED.items():
        assert catalogue.origin(name).host == host
        assert catalogue.origin(name.upper()).host == host
    assert catalogue.origin("pastis", "zenodo") == hosts.Origin("zenodo", "5735646")
    assert catalogue.origin("pastis-r", "huggingface").host == "huggingface"


def test_a_dataset_by_its_published_name(tmp_path: Path) -> None:
    pastis.fake(tmp_path)
    data = everysat.data("pastis-hd", tmp_path, split="train", fold=1, modalities=["s2", "s1-asc", "spot"])
    assert data == pastis.build(root=tmp_path, fold=1, modalities=["s2", "s1-asc", "spot"])
    assert set(data[0].layers) == {"s2", "s1-asc", "spot", "label"}
    assert everysat.data("PASTIS/classify", root=tmp_path) == pastis.build("classify", root=tmp_path)
    treesatai.fake(tmp_path / "trees")
    assert len(everysat.data("treesatai-ts", tmp_path / "trees", split="val")) > 0


def test_a_module_keeps_its_own_default_variant() -> None:
    assert everysat.data("synthetic", places=2)[0].layers.keys() == synthetic.build(places=2)[0].layers.keys()
    assert set(everysat.data("synthetic/images", places=1)[0].layers) == set(
        synthetic.build("images", places=1)[0].layers
    )


def test_the_package_stays_a_package() -> None:
    assert everysat.data is importlib.import_module("everysat.data")
    code = "import everysat, everysat.data.split; print(len(everysat.data('synthetic', places=2)), everysat.data.split)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.startswith("2 <module")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("pastis-hdd",), {}, LookupError, "no dataset is called 'pastis-hdd'. Did you mean pastis-hd"),
        (("flair-2/1",), {}, LookupError, "flair-2 already is the variant flair/2; give that, or flair/1"),
        (("pastis-hd",), {}, ValueError, "needs root, the folder that holds it. It is published at https://zenodo"),
        (("pastis-hd", "x"), {"splitt": "val"}, LookupError, "has no option 'splitt'. Did you mean split"),
        (("synthetic", "x"), {}, LookupError, "has no option 'root'"),
        (("scene",), {}, ValueError, "needs the option"),
        (("pastis-hd", "/no/such/folder"), {}, FileNotFoundError, "/no/such/folder"),
    ],
)
def test_mistakes_say_what_to_do(arguments, options, error, message) -> None:
    with pytest.raises(error, match=message.replace(".", r"\.")):
        everysat.data(*arguments, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pastis", r"is at zenodo \(\S+5735646\), huggingface \(\S+PASTIS-HD\). Choose with"),
        ("mmearth", r"Visit https://github.com/vishalned/MMEarth-data [\s\S]*in this layout:[\s\S]*hdf5|h5"),
        ("synthetic", "is not fetched from anywhere"),
        ("nothing", "no dataset is called 'nothing'"),
    ],
)
def test_what_cannot_be_fetched_says_where_to_go(name: str, message: str) -> None:
    with pytest.raises(LookupError, match=message):
        catalogue.origin(name)
    with pytest.raises(LookupError, match=r"is not at google; it is at https://zenodo"):
        catalogue.origin("timesen2crop", "google")


def test_the_list_says_what_is_at_hand(tmp_path: Path) -> None:
    treesatai.fake(tmp_path / "TreeSatAI-TS")
    listed = {entry.name: entry for entry in catalogue.entries(tmp_path)}
    assert listed.keys() == set(names("data"))
    assert listed["treesatai"].at_hand == str(tmp_path / "TreeSatAI-TS")
    assert listed["treesatai"].licence == treesatai.LICENCE
    assert listed["synthetic"].at_hand == "yes"
    assert listed["pastis"].at_hand.startswith("no (a synthetic")
    assert {e.name: e.at_hand for e in catalogue.entries()}["treesatai"].startswith("no")
    assert all(entry.title for entry in listed.values())


def test_the_command_line_lists_and_refuses(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "everysat.cli", "data", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=100)

    listed = json.loads(run("list", "--json", "--in", str(tmp_path)).stdout)
    assert [entry["name"] for entry in listed] == list(names("data"))
    refused = run("get", "so2sat", "--to", str(tmp_path / "new"))
    assert refused.returncode == 2
    assert "Visit https://mediatum.ub.tum.de/1483140" in refused.stderr
    assert not (tmp_path / "new").exists()


def test_the_command_line_fetches_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import zipfile

    from loopback import serving
    from typer.testing import CliRunner

    from everysat.cli import app

    pastis.fake(tmp_path / "made")
    site_folder = tmp_path / "site"
    (site_folder / "files").mkdir(parents=True)
    with zipfile.ZipFile(site_folder / "files" / "PASTIS-R.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in (tmp_path / "made").rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(tmp_path / "made"))
    content = (site_folder / "files" / "PASTIS-R.zip").read_bytes()
    import hashlib

    with serving(site_folder) as site:
        monkeypatch.setitem(hosts.ENDPOINTS, "zenodo", site.url)
        record = {"metadata": {"license": {"id": "cc-by-sa-4.0"}}, "files": [
            {"key": "PASTIS-R.zip", "size": len(content), "checksum": f"md5:{hashlib.md5(content).hexdigest()}",
             "links": {"self": f"{site.url}/files/PASTIS-R.zip"}}]}  # fmt: skip
        (site_folder / "api" / "records").mkdir(parents=True)
        asked = hosts.remote.request
        monkeypatch.setattr(
            hosts.remote, "request",
            lambda url, **more: (json.dumps(record).encode(), {}) if "/api/records/5735646" in url else asked(url, **more),
        )  # fmt: skip
        arguments = ["data", "get", "pastis-r", "--to", str(tmp_path / "to"), "--unpack", "--quiet"]
        shown = CliRunner().invoke(app, [*arguments, "--dry-run"], catch_exceptions=False).output
        assert "PASTIS-R.zip" in shown
        assert not (tmp_path / "to").exists()
        first = CliRunner().invoke(app, arguments, catch_exceptions=False).output
        assert first.index("Licence: CC-BY-SA-4.0 (PASTIS, PASTIS-R)") < first.index("1 files fetched, 0 were there")
        assert "its host says cc-by-sa-4.0" in first
        again = CliRunner().invoke(app, arguments, catch_exceptions=False).output
        assert "0 files fetched, 1 were there: all of it is in" in again
        assert "0 archives unpacked" in again
    assert len(everysat.data("pastis-r", tmp_path / "to", split="val")) == len(
        pastis.build(root=tmp_path / "made", split="val")
    )
