"""Readers and writers against independent implementations, and every kind of bad file."""

import gzip, io, json, os, struct, zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from u2seg import images as I
from u2seg import masks as M

masks = npst.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))
DATA = Path(__file__).parent / 'data' / 'coco10'


def rle_by_hand(mask):
    "COCO's uncompressed code: lengths of runs down the columns, zeros first."
    flat, counts, value, run = mask.flatten(order='F'), [], False, 0
    for v in flat:
        if v != value:
            counts.append(run)
            value, run = v, 0
        run += 1
    return counts + [run]


@given(masks)
@settings(max_examples=200, deadline=None)
def test_rle_round_trip_and_plain_code(mask):
    assert (M.decode_rle(M.encode_rle(mask)) == mask).all()
    assert (M.decode_rle(dict(size=list(mask.shape), counts=rle_by_hand(mask))) == mask).all()


@given(masks)
@settings(max_examples=200, deadline=None)
def test_box_is_tight(mask):
    x, y, w, h = map(int, M.mask_to_box(mask))
    assert mask[y : y + h, x : x + w].sum() == mask.sum()
    if mask.any():
        assert mask[y].any() and mask[y + h - 1].any() and mask[:, x].any() and mask[:, x + w - 1].any()
    else:
        assert (x, y, w, h) == (0, 0, 0, 0)


@given(npst.arrays(np.int64, (4, 5), elements=st.integers(0, 2**24 - 1)))
@settings(max_examples=100, deadline=None)
def test_ids_round_trip(ids):
    rgb = M.ids_to_rgb(ids)
    assert (rgb[..., 0].astype(int) + 256 * rgb[..., 1].astype(int) + 65536 * rgb[..., 2].astype(int) == ids).all()
    assert (M.rgb_to_ids(rgb) == ids).all()


def png(path, array, mode=None):
    Image.fromarray(array, mode).save(path)
    return path


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'LA', '1', 'CMYK', 'YCbCr', 'I;16', 'F', 'PA'])
def test_every_mode_reads_as_rgb(tmp_path, mode):
    base = Image.fromarray(np.full((5, 7, 3), 128, np.uint8))
    if mode == 'I;16':
        im, name = Image.fromarray(np.full((5, 7), 128 * 257, np.uint16)), 'a.png'
    elif mode == 'PA':
        im, name = base.convert('P'), 'a.png'
        im.info['transparency'] = 0
    elif mode == 'P':
        im, name = base.convert('P', palette=Image.Palette.ADAPTIVE), 'a.png'
    else:
        im, name = base.convert(mode), 'a.tif' if mode in ('CMYK', 'YCbCr', 'F') else 'a.png'
    im.save(tmp_path / name, **({'transparency': 0} if mode == 'PA' else {}))
    if mode == 'YCbCr' and PIL.__version__.startswith('12.'):  # the last for Python 3.10 cannot read what it wrote
        with pytest.raises(I.ImageError, match='a.tif: not a readable image'):
            I.read_image(tmp_path / name)
        return
    out = I.read_image(tmp_path / name)
    assert out.shape == (5, 7, 3) and out.dtype == np.uint8 and out.flags.writeable
    if mode not in ('1', 'PA', 'F'):
        assert abs(out.astype(int) - 128).max() <= 2


def test_transparent_is_laid_over_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    Image.fromarray(rgba).save(tmp_path / 'a.png')
    out = I.read_image(tmp_path / 'a.png')
    assert tuple(out[0, 0]) == (10, 20, 30) and (out[1] == 255).all()


@pytest.mark.parametrize(
    'tag,turn',
    [(1, lambda x: x), (3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (8, lambda x: np.rot90(x))],
)
def test_exif_rotation(tmp_path, tag, turn):
    x = np.zeros((16, 24, 3), np.uint8)
    x[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(x).save(tmp_path / 'a.png', exif=exif)
    assert (I.read_image(tmp_path / 'a.png') == turn(x)).all()


def with_exif(entries, extra=b''):
    "A JPEG with a red corner, upper left as stored, and an EXIF block of these (tag, type, count, value)."
    x = np.full((40, 60, 3), 90, np.uint8)
    x[:20, :20] = (250, 30, 30)
    b = io.BytesIO()
    Image.fromarray(x).save(b, 'JPEG', quality=95)
    block = (
        b'II*\0\x08\0\0\0'
        + struct.pack('<H', len(entries))
        + b''.join(struct.pack('<HHI', *e[:3]) + e[3] for e in entries)
        + bytes(4)
        + extra
    )
    return b.getvalue()[:2] + b'\xff\xe1' + struct.pack('>H', len(block) + 8) + b'Exif\0\0' + block + b.getvalue()[2:]


@pytest.mark.parametrize(
    'odd',
    [
        (0x11A, 10, 1, struct.pack('<I', 38)),
        (0x11A, 2, 4, b'72 \0'),
        (0x11A, 2, 4, b'\xff\xfe\0\0'),
        (0x10F, 3, 1, bytes(4)),
    ],
)
def test_odd_metadata_does_not_refuse_pixels_or_hide_the_turn(tmp_path, odd):
    (tmp_path / 'a.jpg').write_bytes(
        with_exif([(0x112, 3, 1, struct.pack('<HH', 6, 0)), odd], struct.pack('<ii', -1, 0))
    )
    out = I.read_image(tmp_path / 'a.jpg')
    assert out.shape == (60, 40, 3) and out[5, -5, 0] > 200 and out[5, 5, 0] < 120


@pytest.mark.parametrize(
    'odd', [(0x112, 2, 4, b'six\0'), (0x112, 3, 1, struct.pack('<HH', 9, 0)), (0x112, 5, 1, struct.pack('<I', 9999))]
)
def test_a_turn_that_cannot_be_read_turns_nothing(tmp_path, odd):
    (tmp_path / 'a.jpg').write_bytes(with_exif([(0x11A, 2, 4, b'72 \0'), odd]))
    out = I.read_image(tmp_path / 'a.jpg')
    assert out.shape == (40, 60, 3) and out[5, 5, 0] > 200


RAMP = np.tile(np.linspace(0, 1000, 64, dtype=np.float32), (8, 1))


@pytest.mark.parametrize('odd', [np.nan, np.inf, -np.inf, -9999, -32768, 3.4028235e38, -3.4028235e38])
def test_pixels_without_a_value_leave_the_others_their_greys(tmp_path, odd):
    Image.fromarray(RAMP).save(tmp_path / 'plain.tif')
    x = RAMP.copy()
    x[0, 9] = odd
    Image.fromarray(x).save(tmp_path / 'odd.tif')
    out, plain = (I.read_image(tmp_path / f'{n}.tif') for n in ('odd', 'plain'))
    assert (out[0, 9] == 0).all() and (out != plain).sum() == 3 and len(np.unique(out)) == 64


@pytest.mark.parametrize(
    'low,high,kind',
    [
        (0, 1, float),
        (0, 0.01, float),
        (-1, 1, float),
        (290, 310, float),
        (0, 300, int),
        (0, 4095, int),
        (100, 16383, int),
    ],
)
def test_the_range_of_deep_grey_is_used(tmp_path, low, high, kind):
    x = low + RAMP.astype(np.float64) / 1000 * (high - low)
    Image.fromarray(x.astype(np.uint16 if kind is int else np.float32)).save(tmp_path / 'a.tif')
    out = I.read_image(tmp_path / 'a.tif')
    assert (
        (out[:, 0] == 0).all()
        and (out[:, -1] == 255).all()
        and len(np.unique(out)) == 64
        and (np.diff(out[0, :, 0].astype(int)) > 0).all()
    )


def test_ordinary_greys_keep_their_values(tmp_path):
    eight = np.random.default_rng(0).integers(30, 200, (9, 9), dtype=np.uint8)
    Image.fromarray(eight).save(tmp_path / '8.png')
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / '16.png')
    for name in ('8', '16'):
        assert (I.read_image(tmp_path / f'{name}.png') == eight[..., None]).all()
    for nothing in (np.nan, -9999, 7):
        Image.fromarray(np.full((3, 4), nothing, np.float32)).save(tmp_path / 'a.tif')
        assert (I.read_image(tmp_path / 'a.tif') == 0).all()


def test_one_pixel_and_very_wide(tmp_path):
    assert I.read_image(png(tmp_path / 'one.png', np.zeros((1, 1, 3), np.uint8))).shape == (1, 1, 3)
    assert I.read_image(png(tmp_path / 'wide.png', np.zeros((3, 20_000, 3), np.uint8))).shape == (3, 20_000, 3)


def bomb(path):
    "A PNG whose header promises 60,000 x 60,000 pixels."
    chunk = lambda kind, data: len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
    head = (60_000).to_bytes(4, 'big') * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'0')) + chunk(b'IEND', b'')
    )


def test_bad_files_are_named(tmp_path):
    whole = png(tmp_path / 'ok.png', np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).read_bytes()
    for name, data in {
        'empty.png': b'',
        'text.jpg': b'hello',
        'cut.png': whole[: len(whole) // 2],
        'head.png': whole[:20],
    }.items():
        (tmp_path / name).write_bytes(data)
    bomb(tmp_path / 'bomb.png')
    (tmp_path / 'folder.png').mkdir()
    for name in ('empty.png', 'text.jpg', 'cut.png', 'head.png', 'bomb.png', 'folder.png', 'none.png'):
        with pytest.raises(I.ImageError, match=name):
            I.read_image(tmp_path / name)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_garbage_never_escapes_as_another_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp('garbage') / 'x.png'
    path.write_bytes(data)
    with pytest.raises(I.ImageError):
        I.read_image(path)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_json_garbage_is_named(tmp_path_factory, data):
    path = tmp_path_factory.mktemp('garbage') / 'x.json'
    path.write_bytes(data)
    try:
        expected = json.loads(data)
    except ValueError:
        with pytest.raises(ValueError, match='x.json'):
            I.read_json(path)
    else:
        assert repr(I.read_json(path)) == repr(expected)


def test_write_is_atomic_on_a_full_disk(tmp_path, monkeypatch):
    I.write_json(tmp_path / 'a.json', [1])

    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError):
        I.write_json(tmp_path / 'a.json', [2])
    assert I.read_json(tmp_path / 'a.json') == [1] and [p.name for p in tmp_path.iterdir()] == ['a.json']


def test_writers_of_one_file_never_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'getpid', lambda: 77)  # two machines may have a process of one number
    assert (
        len({I.part_of(tmp_path / 'a.json') for _ in range(50)}) == 50
        and I.part_of(tmp_path / 'a.json').parent == tmp_path
    )


def test_listing_is_sorted_nested_and_stable(tmp_path):
    for name in ('b/2.png', 'b/10.JPG', 'a/x/1.webp', 'b/2.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    assert [i['file_name'] for i in I.list_images(tmp_path, ['b', 'a'])] == ['b/10.JPG', 'b/2.png', 'a/x/1.webp']
    assert [i['id'] for i in I.list_images(tmp_path, ['b', '.'])] == [1, 2, 3]  # a folder inside another is listed once


def test_linked_folders_are_followed_once(tmp_path):
    for name in ('disk/a/1.jpg', 'disk/b/2.jpg', 'photos/real/3.jpg'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    for link, to in (
        ('photos/a', '../disk/a'),
        ('photos/b', '../disk/b'),
        ('photos/twice', '../disk/a'),
        ('photos/areal', 'real'),
        ('photos/loop', '.'),
        ('disk/b/up', '../..'),
        ('photos/3.jpg', 'gone.jpg'),
        ('all', 'photos'),
    ):
        (tmp_path / link).symlink_to(to)
    found = ['3.jpg', 'a/1.jpg', 'b/2.jpg', 'real/3.jpg']  # the link to no file is named by whoever reads it
    assert [i['file_name'] for i in I.list_images(tmp_path, ['photos'])] == [f'photos/{f}' for f in found]
    assert [i['file_name'] for i in I.list_images(tmp_path, ['all'])] == [f'all/{f}' for f in found]
    assert [i['file_name'] for i in I.list_images(tmp_path / 'disk', ['b'])] == ['b/2.jpg']


@pytest.mark.parametrize('name', ['x' * 251 + '.png', 'é' * 125 + '.png'])
def test_names_of_the_largest_length(tmp_path, name):
    I.write_png(tmp_path / name, np.zeros((3, 4), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_small_images_are_packed_tightly_and_large_ones_quickly(tmp_path):
    for side, how in ((128, dict(optimize=True)), (256, dict(compress_level=3))):
        x = np.random.default_rng(0).integers(0, 9, (side, side, 3), dtype=np.uint8)
        b = io.BytesIO()
        Image.fromarray(x).save(b, 'PNG', **how)
        I.write_png(tmp_path / 'a.png', x)
        assert (tmp_path / 'a.png').read_bytes() == b.getvalue()


def test_annotation_of_an_unknown_image_is_refused():
    with pytest.raises(ValueError, match='annotation 7 names image 3'):
        M.by_image(dict(images=[dict(id=1)], annotations=[dict(id=7, image_id=3)]))


def test_real_panoptic_png_matches_its_json():
    coco = json.loads(gzip.decompress((DATA / 'panoptic.json.gz').read_bytes()))
    assert len(coco['annotations']) == 10
    for a in coco['annotations']:
        ids = M.read_ids(DATA / 'panoptic' / a['file_name'])
        found = dict(zip(*map(np.ndarray.tolist, np.unique(ids, return_counts=True))))
        found.pop(0, None)
        assert found == {s['id']: s['area'] for s in a['segments_info']}
