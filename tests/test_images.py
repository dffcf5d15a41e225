"""Readers and writers against independent implementations, and every kind of bad file."""
import json, os, zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from u2seg import images as I

masks = npst.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))
shared = Path(os.environ.get('U2SEG_SHARED_DATA', Path(__file__).parents[2]/'shared'/'data'))


def rle_by_hand(mask):
    "COCO's uncompressed code: lengths of runs down the columns, zeros first."
    flat, counts, value, run = mask.flatten(order='F'), [], False, 0
    for v in flat:
        if v != value: counts.append(run); value, run = v, 0
        run += 1
    return counts + [run]


@given(masks)
@settings(max_examples=200, deadline=None)
def test_rle_round_trip_and_plain_code(mask):
    assert (I.decode_rle(I.encode_rle(mask)) == mask).all()
    assert (I.decode_rle(dict(size=list(mask.shape), counts=rle_by_hand(mask))) == mask).all()


@given(masks)
@settings(max_examples=200, deadline=None)
def test_box_is_tight(mask):
    x, y, w, h = map(int, I.mask_to_box(mask))
    assert mask[y:y + h, x:x + w].sum() == mask.sum()
    if mask.any(): assert mask[y].any() and mask[y + h - 1].any() and mask[:, x].any() and mask[:, x + w - 1].any()
    else: assert (x, y, w, h) == (0, 0, 0, 0)


@given(npst.arrays(np.int64, (4, 5), elements=st.integers(0, 2**24 - 1)))
@settings(max_examples=100, deadline=None)
def test_ids_round_trip(ids):
    rgb = I.ids_to_rgb(ids)
    assert (rgb[..., 0].astype(int) + 256 * rgb[..., 1].astype(int) + 65536 * rgb[..., 2].astype(int) == ids).all()
    assert (I.rgb_to_ids(rgb) == ids).all()


def png(path, array, mode=None): Image.fromarray(array, mode).save(path); return path


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'LA', '1', 'CMYK', 'YCbCr', 'I;16', 'F', 'PA'])
def test_every_mode_reads_as_rgb(tmp_path, mode):
    base = Image.fromarray(np.full((5, 7, 3), 128, np.uint8))
    if mode == 'I;16': im, name = Image.fromarray(np.full((5, 7), 128 * 257, np.uint16)), 'a.png'
    elif mode == 'PA': im, name = base.convert('P'), 'a.png'; im.info['transparency'] = 0
    elif mode == 'P': im, name = base.convert('P', palette=Image.Palette.ADAPTIVE), 'a.png'
    else: im, name = base.convert(mode), 'a.tif' if mode in ('CMYK', 'YCbCr', 'F') else 'a.png'
    im.save(tmp_path/name, **({'transparency': 0} if mode == 'PA' else {}))
    out = I.read_image(tmp_path/name)
    assert out.shape == (5, 7, 3) and out.dtype == np.uint8 and out.flags.writeable
    if mode not in ('1', 'PA', 'F'): assert abs(out.astype(int) - 128).max() <= 2


def test_transparent_is_laid_over_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8); rgba[0, 0] = (10, 20, 30, 255)
    Image.fromarray(rgba).save(tmp_path/'a.png')
    out = I.read_image(tmp_path/'a.png')
    assert tuple(out[0, 0]) == (10, 20, 30) and (out[1] == 255).all()


@pytest.mark.parametrize('tag,turn', [(1, lambda x: x), (3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (8, lambda x: np.rot90(x))])
def test_exif_rotation(tmp_path, tag, turn):
    x = np.zeros((16, 24, 3), np.uint8); x[:8, :8] = 255
    exif = Image.Exif(); exif[0x0112] = tag
    Image.fromarray(x).save(tmp_path/'a.png', exif=exif)
    assert (I.read_image(tmp_path/'a.png') == turn(x)).all()


def test_one_pixel_and_very_wide(tmp_path):
    assert I.read_image(png(tmp_path/'one.png', np.zeros((1, 1, 3), np.uint8))).shape == (1, 1, 3)
    assert I.read_image(png(tmp_path/'wide.png', np.zeros((3, 20_000, 3), np.uint8))).shape == (3, 20_000, 3)


def bomb(path):
    "A PNG whose header promises 60,000 x 60,000 pixels."
    chunk = lambda kind, data: len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
    head = (60_000).to_bytes(4, 'big') * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'0')) + chunk(b'IEND', b''))


def test_bad_files_are_named(tmp_path):
    whole = png(tmp_path/'ok.png', np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).read_bytes()
    for name, data in {'empty.png': b'', 'text.jpg': b'hello', 'cut.png': whole[:len(whole) // 2], 'head.png': whole[:20]}.items(): (tmp_path/name).write_bytes(data)
    bomb(tmp_path/'bomb.png'); (tmp_path/'folder.png').mkdir()
    for name in ('empty.png', 'text.jpg', 'cut.png', 'head.png', 'bomb.png', 'folder.png', 'none.png'):
        with pytest.raises(I.ImageError, match=name): I.read_image(tmp_path/name)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_garbage_never_escapes_as_another_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp('garbage')/'x.png'; path.write_bytes(data)
    with pytest.raises(I.ImageError): I.read_image(path)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_json_garbage_is_named(tmp_path_factory, data):
    path = tmp_path_factory.mktemp('garbage')/'x.json'; path.write_bytes(data)
    try: expected = json.loads(data)
    except ValueError:
        with pytest.raises(ValueError, match='x.json'): I.read_json(path)
    else: assert repr(I.read_json(path)) == repr(expected)


def test_write_is_atomic_on_a_full_disk(tmp_path, monkeypatch):
    I.write_json(tmp_path/'a.json', [1])
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError): I.write_json(tmp_path/'a.json', [2])
    assert I.read_json(tmp_path/'a.json') == [1] and [p.name for p in tmp_path.iterdir()] == ['a.json']


def test_writers_of_one_file_never_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'getpid', lambda: 77)                        # two machines may have a process of one number
    assert len({I.part_of(tmp_path/'a.json') for _ in range(50)}) == 50 and I.part_of(tmp_path/'a.json').parent == tmp_path


def test_listing_is_sorted_nested_and_stable(tmp_path):
    for name in ('b/2.png', 'b/10.JPG', 'a/x/1.webp', 'b/2.txt'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes(b'')
    assert [i['file_name'] for i in I.list_images(tmp_path, ['b', 'a'])] == ['b/10.JPG', 'b/2.png', 'a/x/1.webp']
    assert [i['id'] for i in I.list_images(tmp_path, ['b', '.'])] == [1, 2, 3]    # a folder inside another is listed once


def test_annotation_of_an_unknown_image_is_refused():
    with pytest.raises(ValueError, match='annotation 7 names image 3'): I.by_image(dict(images=[dict(id=1)], annotations=[dict(id=7, image_id=3)]))


def test_real_panoptic_png_matches_its_json():
    if not (shared/'coco26').is_dir(): pytest.skip(f'no folder {shared/"coco26"}')
    coco = I.read_json(shared/'coco26'/'panoptic.json')
    for a in coco['annotations']:
        ids = I.read_ids(shared/'coco26'/'panoptic'/a['file_name'])
        found = dict(zip(*map(np.ndarray.tolist, np.unique(ids, return_counts=True)))); found.pop(0, None)
        assert found == {s['id']: s['area'] for s in a['segments_info']}
