"""Merge of 1000 images of 640 x 480 with 10 instances each, against a straightforward loop over masks; both see the
same run-length codes.

    python benchmarks/merge.py [--images 1000] [--rounds 3] [--distinct 50]
"""

import argparse

import numpy as np
from pycocotools import mask as coco_mask
from scipy.ndimage import zoom

from machine import RATIO, SIDES, alternate, heading, publish, ratios, spread
from u2seg.panoptic import merge


def plain_merge(instances, semantic, *, n_clusters, max_cover=0.7):
    "The official rule as one would write it down: decode a mask, paint it, look at the image again for each segment."
    masks = [coco_mask.decode(a['segmentation']).astype(bool) for a in instances]
    order = sorted(range(len(masks)), key=lambda i: -a_box(instances[i]))
    ids, info = np.zeros(semantic.shape, np.int32), []
    for i in order:
        ids[masks[i]] = len(info) + 1
        info.append(dict(id=len(info) + 1, category_id=instances[i]['category_id']))
    info = [s for s in info if (ids == s['id']).any()]
    next_id = len(order) + 1
    for c in np.unique(semantic):
        cluster = semantic == c
        free = cluster & (ids == 0)
        if not free.any() or (cluster & (ids != 0)).sum() / cluster.sum() > max_cover:
            continue
        ids[free] = next_id
        info.append(dict(id=next_id, category_id=n_clusters + 1 + int(c)))
        next_id += 1
    for s in info:
        mask = ids == s['id']
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        s.update(
            iscrowd=0,
            area=int(mask.sum()),
            bbox=[int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)],
        )
    return ids, info


def a_box(a):
    return a['bbox'][2] * a['bbox'][3]


def blob(rng, h, w):
    "A smooth region in a box of an eighth to a half of each side, with a wavy outline."
    y, x = np.mgrid[:h, :w]
    ry, rx = rng.uniform(h / 16, h / 4), rng.uniform(w / 16, w / 4)
    cy, cx = rng.uniform(ry, h - ry), rng.uniform(rx, w - rx)
    angle = np.arctan2(y - cy, x - cx)
    wave = 1 + 0.15 * np.sin(rng.integers(3, 9) * angle + rng.uniform(0, 6.3))
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < wave**2


def example(seed, h=480, w=640, n=10, n_stuff=27, present=8):
    "Ten blobs and a stuff map of `present` of the 27 clusters with soft boundaries, as STEGO gives them."
    rng = np.random.default_rng(seed)
    instances = []
    for _ in range(n):
        rle = coco_mask.encode(np.asfortranarray(blob(rng, h, w), dtype=np.uint8))
        instances.append(
            dict(category_id=int(rng.integers(1, 301)), segmentation=rle, bbox=coco_mask.toBbox(rle).tolist())
        )
    fields = np.stack([zoom(rng.standard_normal((8, 10)), (h / 8, w / 10), order=1) for _ in range(present)])
    return instances, rng.choice(n_stuff, present, replace=False).astype(np.uint8)[fields.argmax(0)]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=1000)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--distinct', type=int, default=50)
    p.add_argument('--out', default=None)
    args = p.parse_args()
    distinct = [example(i) for i in range(min(args.images, args.distinct))]  # so many scenes, repeated
    for instances, semantic in distinct[:5]:  # equal results first (ids may be numbered otherwise)
        a, ia = merge(instances, semantic, n_clusters=300)
        b, ib = plain_merge(instances, semantic, n_clusters=300)
        assert [{k: s[k] for k in ('category_id', 'area', 'bbox')} for s in ia] == [
            {k: s[k] for k in ('category_id', 'area', 'bbox')} for s in ib
        ]
        assert ((a == 0) == (b == 0)).all()

    def run(call):
        for i in range(args.images):
            call(*distinct[i % len(distinct)], n_clusters=300)

    sides = dict(ours=lambda: run(merge), plain=lambda: run(plain_merge))
    _, taken = alternate(sides, args.rounds)
    wall, cpu = map(spread, ratios(taken['plain'], taken['ours']))
    about = f'{args.images} images ({len(distinct)} different ones) of 640 x 480, 10 instances, 8 stuff clusters each.'
    publish(
        [
            *heading('Merge', 1, ['numpy'], f'{SIDES} The reference is a loop over masks. {RATIO}'),
            about,
            '',
            '| ratio, wall | ratio, CPU |',
            '|---|---|',
            f'| {wall} | {cpu} |',
        ],
        args.out,
    )


if __name__ == '__main__':
    main()
