"""Normalized cut and MaskCut against the dense reference: equal masks, and how much faster.

    python benchmarks/ncut.py [--timed 9] [--grid 60] [--other-grid 48] [--hard-grid 40] [--threads 2] [--speed-only | --masks-only] [--out benchmarks/results/ncut.md]

The reference side solves (D - A) x = lambda D x by `scipy.linalg.eigh` in double precision, a new affinity each round, as the
published method describes (CutLER, section 3.2). Images: photographs of `../shared/data/coco26` (or of the folder named by
U2SEG_SHARED_DATA), once with low-level features and once with an embedding of their true segments plus noise, 768-d, standing in
for a trained ViT; and generated hard graphs. Everything is a function of fixed seeds. The first `--timed` images have `--grid`
squared tokens and are timed; the rest are smaller, because the reference's time grows with the third power of the tokens.
"""
import argparse, os
from functools import partial
from pathlib import Path

import cv2, numpy as np, scipy.linalg, torch, torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from machine import clock, heading, publish
from u2seg import maskcut as module, ncut as solver
from u2seg.maskcut import cut_rounds, maskcut

SHARED = Path(os.environ.get('U2SEG_SHARED_DATA', Path(__file__).resolve().parents[2]/'shared'/'data'))
TAU, N_MASKS, DIM = .15, 3, 768

# --- the reference, from the description of the method

def reference_region(x):
    side = x > x.mean()
    seed = np.argmax(np.abs(x))
    corners = int(side[0, 0]) + int(side[0, -1]) + int(side[-1, 0]) + int(side[-1, -1])
    reverse = corners >= 3 or not side.flat[seed]
    if reverse: x, side = -x, np.logical_not(side)
    labels, _ = ndimage.label(side)
    return labels == labels.flat[np.argmax(x)]

def reference_rounds(keys, tau=TAU, n_masks=N_MASKS, eps=1e-5):
    "Per round: output mask [h, w], gap, and whether the sign of the eigenvector decides the region."
    d, h, w = keys.shape
    painted, before, out = np.zeros((h, w), bool), None, []
    for i in range(n_masks):
        f = F.normalize(keys.flatten(1)*torch.from_numpy(~painted).flatten(), dim=0)
        a = (f.T @ f).numpy() > tau
        a = np.where(a.astype(np.float64) == 0, eps, a)
        degree = np.diag(a.sum(1))
        values, vectors = scipy.linalg.eigh(degree - a, degree, subset_by_index=[1, 2])
        x = vectors[:, 0].reshape(h, w)
        region = reference_region(x)
        sign_matters = bool((region != reference_region(-x)).any())
        if i:
            union = (region | before).sum()
            if (union and (region & before).sum()/union > .5) or region.mean() <= .01: region = np.zeros_like(region)
        out.append((region & ~painted, values[1] - values[0], sign_matters)) # outputs are disjoint
        painted, before = painted | region, region
    return out

# --- images

def smooth_noise(rng, channels, grid, sigma):
    z = np.stack([cv2.GaussianBlur(rng.standard_normal((grid, grid)).astype(np.float32), (0, 0), sigma) for _ in range(channels)])
    return z/z.std()

def low_level(path, seed, grid):
    "LAB, Gabor energy and soft position, in a random non-linear embedding with a common mean."
    rng = np.random.default_rng(seed)
    image = np.asarray(Image.open(path).convert('RGB').resize((8*grid, 8*grid), Image.Resampling.LANCZOS))
    lab = cv2.cvtColor(image.astype(np.float32)/255, cv2.COLOR_RGB2LAB)/np.float32([50, 30, 30])
    channels = list(lab.transpose(2, 0, 1))
    for wavelength in (4, 8, 16):
        for k in range(4):
            kernel = cv2.getGaborKernel((31, 31), wavelength/2, k*np.pi/4, wavelength, .7)
            kernel -= kernel.mean(); kernel /= np.abs(kernel).sum()
            channels.append(cv2.GaussianBlur(np.abs(cv2.filter2D(lab[..., 0], -1, kernel)), (0, 0), 4))
    x = F.avg_pool2d(torch.from_numpy(np.stack(channels))[None], 8)[0]
    x = (x - x.mean((1, 2), keepdim=True))/x.std((1, 2), keepdim=True)
    y = torch.linspace(0, np.pi, grid)
    waves = [torch.cos(k*y) for k in (1, 2)]
    place = torch.stack([v.expand(grid, grid) for v in waves] + [v.expand(grid, grid).T for v in waves])
    x = torch.cat([x, place]).flatten(1)
    mix = torch.from_numpy(rng.standard_normal((DIM, len(x))).astype(np.float32))/len(x)**.5
    keys = torch.tanh(mix @ x) + .35*torch.from_numpy(rng.standard_normal((DIM, 1)).astype(np.float32))
    return keys.view(DIM, grid, grid)

def semantic(path, seed, grid):
    "An embedding of the true segments, with smooth and white noise and a common mean: what a trained ViT might give."
    rng = np.random.default_rng(1000 + seed)
    rgb = np.asarray(Image.open(path).convert('RGB').resize((8*grid, 8*grid), Image.Resampling.NEAREST)).astype(int)
    ids = rgb @ [1, 256, 65536]
    x = np.zeros((grid*grid, DIM))
    for i in np.unique(ids): x += (ids == i).reshape(grid, 8, grid, 8).mean((1, 3)).reshape(-1, 1)*rng.standard_normal((1, DIM))
    x += smooth_noise(rng, 24, grid, 3).reshape(24, -1).T @ rng.standard_normal((24, DIM))/24**.5
    x += .5*rng.standard_normal(x.shape) + .5*rng.standard_normal((1, DIM))
    return torch.from_numpy(x.T.astype(np.float32)).view(DIM, grid, grid)

def blobs(rng, grid, n):
    "Label map: background 0 and n random discs."
    yy, xx = np.mgrid[0:grid, 0:grid]/grid
    label = np.zeros((grid, grid), int)
    for i in range(n):
        cy, cx, r = rng.uniform(.15, .85, 2).tolist() + [rng.uniform(.1, .25)]
        label[(yy - cy)**2 + (xx - cx)**2 < r*r] = i + 1
    return label

def hard(kind, seed, grid, dim=96):
    rng = np.random.default_rng([seed, HARD.index(kind)])
    label = blobs(rng, grid, 4).ravel()
    x = rng.standard_normal((5, dim))[label] + .6*rng.standard_normal((grid*grid, dim))
    if kind == 'isolated tokens':
        lonely = rng.random(len(x)) < .1
        x[lonely] = 3*rng.standard_normal((lonely.sum(), dim))
    elif kind == 'nearly disconnected':
        x = np.eye(5, dim)[label] + .02*rng.standard_normal(x.shape)
        bridge = rng.choice(len(x), 12); x[bridge] = .5*x[bridge] + .5*np.eye(5, dim)[rng.integers(0, 5, 12)]
    elif kind == 'dense': x += .73*rng.standard_normal((1, dim))
    elif kind == 'sparse': x = .7*rng.standard_normal((5, dim))[label] + 1.6*rng.standard_normal(x.shape)
    elif kind == 'smooth manifold':
        t = (np.mgrid[0:grid, 0:grid]/grid).reshape(2, -1).T @ rng.standard_normal((2, 2))*4
        x = np.concatenate([np.cos(t), np.sin(t)], 1) @ rng.standard_normal((4, dim)) + .3*rng.standard_normal(x.shape)
    elif kind == 'equal groups':
        order = np.arange(grid*grid)*6//(grid*grid)
        x = np.eye(6, dim)[order] + .1*rng.standard_normal(x.shape)
    elif kind == 'zero vectors': x[rng.random(len(x)) < .2] = 0
    elif kind == 'nested': x += rng.standard_normal((2, dim))[(label > 0).astype(int)]*1.5
    elif kind == 'mirror':
        x = x.reshape(grid, grid, dim); x = (x + x[:, ::-1]).reshape(-1, dim) + .4*rng.standard_normal((grid*grid, dim))
    return torch.from_numpy(x.T.astype(np.float32)).reshape(dim, grid, grid)

HARD = ['isolated tokens', 'nearly disconnected', 'dense', 'sparse', 'smooth manifold', 'equal groups', 'zero vectors', 'nested', 'mirror']

# --- the comparison

def iou(a, b):
    union = (a | b).sum()
    return (a & b).sum()/union if union else 1.

def our_rounds(keys):
    "Output mask [h, w] of each round, before empty ones are left out."
    out, covered = [], False
    for _, _, accepted in cut_rounds(keys[None], tau=TAU, n_masks=N_MASKS):
        out.append(accepted[0] & ~covered)
        covered = covered | accepted[0]
    return out

def worst(ours, theirs): return min(iou(a, b[0]) for a, b in zip(ours, theirs)) # two empty masks are equal

def row(name, keys, theirs):
    "What one image shows: worst IoU of its masks, smallest gap, and whether any round depends on the sign."
    return dict(name=name, keys=keys, theirs=theirs, iou=worst(our_rounds(keys), theirs), gap=min(t[1] for t in theirs), signed=any(t[2] for t in theirs))

# --- tables

def mask_table(rows):
    lines = ['| images | n | tokens | worst IoU | IoU < .99 where gap > 1e-3 | gap <= 1e-3 | sign decides | of these IoU < .99 |', '|---|---|---|---|---|---|---|---|']
    names = list(dict.fromkeys(r['name'] for r in rows))
    for name in [*names, '**all**']:
        of = [r for r in rows if name in (r['name'], '**all**')]
        posed = [r for r in of if r['gap'] > 1e-3]
        signed, sizes = [r for r in posed if r['signed']], sorted({r['keys'].shape[1]*r['keys'].shape[2] for r in of})
        lines.append(f"| {name} | {len(of)} | {', '.join(map(str, sizes))} | {min((r['iou'] for r in posed), default=1):.4f} | {sum(r['iou'] < .99 for r in posed)} | "
                     f"{len(of) - len(posed)} | {len(signed)} | {sum(r['iou'] < .99 for r in signed)} |")
    return lines + ['', 'Worst IoU and the columns of the sign count images whose gap exceeds 1e-3 in every round; elsewhere the cut is ill posed in the reference itself.']

def rule_table(rows):
    "Masks that change with the residual at which Lanczos stops, and the products with the links that it takes."
    lines, product = ['| stop at residual | products a round, median | most | images with IoU < .99 (gap > 1e-3) |', '|---|---|---|---|'], solver.link_product
    for tol in (1e-3, 1e-4, 1e-5, 2e-6):
        steps, bad = [], 0
        def counted(links, u): steps[-1] += 1; return product(links, u)
        def fiedler(g): steps.append(0); solver.link_product = counted; y = solver.fiedler(g, tol=tol); solver.link_product = product; return y
        module.fiedler = fiedler
        for r in rows:
            if r['gap'] > 1e-3: bad += worst(our_rounds(r['keys']), r['theirs']) < .99
        lines.append(f'| {tol:.0e} | {np.median(steps):.0f} | {max(steps)} | {bad} |')
    module.fiedler = solver.fiedler
    steps = []
    def counted(links, u): steps[-1] += 1; return product(links, u)
    def orient(g, y): steps.append(0); solver.link_product = counted; y = solver.orient(g, y); solver.link_product = product; return y
    module.orient = orient
    for r in rows: our_rounds(r['keys'])
    module.orient = solver.orient
    return lines + ['', f'The sign is asked for in {len(steps)} rounds and takes {np.median(steps or [0]):.0f} products more (median; most {max(steps, default=0)}).']

def product_line(keys):
    links = solver.token_links(keys.flatten(1)[None], tau=TAU)
    u, wide = torch.randn(1, links.shape[1]), links.float()
    exact, taken = links[0].double() @ u[0].double(), dict(integer=[], float32=[])
    for _ in range(15):
        for name, m in dict(integer=links, float32=wide).items():
            y, t = clock(lambda: solver.link_product(m, u))
            taken[name].append((*t, ((y[0] - exact).abs().max()/exact.abs().max()).item()))
    a, b = (np.median(v, 0) for v in taken.values())
    return f'One product with the links of {len(exact)} tokens: {1e3*a[0]:.2f} ms in integers (error {a[2]:.0e}), {1e3*b[0]:.2f} ms in float32 (error {b[2]:.0e}): **{b[0]/a[0]:.1f}x** (wall; CPU {b[1]/a[1]:.1f}x).'

def speed_table(times, grid, threads, keys):
    wall, cpu = ([t[k]/o[k] for t, o in times] for k in (0, 1))
    (tw, tc), (ow, oc) = (np.median([x[k] for x in times], 0) for k in (0, 1))
    return ['## Speed of the whole chain', '',
            f'Gram matrix, {N_MASKS} rounds, regions and masks of {len(times)} photographs, {grid**2} tokens, {DIM}-d, {threads} thread{"s"*(threads > 1)}; the dense reference once, ours five times an image.', '',
            '| | dense reference, s | ours, s | ratio, median of the images | least | most |', '|---|---|---|---|---|---|',
            f'| wall | {tw:.2f} | {ow:.3f} | **{np.median(wall):.0f}** | {min(wall):.0f} | {max(wall):.0f} |', f'| CPU | {tc:.2f} | {oc:.3f} | **{np.median(cpu):.0f}** | {min(cpu):.0f} | {max(cpu):.0f} |', '',
            product_line(keys)]

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--photos', type=int, default=26); parser.add_argument('--timed', type=int, default=9); parser.add_argument('--seeds', type=int, default=4)
    parser.add_argument('--grid', type=int, default=60); parser.add_argument('--other-grid', type=int, default=48); parser.add_argument('--hard-grid', type=int, default=40)
    parser.add_argument('--threads', type=int, default=2); parser.add_argument('--speed-only', action='store_true'); parser.add_argument('--masks-only', action='store_true'); parser.add_argument('--out')
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if not (SHARED/'coco26').is_dir(): raise SystemExit(f'{SHARED/"coco26"}: the photographs are not there; name their folder in U2SEG_SHARED_DATA')
    photos, truths = (sorted((SHARED/'coco26'/f).iterdir())[:a.photos] for f in ('images', 'panoptic'))
    todo = [t for i, (p, q) in enumerate(zip(photos, truths)) for t in (('photographs, low-level features', partial(low_level, p, i)), ('photographs, embedded segments', partial(semantic, q, i)))]
    rows, times = [], []
    if a.speed_only: todo, a.seeds = todo[:a.timed], 0
    if a.masks_only: a.timed = 0
    for i, (name, make) in enumerate(todo):
        keys = make(a.grid if i < a.timed else a.other_grid)
        if not i: maskcut(keys, tau=TAU, n_masks=N_MASKS)                      # first calls
        theirs, t = clock(lambda: reference_rounds(keys))
        rows.append(row(name, keys, theirs))
        if i < a.timed: times.append((t, clock(lambda: maskcut(keys, tau=TAU, n_masks=N_MASKS), 5)[1]))
        print(i, name, f"{rows[-1]['iou']:.4f} gap {rows[-1]['gap']:.1e}", *([f'{t[0]:.1f} s, ours {times[-1][1][0]:.3f} s'] if i < a.timed else []), flush=True)
    for kind in HARD:
        for seed in range(a.seeds):
            keys = hard(kind, seed, a.hard_grid)
            rows.append(row(f'hard: {kind}', keys, reference_rounds(keys)))
    speed = speed_table(times, a.grid, a.threads, rows[0]['keys']) if times else []
    masks = [] if a.speed_only else ['## Equal masks', '', *mask_table(rows), '', '## When to stop', '', *rule_table(rows), '']
    publish([*heading('Normalized cut against the dense reference', a.threads, ('torch', 'scipy', 'numpy')), *masks, *speed], a.out)

if __name__ == '__main__': main()
