"""Keys of the last block, ours (fused attention, key rows only) against a plain forward pass with the attention matrix written out.

    python benchmarks/features.py [--model vit_small_patch8_224.dino] [--size 224] [--rounds 7] [--batch 1] [--threads 2]

Both sides run alternately in one process; medians and their ratio are printed, with the largest difference of the keys.
"""
import argparse, statistics, time

import torch
from timm.layers import set_fused_attn

from u2seg.features import ViTFeatures


def plain_keys(vit, images):
    "The whole model, every attention matrix materialised; keys caught by a hook, as the original code does."
    caught = {}
    hook = vit.blocks[-1].attn.qkv.register_forward_hook(lambda module, x, y: caught.update(qkv=y))
    with torch.no_grad(): vit.forward_features(images)
    hook.remove()
    d = vit.embed_dim
    return caught['qkv'][:, vit.num_prefix_tokens:, d:2*d].mT.float()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', default='vit_small_patch8_224.dino')
    p.add_argument('--size', type=int, default=224)
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--batch', type=int, default=1)
    p.add_argument('--threads', type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads); torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    images = torch.randn(a.batch, 3, a.size, a.size, device=device)
    ours = {str(t).split('.')[1]: ViTFeatures(a.model, dtype=t).to(device) for t in (torch.float32, torch.bfloat16)}
    set_fused_attn(False)
    plain = ViTFeatures(a.model).vit.to(device)
    set_fused_attn(True)
    assert not plain.blocks[0].attn.fused_attn and ours['float32'].vit.blocks[0].attn.fused_attn
    for f in ours.values(): f.vit.load_state_dict(plain.state_dict())
    sides = {'plain float32': lambda: plain_keys(plain, images)} | {f'ours {name}': (lambda f: lambda: f.keys(images).flatten(2))(f) for name, f in ours.items()}
    want = sides['plain float32']()
    times = {name: [] for name in sides}
    for _ in range(a.rounds):
        for name, run in sides.items():
            if device == 'cuda': torch.cuda.synchronize()
            start = time.perf_counter(); got = run()
            if device == 'cuda': torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    print(f'{a.model}, {a.batch} x {a.size} px, {a.threads} threads, {device}, medians of {a.rounds}')
    base = statistics.median(times['plain float32'])
    for name, run in sides.items():
        error = (run() - want).norm()/want.norm()
        print(f'{name:14} {statistics.median(times[name])*1e3:9.1f} ms   {base/statistics.median(times[name]):5.2f}x   relative difference of the keys {error:.1e}')


if __name__ == '__main__': main()
