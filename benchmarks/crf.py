"""MaskCut's and STEGO's dense CRF against pydensecrf, on photographs, one thread: ratio of times, and IoU of the results.

    python benchmarks/crf.py [--rounds 3] [--photos 26] [--labels 27] [--out benchmarks/results/crf.md]

Photos: U2SEG_SHARED_DATA/coco26 (default: ../shared/data beside the repository). Masks: up to three of the largest objects of each photo, made rough:
shares of the cells of a 60 x 60 grid, disturbed by noise, cut at one half, as MaskCut's masks are. Both sides get the same masks in one process, in turns.
pydensecrf builds a lattice for each mask and takes two labels; ours builds one for the photo and takes a channel a mask. Without pydensecrf
(github.com/lucasb-eyer/pydensecrf; it has no release on PyPI) only our own times are printed. A mask that both sides wipe out is equal on both.
"""
import argparse, os, statistics
from pathlib import Path

import numpy as np, torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from machine import clock, heading, publish
from u2seg.crf import MASKCUT, STEGO, dense_crf, refine_masks
from u2seg.images import read_ids, read_image, read_json, resize_image

SIZE, GRID = 480, 60
SHARED = Path(os.environ.get('U2SEG_SHARED_DATA', Path(__file__).parents[2]/'shared'/'data'))/'coco26'


def photos(n):
    "(name, uint8 [480, 480, 3], rough masks bool [m, 480, 480], m = 1 ... 3)."
    coco = read_json(SHARED/'panoptic.json')
    thing = {c['id'] for c in coco['categories'] if c['isthing']}
    files, rng = {im['id']: im['file_name'] for im in coco['images']}, np.random.default_rng(0)
    for a in coco['annotations'][:n]:
        image = resize_image(read_image(SHARED/'images'/Path(files[a['image_id']]).name), (SIZE, SIZE))
        ids = np.array(Image.fromarray(read_ids(SHARED/'panoptic'/a['file_name'])).resize((SIZE, SIZE), Image.NEAREST))
        found = sorted((s for s in a['segments_info'] if s['category_id'] in thing), key=lambda s: -s['area']) or sorted(a['segments_info'], key=lambda s: -s['area'])
        masks = []
        for s in found[:3]:
            share = (ids == s['id']).reshape(GRID, SIZE//GRID, GRID, SIZE//GRID).mean((1, 3))
            rough = share + gaussian_filter(rng.normal(size=share.shape), 1)*.6 > .5
            if rough.mean() > .01: masks.append(rough.repeat(SIZE//GRID, 0).repeat(SIZE//GRID, 1))
        if masks: yield a['file_name'], image, np.stack(masks)


def iou(a, b): return (a & b).sum()/(a | b).sum() if (a | b).any() else 1.


def pydensecrf_of(dcrf, image, prob, n_iter, gauss_weight, gauss_sxy, bilateral_weight, bilateral_sxy, bilateral_srgb):
    d = dcrf.DenseCRF2D(image.shape[1], image.shape[0], len(prob))
    d.setUnaryEnergy(np.ascontiguousarray(-np.log(prob.clip(1e-5, 1)).reshape(len(prob), -1)))
    d.addPairwiseGaussian(sxy=gauss_sxy, compat=gauss_weight)
    d.addPairwiseBilateral(sxy=bilateral_sxy, srgb=bilateral_srgb, rgbim=image, compat=bilateral_weight)
    return np.array(d.inference(n_iter)).reshape(prob.shape)


def soften(mask): return np.stack([np.where(mask, .2689414, .7310586), np.where(mask, .7310586, .2689414)]).astype(np.float32)


def timed(sides, rounds):
    "Median seconds (wall, CPU) and last result of each of {name: function}, in turns."
    seconds, results = {k: [] for k in sides}, {}
    for _ in range(rounds):
        for k, f in sides.items():
            results[k], t = clock(f)
            seconds[k].append(t)
    return {k: tuple(map(statistics.median, zip(*v))) for k, v in seconds.items()}, results


def stego(dcrf, todo, labels):
    for name, image, _ in todo:
        prob = np.stack([gaussian_filter(np.random.default_rng(i).normal(size=(SIZE, SIZE)), 20)*60 for i in range(labels)])
        prob = (np.exp(prob - prob.max(0))/np.exp(prob - prob.max(0)).sum(0)).astype(np.float32)
        sides = {'ours': lambda: dense_crf(image, prob, **STEGO)}
        if dcrf: sides['pydensecrf'] = lambda: pydensecrf_of(dcrf, image, prob, **STEGO)
        t, r = timed(sides, 1)
        yield f"{name}: ours {t['ours'][1]:.2f} s" + (f", pydensecrf {t['pydensecrf'][1]:.2f} s (CPU), ratio {t['pydensecrf'][1]/t['ours'][1]:.2f}, same label on {(r['ours'].argmax(0) == r['pydensecrf'].argmax(0)).mean():.4f} of the pixels." if dcrf else '.') + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=3); parser.add_argument('--photos', type=int, default=26); parser.add_argument('--labels', type=int, default=27); parser.add_argument('--out')
    args = parser.parse_args()
    try: import pydensecrf.densecrf as dcrf
    except ImportError: dcrf = None; print('pydensecrf is not importable here: no comparison, only our own times')
    torch.set_num_threads(1)
    _, (first, _) = clock(lambda: refine_masks(np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=bool)[None]))
    todo, table = list(photos(args.photos)), ['| photo | masks | pydensecrf, CPU s | ours, CPU s | ratio, CPU | ratio, wall | IoU, worst mask | of the masks that MaskCut keeps |', '|---|---|---|---|---|---|---|---|']
    rows, threads = [], []
    for name, image, masks in todo:
        sides = {'ours': lambda: refine_masks(image, masks), 'one': lambda: refine_masks(image, masks[:1]), 'two threads': lambda: refine_masks(image, masks, n_threads=2)}
        if dcrf: sides['pydensecrf'] = lambda: [pydensecrf_of(dcrf, image, soften(m), **MASKCUT).argmax(0) == 1 for m in masks]
        t, r = timed(sides, args.rounds)
        threads.append(t['ours'][0]/t['two threads'][0])
        if not dcrf: table.append(f"| {name} | {len(masks)} | - | {t['ours'][1]:.3f} | - | - | - | - |"); continue
        ours, theirs = t['ours'], t['pydensecrf']
        each = [(iou(a, b), iou(m, a) >= .5, iou(m, b) >= .5) for m, a, b in zip(masks, r['ours'], r['pydensecrf'])]
        kept = [v for v, a, b in each if a or b]
        rows.append(dict(cpu=theirs[1]/ours[1], wall=theirs[0]/ours[0], one=theirs[1]/len(masks)/t['one'][1], iou=min(v for v, *_ in each), kept=min(kept, default=1.), n_kept=len(kept), differ=sum(a != b for _, a, b in each)))
        table.append(f"| {name} | {len(masks)} | {theirs[1]:.3f} | {ours[1]:.3f} | {rows[-1]['cpu']:.2f} | {rows[-1]['wall']:.2f} | {rows[-1]['iou']:.4f} | {f'{min(kept):.4f}' if kept else 'none'} |")
        print(table[-1], flush=True)
    column = lambda k: [r[k] for r in rows]
    n_masks = sum(len(m) for *_, m in todo)
    lines = [*heading('Dense CRF against pydensecrf', 1, ('torch', 'numba', 'numpy')), 'MaskCut constants, 480 x 480 px; one lattice a photo and one channel a mask here, one CRF of two labels a mask there; one thread each.', '']
    if dcrf: lines += ['| | median | least |', '|---|---|---|', *(f'| {what} | **{statistics.median(column(k)):.2f}** | {min(column(k)):.2f} |' for what, k in
                       (('ratio of CPU times', 'cpu'), ('ratio of wall times', 'wall'), ('ratio of CPU times, a photo of one mask alone', 'one'))),
                       f"| IoU of both results, worst mask of a photo | {statistics.median(column('iou')):.4f} | {min(column('iou')):.4f} |",
                       f"| the same over the {sum(column('n_kept'))} of {n_masks} masks that MaskCut keeps (IoU with the mask before the CRF of .5 or more) | {statistics.median(column('kept')):.4f} | **{min(column('kept')):.4f}** |", '',
                       f"IoU below .98: {sum(v < .98 for v in column('iou'))} of {len(rows)} photos, {sum(v < .98 for v in column('kept'))} where only kept masks count; a mask kept on one side only: {sum(column('differ'))}. "
                       'What is left of a mask that the CRF wipes out is a handful of pixels; both sides then drop it.', '']
    lines += [*table, '', f'Two threads here against one: {statistics.median(threads):.2f} times as fast (wall) on {n_masks/len(todo):.1f} masks a photo. The first call, which reads or compiles the loops: {first:.1f} s.', '']
    image, masks = todo[0][1:]
    t, r = timed({'ours': lambda: refine_masks(image, masks), 'torch': lambda: refine_masks(image, masks, compiled=False)}, args.rounds)
    lines += [f"Torch operations (the path of a GPU) instead of compiled loops, on this CPU: {t['torch'][1]/t['ours'][1]:.1f} times as long, IoU {min(iou(a, b) for a, b in zip(*r.values())):.4f}.", '',
              f'## STEGO constants, {args.labels} labels', '', *stego(dcrf, todo[:3], args.labels)]
    publish(lines, args.out)


if __name__ == '__main__': main()
