"Polygons: exact where nothing may be lost, within the bound elsewhere, for masks of any shape."

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from scipy.ndimage import binary_fill_holes, gaussian_filter, label

from u2seg.masks import decode_rle, encode_rle
from u2seg.polygons import joined, mask_window, polygon_mask, polygons, rings


def forms(parts, size):
    "The masks that pycocotools makes of the parts: a ring each, and one ring for all."
    several = [joined(p) for p in parts]
    return [polygon_mask(several, size), polygon_mask([joined(several)], size)]


def smooth(height, width, sigma, seed):
    "A mask with holes and several parts."
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((height, width)), sigma)
    return noise > np.quantile(noise, 0.6)


@st.composite
def masks(draw):
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return np.array(bits).reshape(height, width)


@settings(max_examples=60, deadline=None)
@given(masks())
def test_exact_rings_are_the_mask_again(mask):
    rle = encode_rle(mask)
    parts = polygons(rle, loss=0)
    assert len(parts) == label(mask)[1]
    if parts:
        assert [f['counts'] for f in forms(parts, mask.shape)] == [rle['counts']] * 2


@settings(max_examples=60, deadline=None)
@given(masks(), st.sampled_from([0.005, 0.02, 0.2, 0.5]))
def test_no_mask_loses_more_than_the_bound(mask, loss):
    rle = encode_rle(mask)
    parts = polygons(rle, loss=loss)
    assert bool(parts) == bool(mask.any())
    for form in forms(parts, mask.shape) if parts else []:
        assert coco_mask.iou([form], [rle], [0])[0, 0] >= 1 - loss


@settings(max_examples=40, deadline=None)
@given(masks())
def test_outlines_and_holes_enclose_the_pixels(mask):
    corners, first, part = rings(mask)
    signed, outlines = np.zeros(len(part)), []
    for i, ring in enumerate(np.split(corners, first[1:-1]) if len(part) else []):
        x, y = ring.T
        signed[i] = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2
    assert signed.sum() == mask.sum()
    assert sorted(part[signed > 0]) == list(range(1, label(mask)[1] + 1))
    holes = label(~np.pad(mask, 1), np.ones((3, 3)))[1] - 1
    assert (signed < 0).sum() >= holes


def test_smooth_masks_need_few_corners():
    "A slanted outline is a line, not its steps."
    rle = encode_rle(smooth(300, 400, 8, 0))
    exact, few = polygons(rle, loss=0), polygons(rle, loss=0.005)
    count = [sum(len(r) for p in parts for r in p) for parts in (exact, few)]
    assert count[1] < count[0] / 2.5


def test_the_window_is_the_mask_without_its_margin():
    mask = np.zeros((4000, 3000), bool)
    mask[3999, 17], mask[3000, 2999] = True, True
    window, (x, y) = mask_window(encode_rle(mask))
    assert (x, y, window.shape, window.sum()) == (17, 3000, (1000, 2983), 2)
    assert (np.argwhere(window) + [y, x]).tolist() == np.argwhere(mask).tolist()


def test_one_pixel_in_a_large_image():
    mask = np.zeros((4000, 4000), bool)
    mask[3999, 3999] = True
    (((ring,),),) = [polygons(encode_rle(mask))]
    assert sorted(ring.round().tolist()) == [[3999, 3999], [3999, 4000], [4000, 3999], [4000, 4000]]
    assert decode_rle(polygon_mask([ring], mask.shape)).sum() == 1


def test_readers_that_cut_off_and_paint_outlines_see_the_mask_too():
    "OpenCV's way, with which supervision and ultralytics read: exact where there is no hole."
    cv2 = pytest.importorskip('cv2')
    for seed in range(20):
        mask = binary_fill_holes(smooth(40, 50, 4, seed))
        seen = np.zeros(mask.shape, np.uint8)
        for part in polygons(encode_rle(mask), loss=0):
            cv2.fillPoly(seen, [joined(part).astype(np.int32)], 1)
        assert (seen == mask).all()


@pytest.mark.parametrize('loss', [-0.1, 1, float('nan')])
def test_a_loss_that_cannot_be_is_refused(loss):
    with pytest.raises(ValueError, match=r'loss must lie in \[0, 1\)'):
        polygons(encode_rle(np.ones((2, 2), bool)), loss=loss)
