"""What users bring: every kind of photo, and every kind of trouble."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.capture import open_capture


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def folder_of(path: Path, n: int = 3) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        picture(i).save(path / f"plain {i}.png")
    return path


def pixels_of(folder: Path, work: Path, original: str) -> np.ndarray:
    capture = open_capture(folder, work)
    photo = next(p for p in capture.photos if p.original == original)
    with Image.open(photo.path) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def test_plain_photos_are_not_encoded_again(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in")
    (folder / "sub folder").mkdir()
    picture(9).save(folder / "sub folder" / "plain 1.png")
    picture(8).save(folder / "фото 写真.jpg")
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "notes.txt").write_text("not a photo")
    capture = open_capture(folder, tmp_path / "work")
    names = ["plain 0.png", "plain 1.png", "plain 2.png", "sub folder/plain 1.png", "фото 写真.jpg"]
    assert [p.name for p in capture.photos] == names
    for photo in capture.photos:
        assert photo.path.read_bytes() == (folder / photo.name).read_bytes()


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("grey.png", lambda im, p: im.convert("L").save(p)),
        (
            "deep.png",
            lambda im, p: Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257).save(p),
        ),
        ("cmyk.jpg", lambda im, p: im.convert("CMYK").save(p, quality=100)),
        ("palette.png", lambda im, p: im.quantize(8).save(p)),
        ("alpha.webp", lambda im, p: im.convert("RGBA").save(p, lossless=True)),
        ("plain.tiff", lambda im, p: im.save(p)),
    ],
)
def test_every_kind_becomes_rgb(tmp_path: Path, name: str, save: object) -> None:
    folder = folder_of(tmp_path / "in")
    source = picture(5)
    smooth = source.resize((8, 6)).resize((40, 30), Image.Resampling.BICUBIC)
    save(smooth, folder / name)  # type: ignore[operator]
    result = pixels_of(folder, tmp_path / "work", name).astype(int)
    grey = name in ("grey.png", "deep.png")
    expected = np.asarray(smooth.convert("L").convert("RGB") if grey else smooth).astype(int)
    limit = {"cmyk.jpg": 6, "palette.png": 60}.get(name, 1)
    assert np.abs(result - expected).mean() <= limit


def test_sixteen_bit_colour_tiff(tmp_path: Path) -> None:
    import struct

    folder = folder_of(tmp_path / "in")
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint16) * 257
    data = values.astype("<u2").tobytes()
    tags = [
        (256, 3, 1, 40), (257, 3, 1, 30), (258, 3, 3, 8 + 2 + 12 * 9 + 4), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 8 + 2 + 12 * 9 + 4 + 6), (277, 3, 1, 3), (278, 3, 1, 30), (279, 4, 1, len(data)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    header = struct.pack("<2sHI", b"II", 42, 8)
    (folder / "deep.tif").write_bytes(header + directory + struct.pack("<I", 0) + struct.pack("<3H", 16, 16, 16) + data)
    result = pixels_of(folder, tmp_path / "work", "deep.tif").astype(int)
    assert np.abs(result - (values // 257)).max() <= 1


def test_rotation_and_profile_are_applied(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(5).save(folder / "turned.png", exif=exif)
    turned = pixels_of(folder, tmp_path / "work", "turned.png")
    assert np.array_equal(turned, np.asarray(picture(5).transpose(Image.Transpose.ROTATE_270)))
    lab_white = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
    picture(6).save(folder / "tagged.png", icc_profile=lab_white.tobytes())
    assert pixels_of(folder, tmp_path / "work2", "tagged.png").shape == (30, 40, 3)


def test_focal_length_and_position_of_exif(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in")
    exif = Image.Exif()
    details, gps = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.GPSInfo)
    details[ExifTags.Base.FocalLengthIn35mmFilm] = 27
    gps.update({1: "S", 2: (33.0, 30.0, 36.0), 3: "E", 4: (151.0, 0.0, 0.0), 5: b"\x00", 6: 12.5})
    picture(5, (400, 300)).save(folder / "drone.jpg", exif=exif)
    photo = next(p for p in open_capture(folder, tmp_path / "work").photos if p.name == "drone.jpg")
    assert photo.focal_px == pytest.approx(300)
    assert photo.position == pytest.approx((-33.51, 151.0, 12.5))


def test_bad_photos_are_skipped_and_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    picture(1, (200, 200)).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    capture = open_capture(folder, tmp_path / "work")
    assert {s.name for s in capture.skipped} == {"empty.jpg", "text.jpg", "cut.jpg"}
    assert len(capture.photos) == 4


def test_a_damaged_exif_is_no_exif(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in")
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "drone"
    exif.get_ifd(ExifTags.IFD.GPSInfo).update({1: "N", 2: (5.0, 0.0, 0.0), 3: "E", 4: (5.0, 0.0, 0.0), 6: 1.0})
    picture(3).save(folder / "whole.jpg", exif=exif)
    data = bytearray((folder / "whole.jpg").read_bytes())
    start = data.index(b"Exif")
    draw = np.random.default_rng(0)
    for i in range(60):
        broken = bytearray(data)
        for place in draw.integers(start + 6, start + 140, 4):
            broken[place] = draw.integers(0, 256)
        (folder / f"broken {i:02d}.jpg").write_bytes(broken)
    capture = open_capture(folder, tmp_path / "work")
    assert len(capture.photos) + len(capture.skipped) == 64 and len(capture.photos) > 40


def test_names_that_would_meet_are_told_apart(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", 2)
    picture(3).convert("CMYK").save(folder / "a.jpg")
    picture(4).save(folder / "a.jpg.png")
    capture = open_capture(folder, tmp_path / "work")
    assert len({photo.path for photo in capture.photos}) == 4


def test_heic(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    folder = folder_of(tmp_path / "in")
    smooth = picture(5).resize((8, 6)).resize((64, 48), Image.Resampling.BICUBIC)
    pillow_heif.from_pillow(smooth).save(str(folder / "photo.heic"), quality=95)
    result = pixels_of(folder, tmp_path / "work", "photo.heic").astype(int)
    assert np.abs(result - np.asarray(smooth).astype(int)).mean() < 6


def refused(path: Path, work: Path, *words: str) -> None:
    with pytest.raises(InputError) as error:
        open_capture(path, work)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_too_few(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", tmp_path / "w", "no photos", "none")
    refused(folder_of(tmp_path / "two", 2), tmp_path / "w", "2 usable photos")
    refused(tmp_path / "missing", tmp_path / "w", "missing")


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in")
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    refused(folder, tmp_path / "w", "bomb.png", "remove it")


def archive(path: Path, extra: list[zipfile.ZipInfo]) -> Path:
    folder = folder_of(path.parent / "zipped")
    with zipfile.ZipFile(path, "w") as bundle:
        for photo in folder.iterdir():
            bundle.write(photo, f"photos/{photo.name}")
        for entry in extra:
            bundle.writestr(entry, b"data")
    return path


def test_zip(tmp_path: Path) -> None:
    capture = open_capture(archive(tmp_path / "in.zip", []), tmp_path / "work")
    assert [p.name for p in capture.photos] == ["plain 0.png", "plain 1.png", "plain 2.png"]


@pytest.mark.parametrize("name", ["/tmp/a.png", "../a.png", "photos/../../a.png", "C:\\a.png"])
def test_zip_entries_that_point_outside_are_refused(tmp_path: Path, name: str) -> None:
    refused(archive(tmp_path / "in.zip", [zipfile.ZipInfo(name)]), tmp_path / "work", "outside")
    assert not (tmp_path / "a.png").exists()


def test_zip_links_and_broken_zips_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("photos/link.png")
    link.external_attr = 0o120777 << 16
    refused(archive(tmp_path / "in.zip", [link]), tmp_path / "work", "link")
    data = archive(tmp_path / "ok.zip", []).read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "cut.zip", tmp_path / "work", "cut.zip", "zip")
    with zipfile.ZipFile(tmp_path / "deflated.zip", "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("a.png", bytes(range(256)) * 40)
    data = bytearray((tmp_path / "deflated.zip").read_bytes())
    data[45:60] = b"\xff" * 15
    (tmp_path / "deflated.zip").write_bytes(data)
    refused(tmp_path / "deflated.zip", tmp_path / "work", "deflated.zip", "zip")


def test_transforms_json_becomes_a_model(tmp_path: Path) -> None:
    import pycolmap

    folder = folder_of(tmp_path / "in")
    pose = np.eye(4)
    pose[:3, 3] = [1, 2, 3]
    frames = [{"file_path": f"plain {i}", "transform_matrix": pose.tolist()} for i in range(3)]
    (folder / "transforms.json").write_text(json.dumps({"fl_x": 50, "w": 40, "h": 30, "frames": frames}))
    capture = open_capture(folder, tmp_path / "work")
    model = pycolmap.Reconstruction(str(capture.reconstruction))
    image = next(iter(model.images.values()))
    assert model.num_reg_images() == 3
    np.testing.assert_allclose(image.projection_center(), [1, 2, 3])
    np.testing.assert_allclose(image.viewing_direction(), [0, 0, -1], atol=1e-12)
    (folder / "transforms.json").write_text('{"frames": [{}]}')
    refused(folder, tmp_path / "work2", "transforms.json")
