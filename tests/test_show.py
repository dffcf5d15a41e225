"Pictures: fixed colours, overlays against a loop over pixels, figures with the same small bytes."

import hashlib
import io
import numpy as np
import pytest
from PIL import Image
from matplotlib.figure import Figure
from u2seg.show import (
    AREA,
    class_colours,
    draw_boxes,
    grid,
    jpeg_bytes,
    overlay,
    overlay_classes,
    overlay_masks,
    PALETTE,
    Picture,
    png_bytes,
    readable,
    save_figure,
)


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)


def test_palette_is_fixed_and_distinct():
    assert PALETTE.shape == (256, 3) and PALETTE.dtype == np.uint8 and not PALETTE[0].any()
    assert len({tuple(c) for c in PALETTE.tolist()}) == 256
    assert hashlib.sha256(PALETTE.tobytes()).hexdigest()[:16] == 'a203f7cda7d750bb'
    for step in (1, 2, 3):
        assert np.abs(np.diff(PALETTE[1:].astype(int)[::step], axis=0)).sum(1).min() > 90


@pytest.mark.parametrize('outline', [True, False])
def test_overlay_against_a_loop(photo, outline):
    ids = (
        np.random.default_rng(1).integers(0, 4, (5, 7)).repeat(2, 0).repeat(2, 1)[:9, :13] * 87
    )  # 0, 87, 174, 261: past the palette
    got = overlay(photo, ids, alpha=0.4, outline=outline)
    h, w = ids.shape
    for y in range(h):
        for x in range(w):
            i, want = int(ids[y, x]), photo[y, x].astype(float)
            if i:
                want = 0.6 * want + 0.4 * PALETTE[(i - 1) % 255 + 1]
            edge = (y + 1 < h and ids[y + 1, x] != i) or (x + 1 < w and ids[y, x + 1] != i)
            if outline and edge:
                want = 0.15 * want + 0.85 * 255
            assert np.abs(got[y, x] - want).max() <= 0.51, (y, x)


def test_outline_grows_with_the_image():
    for side, width in ((64, 1), (960, 3)):
        ids = np.ones((side, side), int)
        ids[:, side // 2 :] = 2
        plain = np.zeros((side, side, 3), np.uint8)
        line = (overlay(plain, ids) != overlay(plain, ids, outline=False)).any(-1)
        assert line.sum(1).tolist() == [width] * side


def test_void_and_no_masks_leave_the_photo(photo):
    assert (overlay(photo, np.zeros((9, 13), int)) == photo).all()
    assert (overlay_masks(photo, np.zeros((0, 9, 13), bool)) == photo).all()
    assert (overlay_masks(photo, np.zeros((2, 9, 13), bool)) == photo).all()


def test_small_masks_stay_visible(photo):
    small, large = np.zeros((2, 9, 13), bool)
    small[4, 6] = True
    large[2:8, 3:11] = True
    for order in ([small, large], [large, small]):
        got = overlay_masks(photo, np.stack(order), alpha=1.0)
        i = 1 if order[0] is small else 2
        assert np.abs(got[4, 6].astype(int) - (0.15 * PALETTE[i] + 0.85 * 255)).max() <= 1  # one pixel is all outline
    assert (overlay_masks(photo, small[None], alpha=0.5)[0, 0] == photo[0, 0]).all()


def test_wrong_arguments_are_named(photo):
    with pytest.raises(ValueError, match=r'\[4, 4, 3\].*\[9, 13, 3\]'):
        overlay(photo, np.zeros((4, 4), int))
    with pytest.raises(ValueError, match='float64'):
        overlay(photo / 255, np.zeros((9, 13), int))
    with pytest.raises(ValueError, match='titles must be 1 strings'):
        grid([photo], n_columns=2, titles=['a', 'b'])


def test_a_figure_shows_what_can_be_read(photo):
    def read(i):
        if i in broken:
            raise OSError(f'{i}.jpg: gone')
        return i * i

    for n, broken in ((0, set()), (1, set()), (3, {1}), (100, {0, 33, 34, 99}), (5, set(range(5)))):
        shown = readable(range(n), 4, read)
        numbers = [i for i, _ in shown]
        assert all(v == i * i for i, v in shown) and numbers == sorted(set(numbers) - broken) and len(numbers) <= 4
        if n - len(broken) > 50:
            assert numbers == [1, 35, 66]
        elif not broken:
            assert numbers == list(range(n))
        png_bytes(grid([photo for _ in shown], n_columns=4, titles=[str(i) for i in numbers]))
    with pytest.raises(ZeroDivisionError):
        readable([0], 1, lambda i: 1 / i)  # a fault of the program


def test_figures_have_the_same_small_bytes(tmp_path):
    photos = list(np.random.default_rng(0).integers(0, 256, (12, 128, 128, 3), dtype=np.uint8))  # noise: the worst case
    for name in ('a.png', 'b.png', 'a.jpg', 'b.jpg'):
        save_figure(grid(photos, n_columns=4, titles=['x'] * 12), tmp_path / name)
    for suffix, mode in (('png', 'P'), ('jpg', 'RGB')):
        data = (tmp_path / f'a.{suffix}').read_bytes()
        assert data == (tmp_path / f'b.{suffix}').read_bytes() and len(data) < 150_000
        shown = Image.open(io.BytesIO(data))
        assert shown.mode == mode and b'tIME' not in data and not getattr(shown, 'text', {})


def shown_as(fig, monkeypatch):
    "The format in which a notebook shows a figure."
    from IPython.core.formatters import format_display_data

    data = []
    monkeypatch.setattr('IPython.display.display', lambda shown: data.append(format_display_data(shown)[0]))
    fig._ipython_display_()
    return [*data[0]][0]


def test_images_are_shown_as_jpeg_and_lines_as_png(photo, monkeypatch):
    assert shown_as(grid([photo, photo], n_columns=2), monkeypatch) == 'image/jpeg'
    assert shown_as(grid([np.eye(9)], n_columns=1), monkeypatch) == 'image/png'
    fig = Picture(figsize=(3, 2))
    fig.subplots().plot([0, 1], [1, 0])
    assert shown_as(fig, monkeypatch) == 'image/png'


def test_a_sky_has_no_steps():
    "A slow gradient keeps its levels: a palette of 256 colours for the whole figure would join them."
    sky = np.linspace(80, 200, 128)[:, None, None] + np.array([0, 20, 50])
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3))
    images = [np.broadcast_to(sky, (128, 128, 3)).astype(np.uint8), noise.astype(np.uint8)]
    got = np.asarray(Image.open(io.BytesIO(jpeg_bytes(grid(images, n_columns=2)))))[:, 2:126].astype(int)
    assert np.abs(got - images[0][:, 2:126].astype(int)).max() <= 6


def test_titles_of_columns_stand_above_the_first_row():
    red = np.zeros((40, 60, 3), np.uint8) + np.uint8([255, 0, 0])
    shown = pixels(grid([red] * 4, n_columns=2, titles=['a', 'b']))
    assert shown.shape[0] == 18 + 2 * 40 + 4 and (shown[62:102, :60] == [255, 0, 0]).all()
    assert pixels(grid([red] * 4, n_columns=2, titles=['a', 'b', 'c', 'd'])).shape[0] == 2 * (18 + 40) + 4
    with pytest.raises(ValueError, match='titles must be 4 strings, or one for each of 2 columns, got 3'):
        grid([red] * 4, n_columns=2, titles=['a', 'b', 'c'])


def test_grid_places_images():
    red, map_ = np.zeros((20, 30, 3), np.uint8) + np.uint8([255, 0, 0]), np.eye(20)
    got = np.asarray(Image.open(io.BytesIO(png_bytes(grid([red, map_, red], n_columns=2, scale=2)))).convert('RGB'))
    assert got.shape == (84, 124, 3)
    assert (got[5:35, 5:55] == [255, 0, 0]).all() and (got[50:80, 5:55] == [255, 0, 0]).all()
    assert (got[50:80, 70:] == 255).all()  # the empty place is white
    titled = np.asarray(
        Image.open(io.BytesIO(png_bytes(grid([red, red], n_columns=1, titles=['above', 'below'], scale=2)))).convert(
            'RGB'
        )
    )
    assert titled.shape == (2 * (40 + 18) + 4, 60, 3)
    for top in (18, 18 + 40 + 4 + 18):
        assert (titled[top + 2 : top + 38, 2:58] == [255, 0, 0]).all() and (titled[top - 14 : top - 4].min() < 128)


def pixels(fig):
    return np.asarray(Image.open(io.BytesIO(png_bytes(fig))).convert('RGB'))


def test_a_class_has_one_colour_whatever_the_numbers(photo):
    "Against a loop over pixels: the tint is that of the category, the line that of the segment."
    a = np.arange(13)[None].repeat(9, 0) // 4  # segments 0 (void), 1, 2, 3
    b = np.array([0, 70_000, 5, 9])[a]  # the same under other numbers
    segments = lambda ids: [dict(id=ids[0], category_id=300), dict(id=ids[1], category_id=300)]
    got = overlay_classes(photo, a, segments([1, 2]), alpha=0.4)
    assert (got == overlay_classes(photo, b, segments([70_000, 5]), alpha=0.4)).all()
    for y in range(9):
        for x in range(13):
            want = photo[y, x].astype(float)
            if a[y, x] in (1, 2):
                want = 0.6 * want + 0.4 * PALETTE[(300 - 1) % 255 + 1]  # segment 3 is not listed
            if x < 12 and a[y, x + 1] != a[y, x]:
                want = 0.15 * want + 0.85 * 255
            assert np.abs(got[y, x] - want).max() <= 0.51, (y, x)


def test_legend_and_row_labels_stand_beside_the_images():
    black = np.zeros((40, 60, 3), np.uint8)
    plain = pixels(grid([black] * 4, n_columns=2))
    colours = class_colours(
        [dict(id=1, name='a thing'), dict(id=2, name='another'), dict(id=3, name='a third of a long name')]
    )
    full = pixels(grid([black] * 4, n_columns=2, rows=['up', 'down'], legend=colours))
    assert full.shape[1] == plain.shape[1] + 18
    assert (full[: plain.shape[0], 18:] == plain).all()  # the images stay as they are
    assert full[:40, :18].min() < 128 and full[44:84, :18].min() < 128  # a label beside each row
    below = full[plain.shape[0] :].reshape(-1, 3)
    for colour in colours.values():
        assert (below == colour).all(1).sum() >= 60
    with pytest.raises(ValueError, match='rows must be 2 strings, got 1'):
        grid([black] * 4, n_columns=2, rows=['up'])


def test_a_shown_figure_has_no_speckle():
    "Pixels of one colour stay of one colour; dithered, they become a mixture of two."
    image = np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8)
    image[:, 128:] = image[:1, 128:]  # each column of the right half is of one colour
    shown = pixels(grid([image], n_columns=1))
    assert shown.shape == image.shape
    assert (shown[8:-8, 136:] == shown[8:9, 136:]).all()


def test_save_figure_takes_any_figure(tmp_path):
    fig = Figure(figsize=(3, 2), dpi=100)
    fig.add_subplot().plot([0, 1], [1, 0])
    save_figure(fig, tmp_path / 'deep' / 'line.png')
    assert Image.open(tmp_path / 'deep' / 'line.png').size == (300, 200)


def test_large_images_shrink_and_their_titles_do_not():
    fig = grid([np.zeros((480, 640, 3), np.uint8)] * 16, n_columns=8, titles=['a'] * 16)
    width, height = fig.get_size_inches() * fig.dpi
    assert 400_000 < width * height < 550_000 and width / height > 2  # the pictures, titles and gaps beside them
    assert grid([np.zeros((30, 40, 3), np.uint8)] * 2, n_columns=2).get_size_inches().tolist() == [
        0.84,
        0.3,
    ]  # small ones stay as they are
    assert {a.title.get_fontsize() for a in fig.axes} == {8.0}


def test_overlay_of_a_large_photo_needs_little_memory():
    import tracemalloc

    image, ids = np.full((2000, 3000, 3), 90, np.uint8), np.zeros((2000, 3000), np.int32)
    ids[300:900, 500:2500] = 7
    tracemalloc.start()
    out = overlay(image, ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * image.nbytes and (out[::9] != image[::9]).any()


def test_a_large_image_is_made_smaller_before_it_is_drawn():
    "Boxes keep its coordinates, and a map its labels."
    image = np.zeros((3000, 4000, 3), np.uint8)
    image[:, 2000:] = 200
    fig = draw_boxes(image, [(np.array([[2000, 0, 3999, 2999]]), 'red')])
    (drawn,) = fig.axes[0].images
    assert drawn.get_array().size < 3 * 9 * AREA and [*drawn.get_extent()] == [-0.5, 3999.5, 2999.5, -0.5]
    seen = pixels(fig)
    middle = len(seen) // 2, seen.shape[1] // 2
    assert (seen[middle[0], middle[1] - 40] == 0).all() and (seen[middle[0], middle[1] + 40] == 200).all()
    labels = np.where(image[..., 0] > 0, 7, 3)
    assert set(np.unique(grid([labels], n_columns=1).axes[0].images[0].get_array())) == {3, 7}
