"""Every path that runs on a GPU beside the CPU, then how fast it is.

python benchmarks/gpu.py --out DIR                  # all on one machine with a GPU: gpu.json and gpu.md
python benchmarks/gpu.py --reference REF            # on a CPU: what a GPU is compared with, one file a part
python benchmarks/gpu.py --compare REF --out DIR    # ... on the machine with the GPU
python benchmarks/gpu.py --tiny --out DIR           # all parts, small, on any machine

Each part runs in a process of its own, within its seconds. What it finds is written at once: a fault or a part that
takes too long loses itself alone.
"""

import argparse, contextlib, functools, gzip, importlib, json, multiprocessing
import os, signal, statistics, subprocess, sys, tempfile
import time, traceback, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ |= dict(PYTORCH_NVML_BASED_CUDA_CHECK='1', TQDM_DISABLE='1')  # to look for a GPU must not forbid to fork
import numpy as np
import torch
import yaml
from torch.nn import functional as F
from torch.utils.data import Dataset

from machine import alternate, heading, publish

ROOT = Path(__file__).resolve().parents[1]
PARTS = {}
FULL = dict(n=16, side=60, dim=768, px=480, vit='vit_base_patch8_224.dino', h=800, w=1088, batch=16, rounds=5)
TINY = dict(n=2, side=12, dim=48, px=96, vit=None, h=96, w=128, batch=2, rounds=1)
SMALL_VIT = dict(img_size=96, embed_dim=48, depth=2, num_heads=3, patch_size=8)
SMALL_NET = dict(
    n_things=24,
    n_stuff=12,
    depth=18,
    width=16,
    n_blocks=[1, 1, 1, 1],
    fpn_channels=32,
    fc_dim=64,
    mask_dim=32,
    sem_dim=32,
    rpn_pre_train=400,
    rpn_post_train=200,
    roi_batch=64,
    min_size=128,
    max_size=160,
)


def part(seconds, reference=None):
    "A part of the run: a generator of rows (what, value) or (what, value, '<' or '>', bound)."

    def add(f):
        PARTS[f.__name__] = f, seconds, reference
        return f

    return add


def device():
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ms(call, times=10, warm=2):
    "Milliseconds of a call, the median."
    taken = []
    for _ in range(warm + times):
        wait()
        start = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken[warm:])


def peak(call):
    "GiB of the GPU that a call takes at most, beside what is held before it."
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    wait()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def error(x, y):
    "Relative difference of two arrays."
    x, y = (torch.as_tensor(v).double().cpu() for v in (x, y))
    return float((x - y).norm() / y.norm().clamp_min(1e-30))


def iou(x, y):
    x, y = (torch.as_tensor(v).cpu() for v in (x, y))
    return float((x & y).sum() / (x | y).sum().clamp_min(1))


@contextlib.contextmanager
def exact_convolutions():
    "cuDNN without TF32."
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def same_draws():
    "Let the samples of the losses be drawn on the CPU, whatever the device."
    from u2seg import boxes, cascade, rpn

    draw = boxes.random_keys
    rpn.random_keys = cascade.random_keys = lambda n, seed, device: draw(n, seed, 'cpu').to(device)


def photos():
    "Image files: of --photos, or drawn."
    if S['photos']:
        return sorted(Path(S['photos']).iterdir())[: S['n']]
    from PIL import Image
    from u2seg.scenes import draw_scene

    folder = Path(tempfile.mkdtemp(prefix='photos'))
    for i in range(S['n']):
        Image.fromarray(draw_scene([5, i], size=S['px'])[0]).save(folder / f'{i}.png')
    return sorted(folder.iterdir())


def square_photos(n):
    from u2seg.images import read_image, resize_image

    return [torch.from_numpy(resize_image(read_image(f), (S['px'],) * 2).copy()) for f in photos()[:n]]


# ---- the machine


@part(30)
def machine():
    "The machine."
    yield 'device', torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU: all of this is of a CPU'
    yield 'CPU cores', os.cpu_count()
    yield (
        'TF32 of convolutions, of products',
        f'{torch.backends.cudnn.allow_tf32}, {torch.get_float32_matmul_precision()}',
    )
    if torch.cuda.is_available():
        x = torch.ones(2**28, dtype=torch.uint8)
        pinned = x.pin_memory()
        yield 'copy to the GPU, GB/s', x.numel() / 1e6 / ms(lambda: x.to(device()), 3)
        yield '... from pinned memory', x.numel() / 1e6 / ms(lambda: pinned.to(device()), 3)
        a = torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16)
        yield 'bfloat16 product, TFLOP/s', 2 * 8192**3 / 1e9 / ms(lambda: a @ a)


# ---- labels


def token_keys():
    "Keys float32 [n, dim, side, side] of blobs under noise, the same on every machine."
    rng = np.random.default_rng(3)
    draw = lambda *shape: torch.from_numpy(rng.standard_normal(shape, np.float32))
    n, d, side = S['n'], S['dim'], S['side']
    blobs = F.interpolate(draw(n, d, 5, 5), (side, side), mode='bicubic')
    return blobs + 0.3 * draw(n, d, side, side) + 0.35 * draw(n, d, 1, 1)


def cut(where):
    from u2seg.maskcut import maskcut_batch

    return [m.cpu() for m in maskcut_batch(token_keys().to(where), tau=0.15, n_masks=3)]


@part(60, lambda: cut('cpu'))
def maskcut(want):
    "MaskCut on key maps, all in one batch."
    from u2seg import ncut
    from u2seg.maskcut import maskcut_batch

    found = cut(device())
    same = [len(f) == len(w) and all(iou(a, b) >= 0.99 for a, b in zip(f, w)) for f, w in zip(found, want)]
    yield 'masks of the CPU', sum(map(len, want))
    yield 'images whose masks all have IoU .99 with the CPU', sum(same) / len(same), '>', 0.9
    x = token_keys().to(device())
    affinity = ncut.token_affinity(x.flatten(2), tau=0.15)
    g = ncut.token_graph(affinity)
    y = ncut.fiedler(g)
    yield 'whole, ms an image', ms(lambda: maskcut_batch(x, tau=0.15, n_masks=3), 3) / len(x)
    yield 'affinity', ms(lambda: ncut.token_affinity(x.flatten(2), tau=0.15), 3) / len(x)
    yield 'one product', ms(lambda: ncut.propagate(g, y)) / len(x)
    yield 'second eigenvector', ms(lambda: ncut.fiedler(g), 3) / len(x)
    yield 'its sign', ms(lambda: ncut.orient(g, y), 3) / len(x)
    if torch.cuda.is_available():
        whole = lambda: maskcut_batch(x, tau=0.15, n_masks=3)
        yield 'waits of the host, an image', host_waits(whole) / len(x)
        busy, top = kernels(whole)
        yield 'GPU busy, ms an image', busy / len(x)
        yield 'kernels', top


def crf_input():
    px, q = S['px'], S['px'] // 4
    masks = torch.zeros(3, px, px, dtype=torch.bool)
    masks[0, q : 2 * q, q : 3 * q] = masks[1, :q] = masks[2, 2 * q :, q:] = True
    return square_photos(4), masks


def crf_reference():
    from u2seg.crf import refine_masks

    images, masks = crf_input()
    return [refine_masks(x, masks) for x in images]


@part(60, crf_reference)
def crf(want):
    "The dense CRF of MaskCut by torch operations, beside the compiled loops of the CPU, an image a thread."
    from u2seg import gpu_lattice as L
    from u2seg.crf import refine_masks

    images, masks = crf_input()
    images, masks = [x.to(device()) for x in images], masks.to(device())
    refine = functools.partial(refine_masks, masks=masks, compiled=False)
    found = [refine(x) for x in images]
    yield 'IoU with the CPU, least', min(iou(a, b) for f, w in zip(found, want) for a, b in zip(f, w)), '>', 0.98
    yield 'equal when repeated', all(torch.equal(f, refine(x)) for x, f in zip(images, found)), '>', 1
    lat = L.torch_lattice(images[0], sxy=50.0, srgb=5.0)
    x, splat, add = torch.rand(3, len(lat.index), device=device()), L._torch_splat(lat), L._torch_filter(lat)
    entries = torch.bincount(lat.index.flatten().long())
    yield 'points of the lattice', len(entries)
    yield 'entries of the fullest', int(entries.max())
    yield 'whole, ms an image', statistics.mean(ms(lambda: refine(x), 3) for x in images)
    yield 'lattice', ms(lambda: L.torch_lattice(images[0], sxy=50.0, srgb=5.0), 3)
    many = torch.stack(images * 4)
    together = functools.partial(refine_masks, many, torch.stack([masks] * len(many), 1), compiled=False)
    same = torch.stack(found * 4, 1) == together()
    yield f'{len(many)} images as one lattice: pixels as alone', float(same.float().mean()), '>', 0.9999
    yield '... whole, ms an image', ms(together, 3) / len(many)
    yield '... lattice', ms(lambda: L.torch_lattice(many, sxy=50.0, srgb=5.0), 3) / len(many)
    yield '... peak GiB', peak(together)
    if torch.cuda.is_available():
        busy, top = kernels(together)
        yield '... GPU busy, ms an image', busy / len(many)
        yield '... kernels', top
    compiled = functools.partial(refine_masks, images[0].cpu(), masks.cpu())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        many = lambda: list(pool.map(lambda _: compiled(), range(2 * threads)))
        yield f'compiled loops, {threads} threads, ms an image', ms(many, 3) / (2 * threads)
    torch.set_num_threads(threads)
    yield 'splat', ms(lambda: splat(x))
    yield 'splat, blur and slice', ms(lambda: add(x, 1, torch.zeros_like(x)))


def random_vit(dtype=torch.float32):
    from u2seg.features import ViTFeatures

    torch.manual_seed(0)
    return ViTFeatures(S['vit'] or SMALL_VIT, dtype=dtype)


def vit_input():
    return torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, 96, 96), np.float32))


def keys_and_without_position():
    from u2seg.position import fit_position, remove_position

    keys = random_vit().keys(vit_input())
    return keys, remove_position(keys, fit_position([keys]))


@part(60, keys_and_without_position)
def vit(want):
    "Keys of ViT-B/8, random weights."
    from u2seg.position import fit_position, remove_position

    want, placeless = want
    keys = want.to(device())
    yield 'keys without position: difference', error(remove_position(keys, fit_position([keys])), placeless), '<', 1e-4
    net, x = random_vit().to(device()), vit_input().to(device())
    yield 'difference, TF32 in convolutions', error(net.keys(x), want), '<', 2e-3
    with exact_convolutions():
        yield 'difference, float32', error(net.keys(x), want), '<', 1e-4
    big = torch.randn(S['batch'], 3, S['px'], S['px'], device=device())
    for name, precision in ('float32', 'highest'), ('TF32', 'high'):
        torch.set_float32_matmul_precision(precision)
        yield f'{name}, images/s', 1e3 * len(big) / ms(lambda: net.keys(big), 2, 1)
    yield 'difference, TF32 everywhere', error(net.keys(x), want)
    torch.set_float32_matmul_precision('highest')
    net = random_vit(torch.bfloat16).to(device())
    yield 'difference, bfloat16', error(net.keys(x), want), '<', 5e-2
    yield 'bfloat16, images/s', 1e3 * len(big) / ms(lambda: net.keys(big), 3, 1)


# ---- the network


def scene(n, h, w, n_things, n_stuff, n_labels=6):
    "Images of noise with rectangles as labels, the same on every machine."
    from u2seg.augment import masks_to_boxes

    rng, images, targets = np.random.default_rng(0), [], []
    for i in range(n):
        masks = torch.zeros(n_labels, h, w, dtype=torch.bool)
        for m, (y, x) in zip(masks, (rng.random((n_labels, 2)) * [0.6 * h, 0.6 * w]).astype(int)):
            m[y : y + h // 4, x : x + w // 4] = True
        images.append(torch.from_numpy(rng.integers(0, 256, (3, h, w), np.uint8)))
        labels, sem = rng.integers(0, n_things, n_labels), rng.integers(0, n_stuff + 1, (h, w))
        named = dict(boxes=masks_to_boxes(masks), masks=masks, seed=i + 1)
        targets.append(named | dict(labels=torch.from_numpy(labels), sem=torch.from_numpy(sem)))
    return images, targets


def weighed(batch):
    "The same batch with a weight for each label and for each pixel of stuff."
    for i, t in enumerate(batch[1]):
        rng = np.random.default_rng([4, i])
        t['weight'] = torch.from_numpy(rng.uniform(0.2, 1.8, len(t['labels'])).astype(np.float32))
        t['certainty'] = torch.from_numpy(rng.uniform(0.2, 1.8, t['sem'].shape).astype(np.float32))
    return batch


def losses_and_gradients(norm, where, proposals=None):
    """Losses, gradients and proposals; with the CPU's `proposals`, since two of nearly one score change places under
    rounding, and a loss that counts regions then jumps by a whole one."""
    from u2seg import rpn
    from u2seg.model import build_model
    from u2seg.train import _to

    found, top = [], rpn.top_proposals

    def take(*arguments, **options):
        found.extend(x.cpu() for x in top(*arguments, **options))
        return [x.to(where) for x in proposals or found]

    rpn.top_proposals = take
    torch.manual_seed(0)
    norm, *more = norm.split(', ')
    fpn_norm = '' if norm == 'FrozenBN' else norm
    net = build_model(dict(SMALL_NET, norm=norm, fpn_norm=fpn_norm, droploss=0.01)).to(where).train()
    batch = scene(4, 128, 160, 24, 12)
    losses = net(*_to(torch.device(where), *(weighed(batch) if more else batch)))
    rpn.top_proposals = top
    sum(losses.values()).backward()
    gradient = {n.split('.')[0]: 0.0 for n, _ in net.named_parameters()}
    for name, p in net.named_parameters():
        if p.grad is not None:
            gradient[name.split('.')[0]] += float(p.grad.double().square().sum())
    gradient = {f'gradient of {k}': v**0.5 for k, v in gradient.items()}
    return {k: v.item() for k, v in losses.items()} | gradient, found


def losses_reference():
    same_draws()
    return {norm: losses_and_gradients(norm, 'cpu') for norm in ('SyncBN', 'GN', 'FrozenBN', 'GN, weighed labels')}


@part(45, losses_reference)
def losses(want):
    "Losses and gradients of a training step, with draws and proposals of the CPU; largest relative difference."
    from u2seg.boxes import box_iou

    same_draws()
    with exact_convolutions():
        for norm, (values, proposals) in want.items():
            found, own = losses_and_gradients(norm, device(), proposals)
            near = [float((box_iou(p, o).amax(1) > 0.99).float().mean()) for p, o in zip(proposals, own)]
            yield f'{norm}, proposals of the CPU that are found', statistics.mean(near), '>', 0.98
            differences = {k: abs(found[k] - v) / max(abs(v), 1e-6) for k, v in values.items()}
            worst = max(differences, key=differences.get)
            yield f'{norm}, largest at {worst}', differences[worst], '<', 2e-3


def our_step(amp, layout):
    from u2seg.model import build_model
    from u2seg.optim import clip_gradients
    from u2seg.train import _to

    torch.manual_seed(0)
    config = SMALL_NET if S['tiny'] else dict(n_things=800, n_stuff=27, droploss=0.01)
    net = build_model(config).to(device()).to(memory_format=layout).train()
    optimizer = torch.optim.SGD(net.parameters(), 1e-6, momentum=0.9)
    c = net.config
    batch = _to(device(), *scene(S['batch'], S['h'], S['w'], c['n_things'], c['n_stuff']))

    def step():
        with torch.autocast(device().type, amp):
            losses = net(*batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        clip_gradients(list(net.parameters()), clip_type='parameter', clip_value=1.0)
        optimizer.step()
        wait()

    return step


def their_step(amp):
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(0)
    options = dict(min_size=S['h'], max_size=1333, num_classes=801)
    if S['tiny']:
        options = dict(min_size=S['h'], num_classes=25, box_batch_size_per_image=16, rpn_post_nms_top_n_train=20)
    net = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **options).to(device()).train()
    optimizer = torch.optim.SGD(net.parameters(), 1e-6, momentum=0.9)
    images, targets = scene(S['batch'], S['h'], S['w'], options['num_classes'] - 1, 1)
    images = [x.to(device()).float() / 255 for x in images]
    keep = lambda t: dict(boxes=t['boxes'].to(device()), masks=t['masks'].to(device()).byte())
    targets = [keep(t) | dict(labels=t['labels'].to(device()) + 1) for t in targets]

    def step():
        with torch.autocast(device().type, amp):
            losses = net(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        wait()

    return step


def kernels(step, n=15):
    "Milliseconds that the GPU is busy in a step, and the kernels that take most of it."
    from torch.profiler import profile, ProfilerActivity

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        step()
    rows = [r for r in prof.key_averages() if r.self_device_time_total and r.device_type.name == 'CUDA']
    rows.sort(key=lambda r: -r.self_device_time_total)
    top = [f'{r.self_device_time_total / 1e3:.1f} ms in {r.count}: {r.key[:70]}' for r in rows[:n]]
    return sum(r.self_device_time_total for r in rows) / 1e3, top


def host_waits(step):
    torch.cuda.set_sync_debug_mode('warn')
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        step()
    torch.cuda.set_sync_debug_mode('default')
    return sum('synchroniz' in str(w.message) for w in seen)


@part(110)
def step():
    "A training step of R50, 800 clusters, beside torchvision's Mask R-CNN (one stage, no stuff), in turns."
    half = dict(float16=torch.float16, bfloat16=torch.bfloat16)
    if S['tiny']:
        del half['float16']  # slow on a CPU
    sides = {f'ours, {k}': our_step(amp, torch.contiguous_format) for k, amp in half.items()}
    sides |= {f'torchvision, {k}': their_step(amp) for k, amp in half.items()}
    for name, one in sides.items():
        yield f'{name}: peak GiB', peak(one)
    _, taken = alternate(sides, S['rounds'])
    medians = {name: statistics.median(wall for wall, _ in times) for name, times in taken.items()}
    for name, t in medians.items():
        yield f'{name}: ms', 1e3 * t
    for k in half:
        yield f'{k}: times as long in torchvision', medians[f'torchvision, {k}'] / medians[f'ours, {k}']
    amp = next(iter(half.values()))
    last = our_step(amp, torch.channels_last)
    yield f'ours, {str(amp)[6:]}, channels last: ms', ms(last, S['rounds'], 1)
    if torch.cuda.is_available():
        for name in 'ours, float16', 'torchvision, float16':
            yield f'{name}: waits of the host', host_waits(sides[name])
            busy, top = kernels(sides[name])
            yield f'{name}: GPU busy, ms', busy
            yield f'{name}: kernels', top


@part(45)
def inference():
    "Inference of R50, 800 clusters: ms an image."
    from u2seg import pixels
    from u2seg.model import build_model

    torch.manual_seed(0)
    low = dict(score_threshold=0.0012, panoptic_score=0.0012)  # random weights: low enough for 100 detections
    config = SMALL_NET | low if S['tiny'] else dict(n_things=800, n_stuff=27) | low
    net, n = build_model(config).to(device()).eval(), 4 if not S['tiny'] else 1
    images = [x.to(device()) for x in scene(n, S['h'], S['w'], 24, 12)[0]]
    with torch.inference_mode():
        found = net(images)[0]
        m = len(found['boxes'])
        yield 'detections', m
        yield 'whole', ms(lambda: net(images), 5) / n
        with torch.autocast(device().type, torch.bfloat16):
            yield 'whole, bfloat16', ms(lambda: net(images), 5) / n
        yield 'backbone', ms(lambda: net.backbone(net.batch(images)[0]), 5) / n
        probs = torch.rand(m, 28, 28, device=device())
        yield 'paste_masks', ms(lambda: pixels.paste_masks(probs, found['boxes'], S['h'], S['w']), 5)
        options = pixels._combine_options(net.config)
        parts = found['masks'], found['scores'], found['labels'], found['semantic']
        yield 'combine', ms(lambda: pixels.combine(*parts, **options), 5)
        if torch.cuda.is_available():
            busy, top = kernels(lambda: pixels.combine(*parts, **options))
            yield '... of it GPU busy', busy
            yield '... kernels', top
        if torch.cuda.is_available():
            yield 'waits of the host', host_waits(lambda: net(images[:1]))
            busy, top = kernels(lambda: net(images[:1]))
            yield 'GPU busy, ms', busy
            yield 'kernels', top


# ---- whole stages


@part(60)
def whole():
    "From image files to run-length codes: MaskCut with ViT-B/8 (random weights) and CRF, images/s."
    from u2seg.maskcut import label_images

    files = photos()
    items = [dict(id=i + 1, file_name=files[i % len(files)].name) for i in range(S['n'] * (1 if S['tiny'] else 32))]
    options = dict(size=S['px'], feature='keys', tau=0.15, n_masks=3, crf=True, min_agreement=0.0, desc='')
    threads = torch.get_num_threads()

    def rate(net, batch_size, n=len(items)):
        with tempfile.TemporaryDirectory() as folder:
            run = functools.partial(label_images, features=net, root=files[0].parent, folder=folder, **options)
            run(items[:1])  # loops compile
            start = time.perf_counter()
            coco, _ = run(items[:n], batch_size=batch_size)
            return n / (time.perf_counter() - start), len(coco['annotations']) / n

    net = random_vit(torch.bfloat16).to(device())
    sizes = (1, 2) if S['tiny'] else (16, 64)
    for batch_size in sizes:
        yield f'bfloat16, {batch_size} at a time, images/s', rate(net, batch_size)[0]
        if torch.cuda.is_available():
            yield '... peak GiB', torch.cuda.max_memory_allocated() / 2**30
    torch.set_num_threads(min(threads, 4))
    yield f'bfloat16, {sizes[0]} at a time, {torch.get_num_threads()} threads, images/s', rate(net, sizes[0])[0]
    torch.set_num_threads(threads)
    fast, masks = rate(random_vit().to(device()), sizes[0], n=max(len(items) // 4, 1))
    yield f'float32, {sizes[0]} at a time, images/s', fast
    yield '... masks an image', masks


class Labelled(Dataset):
    "Images with their instances and stuff, as `PseudoLabels` gives them."

    def __init__(self, items):  # (image uint8 [H, W, 3] or its file, masks bool [m, H, W], labels, sem uint8 [H, W])
        self.items = items
        self.sizes = [sem.shape for *_, sem in items]
        self.labels = [torch.tensor(labels, dtype=torch.long) for _, _, labels, _ in items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        from u2seg.augment import masks_to_boxes
        from u2seg.images import read_image

        image, masks, _, sem = self.items[i]
        image = read_image(image) if isinstance(image, Path) else image
        masks, sem = torch.from_numpy(masks), torch.from_numpy(sem).long()
        target = dict(boxes=masks_to_boxes(masks), labels=self.labels[i], masks=masks, sem=sem)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), target


def labelled_photos():
    from u2seg.images import read_image

    items, rng = [], np.random.default_rng(0)
    for f in photos():
        h, w = read_image(f).shape[:2]
        masks = np.zeros((6, h, w), bool)
        for m, (y, x) in zip(masks, (rng.random((6, 2)) * [0.6 * h, 0.6 * w]).astype(int)):
            m[y : y + h // 3, x : x + w // 3] = True
        items.append((f, masks, [0, 1, 2, 3, 0, 1], rng.integers(0, 13, (h, w), np.uint8)))
    return Labelled(items)


@part(60)
def loader():
    "Training batches of photographs with copy-paste: seconds a batch."
    from u2seg.augment import Augment
    from u2seg.batches import Batches
    from u2seg.train import _Slice, _loader, _to

    jitter = dict(flip=0.5, colour_jitter=[0.2, 0.2, 0.2, 0.05], copy_paste='semantic', paste_rate=1.0)
    augment = Augment(short_sides=[S['h']], max_size=1333, paste_scale=[0.3, 1.0], **jitter)
    batches = Batches(labelled_photos(), augment, batch_size=S['batch'], seed=0)
    for workers in (16, 4) if not S['tiny'] else (1,):
        for i, batch in enumerate(_loader(_Slice(batches, 0, 1, 1), 0, 3 * workers, workers)):
            if i == workers - 1:  # the first of each process
                start = time.perf_counter()
        yield f'{workers} processes', (time.perf_counter() - start) / (2 * workers)
    images, targets, _ = batch[0]
    yield 'copy of a batch to the GPU, ms', ms(lambda: _to(device(), images, targets), 3)
    if torch.cuda.is_available():
        pinned = [x.pin_memory() for x in images]
        held = [{k: v if k == 'seed' else v.pin_memory() for k, v in t.items()} for t in targets]
        yield '... from pinned memory, ms', ms(lambda: _to(device(), pinned, held), 3)


def train_stego(where, n, side, n_iters, **sizes):
    from u2seg.stego import fit_stego

    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((n, sizes.pop('dim'), side, side), np.float32)).to(where)
    neighbors = torch.from_numpy(rng.integers(0, n, (n, 5)))
    weights = dict(w_self=0.67, w_knn=0.25, w_rand=0.63, b_self=0.75, b_knn=0.6, b_rand=0.7)
    rest = dict(dropout=0.1, lr=0.002, lr_probe=0.005, n_random=3, pointwise=True, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        labeller = fit_stego(features, neighbors, folder=folder, n_iters=n_iters, **sizes, **weights, **rest)
    return labeller.clusters.detach().cpu()


SMALL_STEGO = dict(n=24, dim=64, side=12, n_iters=30, n_classes=5, code_dim=16, batch_size=8, n_points=6)


@part(45, lambda: train_stego('cpu', **SMALL_STEGO))
def stego(want):
    "STEGO: 30 steps beside the CPU's; a step at the paper's size (batch 32, 768 x 28 x 28, 27 classes)."
    with exact_convolutions():
        yield 'difference of the clusters', error(train_stego(device(), **SMALL_STEGO), want), '<', 1e-2
    n = 20 if not S['tiny'] else 2
    large = dict(dim=S['dim'], side=28, n_classes=27, code_dim=90, batch_size=32 if n > 2 else 4, n_points=11)
    taken = [ms(lambda: train_stego(device(), n=64 if n > 2 else 8, n_iters=k * n, **large), 1, 1) for k in (1, 3)]
    yield 'step, ms', (taken[1] - taken[0]) / (2 * n)


def train_labellers(where, n_iters, dim, side, batch_size, n_classes, code_dim):
    "Clusters of SmooSeg and of CAUSE on features of noise, and the concept book of the second."
    from u2seg.cause import fit_cause
    from u2seg.smooseg import fit_smooseg

    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((2 * batch_size, dim, side, side), np.float32)).to(where)
    sizes = dict(n_classes=n_classes, code_dim=code_dim, batch_size=batch_size, n_iters=n_iters, dropout=0.1)
    energy = dict(b_self=0.5, b_rand=0.7, temperature=0.1, decay=0.99, pointwise=True)
    book = dict(n_concepts=64, positive=0.6, negative=0.2, decay=0.99, n_points=side // 2)
    rates = dict(lr=0.002, lr_probe=0.005, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        smooth = fit_smooseg(features, folder=Path(folder) / 'smooseg', **sizes, **energy, **rates)
        conceptual = fit_cause(features, folder=Path(folder) / 'cause', **sizes, **book, **rates)
    return {k: m.clusters.detach().cpu() for k, m in dict(smooseg=smooth, cause=conceptual).items()}


SMALL_LABELLERS = dict(n_iters=30, dim=64, side=12, batch_size=8, n_classes=5, code_dim=16)


@part(45, lambda: train_labellers('cpu', **SMALL_LABELLERS))
def labellers(want):
    "SmooSeg and CAUSE: 30 steps beside the CPU's; a step of both (batch 32, 768 x 28 x 28, 27 classes)."
    with exact_convolutions():
        found = train_labellers(device(), **SMALL_LABELLERS)
    for name, clusters in want.items():
        yield f'{name}: difference of the clusters', error(found[name], clusters), '<', 1e-2
    n = 20 if not S['tiny'] else 2
    large = dict(dim=S['dim'], side=28, n_classes=27, code_dim=90, batch_size=32 if n > 2 else 4)
    taken = [ms(lambda: train_labellers(device(), n_iters=k * n, **large), 1, 1) for k in (1, 3)]
    yield 'a step of each, ms', (taken[1] - taken[0]) / (2 * n)


def random_labeller():
    from u2seg.labeller import Head, Labeller

    torch.manual_seed(0)
    return Labeller(Head(48, 20), torch.randn(27, 20)).eval().requires_grad_(False)


def stuff_maps(where, images, crf):
    from u2seg.crf import STEGO
    from u2seg.features import ViTFeatures
    from u2seg.semantic import segment

    torch.manual_seed(0)
    net, labeller = ViTFeatures(SMALL_VIT).to(where), random_labeller().to(where)
    images = [x.numpy() for x in images]
    options = dict(size=S['px'], patch_size=8, alpha=3.0, flip=True, crf=STEGO if crf else None)
    return segment(labeller, net.patches, images, **options)


@part(45, lambda: {crf: stuff_maps('cpu', square_photos(4), crf) for crf in (False, True)})
def stuff(want):
    "Stuff maps of 27 labels, with and without the CRF."
    images = square_photos(4)
    for crf, maps in want.items():
        found = stuff_maps(device(), images, crf)
        same = np.mean([(a == b).mean() for a, b in zip(found, maps)])
        yield f'pixels as on the CPU{", with CRF" * crf}', same, '>', 0.98
        yield f'ms an image{", with CRF" * crf}', ms(lambda: stuff_maps(device(), images, crf), 3, 1) / 4


# ---- the trained model


def predictions(where):
    from u2seg.predict import U2Seg
    from u2seg.scenes import draw_scene

    images = [draw_scene([7, i], ('objects', 'scenes')[i % 2])[0] for i in range(24)]
    found = U2Seg.from_pretrained(S['model'], device=where).predict(images)
    return [{k: getattr(p, k) for k in ('boxes', 'scores', 'categories', 'ids', 'semantic')} for p in found]


def predictions_by_name(where):
    "The same, decided by name; every eighth cluster has one name."
    from u2seg.joined import join_clusters
    from u2seg.predict import U2Seg, run_network
    from u2seg.scenes import draw_scene

    images = [draw_scene([7, i], ('objects', 'scenes')[i % 2])[0] for i in range(24)]
    model = U2Seg.from_pretrained(S['model'], device=where).model.eval()
    c = model.config
    joined = join_clusters(np.arange(c['n_things']) % 8, np.arange(c['n_stuff']) % 5)
    with torch.inference_mode():
        found = run_network(model, images, short=c['min_size'], max_size=c['max_size'], joined=joined)
    return [
        dict(boxes=r['boxes'].cpu().numpy(), scores=r['scores'].cpu().numpy(), categories=r['labels'].cpu().numpy())
        for r in found
    ]


def counterparts(found, want):
    "Fraction of the detections of `want` with one of equal category, IoU .95 and score to .01 in `found`."
    from u2seg.boxes import box_iou

    hits = 0
    for f, w in zip(found, want):
        close = box_iou(torch.from_numpy(w['boxes']), torch.from_numpy(f['boxes'])).numpy() > 0.95
        close &= w['categories'][:, None] == f['categories']
        hits += (close & (abs(w['scores'][:, None] - f['scores']) < 0.01)).any(1).sum()
    return hits / sum(len(w['boxes']) for w in want)


@part(45, lambda: (predictions('cpu'), predictions_by_name('cpu')))
def predict(want):
    "U2Seg.predict with the trained embedded model."
    where = str(device())
    want, named = want
    with exact_convolutions():
        found, found_named = predictions(where), predictions_by_name(where)
    yield 'by name: detections of the CPU', sum(len(w['boxes']) for w in named)
    yield '... of them found on the GPU', counterparts(found_named, named), '>', 0.99
    yield 'detections of the CPU', sum(len(w['boxes']) for w in want)
    yield 'of them found on the GPU', counterparts(found, want), '>', 0.99
    for k in 'semantic', 'ids':
        same = np.mean([(f[k] == w[k]).mean() for f, w in zip(found, want)])
        yield f'pixels of equal {k}', same, '>', 0.99
    yield 'detections found with TF32', counterparts(predictions(where), want), '>', 0.9


def teach(where, views=None):
    "What a teacher sees in drawn images: mean probabilities of stuff, and instances of all views."
    from u2seg.predict import U2Seg
    from u2seg.scenes import draw_scene
    from u2seg.teacher import average_views, merge_views

    images = [draw_scene([8, i], ('objects', 'scenes')[i % 2])[0] for i in range(8)]
    seen = average_views(U2Seg.from_pretrained(S['model'], device=where).model.eval(), images)
    return [(probs.half().cpu(), merge_views(found, 6)) for probs, found in seen]


@part(45, lambda: teach('cpu'))
def teacher(want):
    "The teacher of self-training, six views an image: the trained embedded model, then R50 with 800 clusters."
    from pycocotools import mask as rle
    from u2seg.model import build_model
    from u2seg.teacher import average_views

    with exact_convolutions():
        found = teach(str(device()))
    yield 'difference of the probabilities', max(error(f, w) for (f, _), (w, _) in zip(found, want)), '<', 1e-2
    n, hits = 0, 0
    for (_, mine), (_, theirs) in zip(found, want):
        for a in (a for a in theirs if a['score'] > 0.3):
            near = [b for b in mine if b['category_id'] == a['category_id'] and abs(b['score'] - a['score']) < 0.02]
            codes = [b['segmentation'] for b in near]
            n += 1
            hits += bool(codes) and rle.iou([a['segmentation']], codes, [0] * len(codes)).max() > 0.95
    yield 'instances of the CPU above .3', n
    yield '... of them found on the GPU', hits / max(n, 1), '>', 0.97
    torch.manual_seed(0)
    low = dict(score_threshold=0.0012, panoptic_score=0.0012)
    config = SMALL_NET | low if S['tiny'] else dict(n_things=800, n_stuff=27) | low
    net, many = build_model(config).to(device()).eval(), 4 if not S['tiny'] else 1
    images = [x.permute(1, 2, 0).numpy() for x in scene(many, S['h'], S['w'], 24, 12)[0]]
    yield 'six views of 100 detections each, ms an image', ms(lambda: average_views(net, images), 2, 1) / many


@functools.cache
def drawn(n):
    "Drawn images with their ground truth as labels."
    from u2seg.scenes import STUFF, THINGS, draw_scene

    items = []
    for i in range(n):
        image, ids, segments = draw_scene([9, i], ('objects', 'scenes')[i % 2])
        things = [s for s in segments if s['category_id'] <= len(THINGS)]
        sem = np.where(ids == 0, 255, 0).astype(np.uint8)
        for s in segments:
            if s not in things:
                sem[ids == s['id']] = s['category_id'] - len(THINGS)
        masks = np.stack([ids == s['id'] for s in things]) if things else np.zeros((0, *ids.shape), bool)
        items.append((image, masks, [s['category_id'] - 1 for s in things], sem))
    return Labelled(items), len(THINGS), len(STUFF)


def train_student(where, amp, n_workers):
    "Log of the embedded student's training from random weights."
    from u2seg.augment import Augment
    from u2seg.batches import Batches
    from u2seg.model import build_model
    from u2seg.solver import Solver
    from u2seg.train import fit

    p = yaml.safe_load((ROOT / 'params.yaml').read_text())
    solver = Solver(**p['solver'] | p['train']['solver'] | dict(n_iters=200 if not S['tiny'] else 2, amp=amp))
    data, n_things, n_stuff = drawn(200 if not S['tiny'] else 8)
    torch.manual_seed(0)
    classes = dict(n_things=n_things, n_stuff=n_stuff)
    net = build_model(p['network'] | p['train']['network'] | classes).to(where)
    batches = Batches(data, Augment(**p['augment'] | p['train']['augment']), batch_size=solver.batch_size, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        return fit(net, batches, solver, folder=folder, log_every=1, n_workers=n_workers)


def late(rows):
    "Mean loss of the last fifth of a log."
    return statistics.mean(r['loss'] for r in rows[-max(len(rows) // 5, 1) :])


@part(90, lambda: train_student('cpu', None, 0))
def student(want):
    "The embedded student, 200 iterations from random weights, beside the CPU's training in float32."
    for amp in 'bf16', None:
        start = time.perf_counter()
        rows = train_student(device(), amp, min(8, os.cpu_count()))
        name = amp or 'float32'
        yield f'{name}: first loss over the CPU\'s', rows[0]['loss'] / want[0]['loss']
        yield f'{name}: last loss over the CPU\'s', late(rows) / late(want), '<', 1.05
        yield f'{name}: iterations/s, start included', len(rows) / (time.perf_counter() - start)
    yield 'loss of the CPU, first', want[0]['loss']
    yield '... last', late(want)


# ---- the rest


def crop_embeddings(where):
    from u2seg.crops import embed_crops
    from u2seg.features import ViTFeatures

    torch.manual_seed(0)
    net, rng = ViTFeatures(SMALL_VIT).to(where), np.random.default_rng(0)
    crops, covers = rng.integers(0, 256, (80, 96, 96, 3), np.uint8), rng.integers(0, 256, (80, 96, 96), np.uint8)
    return {e: embed_crops(net, crops, covers, embedding=e) for e in ('cls', 'mask_mean', 'mask_keys')}


@part(60, lambda: crop_embeddings('cpu'))
def cluster(want):
    "Embeddings of crops; k-means of 1.3 million rows of 768 numbers, faiss on the CPU and products on the GPU."
    from u2seg.kmeans import kmeans, nearest

    with exact_convolutions():
        found = crop_embeddings(device())
    for e, x in want.items():
        yield f'difference, {e}', error(found[e], x), '<', 1e-4
    n, k = (1_300_000, 800) if not S['tiny'] else (3000, 20)
    x = F.normalize(torch.randn(n, S['dim'], device=device(), generator=torch.Generator(device()).manual_seed(0)))
    rows = x.cpu().numpy()
    centroids = torch.from_numpy(rows[:k].copy()).to(device())
    search = lambda: torch.cat([(b @ centroids.T).argmax(1) for b in x.split(2**17)])
    yield 'assignment on the GPU, s', ms(search, 3) / 1e3
    start = time.perf_counter()
    labels, _ = nearest(rows, rows[:k], metric='cosine')
    yield 'assignment by faiss, s', time.perf_counter() - start
    yield 'rows of one label in both', float((torch.from_numpy(labels) == search().cpu()).double().mean()), '>', 0.999
    start = time.perf_counter()
    kmeans(rows, k, seed=0, n_iters=2, metric='cosine')
    yield 'spherical k-means of 2 iterations, s', time.perf_counter() - start


def pretrain_log(where):
    from u2seg.pretrain import fit

    images = np.random.default_rng(0).integers(0, 256, (12, 128, 128, 3), np.uint8)
    sizes = dict(n_iters=20, n_composed=4, composed_size=96, n_patches=12, n_plain=4, image_size=64)
    factors = dict(patch_weight=1.0, image_weight=1.0, patch_temperature=0.2, image_temperature=0.2)
    rates = dict(lr=1e-4, weight_decay=0.05, warmup_iters=5, ema_decay=0.99, bf16=False, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        return fit(images, folder, model=SMALL_VIT, device=str(where), **sizes, **factors, **rates)[1]


@part(30, lambda: pretrain_log('cpu'))
def pretrain(want):
    "The small ViT's training, 20 steps."
    with exact_convolutions():
        found = pretrain_log(device())
    for k in want[-1].keys() - {'step'}:
        yield f'{k}: difference', abs(found[-1][k] - want[-1][k]) / max(abs(want[-1][k]), 1e-6), '<', 1e-2


STAGES = 'maskcut', 'cutler', 'cluster', 'stego', 'panoptic', 'train', 'evaluate', 'fewshot'
SCORES = 'mask_AP50', 'PixelAcc', 'PQ'


def copy_of_project(params):
    "A folder in which the stages run: nothing of the working tree is written to."
    folder = Path(tempfile.mkdtemp(prefix='pipeline'))
    for name in 'nbs', 'configs', 'data', 'u2seg', 'ablations':
        (folder / name).symlink_to(ROOT / name)
    (folder / 'out' / 'features').mkdir(parents=True)
    for f in (ROOT / 'out' / 'features').glob('*.safetensors'):
        (folder / 'out' / 'features' / f.name).symlink_to(f)
    (folder / 'params.yaml').write_text(yaml.safe_dump(params))
    return folder


@part(500)
def pipeline():
    "The stages of the embedded data one after another, `u2seg run STAGE`, and their scores beside the seeds of a CPU."
    from u2seg.margins import mean_and_spread
    from u2seg.recipes import overlay
    from u2seg.results import flatten, read_rows, select
    from u2seg.scenes import draw_dataset

    params = yaml.safe_load((ROOT / 'params.yaml').read_text())
    workers = {s: dict(n_workers=min(8, os.cpu_count() // 2)) for s in ('cutler', 'train', 'fewshot')}
    changes = yaml.safe_load((ROOT / 'tests' / 'small.yaml').read_text()) if S['tiny'] else workers
    folder = copy_of_project(overlay(params, changes))
    if S['tiny']:
        draw_dataset(folder / 'small', seed=1, n_train=20, n_val=6, kinds=('objects', 'scenes'), n_workers=2)
    path = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    more = dict(PYTHONPATH=os.pathsep.join(path), U2SEG_THREADS=str(os.cpu_count()))
    command, total = [sys.executable, '-c', 'import sys; from u2seg.cli import main; sys.exit(main())', 'run'], 0.0
    for stage in STAGES:
        start = time.perf_counter()
        done = subprocess.run([*command, stage], cwd=folder, env=os.environ | more, capture_output=True, text=True)
        took = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f'{stage}: {done.stderr[-1500:]}')
        total += took
        yield f'{stage}, s', took
    yield 'together, s', total
    seeds = read_rows(ROOT / 'ablations' / 'seeds.csv')
    found = flatten(json.loads((folder / 'out' / 'evaluate' / 'metrics.json').read_text())['splits'])
    for split in dict.fromkeys(r['split'] for r in found):
        for method in 'CutLER+', 'CutLER+STEGO', 'U2Seg', 'U2Seg by name':
            want = dict(split=split, method=method, fitted_on='train', matching='vote')
            for row in select(found, **want):
                of_cpu = {k: mean_and_spread(select(seeds, **want), k) for k in SCORES}
                beside = lambda x: f' ({100 * x[0]:.1f} ± {100 * x[1]:.1f})' if x else ''
                cells = [f'{k} {100 * row[k]:.1f}{beside(of_cpu[k])}' for k in SCORES if row.get(k) is not None]
                yield f'{method}, {split}', ', '.join(cells)


@part(60)
def tests():
    "The tests that are skipped without a GPU."
    files = ['tests/test_crf.py', 'tests/test_model.py']
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-k', 'gpu or half_precision', *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    yield 'pytest', done.stdout.strip().split('\n')[-1]
    yield 'exit status', done.returncode, '<', 0


# ---- running the parts


def work(name, a, send):
    "A part, in a process of its own: sends its rows as they come, or saves its reference."
    os.setsid()
    settings(a)
    f, _, reference = PARTS[name]
    try:
        if a.reference:
            with gzip.open(Path(a.reference) / f'{name}.pt.gz', 'wb') as out:
                return torch.save(reference(), out)
        arguments = []
        if reference:
            file = a.compare and gzip.open(Path(a.compare) / f'{name}.pt.gz')
            arguments = [torch.load(file, weights_only=False) if file else reference()]
        for row in f(*arguments):
            send.send(row)
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)
        at = ' '.join(f'{Path(x.filename).name}:{x.lineno}' for x in frames[-4:])
        send.send(('error', f'{type(e).__name__}: {str(e)[:300]} ({at})'))
        traceback.print_exc()
    finally:
        send.close()


def settings(a):
    global S
    S = (TINY if a.tiny else FULL) | dict(tiny=a.tiny, photos=a.photos, model=a.model or ROOT / 'out' / 'train')


def run(name, a, seconds):
    "Rows of a part, for at most `seconds`."
    context = multiprocessing.get_context(a.start)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(name, a, send))
    process.start()
    send.close()
    end = time.monotonic() + seconds
    try:
        while receive.poll(max(end - time.monotonic(), 0)):
            yield receive.recv()
        yield 'error', f'stopped after {seconds:.0f} s'
    except EOFError:
        process.join(5)
        if process.exitcode:
            yield 'error', f'the process ended with {process.exitcode}'
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def holds(value, sign, bound):
    return value <= bound if sign == '<' else value >= bound


def cell(value):
    if isinstance(value, float):
        return f'{value:.3g}' if abs(value) < 1000 else f'{value:.0f}'
    return str(value).replace('|', '/').replace('\n', ' ')


def report(results):
    "Lines of Markdown."
    rows = [r for part in results.values() for r in part['rows']]
    checks = [r for r in rows if len(r) == 4]
    n_bad = sum(not holds(*r[1:]) for r in checks) + sum(r[0] == 'error' for r in rows)
    device_name = next((r[1] for r in rows if r[0] == 'device'), 'unknown device')
    lines = [f'{device_name}. {len(checks)} checks, {n_bad} of them or of the parts failed.', '']
    left = [name for name in PARTS if name not in results]
    if left:
        lines += [f'Not run: {", ".join(left)}.', '']
    for name, part in results.items():
        lines += [f'## {name}', '', f'{part["what"]} {part["seconds"]:.0f} s.', '', '| | | bound |', '|---|---|---|']
        for what, value, *bound in part['rows']:
            if isinstance(value, list):
                continue
            mark = '' if not bound else f'{"≤" if bound[0] == "<" else "≥"} {bound[1]:g}'
            failed = '' if not bound or holds(value, *bound) else ' **failed**'
            lines.append(f'| {what} | {cell(value)} | {mark}{failed} |')
        lines.append('')
    return lines


def write(results, a):
    out = Path(a.out)
    (out / 'gpu.json').write_text(json.dumps(results, indent=1, default=str))
    how = 'Times are of the GPU unless named otherwise; medians. Relative differences are of norms.'
    head = heading('On a GPU', torch.get_num_threads(), ['torch', 'torchvision', 'timm', 'numpy'], how)
    (out / 'gpu.md').write_text('\n'.join([*head, *report(results)]))


def main(a):
    begin, results = time.monotonic(), {}
    for folder in filter(None, (a.out, a.reference)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    if a.start == 'fork':
        preload()
    for name in a.only or list(PARTS):
        f, cap, reference = PARTS[name]
        start = time.monotonic()
        left = a.seconds - (start - begin)
        if left < 5 or a.reference and not reference:
            continue
        part = results[name] = dict(what=f.__doc__, rows=[], seconds=0.0)
        for row in run(name, a, left if a.reference else min(cap, left)):
            part['rows'].append(row)
            part['seconds'] = time.monotonic() - start
            print(f'{name:10} {part["seconds"]:5.1f} s  {row[0]}: {cell(row[1])[:1500]}', *row[2:], flush=True)
            if a.out:
                write(results, a)
        print(f'{name:10} {time.monotonic() - start:5.1f} s', flush=True)
        if name == 'machine' and part['rows'][-1][0] == 'error':
            a.start = 'spawn'  # a process that has used CUDA cannot fork


def preload():
    "Import once what the parts need; no work is done here, so the parts can fork."
    for name in 'maskcut', 'train', 'predict', 'stego', 'semantic', 'crops', 'kmeans', 'model', 'scenes':
        with contextlib.suppress(ImportError):
            importlib.import_module(f'u2seg.{name}')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--reference', help='only make what a GPU is compared with, in this folder')
    p.add_argument('--compare', help='a folder made by --reference; without it the CPU runs first in each part')
    p.add_argument('--out', help='folder of gpu.json and gpu.md')
    p.add_argument('--only', nargs='+', choices=list(PARTS), help='these parts alone')
    p.add_argument('--photos', help='folder of photographs, all of one size or not; without it images are drawn')
    p.add_argument('--model', help='folder of the trained model (out/train)')
    p.add_argument('--seconds', type=float, help='for all parts; those that do not fit are left out')
    p.add_argument('--start', default='fork', choices=['fork', 'spawn'], help='how the process of a part begins')
    p.add_argument('--tiny', action='store_true', help='small sizes')
    a = p.parse_args()
    a.seconds = a.seconds or (36000 if a.reference else 300)
    main(a)
