"""All that MaskCut does after the backbone, against the published procedure: equal masks, and how much faster.

    python benchmarks/maskcut.py [--images 6] [--grid 60] [--threads 2] [--out benchmarks/results/maskcut.md]

From keys of 480 px images (3600 tokens, 768-d) to run-length codes at the image's own size: three rounds, dense CRF, holes, the agreement
filter. The reference: a dense eigen-decomposition each round (see ncut.py here), pydensecrf on each mask where it can be imported (it has no
release on PyPI; without it the reference's CRF takes our code and is not timed), SciPy's hole filling, Pillow's resizing.
Keys are the stand-ins of ncut.py.
"""
import argparse

import numpy as np, torch
from PIL import Image
from scipy import ndimage

from machine import clock, heading, publish
from ncut import DIM, N_MASKS, SHARED, TAU, iou, low_level, reference_rounds, semantic
from u2seg.crf import refine_masks
from u2seg.images import encode_rle, read_image, resize_image, resize_mask
from u2seg.maskcut import maskcut, refine, score_mask

try: import pydensecrf.densecrf as dcrf
except ImportError: dcrf = None

def reference_crf(picture, mask):
    p = np.stack([1. - mask, mask]).astype(np.float32)
    p = np.exp(p)/np.exp(p).sum(0)
    crf = dcrf.DenseCRF2D(mask.shape[1], mask.shape[0], 2)
    crf.setUnaryEnergy(np.ascontiguousarray(-np.log(p.clip(1e-5, 1)).reshape(2, -1)))
    crf.addPairwiseGaussian(sxy=3, compat=7)
    crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=np.ascontiguousarray(picture), compat=10)
    return np.array(crf.inference(10)).reshape(2, *mask.shape).argmax(0).astype(bool)

def reference(keys, picture, original):
    "Masks, and {step: seconds (wall, CPU)}."
    rounds, cut = clock(lambda: [r[0] for r in reference_rounds(keys) if r[0].any()])
    s = picture.shape[0]//keys.shape[1]
    coarse = [m.repeat(s, 0).repeat(s, 1) for m in rounds]
    fine, crf = clock(lambda: [reference_crf(picture, m) for m in coarse] if dcrf else list(refine_masks(picture, np.stack(coarse))) if coarse else [])
    def rest():
        for a, b in zip(coarse, fine):
            b = ndimage.binary_fill_holes(b)
            if not b.any() or (a & b).sum() < .5*(a | b).sum(): continue
            soft = np.asarray(Image.fromarray(np.uint8(b*255)).resize(original[::-1]))
            mask = soft > soft.max()/2
            encode_rle(mask)
            yield mask
    out, last = clock(lambda: list(rest()))
    return out, dict(cut=cut, crf=crf if dcrf else (0., 0.), rest=last)

def ours(keys, picture, original):
    masks, cut = clock(lambda: maskcut(keys, tau=TAU, n_masks=N_MASKS))
    (fine, agreement), crf = clock(lambda: refine(picture, masks, crf=True))
    def rest():
        for m, a in zip(fine, agreement):
            if a < .5 or not m.any(): continue
            mask = resize_mask(m, original)
            encode_rle(mask); score_mask(m, a)
            yield mask
    out, last = clock(lambda: list(rest()))
    return out, dict(cut=cut, crf=crf, rest=last)

def roofline(n=3600, d=768, depth=12, tensor=400e12, single=50e12, memory=3e12):
    "Least time of an image on one H100, by counting: rates reached in practice, FLOP/s of bf16 and of float32, and bytes/s."
    pixels, points, channels = 480*480, 150_000, 3
    steps = {'ViT-B/8, bf16: linear layers and attention': ((24*n*d*d + 4*n*n*d)*(depth - 1) + 2*n*d*d)/tensor, 'Gram matrix, float32': 2*n*n*d/single,
             f'{N_MASKS} rounds of 24 products with float32 links': N_MASKS*24*4*n*n/memory,
             'dense CRF, 3 masks, 10 iterations of gathers (a quarter of the rate)': 10*(pixels*6*(8 + 4*channels)*2 + 6*points*4*(2 + 4*channels))/(memory/4), 'sort of the lattice keys': 6*pixels*16*8/memory}
    rows = [f'| {name} | {1e3*t:.2f} |' for name, t in steps.items()]
    return ['## On a GPU, on paper', '', f'No GPU was at hand: this is arithmetic, not a measurement. One H100, reaching {tensor/1e12:.0f} TFLOP/s in bf16, {single/1e12:.0f} in float32 and {memory/1e12:.0f} TB/s; {n} tokens.', '',
            '| step | least ms an image |', '|---|---|', *rows, f'| **all** | **{1e3*sum(steps.values()):.1f}**, {1/sum(steps.values()):.0f} images/s |', '',
            'Reading and resizing pictures (a batch ahead), filling holes and coding masks are left to the CPU, which needs several processes to keep up.']

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=6); parser.add_argument('--grid', type=int, default=60)
    parser.add_argument('--threads', type=int, default=2); parser.add_argument('--out')
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if not (SHARED/'coco26').is_dir(): raise SystemExit(f'{SHARED/"coco26"}: the photographs are not there; name their folder in U2SEG_SHARED_DATA')
    photos, truths = (sorted((SHARED/'coco26'/f).iterdir()) for f in ('images', 'panoptic'))
    rows, agree = [], []
    for i in range(a.images):
        keys, image = semantic(truths[i], i, a.grid) if i % 2 else low_level(photos[i], i, a.grid), read_image(photos[i])
        picture, runs = resize_image(image, (8*a.grid, 8*a.grid)), []
        if not i: ours(keys, picture, image.shape[:2])                           # first calls
        theirs, r = reference(keys, picture, image.shape[:2])
        for _ in range(3): mine, o = ours(keys, picture, image.shape[:2]); runs.append(o)
        rows.append((r, {step: tuple(np.median([run[step] for run in runs], 0)) for step in r}))
        agree.append(min([iou(x, y) for x, y in zip(mine, theirs)], default=1.) if len(mine) == len(theirs) else 0.)
        print(f"{photos[i].name}: {sum(t[0] for t in r.values()):.2f} s, {sum(t[0] for t in rows[-1][1].values()):.3f} s, {len(mine)} masks, worst IoU {agree[-1]:.3f}", flush=True)
    lines = ['| step | reference, wall | here, wall | ratio, wall | reference, CPU | here, CPU | ratio, CPU |', '|---|---|---|---|---|---|---|']
    names = dict(cut='three rounds of normalized cut', crf='dense CRF' + ('' if dcrf else ' (reference not timed)') + '; here with holes and agreement', rest='holes, agreement, resizing, RLE', all='**all**')
    for step, name in names.items():
        of = lambda side, k: sum(side[s][k] for s in (side if step == 'all' else [step]))
        cells = []
        for k in (0, 1):
            r, o = (np.array([of(x[side], k) for x in rows]) for side in (0, 1))
            cells += [f'{np.median(r):.3f} s', f'{np.median(o):.4f} s', f'**{np.median(r/np.maximum(o, 1e-9)):.0f}** ({(r/np.maximum(o, 1e-9)).min():.0f} to {(r/np.maximum(o, 1e-9)).max():.0f})']
        lines.append(f"| {name} | {' | '.join(cells)} |")
    publish([*heading('MaskCut after the backbone', a.threads, ('torch', 'scipy', 'numba')),
             f'{len(rows)} photographs at {8*a.grid} px, patch 8, {DIM}-d, N = {N_MASKS}, {a.threads} thread{"s"*(a.threads > 1)}; from keys to run-length codes. Ratios are medians over the images (least to most).', '', *lines, '',
             f'Final masks: worst IoU of an image\'s masks {min(agree):.3f}, median {np.median(agree):.3f} (different numerics of the CRF included). The backbone itself: `benchmarks/features.py`.', '', *roofline()], a.out)

if __name__ == '__main__': main()
