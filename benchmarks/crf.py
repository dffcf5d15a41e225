"""MaskCut's and STEGO's dense CRF against pydensecrf, on photographs, one thread: ratio of times, and IoU of the results.

    python benchmarks/crf.py [--rounds 3] [--photos 26] [--labels 27]

Photos: U2SEG_SHARED_DATA/coco26 (default: ../shared/data beside the repository). Masks: up to three of the largest objects of each photo, made rough:
shares of the cells of a 60 x 60 grid, disturbed by noise, cut at one half, as MaskCut's masks are. Both sides get the same masks in one process, in turns.
pydensecrf builds a lattice for each mask and takes two labels; ours builds one for the photo and takes a channel a mask. Without pydensecrf
(github.com/lucasb-eyer/pydensecrf; it has no release on PyPI) only our own times are printed.
"""
import argparse, os, statistics, time
from pathlib import Path

import numpy as np, torch
from PIL import Image
from scipy.ndimage import gaussian_filter

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


def iou(a, b): return (a & b).sum()/max((a | b).sum(), 1)


def pydensecrf_of(dcrf, image, prob, n_iter, gauss_weight, gauss_sxy, bilateral_weight, bilateral_sxy, bilateral_srgb):
    d = dcrf.DenseCRF2D(image.shape[1], image.shape[0], len(prob))
    d.setUnaryEnergy(np.ascontiguousarray(-np.log(prob.clip(1e-5, 1)).reshape(len(prob), -1)))
    d.addPairwiseGaussian(sxy=gauss_sxy, compat=gauss_weight)
    d.addPairwiseBilateral(sxy=bilateral_sxy, srgb=bilateral_srgb, rgbim=image, compat=bilateral_weight)
    return np.array(d.inference(n_iter)).reshape(prob.shape)


def soften(mask): return np.stack([np.where(mask, .2689414, .7310586), np.where(mask, .7310586, .2689414)]).astype(np.float32)


def timed(sides, rounds):
    "Median seconds and last result of each of {name: function}, in turns."
    seconds, results = {k: [] for k in sides}, {}
    for _ in range(rounds):
        for k, f in sides.items():
            start = time.perf_counter(); results[k] = f()
            seconds[k].append(time.perf_counter() - start)
    return {k: statistics.median(v) for k, v in seconds.items()}, results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=3); parser.add_argument('--photos', type=int, default=26); parser.add_argument('--labels', type=int, default=27)
    args = parser.parse_args()
    try: import pydensecrf.densecrf as dcrf
    except ImportError: dcrf = None; print('pydensecrf is not importable here: no comparison, only our own times')
    torch.set_num_threads(1)
    start = time.perf_counter()
    refine_masks(np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=bool)[None])
    print(f'first call (compiling, or reading the compiled loops): {time.perf_counter() - start:.1f} s\n')
    todo = list(photos(args.photos))
    print('MaskCut constants; one lattice a photo, one channel a mask, one thread\n\n| photo | masks | pydensecrf, s | ours, s | ratio | IoU, worst mask |\n|---|---|---|---|---|---|')
    ratios, singles, ious, threads, torches = [], [], [], [], []
    for name, image, masks in todo:
        sides = {'ours': lambda: refine_masks(image, masks), 'one': lambda: refine_masks(image, masks[:1]), 'two threads': lambda: refine_masks(image, masks, n_threads=2)}
        if dcrf: sides['pydensecrf'] = lambda: [pydensecrf_of(dcrf, image, soften(m), **MASKCUT).argmax(0) == 1 for m in masks]
        t, r = timed(sides, args.rounds)
        threads.append(t['ours']/t['two threads'])
        if not dcrf: print(f"| {name} | {len(masks)} | - | {t['ours']:.3f} | - | - |", flush=True); continue
        worst = min(iou(a, b) for a, b in zip(r['ours'], r['pydensecrf']))
        ratios.append(t['pydensecrf']/t['ours']); singles.append(t['pydensecrf']/len(masks)/t['one']); ious.append(worst)
        print(f"| {name} | {len(masks)} | {t['pydensecrf']:.3f} | {t['ours']:.3f} | {ratios[-1]:.2f} | {worst:.4f} |", flush=True)
    print(f'\ntwo threads against one: {statistics.median(threads):.2f} times as fast on {sum(len(m) for *_, m in todo)/len(todo):.1f} masks a photo')
    if dcrf: print(f'\n**median ratio {statistics.median(ratios):.2f}** (least {min(ratios):.2f}); a photo of one mask alone: {statistics.median(singles):.2f} (least {min(singles):.2f}); '
                   f'**IoU {statistics.fmean(ious):.4f}, least {min(ious):.4f}**, below .98 on {sum(v < .98 for v in ious)} of {len(ious)} photos')
    image, masks = todo[0][1:]
    t, r = timed({'ours': lambda: refine_masks(image, masks), 'torch': lambda: refine_masks(image, masks, compiled=False)}, args.rounds)
    print(f"\ntorch operations instead of compiled loops, on this CPU: {t['torch']/t['ours']:.1f} times as long, IoU {min(iou(a, b) for a, b in zip(*r.values())):.4f}")
    print(f'\nSTEGO constants, {args.labels} labels\n')
    for name, image, _ in todo[:3]:
        prob = np.stack([gaussian_filter(np.random.default_rng(i).normal(size=(SIZE, SIZE)), 20)*60 for i in range(args.labels)])
        prob = (np.exp(prob - prob.max(0))/np.exp(prob - prob.max(0)).sum(0)).astype(np.float32)
        sides = {'ours': lambda: dense_crf(image, prob, **STEGO)}
        if dcrf: sides['pydensecrf'] = lambda: pydensecrf_of(dcrf, image, prob, **STEGO)
        t, r = timed(sides, 1)
        print(f"{name}: ours {t['ours']:.2f} s" + (f", pydensecrf {t['pydensecrf']:.2f} s, ratio {t['pydensecrf']/t['ours']:.2f}, same label on {(r['ours'].argmax(0) == r['pydensecrf'].argmax(0)).mean():.4f} of the pixels" if dcrf else ''), flush=True)


if __name__ == '__main__': main()
