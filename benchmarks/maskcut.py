"""All that MaskCut does after the backbone, against the published procedure: equal masks, and how much faster.

    python benchmarks/maskcut.py [--images 9] [--grid 60] [--threads 2] [--backbone] [--out benchmarks/results/maskcut.md]

From keys of 480 px images (3600 tokens, 768-d) to run-length codes at the image's own size: three rounds, dense CRF, holes, the agreement
filter. The reference: a dense eigen-decomposition each round (see ncut.py here), pydensecrf on each mask where it can be imported (it has no
release on PyPI; without it the reference's CRF takes our code and is not timed), SciPy's hole filling, Pillow's resizing.
`--backbone` adds the time of a ViT-B/8 with random weights on one image. Keys are the stand-ins of ncut.py.
"""
import argparse, datetime, os, platform, time
from pathlib import Path

import numpy as np, torch
from PIL import Image
from scipy import ndimage

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

def reference(keys, picture, original, clock):
    start, out = time.perf_counter(), []
    masks = [r[0] for r in reference_rounds(keys) if r[0].any()]
    clock['cut'] = time.perf_counter() - start; start = time.perf_counter()
    s = picture.shape[0]//keys.shape[1]
    coarse = [m.repeat(s, 0).repeat(s, 1) for m in masks]
    fine = [reference_crf(picture, m) for m in coarse] if dcrf else list(refine_masks(picture, np.stack(coarse))) if coarse else []
    clock['crf'] = (time.perf_counter() - start) if dcrf else 0.; start = time.perf_counter()
    for a, b in zip(coarse, fine):
        b = ndimage.binary_fill_holes(b)
        if not b.any() or (a & b).sum() < .5*(a | b).sum(): continue
        soft = np.asarray(Image.fromarray(np.uint8(b*255)).resize(original[::-1]))
        out.append(soft > soft.max()/2); encode_rle(out[-1])
    clock['rest'] = time.perf_counter() - start
    return out

def ours(keys, picture, original, clock):
    start = time.perf_counter()
    masks = maskcut(keys, tau=TAU, n_masks=N_MASKS)
    clock['cut'] = time.perf_counter() - start; start = time.perf_counter()
    fine, agreement = refine(picture, masks, crf=True)
    clock['crf'] = time.perf_counter() - start; start = time.perf_counter()
    out = [resize_mask(m, original) for m, a in zip(fine, agreement) if a >= .5 and m.any()]
    for m, a in zip(out, agreement): encode_rle(m); score_mask(m, a)
    clock['rest'] = time.perf_counter() - start
    return out

def backbone_seconds(size):
    import timm
    from u2seg.features import ViTFeatures
    vit, x = ViTFeatures('vit_base_patch8_224'), torch.randn(1, 3, size, size)
    def seconds():
        start = time.perf_counter(); vit.keys(x)
        return time.perf_counter() - start
    return np.median([seconds() for _ in range(3)])

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=9); parser.add_argument('--grid', type=int, default=60)
    parser.add_argument('--threads', type=int, default=2); parser.add_argument('--backbone', action='store_true'); parser.add_argument('--out')
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if not (SHARED/'coco26').is_dir(): raise SystemExit(f'{SHARED/"coco26"}: the photographs are not there; name their folder in U2SEG_SHARED_DATA')
    photos, truths = (sorted((SHARED/'coco26'/f).iterdir()) for f in ('images', 'panoptic'))
    rows, agree = [], []
    for i in range(-1, a.images):                          # the first one warms up
        k = max(i, 0)
        keys, image = semantic(truths[k], k, a.grid) if i % 2 else low_level(photos[k], k, a.grid), read_image(photos[k])
        picture, r, o = resize_image(image, (8*a.grid, 8*a.grid)), {}, []
        theirs = reference(keys, picture, image.shape[:2], r)
        for _ in range(3): o.append({}); mine = ours(keys, picture, image.shape[:2], o[-1])
        if i < 0: continue
        o = {k: np.median([c[k] for c in o]) for k in r}
        rows.append((r, o)); agree.append(min([iou(x, y) for x, y in zip(mine, theirs)], default=1.) if len(mine) == len(theirs) else 0.)
        print(f'{photos[i].name}: {sum(r.values()):.2f} s, {1e3*sum(o.values()):.0f} ms, {len(mine)} masks, worst IoU {agree[-1]:.3f}', flush=True)
    total = [sum(r.values())/sum(o.values()) for r, o in rows]
    lines = ['| step | reference | here | ratio |', '|---|---|---|---|']
    for step, name in dict(cut='three rounds of normalized cut', crf='dense CRF' + ('' if dcrf else ' (reference not timed)') + '; here with holes and agreement', rest='rest').items():
        r, o = (np.median([x[k][step] for x in rows]) for k in (0, 1))
        lines.append(f'| {name} | {1e3*r:.0f} ms | {1e3*o:.1f} ms | {r/o:.1f} |')
    r, o = (np.median([sum(x[k].values()) for x in rows]) for k in (0, 1))
    lines += [f'| **all** | {r:.2f} s | {o:.3f} s | **{np.median(total):.0f}** (median of the images\' ratios, {min(total):.0f} to {max(total):.0f}) |', '',
              f'Final masks: worst IoU of an image\'s masks {min(agree):.3f}, median {np.median(agree):.3f}, over {len(rows)} images (different numerics of the CRF included).']
    if a.backbone: lines += ['', f'ViT-B/8 keys at {8*a.grid} px (float32, random weights): {backbone_seconds(8*a.grid):.2f} s an image.']
    print('\n'.join(lines))
    if a.out:
        head = ['# MaskCut after the backbone', '', f'`python benchmarks/maskcut.py`, {datetime.date.today()}, {platform.machine()}, {a.threads} threads on {os.cpu_count()} shared cores, '
                f'torch {torch.__version__.split("+")[0]}; {len(rows)} photographs at {8*a.grid} px, patch 8, {DIM}-d, N = {N_MASKS}; both sides alternate in one process, medians.', '']
        Path(a.out).write_text('\n'.join(head + lines + ['']))

if __name__ == '__main__': main()
