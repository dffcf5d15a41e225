"""Normalized cut and MaskCut against the dense reference: equal masks, and how much faster.

    python benchmarks/ncut.py [--photos 26] [--timed 9] [--grid 60] [--out benchmarks/results/ncut.md]

The reference side solves (D - A) x = lambda D x by `scipy.linalg.eigh` in double precision, a new affinity each round, as the
published method describes (CutLER, section 3.2). Images: photographs of `../shared/data/coco26` (or of the folder named by
U2SEG_SHARED_DATA), once with low-level features and once with an embedding of their true segments plus noise, 768-d, standing in
for a trained ViT; and generated hard graphs. Everything is a function of fixed seeds.
"""
import argparse, datetime, os, platform, time
from pathlib import Path

import cv2, numpy as np, scipy.linalg, torch, torch.nn.functional as F
from PIL import Image
from scipy import ndimage

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
    elif kind == 'dense': x += 1.0*rng.standard_normal((1, dim))
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

def compare(keys):
    "Worst IoU of the N output masks (two empty ones count as equal), smallest gap, and whether any round depends on the sign."
    theirs = reference_rounds(keys)
    ours, covered = [], False
    for _, _, accepted in cut_rounds(keys[None], tau=TAU, n_masks=N_MASKS):
        ours.append(accepted[0] & ~covered)
        covered = covered | accepted[0]
    return min(iou(a, b[0]) for a, b in zip(ours, theirs)), min(t[1] for t in theirs), any(t[2] for t in theirs)

def seconds(call):
    start = time.perf_counter(); call()
    return time.perf_counter() - start

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--photos', type=int, default=26); parser.add_argument('--timed', type=int, default=9)
    parser.add_argument('--grid', type=int, default=60); parser.add_argument('--hard-grid', type=int, default=40)
    parser.add_argument('--threads', type=int, default=2); parser.add_argument('--out')
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if not (SHARED/'coco26').is_dir(): raise SystemExit(f'{SHARED/"coco26"}: the photographs are not there; name their folder in U2SEG_SHARED_DATA')
    photos, truths = (sorted((SHARED/'coco26'/f).iterdir())[:a.photos] for f in ('images', 'panoptic'))
    groups = {'photographs, low-level features': [lambda p=p, i=i: low_level(p, i, a.grid) for i, p in enumerate(photos)],
              'photographs, embedded segments': [lambda p=p, i=i: semantic(p, i, a.grid) for i, p in enumerate(truths)]}
    groups |= {f'hard: {k}': [lambda k=k, s=s: hard(k, s, a.hard_grid) for s in range(4)] for k in HARD}
    makers = [m for pair in zip(*list(groups.values())[:2]) for m in pair][:a.timed]
    theirs, ours, each = [], [], []
    maskcut(makers[0]().float(), tau=TAU, n_masks=N_MASKS)
    for make in makers:
        keys = make()
        t = seconds(lambda: reference_rounds(keys))
        o = np.median([seconds(lambda: maskcut(keys, tau=TAU, n_masks=N_MASKS)) for _ in range(5)])
        theirs.append(t); ours.append(o); each.append(t/o)
    speed = (f'{len(makers)} photographs, {a.grid*a.grid} tokens, {DIM}-d, N = {N_MASKS}, {a.threads} threads: dense reference {np.median(theirs):.2f} s, '
             f'ours {1e3*np.median(ours):.0f} ms an image; **{np.median(each):.0f}x** (median of the images\' ratios; {min(each):.0f}x to {max(each):.0f}x).')
    print(speed)
    lines = ['| images | n | worst IoU | IoU < .99 where gap > 1e-3 | gap <= 1e-3 | sign decides | of these IoU < .99 |', '|---|---|---|---|---|---|---|']
    total = []
    for name, makers in groups.items():
        rows = [compare(make()) for make in makers]
        total += rows; lines.append(summary(name, rows)); print(lines[-1], flush=True)
    lines.append(summary('**all**', total)); print(lines[-1], flush=True)
    if a.out: Path(a.out).write_text(report(lines, speed))

def summary(name, rows):
    posed = [r for r in rows if r[1] > 1e-3]
    signed = [r for r in posed if r[2]]
    worst = f'{min(r[0] for r in posed):.4f}' if posed else '-'
    return f'| {name} | {len(rows)} | {worst} | {sum(r[0] < .99 for r in posed)} | {len(rows) - len(posed)} | {len(signed)} | {sum(r[0] < .99 for r in signed)} |'

def report(lines, speed):
    return '\n'.join(['# Normalized cut against the dense reference', '',
        f'`python benchmarks/ncut.py`, {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} shared cores, torch {torch.__version__.split("+")[0]}, scipy {scipy.__version__}. '
        'The worst IoU and the sign columns count images whose spectral gap exceeds 1e-3 in every round; elsewhere the cut is ill posed in the reference itself.', '', *lines, '',
        '## Speed of the whole chain', '', 'Both sides alternate in one process; gram matrix, three rounds, regions and masks are included.', '', speed, ''])

if __name__ == '__main__': main()
