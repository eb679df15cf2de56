"""Interactive views: true to the map, equal for equal maps, and nothing is loaded or downloaded."""

from __future__ import annotations

import base64
import json
import re
import socket
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from helpers.pages import NASTY, Reader
from shards.reporting import viewer
from shards.reporting.viewer import Map

AFFINE = np.array([[8.0, 0, 0, -92], [0, 8, 0, -120], [0, 0, 8, -68], [0, 0, 0, 1]])


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def image() -> nib.Nifti1Image:
    """A map with a few values, the largest at (5, 20, 9)."""
    volume_XYZ = np.zeros((24, 28, 24), np.float32)
    volume_XYZ[4:7, 18:22, 8:11] = np.random.default_rng(0).uniform(1, 2, (3, 4, 3))
    volume_XYZ[5, 20, 9] = 3
    volume_XYZ[10, 10, 10] = np.nan
    return nib.Nifti1Image(volume_XYZ, AFFINE)


def parameters(page: str) -> dict:
    (found,) = re.findall(r"brainsprite\((\{.*?\})\);", page, re.DOTALL)
    return json.loads(found)


def overlay(page: str) -> np.ndarray:
    """The pixels of the coloured map, (X, Y, Z, 4): nilearn tiles the sagittal planes, row by row."""
    (data,) = re.findall(r'id="overlayImg-view"\s+class="hidden"\s+src="data:image/png;base64,([^"]+)"', page)
    pixels = np.asarray(Image.open(BytesIO(base64.b64decode(data))).convert("RGBA")).astype(int)
    x, y, z = (parameters(page)["nbSlice"][axis] for axis in "XYZ")
    tiles = pixels.reshape(-1, z, pixels.shape[1] // y, y, 4).transpose(0, 2, 3, 1, 4)
    return tiles.reshape(-1, y, z, 4)[:x, :, ::-1]


def check_loads_nothing(page: str) -> None:
    reader = Reader(page)
    assert not {tag for tag, _ in reader.tags} & {"link", "iframe", "object", "embed", "base"}
    for tag, attrs in reader.tags:
        assert all(attrs[name].startswith("data:") for name in ("src", "href") if name in attrs), tag
    policies = [attrs["content"] for _, attrs in reader.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; ")
    assert "http" not in policies[0] and "*" not in policies[0] and "'self'" not in policies[0]
    assert page.index("Content-Security-Policy") < page.index("<script")


def test_every_value_is_coloured_and_the_first_cut_shows_the_map(image, unreachable) -> None:
    page = Map(image, "a map", under=image).volume()
    check_loads_nothing(page)
    shown = overlay(page)
    assert np.count_nonzero(shown[..., 3]) == 3 * 4 * 3  # neither 0 nor NaN
    facts = parameters(page)
    assert facts["nbSlice"] == {"X": 24, "Y": 28, "Z": 24}
    cut = [facts["numSlice"][axis] for axis in "XYZ"]
    assert all(low <= place < high for place, (low, high) in zip(cut, ((4, 7), (18, 22), (8, 11)), strict=True))
    # the brightest colour of inferno is the largest value
    assert np.unravel_index(shown[..., :3].sum(axis=3).argmax(), shown.shape[:3]) == (5, 20, 9)


def test_small_values_are_left_out_and_the_sign_has_a_colour(image) -> None:
    volume_XYZ = np.nan_to_num(image.get_fdata())
    volume_XYZ[5, 20, 9] = -3
    signed = Map(nib.Nifti1Image(volume_XYZ, AFFINE), "signed", image, signed=True, threshold=2.5).volume()
    pixels = overlay(signed)
    ((red, _, blue, _),) = pixels[pixels[..., 3] > 0]
    assert blue > red
    assert parameters(signed)["colorMap"]["min"] == -parameters(signed)["colorMap"]["max"]


@pytest.mark.parametrize(("mm", "behind"), [(8.0, 4), (5.0, 2), (4.0, 2), (3.3, 2), (2.0, 2), (1.0, 2)])
def test_the_mni_template_is_behind_maps_without_an_image(mm: float, behind: int, unreachable) -> None:
    """Half the voxels of the map, but not below 2 mm. The brightest place of the map stays where it is."""
    volume_XYZ = np.random.default_rng(0).uniform(1, 2, (12, 12, 12)).astype(np.float32)
    affine = np.diag([mm, mm, mm, 1])
    affine[:3, 3] = -5 * mm
    volume_XYZ[6:8, 4:6, 5:7] = 10
    page = Map(nib.Nifti1Image(volume_XYZ, affine), "a map", limit=10).volume()
    check_loads_nothing(page)
    facts = parameters(page)
    shown = np.array(facts["affine"])
    np.testing.assert_allclose(np.diag(shown)[:3], behind)
    pixels = overlay(page)
    bright_N3 = np.argwhere(pixels[..., :3].sum(axis=3) == pixels[..., :3].sum(axis=3).max())
    # the viewer counts voxels from 1
    middle_3 = (bright_N3.mean(axis=0) + 1) * behind + shown[:3, 3]
    np.testing.assert_allclose(middle_3, affine[:3, :3] @ [6.5, 4.5, 5.5] + affine[:3, 3], atol=behind / 2 + mm / 2)


def test_fine_images_are_shown_at_2_mm() -> None:
    volume_XYZ = np.random.default_rng(0).random((40, 40, 40), np.float32)
    fine = nib.Nifti1Image(volume_XYZ, np.diag([1.0, 1, 1, 1]))
    assert parameters(Map(fine, "fine", fine).volume())["nbSlice"]["X"] in (20, 21)


@pytest.mark.parametrize(("size", "end", "words"), [(3.0, 3.0, "a map"), (3.4e-5, 3.4, "a map, in units of 1e-05")])
def test_small_numbers_have_a_unit(image, size: float, end: float, words: str) -> None:
    """A view shows three decimals beside its colours."""
    small = nib.Nifti1Image(image.get_fdata() * size / 3, AFFINE)
    page = Map(small, "a map", image, threshold=size / 2, limit=size).volume()
    assert parameters(page)["colorMap"]["max"] == pytest.approx(end) and words in Reader(page).text
    whole = Map(image, "a map", image, threshold=1.5, limit=3.0).volume()
    np.testing.assert_array_equal(overlay(page), overlay(whole))


def test_equal_maps_give_equal_bytes_and_titles_are_text(image) -> None:
    first, second = (Map(image, NASTY, image).volume() for _ in range(2))
    assert first == second
    assert NASTY not in first and Reader(first).text.count(NASTY) == 2  # title and heading


def test_a_map_of_zeros_can_be_shown() -> None:
    empty = nib.Nifti1Image(np.zeros((8, 8, 8), np.float32), AFFINE)
    assert not overlay(Map(empty, "empty", empty).volume())[..., 3].any()


def test_surfaces_are_made_in_mni_space_alone(image, tmp_path: Path, unreachable) -> None:
    path = tmp_path / "map.html"
    if viewer.can_draw_surfaces():
        viewer.write(path, Map(image, "a map"), in_mni=True)
        found = viewer.find(path)
        assert [*found] == ["volume", "surface"] and found["surface"].name == "map_surface.html"
        page = found["surface"].read_text()
        check_loads_nothing(page)
        assert "a map, on the cortical surface" in page and "surfaceMapInfo" in page
    viewer.write(path, Map(image, "a map", image), in_mni=False)
    assert [*viewer.find(path)] == ["volume"]
    viewer.remove(path)
    assert viewer.find(path) == {} and not [*tmp_path.iterdir()]


def test_surfaces_are_left_out_without_plotly(image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "can_draw_surfaces", lambda: False)
    viewer.write(tmp_path / "map.html", Map(image, "a map"), in_mni=True)
    assert [*viewer.find(tmp_path / "map.html")] == ["volume"]
