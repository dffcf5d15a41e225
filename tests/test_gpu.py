"""Every path of a GPU, run without one (tests/pretended.py): no operator meets tensors of two devices.

Each run is one module's path. The tests below ask that every public function that takes tensors is in one of them
(`LEFT_OUT` names the rest and says why), that forgetting one `device=` turns a run red, and that a step of training
waits for the GPU no more often than it does today.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import pkgutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import u2seg
from pretended import CUDA, Gpu, MixedDevices, gpu, on
from u2seg import (
    augment,
    cause,
    certainty,
    correspondence,
    crf,
    crops,
    kmeans,
    labeller,
    maskcut,
    ncut,
    pixels,
    pretrain,
)
from u2seg import position, semantic, smooseg, stego
from u2seg.checkpoints import save_weights
from u2seg.features import ViTFeatures, weights_digest
from u2seg.images import write_png
from u2seg.joined import join_clusters
from u2seg.model import build_model
from u2seg.optim import clip_gradients

VIT = dict(img_size=64, embed_dim=24, depth=2, num_heads=3, patch_size=8)
NETWORK = dict(
    n_things=6,
    n_stuff=4,
    depth=18,
    width=8,
    n_blocks=[1, 1, 1, 1],
    fpn_channels=16,
    fc_dim=32,
    mask_dim=16,
    sem_dim=16,
    n_mask_convs=2,
    rpn_pre_train=100,
    rpn_post_train=60,
    rpn_pre_test=60,
    rpn_post_test=40,
    roi_batch=32,
    panoptic_area=64,
    min_size=96,
    max_size=128,
    score_threshold=0.03,
    panoptic_score=0.03,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(h=64, w=64, seed=0):
    "A bright square on a dark ground, with noise."
    image = np.random.default_rng(seed).integers(0, 60, (h, w, 3), dtype=np.uint8)
    image[h // 4 : h // 2, w // 4 : w // 2] += 150
    return image


def values(x):
    return x.elem if isinstance(x, Gpu) else x


def keys(n, grid, d=24):
    g = rng(3)
    coarse = F.interpolate(torch.randn(n, d, 4, 4, generator=g), (grid, grid), mode='bicubic')
    return coarse + 0.3 * torch.randn(n, d, grid, grid, generator=g)


# ---------------------------------------------------------------- what is run


def run_features():
    for stem in (None, [8, 8, 8]):
        for dtype in (torch.float32, torch.bfloat16):
            for interpolation in ('timm', 'dino'):
                torch.manual_seed(0)
                vit = ViTFeatures(dict(VIT, stem_channels=stem), dtype=dtype, interpolation=interpolation)
                x = torch.randn(2, 3, 96, 64, generator=rng())
                want, digest = vit(x), weights_digest(vit)
                got = on(vit)(on(x))
                assert all(t.is_cuda and t.dtype == torch.float32 for t in got.values())
                assert all(torch.allclose(values(got[k]), want[k], atol=1e-5) for k in want)
                assert weights_digest(vit) == digest


def run_ncut():
    k = keys(3, 8).flatten(2)
    x = ncut.second_eigenvector(on(k), tau=0.15)
    assert torch.allclose(values(x), ncut.second_eigenvector(k, tau=0.15), atol=1e-4)
    blocks = torch.eye(3)[:, [0] * 24 + [1] * 24 + [2] * 16].expand(2, 3, 64)  # few eigenvalues: Lanczos begins anew
    g = ncut.token_graph(ncut.token_affinity(on(blocks), tau=0.15))
    for basis, _, beta in ncut.lanczos(g, torch.ones_like(g.scale), g.scale[:, None][:, :0], max_steps=30):
        pass
    assert any((b == 0).any() for b in map(values, beta))
    basis = values(basis)
    assert torch.allclose(basis @ basis.mT, torch.eye(30).expand(2, 30, 30), atol=1e-4)
    gap = ncut.spectral_gap(on(k), tau=0.15)
    assert torch.allclose(values(gap), ncut.spectral_gap(k, tau=0.15), atol=1e-4)


def run_maskcut():
    k = keys(3, 8)
    got = maskcut.maskcut_batch(on(k), tau=0.15, n_masks=2)
    want = maskcut.maskcut_batch(k, tau=0.15, n_masks=2)
    assert all(m.is_cuda and torch.equal(values(m), w) for m, w in zip(got, want))
    assert maskcut.maskcut(on(k[0]), tau=0.15, n_masks=2).is_cuda
    assert len(maskcut.refine(picture(), got[0], crf=True)[0]) == len(got[0])
    vit = on(ViTFeatures(VIT))
    options = dict(size=64, feature='keys', tau=0.15, n_masks=2, crf=True, min_agreement=0.0)
    assert isinstance(maskcut.label_image(picture(), vit, **options), list)


def run_crf():
    image, prob = picture(24, 24), torch.rand(3, 24, 24, generator=rng()).softmax(0)
    got, want = crf.dense_crf(image, on(prob), **crf.STEGO), crf.dense_crf(image, prob, **crf.STEGO)
    assert got.is_cuda and torch.allclose(values(got), want, atol=2e-3)
    binary = crf.binary_crf(image, on(prob), **crf.MASKCUT)
    assert binary.is_cuda
    masks = prob > 0.4
    assert crf.refine_masks(on(torch.from_numpy(image)), on(masks)).is_cuda
    assert crf.refine_mask(on(torch.from_numpy(image)), on(masks[0])).is_cuda


def run_kmeans():
    x = torch.randn(60, 5, generator=rng()).numpy()
    for metric in kmeans.METRICS:
        centroids, labels = kmeans.kmeans(x, 4, seed=0, init='k-means++', metric=metric)
        assert (kmeans.assign(x, centroids, metric=metric) == labels).all()
    assert kmeans.spherical_kmeans(on(torch.from_numpy(x)), 3, seed=0, n_init=1, max_points=50).shape == (3, 5)


def run_correspondence():
    x = F.normalize(torch.randn(30, 5, generator=rng()), dim=1)
    near = correspondence.nearest_images(on(x), 4)
    cosine = (x @ x.T).fill_diagonal_(-2)
    assert torch.equal(near, cosine.topk(4).indices)
    feat, code = on(torch.randn(4, 6, 5, 5, generator=rng())), on(torch.randn(4, 3, 5, 5, generator=rng()))
    code.requires_grad_()
    shifts = dict(w_self=0.1, w_knn=1.0, w_rand=0.1, b_self=0.1, b_knn=0.2, b_rand=1.0)
    options = dict(shifts, n_points=3, n_random=2, pointwise=True, generator=rng())
    correspondence.stego_loss(feat, code, feat, code, **options)['loss'].backward()
    assert code.grad.is_cuda


def run_labeller(folder):
    vit = on(ViTFeatures(VIT))
    files = [dict(id=i + 1, file_name=f'{i}.png') for i in range(4)]
    for i in range(4):
        write_png(folder / f'{i}.png', picture(48, 64, seed=i))
    extract = labeller.extractor(vit, 'block0')
    source = labeller.PatchFeatures(extract, folder, files, size=32, device=CUDA)
    pooled, _ = labeller.pool_features(source, folder=folder / 'work', key={})
    near = correspondence.nearest_images(pooled, 2)
    kept = labeller.keep_features(source, max_gb=1)
    assert kept.is_cuda and not pooled.is_cuda
    common = dict(n_classes=3, code_dim=4, seed=0)
    loss = dict(w_self=0.6, w_knn=0.2, w_rand=0.6, b_self=0.7, b_knn=0.6, b_rand=0.7, n_points=3, n_random=2)
    train = dict(loss, pointwise=True, dropout=0.1, n_iters=2, batch_size=2, lr=0.01, lr_probe=0.01)
    made = stego.fit_stego(kept, near, folder=folder / 'stego', **common, **train)
    made = stego.refit_probe(made, kept, seed=0)
    short = common | dict(dropout=0.1, n_iters=2, batch_size=2, lr=0.01, lr_probe=0.01)
    energy = dict(pointwise=True, b_self=0.1, b_rand=0.4, temperature=0.1, decay=0.9)
    smooth = smooseg.fit_smooseg(kept, folder=folder / 'smooseg', **short, **energy)
    book = dict(n_points=3, n_concepts=5, positive=0.5, negative=0.5, decay=0.9)
    conceptual = cause.fit_cause(kept, folder=folder / 'cause', **short, **book)
    plain = stego.fit_kmeans(kept, smooth=3, **common)
    labels = torch.randint(0, 3, (4, 32, 32), generator=rng())
    stego.linear_probe(made, kept, labels, n_classes=3, seed=0, n_iters=2, batch_size=2)
    options = dict(size=32, patch_size=8, alpha=2.0, flip=True)
    for model in (made, smooth, conceptual, plain):
        assert model.clusters.is_cuda
        run = functools.partial(semantic.segment, model, extract, crf=crf.STEGO, **options)
        images = [picture(20, 24), picture(24, 20), picture(20, 24, seed=1)]
        maps = run(images)  # two of one size are one lattice
        assert [m.shape for m in maps] == [(20, 24), (24, 20), (20, 24)]
        assert all((m == run([im])[0]).mean() > 0.99 for m, im in zip(maps, images))
        labeller.save_labeller(folder / 'l.safetensors', model, {})
        assert labeller.load_labeller(folder / 'l.safetensors', CUDA)[0].clusters.is_cuda
    out = dict(crf=None, work_folder=folder / 'maps', key={}, **options)
    records, _ = semantic.write_semantic(made, extract, folder, files, folder / 'semantic', **out)
    assert len(records) == 4


def run_crops():
    vit = on(ViTFeatures(VIT))
    cut = np.stack([picture(32, 32, seed=i) for i in range(3)])
    covers = np.full((3, 32, 32), 255, np.uint8)
    for kind in crops.EMBEDDINGS:
        assert crops.embed_crops(vit, cut, covers, embedding=kind, batch_size=2).shape == (3, 24)


def run_position():
    maps = torch.randn(3, 6, 5, 4, generator=rng())
    want, weights = position.fit_position([maps]), position.fit_position([on(maps)])
    assert weights.is_cuda and torch.allclose(values(weights), want, atol=1e-5)
    left = position.remove_position(maps, want)
    assert torch.allclose(values(position.remove_position(on(maps), weights)), left, atol=1e-5)
    assert torch.allclose(values(position.without_position(lambda x: x, weights)(on(maps))), left, atol=1e-5)
    assert abs(position.position_share(on(maps), weights) - position.position_share(maps, want)) < 1e-5
    vit, image = on(ViTFeatures(VIT)), on(torch.rand(1, 3, 32, 32, generator=rng()))
    less = position.WithoutPosition(vit, 'keys', on(torch.randn(5, 24, generator=rng())))
    assert not torch.equal(values(less.keys(image)), values(vit.keys(image)))
    assert torch.equal(values(less.patches(image)), values(vit.patches(image)))


def run_certainty():
    prob, sem = torch.rand(3, 6, 5, generator=rng()).softmax(0), torch.randint(0, 4, (6, 5), generator=rng())
    want = certainty.certainty_map(prob, prob.argmax(0))
    assert torch.equal(values(certainty.certainty_map(on(prob), on(prob.argmax(0)))), want)
    right = certainty.pixel_weights(want, sem, 2.0)
    weights = certainty.pixel_weights(on(want), on(sem), 2.0)
    assert weights.is_cuda and torch.allclose(values(weights), right)
    logits = torch.randn(1, 4, 6, 5, generator=rng())
    loss, n = certainty.weighted_cross_entropy(on(logits), on(sem[None]), weights[None])
    at_hand = certainty.weighted_cross_entropy(logits, sem[None], right[None])
    assert torch.allclose(values(loss), at_hand[0]) and torch.allclose(values(n), at_hand[1])


def run_pretrain(folder):
    images = np.stack([picture(32, 32, seed=i) for i in range(8)])
    options = dict(n_composed=2, composed_size=32, n_patches=4, n_plain=4, image_size=16, patch_weight=1.0)
    options |= dict(image_weight=1.0, patch_temperature=0.2, image_temperature=0.2, lr=0.001, weight_decay=0.05)
    options |= dict(warmup_iters=1, ema_decay=0.9, bf16=True, seed=0)
    vit, log = pretrain.fit(images, folder, model=dict(VIT, img_size=32), n_iters=2, **options)
    assert not next(vit.parameters()).is_cuda and np.isfinite(log[-1]['patch_loss'])


def targets_of(n, h, w, n_labels=3):
    targets = []
    for i in range(n):
        masks = torch.zeros(n_labels, h, w, dtype=torch.bool)
        for j in range(n_labels):
            masks[j, 8 * j : 8 * j + 30, 6 * i : 6 * i + 40] = True
        boxes = augment.masks_to_boxes(masks) if n_labels else torch.zeros(0, 4)
        sem = torch.randint(0, 5, (h, w), generator=rng(i))
        labels = torch.randint(0, 6, (n_labels,), generator=rng(i))
        targets.append(dict(boxes=boxes, labels=labels, masks=masks, sem=sem, seed=i + 1))
    return targets


def to_gpu(targets):
    return [{k: v if k == 'seed' else on(v) for k, v in t.items()} for t in targets]


def step(model, amp=None, n=2, n_labels=3, weighed=False):
    "One step of training on the GPU; the losses."
    images = [torch.randint(0, 256, (3, 96, 128), generator=rng(i)).float() for i in range(n)]
    targets = targets_of(n, 96, 128, n_labels)
    if weighed:
        targets = [dict(t, weight=torch.rand(n_labels, generator=rng(7))) for t in targets]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    with torch.autocast('cuda', amp, enabled=amp is not None):
        losses = model(on(images), to_gpu(targets))
    sum(losses.values()).backward()
    clip_gradients(parameters, clip_type='parameter', clip_value=1.0)
    optimizer.step()
    assert all(p.grad is None or p.grad.is_cuda for p in parameters)
    return {k: float(v) for k, v in losses.items()}


VARIANTS = [
    dict(),
    dict(stem_pool=False, stem_kernel=5, fpn_first=3, anchor_sizes=[16, 32, 56, 84], decode='objectness', norm='BN'),
    dict(norm='FrozenBN', fpn_norm='', sampling_ratio=2, sem_loss_stride=2),
    dict(norm='GN', fpn_norm='GN', droploss=0.0),
]


def run_training():
    for variant, amp in zip(VARIANTS, (None, torch.bfloat16, torch.float16, None)):
        torch.manual_seed(0)
        losses = step(on(build_model(NETWORK | variant)).train(), amp)
        assert all(np.isfinite(v) for v in losses.values()), losses
    model = on(build_model(NETWORK)).train()
    step(model, n_labels=0)
    step(model, weighed=True)
    sum(model([], []).values()).backward()


def confident(config):
    "Random weights that find something."
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for p in model.roi_heads.box_predictor:
            p.cls_score.weight.mul_(60)
        model.proposal_generator.rpn_head.objectness_logits.weight.mul_(30)
    return model.eval()


def run_inference():
    images = [torch.randint(0, 256, (3, 96, 128), generator=rng(i), dtype=torch.uint8) for i in range(2)]
    for variant in (dict(), dict(decode='objectness', n_stuff=0)):
        model = on(confident(NETWORK | variant))
        for amp in (None, torch.bfloat16):
            with torch.no_grad(), torch.autocast('cuda', amp, enabled=amp is not None):
                found = model(on(images), sizes=[(60, 90), (96, 128)])
                joined = join_clusters(np.arange(6) % 2, np.arange(model.config["n_stuff"]) % 2)
                found += model(on(images), sizes=[(60, 90), (96, 128)], joined=joined)
            assert all(r['boxes'].is_cuda and r['masks'].is_cuda and len(r['boxes']) for r in found)


def run_predict(folder):
    from u2seg.predict import U2Seg, as_image

    assert (as_image(on(torch.from_numpy(picture()).permute(2, 0, 1))) == picture()).all()
    save_weights(confident(NETWORK), folder / 'model.safetensors')
    model = U2Seg.from_pretrained(folder, device='cuda')
    for p in model.predict([picture(60, 90), picture(96, 128)]):
        assert isinstance(p.ids, np.ndarray) and len(p.instances) == len(p.boxes) > 0
        assert p.overlay().shape == p.image.shape and p.to_coco()['annotations']


def run_detect(folder):
    from u2seg.selftrain import detect

    write_png(folder / '0.png', picture(60, 90))
    model = on(confident(NETWORK | dict(n_things=1, n_stuff=0, decode='objectness')))
    options = dict(score_threshold=0.05, n_max=10, batch_size=1, short=96, max_size=128)
    _, found, _ = detect(model, folder, [dict(id=1, file_name='0.png')], folder=folder / 'work', **options)
    assert found and all(isinstance(a['score'], float) for a in found)


def run_augment():
    image, target = torch.from_numpy(picture(96, 128)).permute(2, 0, 1), targets_of(1, 96, 128)[0]
    target.pop('seed')
    here = on(image), {k: on(v) for k, v in target.items()}
    options = dict(short_sides=[64], max_size=96, flip=1.0, colour_jitter=(0.3, 0.3, 0.3, 0.1))
    want = augment.view(image, target, rng=np.random.default_rng(0), **options)
    got = augment.view(*here, rng=np.random.default_rng(0), **options)
    assert got[0].is_cuda and torch.equal(values(got[1]['masks']), want[1]['masks'])
    assert augment.crop(*here, (8, 8, 48, 40))[0].is_cuda
    pasted = dict(paste_scale=(0.5, 1.0), max_cover=0.9)
    for put in (augment.copy_paste, augment.semantic_copy_paste):
        assert put(*here, *here, rng=np.random.default_rng(0), **pasted)[0].is_cuda


RUNS = {name[4:]: f for name, f in list(globals().items()) if name.startswith('run_')}


def run(name, folder):
    f = RUNS[name]
    with torch.random.fork_rng(devices=[]):
        f(folder) if f.__code__.co_argcount else f()


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    "All runs: what went wrong in each, and the functions that were given a tensor on the GPU."
    faults, functions = {}, set()

    def look(frame, event, arg):
        if event == 'call' and any(has_gpu(x) for x in frame.f_locals.values()):
            functions.add(frame.f_code)

    for name in RUNS:
        folder = tmp_path_factory.mktemp(name)
        with gpu():
            sys.setprofile(look)
            try:
                run(name, folder)
            except Exception as e:
                faults[name] = e
            finally:
                sys.setprofile(None)
    return faults, functions


def has_gpu(x):
    return isinstance(x, Gpu) or type(x) in (list, tuple) and any(isinstance(i, Gpu) for i in x[:3])


@pytest.mark.parametrize('name', RUNS)
def test_on_the_gpu(ran, name):
    if name in ran[0]:
        raise ran[0][name]


# ---------------------------------------------------------------- nothing is left out

APART = '_modidx', 'detectron', 'engine'  # no functions; detectron2's, tested where that is installed
MODULES = [m.name for m in pkgutil.iter_modules(u2seg.__path__) if m.name not in APART]
LEFT_OUT = {
    'checkpoints.rename_weights': 'names of the tensors of a file, which is read on the CPU',
    'convert.checkpoint_config': 'names and shapes of the tensors of a file, which is read on the CPU',
    'lattice.lattice': 'compiled loops of a CPU; a GPU has gpu_lattice.torch_lattice',
    'labeller.PatchFeatures.features': 'images are read on the CPU, and moved then',
    'views.box': 'boxes are drawn on the CPU, with its random numbers, and moved then',
}


def public(name):
    "Code of the public functions of a module that take tensors, and of the public methods of its classes."
    module = importlib.import_module(f'u2seg.{name}')
    for symbol in getattr(module, '__all__', ()):
        thing = getattr(module, symbol)
        parts = vars(thing) if inspect.isclass(thing) else {'': thing}
        for part, f in parts.items():
            f = inspect.unwrap(f) if callable(f) else None
            if part.startswith('_') or not inspect.isfunction(f) or f.__module__ != module.__name__:
                continue
            given = {k: v for k, v in f.__annotations__.items() if k != 'return'}
            if any('Tensor' in repr(v) for v in given.values()):
                yield f'{name}.{symbol}.{part}'.rstrip('.'), f.__code__


def test_every_public_function_that_takes_tensors_is_run(ran):
    missing = {symbol for name in MODULES for symbol, code in public(name) if code not in ran[1]}
    assert missing == set(LEFT_OUT), sorted(missing ^ set(LEFT_OUT))


# ---------------------------------------------------------------- a forgotten device is seen

FACTORIES = 'arange', 'zeros', 'ones', 'full', 'empty', 'rand', 'randperm', 'tensor'
CARELESS = dict(ncut='ncut', gpu_lattice='crf', crf='crf', labeller='labeller', views='pretrain', boxes='training')
CARELESS |= dict(rpn='training', roialign='training', cascade='training', pixels='inference')


class Careless(types.ModuleType):
    "torch, whose factories forget the device they are told."

    forgotten = 0

    def __getattr__(self, name):
        plain = getattr(torch, name)
        if name not in FACTORIES:
            return plain

        def make(*args, device=None, **kwargs):
            self.forgotten += device is not None and torch.device(device).type == 'cuda'
            return plain(*args, **kwargs)

        return make


@pytest.mark.parametrize('name', CARELESS)
def test_a_forgotten_device_turns_the_run_red(name, tmp_path, monkeypatch):
    careless = Careless('torch')
    monkeypatch.setattr(importlib.import_module(f'u2seg.{name}'), 'torch', careless)
    with gpu(), pytest.raises((MixedDevices, AssertionError)):
        run(CARELESS[name], tmp_path)
    assert careless.forgotten


def test_the_pretence_refuses_what_cuda_refuses():
    with gpu() as seen:
        here, there = on(torch.ones(3, 4)), torch.ones(3, 4)
        for refused in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: torch.where(here > 0, there, here),
            lambda: there[on(torch.tensor([0]))],
            lambda: here.index_put_((on(torch.tensor([0])),), there[:1]),
            lambda: here + torch.arange(4),
            lambda: torch.rand(3, device='cuda', generator=torch.Generator()),
            lambda: here.numpy(),
            lambda: np.asarray(here),
        ):
            with pytest.raises((MixedDevices, TypeError)):
                refused()
        assert (here + torch.tensor(1.0)).is_cuda and here[torch.tensor([0])].is_cuda  # as CUDA allows
        assert there.to(here).is_cuda and not here.cpu().is_cuda and torch.zeros(2, device=CUDA).is_cuda
        before = seen.n_waits
        (here.nonzero(), here.sum().item(), here[here > 0], here.to('cpu'), there.to('cuda'), float(here[0, 0]))
        assert seen.n_waits == before + 6
    assert not torch.zeros(2).is_cuda and not torch.cuda.is_available()


# ---------------------------------------------------------------- waits of a step


def torchvision_step(n):
    "The same step of torchvision's Mask R-CNN, a cascade of one stage without stuff."
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name='resnet18', weights=None, trainable_layers=5)
    sizes = dict(min_size=96, max_size=128, rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=60)
    model = on(MaskRCNN(backbone, num_classes=7, box_batch_size_per_image=32, **sizes)).train()
    images = [on(torch.rand(3, 96, 128, generator=rng(i))) for i in range(n)]
    keep = 'boxes', 'labels', 'masks'
    targets = [{k: v for k, v in t.items() if k in keep} for t in to_gpu(targets_of(n, 96, 128))]
    for t in targets:
        t['masks'] = t['masks'].byte()
    sum(model(images, targets).values()).backward()


def waits(f):
    with torch.random.fork_rng(devices=[]), gpu() as seen:
        f()
    return seen.n_waits


def test_a_step_waits_for_the_gpu_a_bounded_number_of_times():
    "Measured: 61 waits for 2 images, 73 for 4; torchvision 78 and 130."
    ours = [waits(lambda: step(on(build_model(NETWORK)).train(), n=n)) for n in (2, 4)]
    theirs = [waits(lambda: torchvision_step(n)) for n in (2, 4)]
    assert ours[0] <= 65 and ours[1] <= 78, ours
    assert ours[0] < theirs[0] and ours[1] - ours[0] < (theirs[1] - theirs[0]) / 2, (ours, theirs)


def test_each_thing_of_a_map_starts_few_operations():
    "Eight, and three views: starting them is what a GPU takes its time for."
    rules = dict(n_things=6, score=0.0, overlap=0.5, area=1)

    def launches(n):
        masks, sem = on(torch.rand(n, 24, 24, generator=rng()) > 0.5), on(torch.zeros(24, 24, dtype=torch.int64))
        with gpu() as seen:
            pixels.combine(masks, on(torch.rand(n)), on(torch.zeros(n, dtype=torch.int64)), sem, **rules)
        return seen.launches

    assert launches(12) - launches(2) == 10 * 11
