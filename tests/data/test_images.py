import numpy as np
import pytest
from PIL import Image

from normdrop.data.images import Rule, Unreadable, decode, is_junk, look, walk

RGB, GREY = Rule(3, 10, 12), Rule(1, 10, 12)


def save(path, image, **options):
    image.save(path, **options)
    return path


def ramp(mode="L"):
    values = np.linspace(0, 255, 120).reshape(10, 12).astype(np.uint8)
    return Image.fromarray(values).convert(mode)


def test_grey_and_colour_files_keep_their_pixels(tmp_path):
    grey = save(tmp_path / "a.png", ramp())
    assert (decode(grey, GREY)[0] == np.asarray(ramp())).all()
    assert (decode(grey, RGB) == np.asarray(ramp())).all()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3)).astype(np.uint8)
    colour = save(tmp_path / "b.bmp", Image.fromarray(pixels))
    assert (decode(colour, RGB) == pixels.transpose(2, 0, 1)).all()


def test_transparent_pixels_show_white(tmp_path):
    image = Image.new("RGBA", (12, 10), (200, 0, 0, 255))
    image.putpixel((3, 4), (0, 0, 0, 0))
    image.putpixel((5, 6), (0, 0, 0, 128))
    array = decode(save(tmp_path / "a.png", image), RGB)
    assert array[:, 4, 3].tolist() == [255, 255, 255]
    assert array[:, 0, 0].tolist() == [200, 0, 0]
    assert array[0, 6, 5] == pytest.approx(127, abs=1)
    grey = Image.new("LA", (12, 10), (0, 0))
    assert (decode(save(tmp_path / "b.png", grey), GREY) == 255).all()


def test_palette_and_two_tone_files(tmp_path):
    colours = Image.new("RGB", (12, 10), (10, 200, 30))
    palette = save(tmp_path / "a.gif", colours.convert("P", palette=Image.Palette.ADAPTIVE))
    assert np.abs(decode(palette, RGB)[:, 0, 0].astype(int) - [10, 200, 30]).max() <= 4
    assert look(palette) == (10, 12, False)
    grey_palette = ramp().quantize(16)
    assert look(save(tmp_path / "b.png", grey_palette)) == (10, 12, True)
    two = save(tmp_path / "c.png", ramp("1"))
    assert set(np.unique(decode(two, GREY))) == {0, 255}
    assert look(two) == (10, 12, True)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = (np.asarray(ramp()).astype(np.uint16) * 257).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        path = save(tmp_path / name, Image.fromarray(values))
        assert look(path) == (10, 12, True)
        assert (decode(path, GREY)[0] == np.asarray(ramp())).all()


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("int32", 0, 2**31 - 1),
        ("uint32", 0, 2**32 - 1),
        ("int32", -500, 90_000),
        ("int32", 0, 70_000),
    ],
)
def test_grey_of_32_bits_is_scaled_to_its_own_range(tmp_path, kind, low, high):
    values = np.rint(np.linspace(low, high, 120)).astype(np.int64).reshape(10, 12)
    image = Image.fromarray(values.astype(kind).view(np.int32))
    path = save(tmp_path / "a.tif", image)
    if kind == "uint32":
        # Tag 339, which Pillow writes as 2, signed; 1 is unsigned.
        tag = bytes.fromhex("5301 0300 01000000")
        path.write_bytes(path.read_bytes().replace(tag + b"\x02", tag + b"\x01"))
    array = decode(path, GREY)
    np.testing.assert_array_equal(array[0], np.rint((values - low) * (255 / (high - low))))


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    image = Image.new("RGB", (12, 10), (250, 20, 20)).convert("CMYK")
    array = decode(save(tmp_path / "a.jpg", image), RGB)
    assert np.abs(array[:, 5, 5].astype(int) - [250, 20, 20]).max() < 8


def test_camera_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (12, 10), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 12, 3))  # The upper edge is white.
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned by 90 degrees clockwise to stand upright.
    path = save(tmp_path / "a.jpg", image, exif=exif, quality=95)
    assert look(path)[:2] == (12, 10)
    array = decode(path, Rule(3, 12, 10))
    assert array[0, 6, 9] > 200  # Now the right edge is white.
    assert array[0, 6, 0] < 50


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_look_at_the_header_gives_the_size_of_the_pixels(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.jpg", Image.new("RGB", (12, 10)), exif=exif)
    assert look(path)[:2] == ((10, 12) if orientation <= 4 else (12, 10))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"%PDF-1.7\n", "a PDF"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "an SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, content, kind):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for read in (look, lambda path: decode(path, RGB)):
        with pytest.raises(Unreadable, match=f"^it is {kind}; save it as PNG or JPEG$"):
            read(path)


def test_other_sizes_are_covered_and_cut_in_the_middle(tmp_path):
    image = Image.new("L", (60, 20), 0)
    image.paste(255, (20, 0, 40, 20))  # The middle third is white.
    array = decode(save(tmp_path / "a.png", image), Rule(1, 10, 10))
    assert array.shape == (1, 10, 10)
    assert (array[..., 1:-1] == 255).all()
    assert (array > 200).all()  # At the cut the dark thirds shine in, by interpolation.


def test_large_jpegs_decode_at_a_fraction_but_look_the_same(tmp_path):
    y, x = np.mgrid[:480, :640]
    pixels = np.stack([x * 255 / 640, y * 255 / 480, (x + y) * 255 / 1120], -1).astype(np.uint8)
    jpeg = save(tmp_path / "a.jpg", Image.fromarray(pixels), quality=95)
    png = save(tmp_path / "a.png", Image.fromarray(pixels))
    rule = Rule(3, 32, 32)
    assert np.abs(decode(jpeg, rule).astype(int) - decode(png, rule)).max() <= 4


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("L", (12, 10), value) for value in (0, 255)]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert (decode(path, GREY) == 0).all()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jpg", b""), ("a.png", b"no image"), ("b.gif", b"GIF89a"), ("c.bmp", b"BM123")],
)
def test_what_is_no_image_is_unreadable(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=r"^it is no image file$"):
        decode(path, RGB)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.tif", "a.webp"])
def test_an_image_that_is_cut_off_is_unreadable(tmp_path, name):
    draw = np.random.default_rng(0)
    path = save(tmp_path / name, Image.fromarray(draw.integers(0, 255, (64, 64, 3), np.uint8)))
    content = path.read_bytes()
    for share in (0.5, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(Unreadable):
            decode(path, RGB)


def test_a_png_with_a_flipped_bit_is_unreadable(tmp_path):
    draw = np.random.default_rng(0)
    path = save(tmp_path / "a.png", Image.fromarray(draw.integers(0, 255, (64, 64), np.uint8)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(Unreadable):
        decode(path, GREY)


def test_floating_point_pixels_are_unreadable(tmp_path):
    path = save(tmp_path / "a.tif", Image.new("F", (12, 10), 0.5))
    for function in (look, lambda p: decode(p, GREY)):
        with pytest.raises(Unreadable, match="floating-point numbers"):
            function(path)


def test_junk_is_known_by_name_and_suffix(tmp_path):
    junk = [".DS_Store", "Thumbs.db", "notes.txt", "desktop.ini", "._a.jpg", "README", "x.json"]
    good = ["a.jpg", "b.PNG", "without-suffix", "c.tiff", "d.xyz"]
    for name in junk + good:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in walk(tmp_path)] == sorted(good)
    assert all(is_junk(tmp_path / name) for name in junk)


def test_walk_follows_links_but_not_in_circles(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "a.png").write_bytes(b"")
    (inner / "loop").symlink_to(tmp_path)
    other = tmp_path / "outside.png"
    other.write_bytes(b"")
    (inner / "linked.png").symlink_to(other)
    names = [path.relative_to(tmp_path).as_posix() for path in walk(tmp_path)]
    assert sorted(names) == ["inner/a.png", "inner/linked.png", "outside.png"]
