"""Untrusted image files become the right RGB image, or raise one sentence that names the fault."""

import io
import struct
import zlib

import fixtures
import numpy as np
import pytest
from PIL import Image

from avit_jax.data import image_files

RED, BLUE = (200, 30, 40), (20, 60, 220)


def encoded(picture: Image.Image, kind: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def halves() -> Image.Image:
    """Returns an image of 20 x 10 pixels, red on the left and blue on the right."""
    picture = Image.new("RGB", (20, 10), RED)
    picture.paste(BLUE, (10, 0, 20, 10))
    return picture


def assert_halves(picture: Image.Image, atol: int = 0) -> None:
    assert (picture.mode, picture.size) == ("RGB", (20, 10))
    np.testing.assert_allclose(np.asarray(picture), np.asarray(halves()), atol=atol)


@pytest.mark.parametrize("kind", ["png", "bmp", "gif"])
def test_lossless(kind: str) -> None:
    assert_halves(image_files.decode(encoded(halves(), kind)), atol=2 * (kind == "gif"))


def test_webp_and_jpeg() -> None:
    assert_halves(image_files.decode(encoded(halves(), "webp", lossless=True)))
    assert_halves(image_files.decode(encoded(halves(), "jpeg", quality=100, subsampling=0)), atol=8)


def test_grey_palette_and_black_and_white() -> None:
    assert_halves(image_files.decode(encoded(halves().quantize(4))), atol=2)
    grey = image_files.decode(encoded(halves().convert("L")))
    np.testing.assert_array_equal(
        np.asarray(grey), np.asarray(halves().convert("L").convert("RGB"))
    )
    bits = np.arange(24).reshape(4, 6) % 2 == 0
    np.testing.assert_array_equal(
        np.asarray(image_files.decode(encoded(Image.fromarray(bits))))[..., 1], 255 * bits
    )


def test_cmyk() -> None:
    inks = Image.new("CMYK", (20, 10), (0, 255, 255, 0))  # magenta and yellow make red
    colour = (
        np.asarray(image_files.decode(encoded(inks, "jpeg", quality=100))).reshape(-1, 3).mean(0)
    )
    np.testing.assert_allclose(colour, (255, 0, 0), atol=6)


def test_sixteen_bits() -> None:
    values = np.linspace(0, 65535, 200).astype(np.uint16).reshape(10, 20)
    grey = np.asarray(image_files.decode(encoded(Image.fromarray(values))))
    np.testing.assert_allclose(grey, np.repeat(values[..., None] / 257, 3, axis=2), atol=1)


def test_transparency_shows_white() -> None:
    clear = halves().convert("RGBA")
    alpha = Image.new("L", (20, 10), 255)
    alpha.paste(0, (0, 0, 10, 10))
    alpha.paste(128, (10, 0, 20, 5))
    clear.putalpha(alpha)
    pixels = np.asarray(image_files.decode(encoded(clear))).astype(int)
    np.testing.assert_array_equal(pixels[:, :10], 255)
    np.testing.assert_array_equal(pixels[5:, 10:], np.broadcast_to(BLUE, (5, 10, 3)))
    np.testing.assert_allclose(
        pixels[:5, 10:], np.broadcast_to((np.array(BLUE) + 255) / 2, (5, 10, 3)), atol=1
    )


def test_transparent_colour_of_a_palette_and_of_grey() -> None:
    palette = halves().quantize(2)
    index = palette.getpixel((0, 0))
    pixels = np.asarray(image_files.decode(encoded(palette, transparency=index)))
    np.testing.assert_array_equal(pixels[:, :10], 255)
    np.testing.assert_allclose(pixels[:, 10:], np.broadcast_to(BLUE, (10, 10, 3)), atol=2)
    grey = image_files.decode(encoded(Image.new("L", (4, 4), 7), transparency=7))
    np.testing.assert_array_equal(np.asarray(grey), 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    # Written as the camera holds it, so that turning it upright gives red left, blue right.
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = halves().transpose(turns[orientation]) if orientation > 1 else halves()
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_halves(image_files.decode(encoded(stored, "png", exif=exif)))


def _with_exif(jpeg: bytes, exif: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def test_an_odd_exif_field_does_no_harm() -> None:
    orientation = struct.pack("<HHIHxx", 0x0112, 3, 1, 3)  # upside down
    resolution = struct.pack("<HHI4s", 0x011A, 2, 3, b"72")  # in letters
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + orientation + resolution + bytes(4)
    jpeg = encoded(
        halves().transpose(Image.Transpose.ROTATE_180), "jpeg", quality=100, subsampling=0
    )
    assert_halves(image_files.decode(_with_exif(jpeg, exif)), atol=8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_data_is_ignored() -> None:
    jpeg = encoded(halves(), "jpeg", quality=100, subsampling=0)
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff" + b"\xff" * 30
    assert_halves(image_files.decode(_with_exif(jpeg, exif)), atol=8)


def test_first_frame_of_an_animation() -> None:
    frames = [halves(), Image.new("RGB", (20, 10), "green")]
    for kind, options in (("gif", {}), ("webp", {"lossless": True}), ("png", {})):
        animated = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options
        )
        assert_halves(image_files.decode(animated), atol=2 * (kind == "gif"))


def _png_header(width: int, height: int) -> bytes:
    """Returns the start of a PNG that claims to be huge."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, data)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_absurd_sizes_are_refused_before_they_are_decoded() -> None:
    for side in (9_500, 30_000):
        with pytest.raises(image_files.BadImage, match=rf"{side}|bomb|{side * side}"):
            image_files.decode(_png_header(side, side))
    image_files._check_size(9_000, 9_000)


def malformed() -> list[bytes]:
    """Yields 200 files that are no image, or only a part of one."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    files = [
        b"",
        b"\0",
        bytes(1000),
        b"just text",
        "Ünïcode".encode(),
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF",
    ]
    files += [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ]
    files += [
        encoded(noise, "tiff"),
        encoded(noise, "ico"),
        _png_header(30_000, 30_000),
        _png_header(60_000, 2_000),
    ]
    whole = {
        kind: encoded(noise, kind, **options)
        for kind, options in (("png", {}), ("webp", {}), ("jpeg", {}), ("gif", {}))
    }
    rng = np.random.default_rng(1)
    while len(files) < 200:
        kind = ("png", "webp", "jpeg", "gif")[len(files) % 4]
        files.append(whole[kind][: int(rng.integers(1, 0.9 * len(whole[kind])))])
    return files


def test_malformed_files_are_named_bad() -> None:
    files = malformed()
    assert len(files) == 200
    for data in files:
        with pytest.raises(image_files.BadImage) as caught:
            image_files.decode(data)
        assert str(caught.value) and "\n" not in str(caught.value)


def test_damaged_bytes_never_raise_anything_else() -> None:
    rng = np.random.default_rng(2)
    whole = [encoded(halves(), kind) for kind in ("png", "webp", "jpeg", "gif", "bmp")] + [
        fixtures.png(np.zeros((3, 3), np.uint8))
    ]
    bad = 0
    for i in range(600):
        data = bytearray(whole[i % len(whole)])
        for place in rng.integers(len(data), size=1 + i % 5):
            data[place] = rng.integers(256)
        try:
            assert image_files.decode(bytes(data)).mode == "RGB"
        except image_files.BadImage:
            bad += 1
    assert 100 < bad < 590


def _written(depth: int, colour: int, values: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """Returns a PNG of 8 or 16 bits per channel from values `(H, W)` or `(H, W, channels)`."""
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", *values.shape[1::-1], depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    "chunks", [(), ((b"PLTE", b""),), ((b"PLTE", b"\1\2"),), ((b"tRNS", b"\0"),)]
)
def test_a_missing_palette_is_named(chunks: tuple) -> None:
    with pytest.raises(image_files.BadImage, match="palette, which is missing"):
        image_files.decode(_written(8, 3, np.arange(12).reshape(3, 4), *chunks))


_TWELVE_BITS = np.array([[0, 100, 2048], [4095, 4000, 7]])


def test_grey_of_twelve_bits_is_scaled_where_the_file_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    image_files.reset_warnings()
    for bits in (12, 10):
        values = _TWELVE_BITS >> (12 - bits)
        grey = np.asarray(
            image_files.decode(
                _written(16, 0, values, (b"gAMA", bytes(4)), (b"sBIT", bytes([bits])))
            )
        )
        np.testing.assert_allclose(grey[..., 0], values * 255 / (2**bits - 1), atol=1)
    # As the standard has it, 12 bits are shifted up to 16, dark ones too: the brightness is that of
    # the other pictures.
    for values in (_TWELVE_BITS, _TWELVE_BITS // 32):
        shifted = values << 4 | values >> 8
        grey = np.asarray(image_files.decode(_written(16, 0, shifted, (b"sBIT", b"\x0c"))))
        np.testing.assert_array_equal(grey[..., 1], shifted >> 8)
    assert all("4096" in message for message in caplog.messages)


def _with_alpha(values: np.ndarray, channels: int) -> np.ndarray:
    return np.concatenate(
        [np.repeat(values[..., None], channels, axis=-1), np.full((*values.shape, 1), 65535)],
        axis=-1,
    )


@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4])
def test_few_bits_are_warned_about_once_a_data_set(
    channels: int, caplog: pytest.LogCaptureFixture
) -> None:
    def file(values: np.ndarray) -> bytes:
        colours = {
            0: values,
            1: values,
            2: _with_alpha(values, 1),
            3: np.repeat(values[..., None], 3, axis=-1),
        }
        return _written(
            16,
            {0: 0, 1: 0, 2: 4, 3: 2, 4: 6}[channels],
            colours.get(channels, _with_alpha(values, 3)),
        )

    def messages() -> list[str]:  # threads of other tests may still log
        records = [record for record in caplog.records if record.name == image_files.__name__]
        return [record.getMessage() for record in records]

    image_files.reset_warnings()
    for values in (0 * _TWELVE_BITS, 16 * _TWELVE_BITS):
        image_files.decode(file(values))
    assert not messages()
    for _ in range(2):
        grey = np.asarray(image_files.decode(file(_TWELVE_BITS)))
        np.testing.assert_allclose(grey[..., 0], _TWELVE_BITS // 256, atol=1)
    assert len(messages()) == 1 and "no value of 4096 or more" in messages()[0]
    image_files.reset_warnings()
    image_files.decode(file(_TWELVE_BITS))
    assert len(messages()) == 2
