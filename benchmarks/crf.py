"""MaskCut's and STEGO's dense CRF against pydensecrf, one thread: ratio of times, and IoU of the results.

    python benchmarks/crf.py [--photos DIR] [--rounds 3] [--images 26] [--labels 27] [--out benchmarks/results/crf.md]

Images: drawn scenes enlarged to 480 px, or, with --photos, DIR/images of COCO with DIR/panoptic.json and DIR/panoptic.
Masks: up to three of the largest objects of each image, made rough: parts of the cells of a 60 x 60 grid, disturbed by
noise, cut at one half, as MaskCut's masks are. Both sides get the same masks in one process, in turns. pydensecrf
builds a lattice for each mask and takes two labels; ours builds one for the image and takes a channel a mask. Without
pydensecrf (github.com/lucasb-eyer/pydensecrf) only our own ratios are printed. A mask that both wipe out is equal.
"""

import argparse, statistics
from pathlib import Path

import numpy as np, torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from machine import RATIO, SIDES, alternate, clock, heading, publish, ratios, spread
from u2seg.crf import MASKCUT, STEGO, dense_crf, refine_masks
from u2seg.images import read_image, read_json, resize_image
from u2seg.masks import read_ids
from u2seg.scenes import draw_scene

SIZE, GRID = 480, 60


def sources(n, photos):
    "(name, image uint8 [H, W, 3], ids int [H, W], ids of its objects, or of all segments, largest first)."
    if photos is None:
        for i in range(n):
            image, ids, info = draw_scene([2, i], ('objects', 'scenes')[i % 2])
            yield f'drawn {i}', image, ids, by_area(info, range(1, 9))
        return
    folder = Path(photos)
    coco = read_json(folder / 'panoptic.json')
    things = {c['id'] for c in coco['categories'] if c['isthing']}
    files = {im['id']: Path(im['file_name']).name for im in coco['images']}
    for a in coco['annotations'][:n]:
        image, ids = (
            read_image(folder / 'images' / files[a['image_id']]),
            read_ids(folder / 'panoptic' / a['file_name']),
        )
        yield a['file_name'], image, ids, by_area(a['segments_info'], things)


def by_area(info, things):
    found = [s for s in info if s['category_id'] in things] or info
    return [s['id'] for s in sorted(found, key=lambda s: -s['area'])]


def inputs(n, photos):
    "(name, uint8 [480, 480, 3], rough masks bool [m, 480, 480], m = 1 ... 3)."
    rng, cell = np.random.default_rng(0), SIZE // GRID
    for name, image, ids, chosen in sources(n, photos):
        ids = np.array(Image.fromarray(ids.astype(np.int32)).resize((SIZE, SIZE), Image.NEAREST))
        masks = []
        for k in chosen[:3]:
            part = (ids == k).reshape(GRID, cell, GRID, cell).mean((1, 3))
            rough = part + gaussian_filter(rng.normal(size=part.shape), 1) * 0.6 > 0.5
            if rough.mean() > 0.01:
                masks.append(rough.repeat(cell, 0).repeat(cell, 1))
        if masks:
            yield name, resize_image(image, (SIZE, SIZE)), np.stack(masks)


def iou(a, b):
    return (a & b).sum() / (a | b).sum() if (a | b).any() else 1.0


def pydensecrf_of(dcrf, image, prob, n_iters, gauss_weight, gauss_sxy, bilateral_weight, bilateral_sxy, bilateral_srgb):
    d = dcrf.DenseCRF2D(image.shape[1], image.shape[0], len(prob))
    d.setUnaryEnergy(np.ascontiguousarray(-np.log(prob.clip(1e-5, 1)).reshape(len(prob), -1)))
    d.addPairwiseGaussian(sxy=gauss_sxy, compat=gauss_weight)
    d.addPairwiseBilateral(sxy=bilateral_sxy, srgb=bilateral_srgb, rgbim=image, compat=bilateral_weight)
    return np.array(d.inference(n_iters)).reshape(prob.shape)


def soften(mask):
    return np.stack([np.where(mask, 0.2689414, 0.7310586), np.where(mask, 0.7310586, 0.2689414)]).astype(np.float32)


def stego(dcrf, todo, labels):
    "A line an image: ratio to pydensecrf at STEGO's constants, and how many pixels get the same label."
    for name, image, _ in todo:
        rngs = map(np.random.default_rng, range(labels))
        prob = np.stack([gaussian_filter(rng.normal(size=(SIZE, SIZE)), 20) * 60 for rng in rngs])
        prob = np.exp(prob - prob.max(0))
        prob = (prob / prob.sum(0)).astype(np.float32)
        sides = dict(
            ours=lambda: dense_crf(image, prob, **STEGO), theirs=lambda: pydensecrf_of(dcrf, image, prob, **STEGO)
        )
        results, taken = alternate(sides, 1)
        wall, cpu = (r[0] for r in ratios(taken['theirs'], taken['ours']))
        same = np.mean(results['ours'].argmax(0) == results['theirs'].argmax(0))
        yield f'| {name} | {wall:.2f} | {cpu:.2f} | {same:.4f} |'


def compare(dcrf, image, masks, rounds):
    "What one image shows beside pydensecrf."

    def theirs(masks):
        return [pydensecrf_of(dcrf, image, soften(m), **MASKCUT).argmax(0) == 1 for m in masks]

    sides = dict(
        ours=lambda: refine_masks(image, masks),
        theirs=lambda: theirs(masks),
        one=lambda: refine_masks(image, masks[:1]),
        theirs_one=lambda: theirs(masks[:1]),
    )
    results, taken = alternate(sides, rounds)
    each = [
        (iou(a, b), iou(m, a) >= 0.5, iou(m, b) >= 0.5) for m, a, b in zip(masks, results['ours'], results['theirs'])
    ]
    kept = [v for v, a, b in each if a or b]
    wall, cpu = map(statistics.median, ratios(taken['theirs'], taken['ours']))
    one = statistics.median(ratios(taken['theirs_one'], taken['one'])[1])
    return dict(
        wall=wall,
        cpu=cpu,
        one=one,
        iou=min(v for v, *_ in each),
        kept=min(kept, default=1.0),
        n_kept=len(kept),
        differ=sum(a != b for _, a, b in each),
    )


def against_pydensecrf(rows, todo):
    column = lambda k: [r[k] for r in rows]
    n_masks = sum(len(m) for *_, m in todo)
    kept = f'the same over the {sum(column("n_kept"))} of {n_masks} masks that MaskCut keeps (IoU of .5 with the old)'
    iou_line = lambda name, k: f'| {name} | {statistics.median(column(k)):.4f} (least {min(column(k)):.4f}) |'
    below = [sum(v < 0.98 for v in column(k)) for k in ('iou', 'kept')]
    return [
        '| | median of the images (least to most) |',
        '|---|---|',
        f'| ratio, wall | {spread(column("wall"))} |',
        f'| ratio, CPU | {spread(column("cpu"))} |',
        f'| ratio, CPU, one mask alone | {spread(column("one"))} |',
        iou_line('IoU of both results, worst mask of an image', 'iou'),
        iou_line(kept, 'kept'),
        '',
        f'IoU below .98: {below[0]} of {len(rows)} images, {below[1]} where only kept masks count; a mask kept on '
        f'one side only: {sum(column("differ"))}. What is left of a mask that the CRF wipes out is a handful of '
        'pixels; both sides then drop it.',
        '',
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--photos', help='COCO: images/, panoptic.json, panoptic/ (default: drawn scenes)')
    for name, value in dict(rounds=3, images=26, labels=27).items():
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--out')
    args = parser.parse_args()
    try:
        import pydensecrf.densecrf as dcrf
    except ImportError:
        dcrf = None
    torch.set_num_threads(1)
    clock(lambda: refine_masks(np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=bool)[None]))  # compiles the loops
    todo, rows, threads = list(inputs(args.images, args.photos)), [], []
    for name, image, masks in todo:
        sides = dict(one=lambda: refine_masks(image, masks), two=lambda: refine_masks(image, masks, n_threads=2))
        _, taken = alternate(sides, args.rounds)
        threads += ratios(taken['one'], taken['two'])[0]
        if dcrf:
            rows.append(compare(dcrf, image, masks, args.rounds))
        print(name, rows[-1] if dcrf else '', flush=True)
    lines = [
        *heading('Dense CRF against pydensecrf', 1, ('torch', 'numba', 'numpy'), f'{SIDES} {RATIO}'),
        f'MaskCut constants, {len(todo)} images of 480 x 480 px, {np.mean([len(m) for *_, m in todo]):.1f} masks '
        'an image; one lattice an image and one channel a mask here, one CRF of two labels a mask there.',
        '',
        *(against_pydensecrf(rows, todo) if dcrf else ['pydensecrf is not installed.', '']),
        f'One thread takes {spread(threads)} times as long as two (wall).',
    ]
    image, masks = todo[0][1:]
    sides = dict(ours=lambda: refine_masks(image, masks), torch=lambda: refine_masks(image, masks, compiled=False))
    results, taken = alternate(sides, args.rounds)
    lines += [
        'Torch operations (the path of a GPU) instead of compiled loops, on this CPU: '
        f'{spread(ratios(taken["torch"], taken["ours"])[1])} times as long (CPU), '
        f'IoU {min(iou(a, b) for a, b in zip(*results.values())):.4f}.',
        '',
    ]
    if dcrf:
        lines += [
            f'## STEGO constants, {args.labels} labels',
            '',
            '| image | ratio, wall | ratio, CPU | same label |',
            '|---|---|---|---|',
            *stego(dcrf, todo[:3], args.labels),
        ]
    publish(lines, args.out)


if __name__ == '__main__':
    main()
