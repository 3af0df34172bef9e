"""Every kind of picture becomes the RGB that arithmetic says; threads change neither order nor number."""

from __future__ import annotations

import io
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sharpscope.errors import DataError
from sharpscope.pictures import Picture, PictureBatches, decoded, rgb

RANDOM = np.random.default_rng(0)
COLORS = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
DEEP = RANDOM.integers(0, 65536, (5, 7), dtype=np.uint16)
GREYS = np.repeat(GREY[..., None], 3, axis=2)


def stored(image, kind, **options):
    """The picture as it comes out of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.asarray(decoded(Picture("it", "", lambda: io.BytesIO(file.getvalue()))))


def palette():
    image = Image.fromarray(COLORS[:2, :2]).quantize(4)
    return image, np.asarray(image.convert("RGB"))


INK = RANDOM.integers(0, 256, (5, 7, 4), dtype=np.uint8)
LIGHT = 255 - INK.astype(float)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.fromarray(COLORS), "PNG", COLORS),
        (Image.fromarray(GREY), "PNG", GREYS),
        (Image.fromarray(GREY > 99), "PNG", 255 * (GREYS > 99)),
        (Image.fromarray(np.dstack([COLORS, GREY])), "PNG", COLORS),  # transparency is dropped, also where it is full
        (Image.fromarray(np.dstack([GREY, GREY[::-1]]), "LA"), "PNG", GREYS),
        (Image.fromarray(DEEP), "PNG", np.repeat((DEEP / 257.0)[..., None], 3, axis=2)),
        (Image.fromarray(DEEP), "TIFF", np.repeat((DEEP / 257.0)[..., None], 3, axis=2)),
        (Image.fromarray(DEEP.astype(np.int32)), "TIFF", np.repeat((DEEP / 257.0)[..., None], 3, axis=2)),
        (Image.fromarray(GREY.astype(np.int32)), "TIFF", GREYS),
        (Image.fromarray(GREY.astype(np.float32) / 255), "TIFF", GREYS),
        (Image.fromarray(INK, "CMYK"), "TIFF", LIGHT[..., :3] * LIGHT[..., 3:] / 255),
        (palette()[0], "PNG", palette()[1]),
        (palette()[0], "GIF", palette()[1]),
        (Image.fromarray(COLORS), "WEBP", COLORS),
        (Image.fromarray(COLORS), "BMP", COLORS),
    ],
    ids=[
        *(
            "rgb",
            "grey",
            "bits",
            "alpha",
            "grey alpha",
            "16 bit png",
            "16 bit tiff",
            "32 bit",
            "8 in 32",
            "float",
            "cmyk",
        ),
        *("palette", "gif", "webp", "bmp"),
    ],
)
def test_every_mode_becomes_the_rgb_that_arithmetic_says(image, kind, expected):
    options = {"lossless": True} if kind == "WEBP" else {}
    found = stored(image, kind, **options)
    assert found.shape == (*expected.shape[:2], 3)
    assert np.abs(found - expected).max() <= 1.001  # one level of rounding
    assert image.mode == "CMYK" or np.abs(found - expected).mean() < 0.5


def test_sixteen_bits_are_scaled_where_pillow_alone_would_clip_them():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None]
    assert (stored(Image.fromarray(ramp), "PNG")[0, :, 0] == np.arange(256)).all()


def test_a_white_that_is_a_guess_is_said():
    ramp = np.arange(256)[None]
    kinds = {
        "eight.tif": ramp.astype(np.int32),
        "twelve.png": 16 * ramp.astype(np.uint16),
        "darker.png": 15 * ramp.astype(np.uint16),
        "sixteen.png": 257 * ramp.astype(np.uint16),
        "black.png": 0 * ramp.astype(np.uint16),
        "plain.png": ramp.astype(np.uint8),
    }
    pictures = [Picture(name, "0", partial(Image.fromarray, values)) for name, values in kinds.items()]
    found = PictureBatches(pictures, {"0": 0}, lambda image: torch.tensor(np.asarray(image).max()), "id")
    assert found.notes == ()
    assert [batch.inputs.tolist() for batch in found] == [[255, 16, 15, 255, 0, 255]]
    list(found)  # said once, however often they are read
    assert found.notes == (
        "id: 2 of 6 images are nowhere brighter than a 16th of their range, as 12 bits in 16 are, and stay as dark "
        "(darker.png)",
        "id: 1 of 6 images hold integers of 32 bits up to 255 and are taken for 8 bits (eight.tif)",
    )


def test_colours_of_sixteen_bits_agree_with_greys_of_sixteen_bits():
    """Pillow drops the low byte of colours, greys are rounded: one level apart at most."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = b"".join(b"\0" + np.repeat(row[:, None], 3, axis=1).astype(">u2").tobytes() for row in DEEP)
    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    found = np.asarray(decoded(Picture("it", "", lambda: io.BytesIO(png))))
    assert np.abs(found[..., 0] - DEEP / 257.0).max() <= 1


@pytest.mark.parametrize(
    "values", [np.array([[0, 1.5]], np.float32), np.array([[0, 70000]], np.int32), np.array([[np.nan]], np.float32)]
)
def test_greys_of_unknown_white_are_refused(values):
    with pytest.raises(ValueError, match=r"greyscale of .* where 0 to (1|65535) can be scaled"):
        rgb(Image.fromarray(values))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_are_turned_upright_as_their_exif_says(orientation, kind):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # white in the top left corner
    # What a camera stores so that the given orientation makes it upright again (EXIF 2.3, tag 0x0112).
    stored_as = [
        upright,
        np.fliplr(upright),
        np.rot90(upright, 2),
        np.flipud(upright),
        upright.transpose(1, 0, 2),
        np.rot90(upright, 1),
        np.rot90(upright, 2).transpose(1, 0, 2),
        np.rot90(upright, -1),
    ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = stored(Image.fromarray(np.ascontiguousarray(stored_as[orientation - 1])), kind, exif=exif)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() < 30


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_of_several_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    found = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (found == [255, 0, 0]).all()


def test_a_transparent_palette_gives_its_colours_without_a_warning():
    image, expected = palette()
    assert (stored(image, "PNG", transparency=bytes([0, 128, 255, 9])) == expected).all()


PNG = io.BytesIO()
Image.fromarray(COLORS).save(PNG, "PNG")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_damage_to_a_file_is_fatal_or_changes_how_many_images_there_are(data):
    content = bytearray(PNG.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    pictures = [Picture("bad", "0", partial(io.BytesIO, content))]
    pictures += [Picture(f"good {i}", "0", partial(io.BytesIO, PNG.getvalue())) for i in range(2)]
    found = PictureBatches(pictures, {"0": 3}, lambda _: torch.zeros(1), "id", max_unreadable=0.5, threads=1)
    assert sum(len(batch.targets) for batch in found) == 3 - len(found.unreadable)


# --- batches


def numbered(count):
    return [Picture(str(i), str(i % 3), partial(Image.new, "RGB", (1, 1), (i, 0, 0))) for i in range(count)]


def value(image):
    return torch.tensor(np.asarray(image)[0, 0, :1])


def test_threads_keep_the_order_and_use_each_other():
    """Early pictures take longest; eight at once take a fraction of the sum."""
    inside, most, lock = 0, 0, threading.Lock()

    def slow(image):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01 if value(image) % 2 else 0.002)
        with lock:
            inside -= 1
        return value(image)

    batches = list(PictureBatches(numbered(60), {"0": 5, "1": 6, "2": 7}, slow, "id", batch_size=7, threads=8))
    assert torch.cat([b.inputs for b in batches])[:, 0].tolist() == list(range(60))
    assert torch.cat([b.targets for b in batches]).tolist() == [5, 6, 7] * 20
    assert [len(b.targets) for b in batches] == [7] * 8 + [4]
    assert most >= 4


def test_the_first_picture_is_read_alone_and_few_are_read_ahead():
    started = []
    batches = iter(
        PictureBatches(numbered(100), dict.fromkeys("012", 0), lambda i: started.append(1) or value(i), "id",
                       batch_size=1, threads=2)
    )  # fmt: skip
    next(batches)
    assert len(started) == 1
    next(batches)
    batches.close()
    assert len(started) < 12


def test_nothing_is_kept_between_readings():
    seen = []
    loader = PictureBatches(numbered(12), dict.fromkeys("012", 0), lambda i: seen.append(1) or value(i), "id")
    assert [sum(len(batch.targets) for batch in loader) for _ in range(2)] == [12, 12]
    assert len(seen) == 24


def test_three_unreadable_pictures_are_named_and_the_rest_counted():
    pictures = [Picture(f"p{i}", "0", partial(io.BytesIO, b"?")) for i in range(5)]
    loader = PictureBatches(pictures + numbered(95), dict.fromkeys("012", 0), value, "id", max_unreadable=0.05)
    assert sum(len(batch.targets) for batch in loader) == 95
    assert loader.notes[-1].startswith("id: 5 of 100 images could not be read and are left out (p0: cannot identify")
    assert loader.notes[-1].endswith("; 2 more)")
    with pytest.raises(
        DataError, match=r"'id': 5 images cannot be read so far .*; 2 more\), more than 0.04 of all 100"
    ):
        list(PictureBatches(pictures + numbered(95), dict.fromkeys("012", 0), value, "id", max_unreadable=0.04))
