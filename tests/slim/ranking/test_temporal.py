"""Standardising, and the masked autoencoder over parcels x time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.core.errors import ConfigError, RunRefused
from slim.ranking.autoencoder import ExtractorConfig, Layout, MaskedAutoencoder, group_parcels
from slim.ranking.extractor import Extractor, standardise
from slim.ranking.extractor_training import train_extractor


def structured_run(seed: int, parcels: int = 40, length: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Slow sources with smooth maps plus noise: (roi_RT, centre_R3)."""
    rng = np.random.default_rng(seed)
    centre_R3 = rng.uniform(-70, 70, (parcels, 3))
    sources_NT = rng.standard_normal((6, length + 20))
    kernel = np.hanning(13)
    sources_NT = np.stack([np.convolve(row, kernel, "same")[10:-10] for row in sources_NT])
    sources_NT /= sources_NT.std(axis=1, keepdims=True)
    peak_N3 = rng.uniform(-70, 70, (6, 3))
    map_RN = np.exp(-((centre_R3[:, None] - peak_N3) ** 2).sum(-1) / (2 * 50**2))
    roi_RT = map_RN @ sources_NT + 0.3 * rng.standard_normal((parcels, length))
    return (1000 + 20 * roi_RT).astype(np.float32), centre_R3


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return train_extractor([structured_run(seed) for seed in range(8)], steps=150)


# ---- standardising


def test_views_are_standard_and_the_second_knows_no_global_signal():
    z_VRT, kept_R = standardise(structured_run(0)[0])
    assert kept_R.all() and z_VRT.dtype == np.float32
    np.testing.assert_allclose(z_VRT.mean(axis=2), 0, atol=1e-5)
    np.testing.assert_allclose(z_VRT.std(axis=2), 1, atol=1e-5)
    np.testing.assert_allclose(z_VRT[1] @ z_VRT[0].mean(axis=0) / z_VRT.shape[2], 0, atol=1e-5)


@pytest.mark.parametrize("scale", [-1.0, 2.0**-60, -(2.0**60), 3.7])
def test_sign_and_scale_do_not_matter(scale):
    roi_RT = structured_run(1)[0].astype(np.float64)
    plain, scaled = standardise(roi_RT)[0], standardise(roi_RT * scale)[0]
    np.testing.assert_allclose(scaled, np.sign(scale) * plain, atol=2e-6)


def test_constant_parcels_are_left_out_of_everything():
    roi_RT = structured_run(2)[0]
    padded_RT = np.insert(roi_RT, [0, 7, 40], np.float32(987.6), axis=0)
    z_VRT, kept_R = standardise(padded_RT)
    np.testing.assert_array_equal(np.flatnonzero(~kept_R), [0, 8, 42])
    np.testing.assert_array_equal(z_VRT, standardise(roi_RT)[0])


def test_a_run_of_one_signal_has_nothing_beside_its_global_signal():
    z_VRT, _ = standardise(np.outer([1.0, 2.0, 5.0], np.sin(np.arange(60.0))))
    assert np.abs(z_VRT[0]).max() > 1
    np.testing.assert_array_equal(z_VRT[1], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_numbers_are_refused_by_name(bad):
    roi_RT = structured_run(3)[0]
    roi_RT[5, 17] = bad
    with pytest.raises(RunRefused, match=r"NaN or infinity in 1 of 40 parcels \(first: 5\)"):
        standardise(roi_RT)


def test_a_single_parcel_is_refused():
    with pytest.raises(RunRefused, match="at least 2 that vary"):
        standardise(np.vstack([np.sin(np.arange(50.0)), np.ones((3, 50))]))


# ---- groups


@settings(deadline=None, max_examples=50)
@given(parcels=st.integers(1, 200), size=st.integers(1, 12), seed=st.integers(0, 99))
def test_groups_hold_every_parcel_once_in_as_few_groups_as_possible(parcels, size, seed):
    slot_GS = group_parcels(np.random.default_rng(seed).integers(0, 4, (parcels, 3)).astype(float), size)
    assert slot_GS.shape == (-(-parcels // size), size)
    assert ((slot_GS >= 0).sum(axis=1) > 0).all()
    np.testing.assert_array_equal(np.sort(slot_GS[slot_GS >= 0]), np.arange(parcels))


def test_groups_are_neighbours():
    centre_R3 = np.random.default_rng(0).uniform(-80, 80, (126, 3))
    spread = centre_R3[group_parcels(centre_R3, 9)].std(axis=1).mean()
    shuffled = centre_R3[np.random.default_rng(1).permutation(126).reshape(14, 9)].std(axis=1).mean()
    assert spread < 0.6 * shuffled


def test_tokens_and_series_are_inverse():
    centre_R3 = np.random.default_rng(0).uniform(-80, 80, (31, 3))
    z_RT = torch.randn(31, 20, generator=torch.Generator().manual_seed(0))
    layout = Layout(centre_R3, 9)
    tokens_WGC = layout.tokens(z_RT, 5)
    assert tokens_WGC.shape == (4, 4, 45)
    assert torch.equal(layout.series(tokens_WGC, 5), z_RT)


# ---- the autoencoder


def test_it_is_light_and_padding_does_not_leak():
    config = ExtractorConfig(frames=5, steps=1, seed=0, runs=1)
    assert 150_000 < Extractor(config).parameters < 250_000
    torch.manual_seed(0)
    model = MaskedAutoencoder(config).eval()
    torch.nn.init.normal_(model.head.weight)
    x_BWGC, place_BGP = torch.randn(2, 8, 5, 45), torch.randn(2, 5, 18)
    hidden_BWG = torch.rand(2, 8, 5) < 0.5
    real_BG = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        padded = model(x_BWGC, hidden_BWG, place_BGP, real_BG)[1, :, :3]
        alone = model(x_BWGC[1:, :, :3], hidden_BWG[1:, :, :3], place_BGP[1:, :3], None)[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_it_rebuilds_hidden_windows_of_fresh_runs(extractor):
    for seed in (100, 101):
        roi_RT, centre_R3 = structured_run(seed)
        z_RT = standardise(roi_RT)[0][0]
        left = np.mean((z_RT - extractor.rebuild(z_RT, centre_R3)) ** 2) / np.mean(z_RT**2)
        assert left < 0.8  # the trivial predictor leaves 1
    noise_RT = standardise(np.random.default_rng(0).standard_normal((40, 200)))[0][0]
    assert np.mean((noise_RT - extractor.rebuild(noise_RT, centre_R3)) ** 2) > 0.95


@pytest.mark.parametrize(
    ("parcels", "length"), [(2, 60), (9, 10), (10, 155), (20, 2400), (131, 300), (1000, 60), (1000, 2400)]
)
def test_any_length_and_any_number_of_parcels(extractor, parcels, length):
    """One extractor, trained on 40 parcels and 200 frames, for all of them."""
    roi_RT, centre_R3 = structured_run(7, parcels, length)
    rebuilt_RT = extractor.rebuild(standardise(roi_RT)[0][0], centre_R3)
    assert rebuilt_RT.shape == (parcels, length) and rebuilt_RT.dtype == np.float32
    energy_W = np.square(rebuilt_RT).reshape(parcels, -1, 5).mean(axis=(0, 2))
    assert np.isfinite(energy_W).all() and (energy_W > 0).all()  # no window is forgotten


def test_a_window_is_rebuilt_without_itself(extractor):
    roi_RT, centre_R3 = structured_run(8, 30, 400)
    z_RT = standardise(np.exp(roi_RT / 20 - 50))[0][0]  # skewed, so that the sign stays what it is
    before_RT = extractor.rebuild(z_RT, centre_R3)
    for window in (0, 1, 26, 27, 28, 40, 79):
        inside = slice(5 * window, 5 * window + 5)
        changed_RT = z_RT.copy()
        changed_RT[:, inside] = 0.5
        after_RT = extractor.rebuild(changed_RT, centre_R3)
        np.testing.assert_allclose(after_RT[:, inside], before_RT[:, inside], atol=1e-5)
        assert np.abs(after_RT - before_RT).max() > 1e-3  # while its neighbours notice


def test_chunks_of_a_long_run_agree_with_a_short_one(extractor):
    roi_RT, centre_R3 = structured_run(9, 20, 400)
    z_RT = standardise(np.exp(roi_RT / 20 - 50))[0][0]
    long_RT, short_RT = extractor.rebuild(z_RT, centre_R3), extractor.rebuild(z_RT[:, :150], centre_R3)
    np.testing.assert_allclose(long_RT[:, :135], short_RT[:, :135], atol=1e-5)


def test_the_negative_of_a_run_is_rebuilt_as_the_negative(extractor):
    roi_RT, centre_R3 = structured_run(10)
    z_RT = standardise(roi_RT)[0][0]
    np.testing.assert_array_equal(extractor.rebuild(-z_RT, centre_R3), -extractor.rebuild(z_RT, centre_R3))


def test_training_is_a_function_of_runs_and_seed():
    runs = [structured_run(0, 25, 80), structured_run(1, 40, 300), structured_run(2, 12, 61)]
    notes: list[str] = []
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = train_extractor(runs, steps=4, advance=lambda n, note: notes.append(note))
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's random numbers move
    torch.rand(3)
    assert train_extractor(runs, steps=4).checksum == first.checksum
    assert train_extractor(runs, steps=4, seed=1).checksum != first.checksum
    assert train_extractor(runs[:2], steps=4).checksum != first.checksum
    assert len(notes) == 4 and all("masked L1" in note for note in notes)


def test_thousands_of_runs_are_sampled_not_read():
    asked: set[int] = set()

    class Many:
        def __len__(self):
            return 4000

        def __getitem__(self, index):
            asked.add(index)
            return structured_run(index % 3, 10, 40)

    train_extractor(Many(), steps=1)  # type: ignore[arg-type]
    assert len(asked) == 256


def test_training_leaves_out_what_it_cannot_use():
    broken = structured_run(1)
    broken[0][3, 3] = np.nan
    useless = [broken, structured_run(1, 20, 9), structured_run(1, 1, 80)]
    trained = train_extractor([useless[0], structured_run(0), *useless[1:]], steps=2)
    assert all(torch.isfinite(weight).all() for weight in trained.model.state_dict().values())
    with pytest.raises(ConfigError, match="3 that cannot be used, expected scans of at least 10 frames"):
        train_extractor(useless, steps=2)


def test_calls_that_cannot_be_meant_are_refused():
    with pytest.raises(ConfigError, match="0 scans"):
        train_extractor([])
    with pytest.raises(ConfigError, match="multiple of 5"):
        Extractor(ExtractorConfig(frames=5, steps=1, seed=0, runs=1)).rebuild(np.zeros((4, 12)), np.zeros((4, 3)))


# ---- files


def test_saved_and_loaded_is_the_same(extractor, tmp_path):
    extractor.save(tmp_path / "extractor")
    loaded = Extractor.load(tmp_path / "extractor")
    assert loaded.checksum == extractor.checksum and loaded.config == extractor.config
    roi_RT, centre_R3 = structured_run(11)
    z_RT = standardise(roi_RT)[0][0]
    np.testing.assert_array_equal(loaded.rebuild(z_RT, centre_R3), extractor.rebuild(z_RT, centre_R3))
    assert sorted(path.name for path in (tmp_path / "extractor").iterdir()) == [
        "config.json",
        "extractor.safetensors",
    ]


def test_files_that_do_not_belong_together_are_refused_in_one_line(extractor, tmp_path):
    folder = tmp_path / "extractor"

    def refused(match: str) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            Extractor.load(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        extractor.save(folder)

    refused("no such file")
    (folder / "extractor.safetensors").unlink()
    refused("extractor.safetensors: got no such file")
    content = (folder / "extractor.safetensors").read_bytes()
    (folder / "extractor.safetensors").write_bytes(content[: len(content) // 2])
    refused("expected the weights that")
    (folder / "extractor.safetensors").write_bytes(content[:-4] + b"\x00\x00\x80\x3f")
    refused("checksum")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "width": 32}))
    refused("expected the weights that")
    for sizes in ({"depth": 1000000}, {"width": 10**9}, {"frames": 0}, {"crop": 10**9}):
        (folder / "config.json").write_text(json.dumps({**config, **sizes}))
        refused(f"{next(iter(sizes))}: got")
    (folder / "config.json").write_text(json.dumps({**config, "depth": 1000, "width": 16384}))
    refused(r"got \d+ bytes, expected the weights that config.json describes, at least \d+ bytes")
    (folder / "config.json").write_text(json.dumps({**config, "heads": 3}))
    refused("heads: got 3, expected a divisor")
    (folder / "config.json").write_text(json.dumps({**config, "seed": 12}))
    refused("checksum")
    (folder / "config.json").write_text(json.dumps({**config, "colour": "red"}))
    refused("unknown key")
    (folder / "config.json").write_text("{")
    refused("unreadable")
