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


@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "tiff"])
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


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, kind: str) -> None:
    # Written as the camera holds it, so that turning it upright gives red left, blue right.
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = halves().transpose(turns[orientation]) if orientation > 1 else halves()
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_halves(image_files.decode(encoded(stored, kind, exif=exif)))


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
        encoded(noise, "ppm"),
        encoded(noise, "ico"),
        _png_header(30_000, 30_000),
        _png_header(60_000, 2_000),
    ]
    whole = {kind: encoded(noise, kind) for kind in ("png", "webp", "jpeg", "gif")}
    whole["tiff"] = encoded(noise, "tiff", compression="tiff_lzw")
    rng = np.random.default_rng(1)
    while len(files) < 200:
        kind = ("png", "webp", "jpeg", "gif", "tiff")[len(files) % 5]
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
    whole = [encoded(halves(), kind) for kind in ("png", "webp", "jpeg", "gif", "bmp", "tiff")]
    whole += [fixtures.png(np.zeros((3, 3), np.uint8)), encoded(Image.fromarray(_DEEP), "tiff")]
    bad = 0
    for i in range(800):
        data = bytearray(whole[i % len(whole)])
        for place in rng.integers(len(data), size=1 + i % 5):
            data[place] = rng.integers(256)
        try:
            assert image_files.decode(bytes(data)).mode == "RGB"
        except image_files.BadImage:
            bad += 1
    assert 100 < bad < 790


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
_DEEP = _TWELVE_BITS.astype(np.uint16)


def _tiff(packed: bytes, bits: int, **tags: int) -> bytes:
    """Returns a grey TIFF of 3 x 2 pixels without compression."""
    values = {256: 3, 257: 2, 258: bits, 259: 1, 262: tags.get("photometric", 1), 273: 0, 277: 1}
    values |= {278: 2, 279: len(packed), 339: tags.get("sample_format", 1)}
    values[273] = 8 + 2 + 12 * len(values) + 4  # where the pixels start
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(values.items())]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    return head + b"".join(entries) + bytes(4) + packed


def _packed_to_12_bits(values: np.ndarray) -> bytes:
    rows = ["".join(f"{value:012b}" for value in row) for row in values]
    rows = [row.ljust(-(-len(row) // 8) * 8, "0") for row in rows]
    return b"".join(int(row, 2).to_bytes(len(row) // 8) for row in rows)


@pytest.mark.parametrize("value_range", [(), (0, 4095)])
def test_a_tiff_of_twelve_bits_says_so_itself(value_range: tuple) -> None:
    grey = np.asarray(image_files.decode(_tiff(_packed_to_12_bits(_DEEP), 12), value_range))
    np.testing.assert_allclose(grey / 255, np.dstack([_DEEP / 4095] * 3), atol=1 / 255)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_the_range_maps_twelve_bits_in_sixteen_to_black_and_white(kind: str) -> None:
    image_files.reset_warnings()
    data = encoded(Image.fromarray(_DEEP), kind)
    for low, high in ((0, 4095), (1000, 4000), (-100.5, 5000.0)):
        grey = np.asarray(image_files.decode(data, (low, high)))
        expected = np.clip((_TWELVE_BITS - low) / (high - low), 0, 1)
        np.testing.assert_allclose(grey / 255, np.dstack([expected] * 3), atol=1 / 255)
    eight = encoded(Image.fromarray((_DEEP >> 4).astype(np.uint8)), kind)
    np.testing.assert_array_equal(
        np.asarray(image_files.decode(eight, (0, 4095)))[..., 0], _DEEP >> 4
    )


def test_a_range_does_not_change_sixteen_bits() -> None:
    values = np.arange(65536).astype(np.uint16).reshape(256, 256)
    for value_range in ((), (0, 65535)):
        grey = image_files.decode(encoded(Image.fromarray(values), "tiff"), value_range)
        np.testing.assert_array_equal(np.asarray(grey)[..., 2], values >> 8)


def test_of_values_without_a_known_range_the_range_is_asked_for() -> None:
    signed = np.array([[-1024, 0, 100], [400, 1023, 7]], np.int16)
    unit = (_DEEP / 4095).astype(np.float32)
    for data, value_range, expected in (
        (_tiff(signed.tobytes(), 16, sample_format=2), (-1024, 1023), (signed + 1024) / 2047),
        (_tiff(unit.tobytes(), 32, sample_format=3), (0, 1), unit),
        (_tiff(_DEEP.astype(np.uint32).tobytes(), 32), (0, 4095), unit),
    ):
        with pytest.raises(image_files.BadImage, match=r"--config\.data\.range="):
            image_files.decode(data)
        grey = np.asarray(image_files.decode(data, value_range))
        np.testing.assert_allclose(grey[..., 0] / 255, expected, atol=1 / 255)
    unit[0, 0] = np.nan
    with pytest.raises(image_files.BadImage, match="not finite"):
        image_files.decode(_tiff(unit.tobytes(), 32, sample_format=3), (0, 1))


def test_a_tiff_whose_zero_is_white() -> None:
    data = _tiff(_DEEP.tobytes(), 16, photometric=0)
    grey = np.asarray(image_files.decode(data, (0, 4095)))
    np.testing.assert_allclose(grey[..., 0] / 255, 1 - _DEEP / 4095, atol=1 / 255)


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
