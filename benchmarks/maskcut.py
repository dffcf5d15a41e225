"""All that MaskCut does after the backbone, against the published procedure: equal masks, and how many times as fast.

    python benchmarks/maskcut.py [--photos DIR] [--images 6] [--grid 60] [--threads 2]
                                 [--out benchmarks/results/maskcut.md]

From keys of 480 px images (3600 tokens, 768-d) to run-length codes at the image's own size: three rounds, dense CRF,
holes, the agreement filter. The reference: a dense eigen-decomposition each round (see ncut.py here), pydensecrf on
each mask where it can be imported (github.com/lucasb-eyer/pydensecrf; without it both sides take our CRF, and it is not
timed), SciPy's hole filling, Pillow's resizing. Images and keys are those of ncut.py: drawn scenes, or the photographs
of --photos.
"""

import argparse

import numpy as np, torch
from PIL import Image
from scipy import ndimage

from machine import RATIO, SIDES, clock, heading, publish, ratios, spread
from ncut import DIM, N_MASKS, TAU, iou, kind_of, low_level, reference_rounds, semantic, sources
from u2seg.crf import refine_masks
from u2seg.images import resize_image, resize_mask
from u2seg.maskcut import maskcut, refine, score_mask
from u2seg.masks import encode_rle

try:
    import pydensecrf.densecrf as dcrf
except ImportError:
    dcrf = None


def reference_crf(picture, mask):
    p = np.stack([1.0 - mask, mask]).astype(np.float32)
    p = np.exp(p) / np.exp(p).sum(0)
    crf = dcrf.DenseCRF2D(mask.shape[1], mask.shape[0], 2)
    crf.setUnaryEnergy(np.ascontiguousarray(-np.log(p.clip(1e-5, 1)).reshape(2, -1)))
    crf.addPairwiseGaussian(sxy=3, compat=7)
    crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=np.ascontiguousarray(picture), compat=10)
    return np.array(crf.inference(10)).reshape(2, *mask.shape).argmax(0).astype(bool)


def reference(keys, picture, original):
    "Masks, and {step: seconds (wall, CPU)}."
    rounds, cut = clock(lambda: [r[0] for r in reference_rounds(keys) if r[0].any()])
    s = picture.shape[0] // keys.shape[1]
    coarse = [m.repeat(s, 0).repeat(s, 1) for m in rounds]

    def sharpen():
        if dcrf or not coarse:
            return [reference_crf(picture, m) for m in coarse]
        return list(refine_masks(picture, np.stack(coarse)))

    fine, crf = clock(sharpen)

    def rest():
        for a, b in zip(coarse, fine):
            b = ndimage.binary_fill_holes(b)
            if not b.any() or (a & b).sum() < 0.5 * (a | b).sum():
                continue
            soft = np.asarray(Image.fromarray(np.uint8(b * 255)).resize(original[::-1]))
            mask = soft > soft.max() / 2
            encode_rle(mask)
            yield mask

    out, last = clock(lambda: list(rest()))
    return out, dict(cut=cut, crf=crf if dcrf else (0.0, 0.0), rest=last)


def ours(keys, picture, original):
    masks, cut = clock(lambda: maskcut(keys, tau=TAU, n_masks=N_MASKS))
    (fine, agreement), crf = clock(lambda: refine(picture, masks, crf=True))

    def rest():
        for m, a in zip(fine, agreement):
            if a < 0.5 or not m.any():
                continue
            mask = resize_mask(m, original)
            encode_rle(mask)
            score_mask(m, a)
            yield mask

    out, last = clock(lambda: list(rest()))
    return out, dict(cut=cut, crf=crf, rest=last)


def roofline(n=3600, d=768, depth=12, tensor=400e12, single=50e12, memory=3e12):
    "Least time of an image on one H100, by counting: rates reached in practice, FLOP/s of bf16, of float32, bytes/s."
    pixels, points, channels = 480 * 480, 150_000, 3
    vit = (24 * n * d * d + 4 * n * n * d) * (depth - 1) + 2 * n * d * d
    gathers = 10 * (pixels * 6 * (8 + 4 * channels) * 2 + 6 * points * 4 * (2 + 4 * channels))
    steps = {
        'ViT-B/8, bf16: linear layers and attention': vit / tensor,
        'Gram matrix, float32': 2 * n * n * d / single,
        f'{N_MASKS} rounds of 24 products with float32 links': N_MASKS * 24 * 4 * n * n / memory,
        'dense CRF, 3 masks, 10 iterations of gathers (a quarter of the rate)': gathers / (memory / 4),
        'sort of the lattice keys': 6 * pixels * 16 * 8 / memory,
    }
    rows = [f'| {name} | {1e3 * t:.2f} |' for name, t in steps.items()]
    return [
        '## On a GPU, on paper',
        '',
        f'Arithmetic, not a measurement. One H100, reaching {tensor / 1e12:.0f} TFLOP/s in bf16, {single / 1e12:.0f} '
        f'in float32 and {memory / 1e12:.0f} TB/s; {n} tokens. Launches, waits of the host, and reading and resizing '
        'of images are not counted, so these are least times, which no run reaches.',
        '',
        '| step | least ms an image |',
        '|---|---|',
        *rows,
        f'| **all** | **{1e3 * sum(steps.values()):.1f}** |',
        '',
        'Filling holes and coding masks are left to the CPU, which needs several processes to keep up.',
    ]


STEPS = dict(
    cut='three rounds of normalized cut',
    crf='dense CRF' + ('; here with holes and agreement' if dcrf else ' (not timed on the reference\'s side)'),
    rest='holes, agreement, resizing, RLE',
    all='**all**' if dcrf else '**all but the CRF**',
)


def total(times, step):
    "(wall, CPU) of a step, or of all that both sides have timed."
    if step in times:
        return times[step]
    return tuple(sum(t[k] for s, t in times.items() if dcrf or s != 'crf') for k in (0, 1))


def table(rows):
    lines = ['| step | ratio, wall | ratio, CPU |', '|---|---|---|']
    for step, name in STEPS.items():
        if step == 'crf' and not dcrf:
            continue
        wall, cpu = map(spread, ratios(*([total(r[side], step) for r in rows] for side in (0, 1))))
        lines.append(f'| {name} | {wall} | {cpu} |')
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--photos', help='folder with images/*.jpg and panoptic/*.png (default: drawn scenes)')
    for name, value in dict(images=6, grid=60, threads=2).items():
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--out')
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    rows, agree = [], []
    for i, (image, ids) in enumerate(sources(a.images, a.photos)):
        keys = semantic(ids, i, a.grid) if i % 2 else low_level(image, i, a.grid)
        picture, runs = resize_image(image, (8 * a.grid, 8 * a.grid)), []
        if not i:
            ours(keys, picture, image.shape[:2])  # first calls
        theirs, r = reference(keys, picture, image.shape[:2])
        for _ in range(3):
            mine, o = ours(keys, picture, image.shape[:2])
            runs.append(o)
        rows.append((r, {step: tuple(np.median([run[step] for run in runs], 0)) for step in r}))
        same = len(mine) == len(theirs)
        agree.append(min([iou(x, y) for x, y in zip(mine, theirs)], default=1.0) if same else 0.0)
        ratio = total(r, 'all')[0] / total(rows[-1][1], 'all')[0]
        print(f'{i}: ratio {ratio:.0f}, {len(mine)} masks, worst IoU {agree[-1]:.3f}', flush=True)
    about = (
        f'{len(rows)} {kind_of(a.photos)} at {8 * a.grid} px, patch 8, {DIM}-d, N = {N_MASKS}; from keys to '
        'run-length codes; for each image in turn the reference once, and ours three times (median).'
    )
    crf = 'different numerics of the CRF included' if dcrf else 'the same CRF on both sides'
    untimed = (
        ''
        if dcrf
        else (
            'The CRF is not timed (pydensecrf is not installed); its ratio is smaller, '
            '`benchmarks/results/crf.md`, and so is that of the whole. '
        )
    )
    title = heading('MaskCut after the backbone', a.threads, ('torch', 'scipy', 'numba'), f'{SIDES} {RATIO}')
    publish(
        [
            *title,
            about,
            '',
            *table(rows),
            '',
            f"Final masks: worst IoU of an image's masks {min(agree):.3f}, median {np.median(agree):.3f} ({crf}). "
            f'{untimed}The backbone itself: `benchmarks/features.py`.',
            '',
            *roofline(),
        ],
        a.out,
    )


if __name__ == '__main__':
    main()
