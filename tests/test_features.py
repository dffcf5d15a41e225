"""Features against hooks, plain formulas and strange weight files."""

import argparse
import math
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from u2seg import features as F

DINO = 'vit_tiny_patch16_224'  # the layout and the names of DINO's ViTs, small
small = dict(img_size=64, embed_dim=48, depth=2, num_heads=3, patch_size=8)
stem = small | dict(stem_channels=[8, 16, 32])


@pytest.fixture(scope='module')
def dino():
    torch.manual_seed(0)
    return F.ViTFeatures(DINO)


def original_names(vit):
    "The state of a ViT as the original DINO code names it."
    d, depth = vit.embed_dim, len(vit.blocks)
    names = ['cls_token', 'pos_embed', 'patch_embed.proj.weight', 'patch_embed.proj.bias', 'norm.weight', 'norm.bias']
    for i in range(depth):
        for part in ('norm1', 'attn.qkv', 'attn.proj', 'norm2', 'mlp.fc1', 'mlp.fc2'):
            names += [f'blocks.{i}.{part}.weight', f'blocks.{i}.{part}.bias']
    state = vit.state_dict()
    assert set(names) == set(state)
    return {n: torch.randn(state[n].shape, generator=torch.Generator().manual_seed(len(n))) for n in names}


def caught(f, images, layer):
    got = {}
    hook = layer.register_forward_hook(lambda m, x, y: got.update(y=y))
    tokens = f.vit.forward_features(images)
    hook.remove()
    return got['y'], tokens


@pytest.mark.parametrize(
    'model,size',
    [
        (DINO, (48, 80)),
        ('vit_small_patch14_reg4_dinov2.lvd142m', (42, 70)),
        (small, (64, 64)),
        (small, (24, 40)),
        (stem, (24, 40)),
    ],
)
def test_keys_tokens_and_cls_are_those_of_the_whole_model(model, size):
    torch.manual_seed(1)
    f = F.ViTFeatures(model)
    for p in f.vit.parameters():
        p.data += 0.02 * torch.randn_like(p)  # biases are zero at birth
    images = torch.randn(2, 3, *size)
    qkv, tokens = caught(f, images, f.vit.blocks[-1].attn.qkv)
    n, h, w = f.vit.num_prefix_tokens, size[0] // f.patch_size, size[1] // f.patch_size
    got = f(images)
    assert got['keys'].shape == got['patches'].shape == (2, f.dim, h, w) and got['cls'].shape == (2, f.dim)
    for name, whole in (('keys', qkv[:, n:, f.dim : 2 * f.dim]), ('patches', tokens[:, n:])):
        for y in range(h):
            for x in range(w):
                torch.testing.assert_close(got[name][:, :, y, x], whole[:, y * w + x], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got['cls'], tokens[:, 0], atol=2e-5, rtol=1e-4)
    assert torch.equal(f.keys(images), got['keys']) and torch.equal(f.patches(images), got['patches'])
    # the last block for one token only
    torch.testing.assert_close(f.cls(images), tokens[:, 0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('model', ['vit_tiny_patch16_dinov3_qkvb', 'vit_small_patch16_dinov3'])
def test_rotary_models(model):
    f = F.ViTFeatures(model)
    images = torch.randn(1, 3, 48, 64)
    tokens = f.vit.forward_features(images)
    entrance = {}

    def remember(m, args, kw):
        entrance.update(x=args[0] if args else kw['x'])

    hook = f.vit.blocks[-1].attn.register_forward_pre_hook(remember, with_kwargs=True)
    f.vit.forward_features(images)
    hook.remove()
    attn, n = f.vit.blocks[-1].attn, f.vit.num_prefix_tokens
    if attn.qkv is not None:
        weight = attn.qkv.weight
    else:
        weight = torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight])
    keys = entrance['x'][:, n:] @ weight[f.dim : 2 * f.dim].T
    if attn.qkv is not None and attn.qkv.bias is not None:
        keys = keys + attn.qkv.bias[f.dim : 2 * f.dim]
    got = f(images)
    torch.testing.assert_close(got['keys'].flatten(2).mT, keys, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got['patches'].flatten(2).mT, tokens[:, n:], atol=2e-5, rtol=1e-4)


def test_the_last_attention_does_not_run_for_keys(dino):
    ran = []
    hooks = [
        m.register_forward_hook(lambda m, x, y: ran.append(y.shape[1]))
        for m in (dino.vit.blocks[-1].attn.proj, dino.vit.blocks[-1].mlp.fc1)
    ]
    dino.keys(torch.randn(1, 3, 32, 32))
    assert not ran
    dino(torch.randn(1, 3, 32, 32), ('keys', 'cls'))
    assert ran == [1, 1]  # one token, not all five
    dino(torch.randn(1, 3, 32, 32), ('patches', 'cls'))
    assert ran == [1, 1, 5, 5]
    for h in hooks:
        h.remove()


# --- positions


def cubic(t, a=-0.75):
    t = abs(t)
    return (
        (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0
    )


def sampled(row, n_new):
    "One axis of DINO's positions, cell by cell: bicubic at (i + 1/2)/s - 1/2, s = (n_new + .1)/n_old, edges repeated."
    n = len(row)
    s = (n_new + 0.1) / n
    out = []
    for i in range(n_new):
        at = (i + 0.5) / s - 0.5
        base = math.floor(at)
        out.append(sum(cubic(at - j) * row[min(max(j, 0), n - 1)] for j in range(base - 1, base + 3)))
    return torch.stack(out)


@pytest.mark.parametrize('new', [(9, 5), (4, 7), (6, 4), (3, 3)])
def test_dino_positions_are_the_plain_formula(new):
    torch.manual_seed(0)
    table = torch.randn(1, 20, 6)  # 4 x 5 cells
    grid = table[0].reshape(4, 5, 6)
    want = sampled(grid, new[0])  # down the rows
    want = sampled(want.transpose(0, 1), new[1]).transpose(0, 1)
    torch.testing.assert_close(F.dino_positions(table, (4, 5), new)[0], want.reshape(-1, 6), atol=1e-5, rtol=1e-5)


def test_dino_interpolation_in_the_model(dino):
    state = dino.vit.state_dict()
    other = F.ViTFeatures(DINO, interpolation='dino')
    other.vit.load_state_dict(state)
    native = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(other.cls(native), dino.cls(native), atol=1e-5, rtol=1e-4)  # 14 x 14: the table as it is
    images = torch.randn(2, 3, 48, 80)
    positions = F.dino_positions(state['pos_embed'][:, 1:], (14, 14), (3, 5))
    # a model of this very size, its table filled by us
    vit = timm.create_model(DINO, num_classes=0, img_size=(48, 80)).eval()
    vit.load_state_dict(state | {'pos_embed': torch.cat([state['pos_embed'][:, :1], positions], 1)})
    with torch.no_grad():
        want = vit.forward_features(images)
    torch.testing.assert_close(other.patches(images).flatten(2).mT, want[:, 1:], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(other.cls(images), want[:, 0], atol=2e-5, rtol=1e-4)
    assert (other.patches(images) - dino.patches(images)).abs().max() > 1e-3


def test_dino_interpolation_with_registers_leaves_them_alone():
    name = 'vit_small_patch14_reg4_dinov2.lvd142m'
    torch.manual_seed(0)
    f = F.ViTFeatures(name, interpolation='dino')
    x, _ = F.embed(f.vit, torch.zeros(1, 3, 28, 42), 'dino')
    assert torch.equal(x[:, :1], f.vit.cls_token) and torch.equal(x[:, 1:5], f.vit.reg_token)
    patches = f.vit.patch_embed(torch.zeros(1, 3, 28, 42)).flatten(1, 2)
    torch.testing.assert_close(x[:, 5:], patches + F.dino_positions(f.vit.pos_embed, (37, 37), (2, 3)))


# --- weights

wrapped = {
    'plain': lambda s: s,
    'teacher': lambda s: {
        'teacher': {f'backbone.{k}': v for k, v in s.items()} | {'head.mlp.0.weight': torch.zeros(1)},
        'student': {f'module.backbone.{k}': v * 0 for k, v in s.items()},
        'epoch': 3,
        'args': argparse.Namespace(lr=0.1),
    },
    'state_dict': lambda s: {'state_dict': {f'module.{k}': v for k, v in s.items()}},
    'student': lambda s: {
        'student': {f'module.backbone.{k}': v for k, v in s.items()} | {'module.head.last_layer.weight': torch.zeros(1)}
    },
}


@pytest.mark.parametrize('how', wrapped)
def test_an_original_dino_file_loads_strictly(how, dino, tmp_path):
    state = original_names(dino.vit)
    torch.save(wrapped[how](state), tmp_path / 'dino.pth')
    f = F.ViTFeatures(DINO, tmp_path / 'dino.pth')
    assert all(torch.equal(f.vit.state_dict()[k], v) for k, v in state.items())


def test_safetensors_loads(dino, tmp_path):
    state = original_names(dino.vit)
    save_file(state, tmp_path / 'w.safetensors')
    assert torch.equal(
        F.ViTFeatures(DINO, str(tmp_path / 'w.safetensors')).vit.state_dict()['norm.bias'], state['norm.bias']
    )


def test_wrong_names_and_shapes_are_named(dino, tmp_path):
    state = original_names(dino.vit)

    def load(s, name='w.pth'):
        torch.save(s, tmp_path / name)
        F.load_strictly(dino.vit, F.read_weights(tmp_path / name), tmp_path / name)

    with pytest.raises(ValueError, match=r'w\.pth lacks blocks\.3\.attn\.qkv\.bias$'):
        load({k: v for k, v in state.items() if k != 'blocks.3.attn.qkv.bias'})
    with pytest.raises(ValueError, match=r'has unknown extra\.weight$'):
        load(state | {'extra.weight': torch.zeros(2)})
    with pytest.raises(ValueError, match=r'has cls_token \[1, 1, 7\] instead of \[1, 1, 192\]'):
        load(state | {'cls_token': torch.zeros(1, 1, 7)})
    with pytest.raises(ValueError, match='holds no named weights'):
        load({})
    with pytest.raises(ValueError, match='holds a list'):
        load([1, 2])


def test_a_malicious_pickle_does_not_run(tmp_path):
    mark = tmp_path / 'ran'

    class Bad:
        def __reduce__(self):
            return (Path.touch, (mark,))

    for name, write in (
        ('a.pth', lambda p: torch.save({'teacher': Bad()}, p)),
        ('b.pth', lambda p: p.write_bytes(pickle.dumps(Bad()))),
    ):
        write(tmp_path / name)
        with pytest.raises(ValueError, match=f'{name}: cannot be read as weights: it asks for'):
            F.ViTFeatures(DINO, tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize(
    'name,content,message',
    [
        ('no.pth', None, 'no such file'),
        ('w.npz', b'', 'must end in'),
        ('w.pth', b'', 'is empty'),
        ('w.safetensors', b'\x00' * 20, 'cannot be read'),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        F.read_weights(tmp_path / name)


# --- the class


@pytest.mark.parametrize(
    'call,message',
    [
        (lambda f: f.keys(torch.zeros(1, 3, 40, 64)), '40 x 64 must be a multiple of the patch size 16'),
        (lambda f: f.keys(torch.zeros(3, 48, 64)), r'must be \[b, 3, H, W\], got \[3, 48, 64\]'),
        (lambda f: f(torch.zeros(1, 3, 48, 64), ('values',)), "'values'"),
        (lambda f: F.ViTFeatures(DINO, interpolation='nearest'), "'nearest'"),
        (lambda f: F.ViTFeatures(DINO, dtype=torch.float16), 'float16'),
        (lambda f: F.ViTFeatures('vit_small_patch16_dinov3', interpolation='dino'), 'needs learned positions'),
        (lambda f: F.ViTFeatures('swin_tiny_patch4_window7_224'), 'plain pre-norm ViT'),
        (lambda f: F.build_vit(stem | dict(patch_size=16)), 'patch_size must be 8'),
    ],
)
def test_faults_are_named(dino, call, message):
    with pytest.raises(ValueError, match=message):
        call(dino)


def test_frozen_and_float32_out_of_bfloat16():
    f = F.ViTFeatures(stem, dtype=torch.bfloat16)
    assert not f.train().training
    assert not any(p.requires_grad for p in f.parameters()) and next(f.vit.parameters()).dtype == torch.bfloat16
    g = F.ViTFeatures(stem)
    g.vit.load_state_dict({k: v.float() for k, v in f.vit.state_dict().items()})
    images = torch.randn(1, 3, 64, 64)
    a, b = f.patches(images), g.patches(images)
    assert a.dtype == torch.float32 and not a.requires_grad
    assert nn.functional.cosine_similarity(a, b, dim=1).min() > 0.98 and not torch.equal(a, b)


@pytest.mark.parametrize(
    'model,interpolation', [(stem, 'timm'), (small, 'dino'), ('vit_tiny_patch16_dinov3_qkvb', 'timm')]
)
def test_a_backbone_file_rebuilds_itself(tmp_path, model, interpolation):
    vit = F.build_vit(model).eval()
    for b in vit.buffers():
        if b.is_floating_point() and b.ndim == 1:
            b.data += 0.3  # statistics of the stem's norms travel too
    F.write_backbone(tmp_path / 'b.safetensors', vit, model, interpolation=interpolation)
    F.write_backbone(tmp_path / 'c.safetensors', vit, model, interpolation=interpolation)
    f = F.ViTFeatures.from_file(tmp_path / 'b.safetensors')
    assert (tmp_path / 'b.safetensors').read_bytes() == (tmp_path / 'c.safetensors').read_bytes()
    assert f.interpolation == interpolation
    stored = lambda t: t if isinstance(model, str) else t.half()  # ours in half precision, others' as they are
    assert all(
        torch.equal(stored(a), stored(b)) for a, b in zip(f.vit.state_dict().values(), vit.state_dict().values())
    )


@pytest.mark.parametrize(
    'name,patch,dim',
    [
        ('vit_small_patch8_224.dino', 8, 384),
        ('vit_base_patch8_224.dino', 8, 768),
        ('vit_small_patch16_224.dino', 16, 384),
        ('vit_base_patch16_224.dino', 16, 768),
        ('vit_small_patch14_dinov2.lvd142m', 14, 384),
        ('vit_base_patch14_reg4_dinov2.lvd142m', 14, 768),
        ('vit_small_patch16_dinov3.lvd1689m', 16, 384),
        ('vit_base_patch16_dinov3.lvd1689m', 16, 768),
    ],
)
def test_the_published_models_by_name(name, patch, dim):
    with torch.device('meta'):
        f = F.ViTFeatures(name)  # shapes alone; no memory, no time
    got = f(torch.zeros(2, 3, 2 * patch, 5 * patch, device='meta'))
    assert f.patch_size == patch
    assert {k: tuple(v.shape) for k, v in got.items()} == dict(
        keys=(2, dim, 2, 5), patches=(2, dim, 2, 5), cls=(2, dim)
    )


def test_a_file_without_description_is_refused(tmp_path):
    save_file({'a': torch.zeros(1)}, tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match='does not say which model'):
        F.ViTFeatures.from_file(tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match='only .safetensors'):
        F.ViTFeatures.from_file(tmp_path / 'a.pth')
