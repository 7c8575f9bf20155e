"""Crowns from the air: which tree, alive or dead, in 369 bands; whole sites or years held out."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from everysat import sensors
from everysat.data.neon import SPECIES, SPLITS, STATES, YEARS, build, fake
from everysat.io import arrays, pictures
from everysat.types import Batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("neon")
    fake(root)
    return root


def test_the_spectrometer_leaves_out_water_vapour_and_noise():
    waves = [band.wavelength_um for band in sensors.get("neon-ais").bands]
    assert len(waves) == 369
    steps = np.diff(waves)
    gaps = np.flatnonzero(steps > 0.006)
    assert [(round(waves[i], 2), round(waves[i + 1], 2)) for i in gaps] == [(1.34, 1.44), (1.8, 1.96)]
    np.testing.assert_allclose(np.delete(steps, gaps), 0.005008, atol=2e-6)
    assert (round(waves[0], 4), round(waves[-1], 3)) == (0.3835, 2.477)


def test_a_crown_is_its_picture_and_its_state(folder):
    data = build("crowns", root=folder, split="all")
    assert len(data) == 30
    for i in (0, 17):
        place = data[i]
        np.testing.assert_array_equal(place.raster("rgb").values[0], pictures.picture(folder / data.files[i]))
        assert place.raster("rgb").gsd_m == 0.1
        assert f"/{STATES[int(place.raster('label').values)]}/" in data.files[i]
    assert data.codes.tolist() == [0] * 15 + [1] * 15


def test_crowns_of_any_size_join(folder):
    data = build("crowns", root=folder, split="all")
    joined = Batch.cat([data[i] for i in range(8)])
    for i in range(8):
        height, width = data[i].raster("rgb").values.shape[2:]
        part = joined[i].raster("rgb")
        assert part.valid[0, 0].sum() == height * width
        assert part.values[..., :height, :width].equal(data[i].raster("rgb").values)


def test_sites_and_years_are_held_out(folder):
    parts = {s: build("crowns", root=folder, split=s, fold=3) for s in SPLITS}
    sites = [set(part.groups) for part in parts.values()]
    assert [len(s) for s in sites] == [3, 1, 1]
    assert len(set.union(*sites)) == 5
    for part in parts.values():
        assert set(part.codes) == {0, 1}, "a site has both"
    species = {s: build("species", root=folder, split=s) for s in SPLITS}
    for split, part in species.items():
        assert {int(year) for year in part.groups} <= set(YEARS[split])
        assert len(set(part.codes)) == 5
    assert sum(map(len, species.values())) == len(build("species", root=folder, split="all")) == 20


def test_spectra_are_reflectance_of_their_year(folder):
    data = build("species", root=folder, split="val")
    numbers, _ = arrays.tiff(folder / data.files[1])
    raster = data[1].raster("hsi")
    torch.testing.assert_close(raster.values[0], torch.from_numpy(numbers.astype(np.float32)) * 1e-4)
    year = [datetime.fromtimestamp(t, UTC) for t in raster.time_s[0].tolist()]
    assert year == [datetime(2019, 1, 1, tzinfo=UTC), datetime(2020, 1, 1, tzinfo=UTC)]
    assert SPECIES[int(data[1].raster("label").values)] == data.names[1]


def test_what_the_spectrometer_did_not_see_is_not_valid(tmp_path):
    fake(tmp_path)
    path = tmp_path / build("species", root=tmp_path, split="val").files[0]
    numbers, _ = arrays.tiff(path)
    numbers[:, 0, 1] = -9999
    arrays.write_tiff(path, numbers)
    valid = build("species", root=tmp_path, split="val")[0].raster("hsi").valid
    assert not valid[0, :, 0, 1].any()
    assert valid.sum() == numbers.size - 369


def test_a_plot_is_one_place_of_two_sensors(folder):
    data = build("plot", root=folder)
    assert len(data) == 1
    place = data[0]
    assert (place.places[0].height_m, place.places[0].width_m) == pytest.approx((6, 4))
    assert str(place.places[0].geobox.crs) == "EPSG:32618"
    for name, gsd_m in (("rgb", 0.1), ("hsi", 1.0)):
        raster = place.raster(name)
        assert raster.gsd_m == gsd_m
        assert raster.time_s.isinf().all()
        assert raster.values.shape[2] * gsd_m == pytest.approx(6)
    assert set(build("plot", root=folder, modalities=["hsi"])[0].layers) == {"hsi"}


def test_files_that_do_not_fit_are_named(tmp_path):
    fake(tmp_path)
    species = tmp_path / "hsi_species_crops"
    arrays.write_tiff(species / "OSBS_contrib.0_2019.tif", np.zeros((426, 4, 4), np.int16))
    with pytest.raises(ValueError, match=r"OSBS_contrib\.0_2019\.tif has 426 bands, expected the 369"):
        build("species", root=tmp_path, split="val")[0]
    arrays.write_tiff(species / "OSBS_contrib.77_2019.tif", np.zeros((369, 4, 4), np.int16))
    with pytest.raises(ValueError, match=r"annotations\.csv gives OSBS_contrib\.77_2019\.tif none of the 15 species"):
        build("species", root=tmp_path, split="val")
    arrays.write_tiff(tmp_path / "hsi_plot" / "HARV_image_crop_hyperspectral_2018.tif", np.zeros((369, 4, 4), np.int16))
    with pytest.raises(ValueError, match=r"hyperspectral_2018\.tif covers other ground"):
        build("plot", root=tmp_path)[0]
    (tmp_path / "crowns" / "Dead" / "2018_OSBS_2_4000_5000_image_0.png").rename(tmp_path / "crowns" / "Dead" / "x.png")
    with pytest.raises(ValueError, match=r"x\.png: the name does not tell the site"):
        build("crowns", root=tmp_path)


@pytest.fixture(scope="module")
def real(data_dir):
    if not (data_dir / "neon_trees").is_dir():
        pytest.skip("needs neon_trees")
    return data_dir / "neon_trees"


def test_the_real_crowns(real):
    data = build("crowns", root=real, split="all")
    assert np.bincount(data.codes).tolist() == [500, 500]
    assert len(set(data.groups)) == 41
    for fold in range(5):
        test = build("crowns", root=real, split="test", fold=fold)
        assert set(test.codes) == {0, 1}
    means = torch.stack([data[i].raster("rgb").values.mean((0, 2, 3)) for i in range(0, 1000, 12)])
    alive, dead = (means[(data.codes[::12] == c)].mean(0) for c in (0, 1))
    assert alive[1] > alive[0], "leaves are green"
    assert dead[0] / dead[1] > alive[0] / alive[1] + 0.03


def test_the_real_spectra_are_of_plants(real):
    """Green peak, red edge, dip of oxygen at 760 nm, dark behind each window of water."""
    data = build("species", root=real, split="all")
    assert (len(data), len(set(data.codes))) == (53, 15)
    assert {s: len(build("species", root=real, split=s)) for s in SPLITS} == {"train": 26, "val": 12, "test": 15}
    waves = np.array([b.wavelength_um for b in sensors.get("neon-ais").bands])
    spectrum = torch.stack([data[i].raster("hsi").values.mean((0, 2, 3)) for i in range(53)]).mean(0).numpy()

    def at(um):
        return spectrum[np.abs(waves - um).argmin()]

    assert at(0.55) > 1.2 * at(0.68)
    assert at(0.80) > 6 * at(0.68)
    assert at(0.759) < 0.97 * at(0.754) < at(0.764)
    assert at(1.65) < at(1.25)
    assert at(2.2) < 0.5 * at(1.65)
    assert 0 <= spectrum.min() < spectrum.max() < 0.5


def test_the_real_plot_shows_the_same_trees_in_both(real):
    place = build("plot", root=real)[0]
    rgb, hsi = place.raster("rgb").values[0], place.raster("hsi")
    assert hsi.values.shape == (1, 369, 27, 10)
    coarse = rgb.view(3, 27, 10, 10, 10).mean((2, 4))
    waves = torch.tensor([b.wavelength_um for b in hsi.sensor.bands])
    for band, um in zip(coarse, (0.65, 0.55, 0.46), strict=True):
        seen = hsi.values[0, (waves - um).abs().argmin()]
        assert torch.corrcoef(torch.stack([band.flatten(), seen.flatten()]))[0, 1] > 0.3
    assert place.places[0].lonlat == pytest.approx((-72.247, 42.411), abs=0.002)
    files = sorted((real / "hsi_plot").glob("*hyperspectral_20*.tif"))
    assert files[0].read_bytes() == files[-1].read_bytes(), "the two years are one"
