"""Normalized cut and MaskCut against the dense reference: equal masks, and how many times as fast.

    python benchmarks/ncut.py [--photos DIR] [--large 9] [--grid 60] [--other-grid 48] [--hard-grid 40] [--threads 2]
                              [--speed-only] [--out benchmarks/results/ncut.md]

The reference side solves (D - A) x = lambda D x by `scipy.linalg.eigh` in double precision, a new affinity each round,
as the published method describes (CutLER, section 3.2). Images: drawn scenes with their true segments, or, with
--photos, photographs DIR/images/*.jpg and their COCO panoptic maps DIR/panoptic/*.png, in the same order. Each gives
low-level features, and an embedding of its true segments plus noise, 768-d, standing in for a trained ViT. Then
generated hard graphs. Everything is a function of fixed seeds. The first `--large` images have `--grid` squared tokens;
the rest are smaller, because the reference's time grows with the third power of the tokens.
"""

import argparse, json, os, subprocess, sys
from functools import partial
from pathlib import Path

import cv2, numpy as np, scipy.linalg, torch, torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from machine import RATIO, SIDES, alternate, clock, heading, publish, ratios, spread
from u2seg import maskcut as module, ncut as solver
from u2seg.images import read_image
from u2seg.maskcut import cut_rounds, maskcut
from u2seg.masks import read_ids
from u2seg.scenes import draw_scene

TAU, N_MASKS, DIM = 0.15, 3, 768

# --- the reference, from the description of the method


def reference_region(x):
    side = x > x.mean()
    seed = np.argmax(np.abs(x))
    corners = int(side[0, 0]) + int(side[0, -1]) + int(side[-1, 0]) + int(side[-1, -1])
    reverse = corners >= 3 or not side.flat[seed]
    if reverse:
        x, side = -x, np.logical_not(side)
    labels, _ = ndimage.label(side)
    return labels == labels.flat[np.argmax(x)]


def reference_rounds(keys, tau=TAU, n_masks=N_MASKS, eps=1e-5):
    "Per round: output mask [h, w], gap, and whether the sign of the eigenvector decides the region."
    d, h, w = keys.shape
    painted, before, out = np.zeros((h, w), bool), None, []
    for i in range(n_masks):
        f = F.normalize(keys.flatten(1) * torch.from_numpy(~painted).flatten(), dim=0)
        a = (f.T @ f).numpy() > tau
        a = np.where(a.astype(np.float64) == 0, eps, a)
        degree = np.diag(a.sum(1))
        values, vectors = scipy.linalg.eigh(degree - a, degree, subset_by_index=[1, 2])
        x = vectors[:, 0].reshape(h, w)
        region = reference_region(x)
        sign_matters = bool((region != reference_region(-x)).any())
        if i:
            union = (region | before).sum()
            if (union and (region & before).sum() / union > 0.5) or region.mean() <= 0.01:
                region = np.zeros_like(region)
        out.append((region & ~painted, values[1] - values[0], sign_matters))  # outputs are disjoint
        painted, before = painted | region, region
    return out


# --- images


def sources(n, photos=None):
    "n pairs of an image uint8 [H, W, 3] and its segments int [H, W]: photographs of a folder, or drawn scenes."
    if photos is None:
        for i in range(n):
            yield draw_scene([1, i], ('objects', 'scenes')[i % 2])[:2]
        return
    images, maps = (sorted((Path(photos) / f).glob(ext))[:n] for f, ext in (('images', '*.jpg'), ('panoptic', '*.png')))
    if not images or len(images) != len(maps):
        raise SystemExit(
            f'{photos}: images/*.jpg and panoptic/*.png must be there, one map an image; '
            f'got {len(images)} and {len(maps)}'
        )
    for image, ids in zip(images, maps):
        yield read_image(image), read_ids(ids)


def kind_of(photos):
    return 'drawn scenes' if photos is None else 'photographs'


def smooth_noise(rng, channels, grid, sigma):
    white = [rng.standard_normal((grid, grid)).astype(np.float32) for _ in range(channels)]
    z = np.stack([cv2.GaussianBlur(w, (0, 0), sigma) for w in white])
    return z / z.std()


def low_level(image, seed, grid):
    "LAB, Gabor energy and soft position, in a random non-linear embedding with a common mean."
    rng = np.random.default_rng(seed)
    image = np.asarray(Image.fromarray(image).resize((8 * grid, 8 * grid), Image.Resampling.LANCZOS))
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) / np.float32([50, 30, 30])
    channels = list(lab.transpose(2, 0, 1))
    for wavelength in (4, 8, 16):
        for k in range(4):
            kernel = cv2.getGaborKernel((31, 31), wavelength / 2, k * np.pi / 4, wavelength, 0.7)
            kernel -= kernel.mean()
            kernel /= np.abs(kernel).sum()
            channels.append(cv2.GaussianBlur(np.abs(cv2.filter2D(lab[..., 0], -1, kernel)), (0, 0), 4))
    x = F.avg_pool2d(torch.from_numpy(np.stack(channels))[None], 8)[0]
    x = (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True)
    y = torch.linspace(0, np.pi, grid)
    waves = [torch.cos(k * y) for k in (1, 2)]
    place = torch.stack([v.expand(grid, grid) for v in waves] + [v.expand(grid, grid).T for v in waves])
    x = torch.cat([x, place]).flatten(1)
    mix = torch.from_numpy(rng.standard_normal((DIM, len(x))).astype(np.float32)) / len(x) ** 0.5
    keys = torch.tanh(mix @ x) + 0.35 * torch.from_numpy(rng.standard_normal((DIM, 1)).astype(np.float32))
    return keys.view(DIM, grid, grid)


def semantic(ids, seed, grid):
    "An embedding of the true segments, with smooth and white noise and a common mean: what a trained ViT might give."
    rng = np.random.default_rng(1000 + seed)
    ids = np.asarray(Image.fromarray(ids.astype(np.int32)).resize((8 * grid, 8 * grid), Image.Resampling.NEAREST))
    x = np.zeros((grid * grid, DIM))
    for i in np.unique(ids):
        x += (ids == i).reshape(grid, 8, grid, 8).mean((1, 3)).reshape(-1, 1) * rng.standard_normal((1, DIM))
    x += smooth_noise(rng, 24, grid, 3).reshape(24, -1).T @ rng.standard_normal((24, DIM)) / 24**0.5
    x += 0.5 * rng.standard_normal(x.shape) + 0.5 * rng.standard_normal((1, DIM))
    return torch.from_numpy(x.T.astype(np.float32)).view(DIM, grid, grid)


def blobs(rng, grid, n):
    "Label map: background 0 and n random discs."
    yy, xx = np.mgrid[0:grid, 0:grid] / grid
    label = np.zeros((grid, grid), int)
    for i in range(n):
        cy, cx, r = rng.uniform(0.15, 0.85, 2).tolist() + [rng.uniform(0.1, 0.25)]
        label[(yy - cy) ** 2 + (xx - cx) ** 2 < r * r] = i + 1
    return label


def hard(kind, seed, grid, dim=96):
    rng = np.random.default_rng([seed, HARD.index(kind)])
    label = blobs(rng, grid, 4).ravel()
    x = rng.standard_normal((5, dim))[label] + 0.6 * rng.standard_normal((grid * grid, dim))
    if kind == 'isolated tokens':
        lonely = rng.random(len(x)) < 0.1
        x[lonely] = 3 * rng.standard_normal((lonely.sum(), dim))
    elif kind == 'nearly disconnected':
        x = np.eye(5, dim)[label] + 0.02 * rng.standard_normal(x.shape)
        bridge = rng.choice(len(x), 12)
        x[bridge] = 0.5 * x[bridge] + 0.5 * np.eye(5, dim)[rng.integers(0, 5, 12)]
    elif kind == 'dense':
        x += 0.73 * rng.standard_normal((1, dim))
    elif kind == 'sparse':
        x = 0.7 * rng.standard_normal((5, dim))[label] + 1.6 * rng.standard_normal(x.shape)
    elif kind == 'smooth manifold':
        t = (np.mgrid[0:grid, 0:grid] / grid).reshape(2, -1).T @ rng.standard_normal((2, 2)) * 4
        x = np.concatenate([np.cos(t), np.sin(t)], 1) @ rng.standard_normal((4, dim)) + 0.3 * rng.standard_normal(
            x.shape
        )
    elif kind == 'equal groups':
        order = np.arange(grid * grid) * 6 // (grid * grid)
        x = np.eye(6, dim)[order] + 0.1 * rng.standard_normal(x.shape)
    elif kind == 'zero vectors':
        x[rng.random(len(x)) < 0.2] = 0
    elif kind == 'nested':
        x += rng.standard_normal((2, dim))[(label > 0).astype(int)] * 1.5
    elif kind == 'mirror':
        x = x.reshape(grid, grid, dim)
        x = (x + x[:, ::-1]).reshape(-1, dim) + 0.4 * rng.standard_normal((grid * grid, dim))
    return torch.from_numpy(x.T.astype(np.float32)).reshape(dim, grid, grid)


HARD = [
    'isolated tokens',
    'nearly disconnected',
    'dense',
    'sparse',
    'smooth manifold',
    'equal groups',
    'zero vectors',
    'nested',
    'mirror',
]

# --- the comparison


def iou(a, b):
    union = (a | b).sum()
    return (a & b).sum() / union if union else 1.0


def our_rounds(keys):
    "Output mask [h, w] of each round, before empty ones are left out."
    out, covered = [], False
    for _, _, accepted in cut_rounds(keys[None], tau=TAU, n_masks=N_MASKS):
        out.append(accepted[0] & ~covered)
        covered = covered | accepted[0]
    return out


def worst(ours, theirs):
    return min(iou(a, b[0]) for a, b in zip(ours, theirs))  # two empty masks are equal


def row(name, keys, theirs):
    "What one image shows: worst IoU of its masks, smallest gap, and whether any round depends on the sign."
    return dict(
        name=name,
        keys=keys,
        theirs=theirs,
        iou=worst(our_rounds(keys), theirs),
        gap=min(t[1] for t in theirs),
        signed=any(t[2] for t in theirs),
    )


# --- tables


def mask_table(rows):
    columns = [
        'images',
        'n',
        'tokens',
        'worst IoU',
        'IoU < .99 where gap > 1e-3',
        'gap <= 1e-3',
        'sign decides',
        'of these IoU < .99',
    ]
    lines = [f'| {" | ".join(columns)} |', '|---|---|---|---|---|---|---|---|']
    names = list(dict.fromkeys(r['name'] for r in rows))
    for name in [*names, '**all**']:
        of = [r for r in rows if name in (r['name'], '**all**')]
        posed = [r for r in of if r['gap'] > 1e-3]
        signed = [r for r in posed if r['signed']]
        sizes = sorted({r['keys'].shape[1] * r['keys'].shape[2] for r in of})
        cells = [
            name,
            len(of),
            ', '.join(map(str, sizes)),
            f"{min((r['iou'] for r in posed), default=1):.4f}",
            sum(r['iou'] < 0.99 for r in posed),
            len(of) - len(posed),
            len(signed),
            sum(r['iou'] < 0.99 for r in signed),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines + [
        '',
        'Worst IoU and the columns of the sign count images whose gap exceeds 1e-3 in every round; '
        'elsewhere the cut is ill posed in the reference itself.',
    ]


class Counted:
    "Calls of a step of the solver, each with the products with the affinity that it takes."

    def __init__(self, call):
        self.call, self.steps = call, []

    def __call__(self, *args):
        product = solver.affinity_product
        self.steps.append(0)

        def counted(affinity, u):
            self.steps[-1] += 1
            return product(affinity, u)

        solver.affinity_product = counted
        try:
            return self.call(*args)
        finally:
            solver.affinity_product = product


def rule_table(rows):
    "Masks that change with the residual at which Lanczos stops, and the products with the affinity that it takes."
    lines = [
        '| stop at residual | products a round, median | most | images with IoU < .99 (gap > 1e-3) |',
        '|---|---|---|---|',
    ]
    for tol in (1e-3, 1e-4, 1e-5, 2e-6):
        module.fiedler = Counted(partial(solver.fiedler, tol=tol))
        bad = sum(worst(our_rounds(r['keys']), r['theirs']) < 0.99 for r in rows if r['gap'] > 1e-3)
        steps = module.fiedler.steps
        lines.append(f'| {tol:.0e} | {np.median(steps):.0f} | {max(steps)} | {bad} |')
    module.fiedler, module.orient = solver.fiedler, Counted(solver.orient)
    for r in rows:
        our_rounds(r['keys'])
    steps, module.orient = module.orient.steps, solver.orient
    return lines + [
        '',
        f'The sign is asked for in {len(steps)} rounds and takes {np.median(steps or [0]):.0f} '
        f'products more (median; most {max(steps, default=0)}).',
    ]


def product(n, threads, rounds=15):
    "Ratios (wall, CPU) of float32 to integers for one product with the affinity of n tokens, and the error of each."
    torch.set_num_threads(threads)
    rng = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 32, n, generator=rng) + 0.5 * torch.randn(1, 32, 1, generator=rng)
    affinity = solver.token_affinity(keys, tau=TAU)
    u, wide = torch.randn(1, n, generator=rng), affinity.float()
    exact = affinity[0].double() @ u[0].double()
    sides = dict(ours=lambda: solver.affinity_product(affinity, u), theirs=lambda: solver.affinity_product(wide, u))
    alternate(sides, 3)  # first calls
    results, taken = alternate(sides, rounds)
    error = {k: ((y[0] - exact).abs().max() / exact.abs().max()).item() for k, y in results.items()}
    return dict(ratios=ratios(taken['theirs'], taken['ours']), error=error)


AVX2 = dict(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2')


def product_table(n, threads):
    "The same in processes of their own, with all instructions of the CPU and with AVX2 alone."
    lines = [
        f'## One product with the affinity of {n} tokens',
        '',
        'How many times as long float32 takes as integers: median (least to most) of 15 runs of each, in turns. '
        'With AVX2 alone, as on a CPU without AVX-512, no instruction multiplies bytes and adds the sums.',
        '',
        '| instructions | threads | ratio, wall | ratio, CPU | error of integers | error of float32 |',
        '|---|---|---|---|---|---|',
    ]
    for name, env in (('all', {}), ('AVX2 alone', AVX2)):
        for t in sorted({1, threads}):
            call = [sys.executable, __file__, '--product', str(n), '--threads', str(t)]
            done = subprocess.run(call, check=True, capture_output=True, text=True, env={**os.environ, **env})
            found = json.loads(done.stdout)
            wall, cpu = map(spread, found['ratios'])
            ours, theirs = (f'{found["error"][k]:.0e}' for k in ('ours', 'theirs'))
            lines.append(f'| {name} | {t} | {wall} | {cpu} | {ours} | {theirs} |')
    return lines


def speed_table(times, name):
    lines = [
        '## Speed of the whole chain',
        '',
        f'Gram matrix, {N_MASKS} rounds, regions and masks of {name}, {DIM}-d; for each image in turn the '
        'dense reference once, and ours five times (median).',
        '',
        '| tokens | images | ratio, wall | ratio, CPU |',
        '|---|---|---|---|',
    ]
    for n, of in sorted(times.items()):
        wall, cpu = map(spread, ratios(*zip(*of)))
        lines.append(f'| {n} | {len(of)} | {wall} | {cpu} |')
    return [*lines, '']


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--photos', help='folder with images/*.jpg and panoptic/*.png (default: drawn scenes)')
    for name, value in dict(images=26, large=9, seeds=4, grid=60, other_grid=48, hard_grid=40, threads=2).items():
        parser.add_argument(f'--{name.replace("_", "-")}', type=int, default=value)
    parser.add_argument('--speed-only', action='store_true')
    parser.add_argument('--product', type=int, help=argparse.SUPPRESS)
    parser.add_argument('--out')
    return parser.parse_args()


def main():
    a = arguments()
    if a.product:
        return print(json.dumps(product(a.product, a.threads)))
    torch.set_num_threads(a.threads)
    name, todo, rows, times = kind_of(a.photos), [], [], {}
    for i, (image, ids) in enumerate(sources(a.images, a.photos)):
        todo += [
            (f'{name}, low-level features', partial(low_level, image, i)),
            (f'{name}, embedded segments', partial(semantic, ids, i)),
        ]
    if a.speed_only:
        todo, a.seeds = todo[: a.large], 0
    for i, (kind, make) in enumerate(todo):
        keys = make(a.grid if i < a.large else a.other_grid)
        if not i:
            maskcut(keys, tau=TAU, n_masks=N_MASKS)  # first calls
        theirs, t = clock(lambda: reference_rounds(keys))
        rows.append(row(kind, keys, theirs))
        _, mine = clock(lambda: maskcut(keys, tau=TAU, n_masks=N_MASKS), 5)
        times.setdefault(keys[0].numel(), []).append((t, mine))
        print(i, kind, f"{rows[-1]['iou']:.4f} gap {rows[-1]['gap']:.1e} ratio {t[0] / mine[0]:.1f}", flush=True)
    for kind in HARD:
        for seed in range(a.seeds):
            keys = hard(kind, seed, a.hard_grid)
            rows.append(row(f'hard: {kind}', keys, reference_rounds(keys)))
    masks = []
    if not a.speed_only:
        masks = ['## Equal masks', '', *mask_table(rows), '', '## When to stop', '', *rule_table(rows), '']
    speed = speed_table(times, name) + product_table(a.grid**2, a.threads)
    how = f'{SIDES} {RATIO}'
    title = heading('Normalized cut against the dense reference', a.threads, ('torch', 'scipy', 'numpy'), how)
    publish([*title, *masks, *speed], a.out)


if __name__ == '__main__':
    main()
