"""GeoCLIP's location encoder: the numbers of the published code, and of its weights where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from golden_rivals import golden, weights_of
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, cross_val_predict

from everysat.models import geoclip, weights
from everysat.types import Batch, Place


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return golden("geoclip")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> geoclip.GeoClip:
    """The weights out of the wheel of geoclip 1.3.0, whose path ``EVERYSAT_GEOCLIP`` gives."""
    file = Path(os.environ.get("EVERYSAT_GEOCLIP", "no such file"))
    if not file.is_file():
        pytest.skip("needs geoclip/model/weights/location_encoder_weights.pth of geoclip 1.3.0: EVERYSAT_GEOCLIP=FILE")
    out = tmp_path_factory.mktemp("geoclip") / "base.safetensors"
    done = weights.convert("geoclip/base", file, out)
    assert (done.kept, dict(done.dropped)) == (27, {})
    return weights.load(out)  # type: ignore[return-value]


def test_matches_the_published_implementation(io) -> None:
    model = geoclip.build("nano", dim=512, width=12, hidden=3).eval()
    weights.load_strictly(model, geoclip.convert(weights_of(io), model.config), "golden")
    torch.testing.assert_close(model.of(io["in.lonlat"]), io["out.tiny"], rtol=1e-5, atol=1e-6)


def test_matches_the_published_weights(published, io) -> None:
    torch.testing.assert_close(published.of(io["in.lonlat"]), io["out.real"], rtol=1e-4, atol=1e-6)


def test_position_tells_the_climate_of_real_stations(published, data_dir) -> None:
    """Ridge regression on features of 3 076 weather stations: R2 0.90 of mean temperature, 0.70 of rain, in five random parts."""
    table = pd.read_csv(data_dir / "satclip_s2" / "ssl4eo" / "stationDataAll.csv")
    with torch.no_grad():
        x = published.of(torch.tensor(table[["Lon", "Lat"]].to_numpy())).double().numpy()
    for column, expected in (("meanT", 0.903), ("meanP", 0.695)):
        parts = KFold(5, shuffle=True, random_state=0)
        found = cross_val_predict(Ridge(1.0), x, np.asarray(table[column]), cv=parts)
        assert abs(r2_score(table[column], found) - expected) < 0.005


def test_summary_and_feature_are_one() -> None:
    torch.manual_seed(0)
    model = geoclip.build("nano").eval()
    batch = Batch((Place(10.0, 10.0, lonlat=(2.35, 48.86)), Place(30.0, 20.0, lonlat=(-70.0, -33.0))))
    features = model.embed(batch)
    torch.testing.assert_close(features.summary, features.mean)
    assert features.coords.at_m.tolist() == [[5.0, 5.0], [15.0, 10.0]]
    torch.testing.assert_close(features.mean, model.of(torch.tensor([[2.35, 48.86], [-70.0, -33.0]])))


def test_features_are_exact_to_single_precision() -> None:
    """With angles in single precision, the finest would be wrong by 1e-4 and more."""
    torch.manual_seed(0)
    model = geoclip.build("base")
    at = model.code(torch.rand(50, 2, dtype=torch.float64) * 160 - 80)
    fine = model.scales[2][0]
    angle = 2 * torch.pi * at @ fine.matrix.double().T
    torch.testing.assert_close(fine(at), torch.cat([angle.cos(), angle.sin()], -1).float(), rtol=0, atol=1e-6)


def test_an_unknown_variant_is_an_error() -> None:
    with pytest.raises(LookupError, match="base"):
        geoclip.build("bas")
