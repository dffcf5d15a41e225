"""Features of the last block, ours (fused attention, only the part of the block that is asked for) against a plain
forward pass.

    python benchmarks/features.py [--model vit_base_patch8_224.dino] [--size 480] [--rounds 3] [--batch 1]
                                  [--threads 2] [--out benchmarks/results/features.md]

The plain side runs the whole model with every attention matrix written out and catches the keys by a hook, as the
original code does. Both sides run in turns in one process, with the same random weights, and print medians, their
ratio and the largest relative difference of the result.
"""

import argparse, statistics

import torch
from timm.layers import set_fused_attn

from machine import clock, heading, publish
from u2seg.features import ViTFeatures


def plain(vit, images):
    "The whole model: keys [b, d, n] and the class token [b, d]."
    caught = {}
    hook = vit.blocks[-1].attn.qkv.register_forward_hook(lambda module, x, y: caught.update(qkv=y))
    with torch.no_grad():
        tokens = vit.forward_features(images)
    hook.remove()
    d = vit.embed_dim
    return dict(keys=caught['qkv'][:, vit.num_prefix_tokens :, d : 2 * d].mT.float(), cls=tokens[:, 0].float())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', default='vit_base_patch8_224.dino')
    p.add_argument('--size', type=int, default=480)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--batch', type=int, default=1)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--out')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    images = torch.randn(a.batch, 3, a.size, a.size, device=device)
    set_fused_attn(False)
    vit = ViTFeatures(a.model).vit.to(device)
    set_fused_attn(True)
    single, half = (ViTFeatures(a.model, dtype=t).to(device) for t in (torch.float32, torch.bfloat16))
    assert not vit.blocks[0].attn.fused_attn and single.vit.blocks[0].attn.fused_attn
    for f in (single, half):
        f.vit.load_state_dict(vit.state_dict())
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None

    def timed(call):
        def run():
            y = call()
            wait()
            return y

        return run

    sides = {
        'whole model, plain attention, float32': lambda: plain(vit, images),
        'keys, float32': lambda: dict(keys=single.keys(images).flatten(2)),
        'class token, float32': lambda: dict(cls=single.cls(images)),
        'all three, float32': lambda: {k: v.flatten(2) if v.ndim == 4 else v for k, v in single(images).items()},
        'keys, bfloat16': lambda: dict(keys=half.keys(images).flatten(2)),
    }
    got, taken = {}, {name: [] for name in sides}
    for _ in range(a.rounds):
        for name, run in sides.items():
            got[name], t = clock(timed(run))
            taken[name].append(t)
    want = next(iter(got.values()))
    times = {name: tuple(map(statistics.median, zip(*t))) for name, t in taken.items()}
    base = next(iter(times.values()))
    lines = [
        *heading('Features: fused attention, and only what is asked for', a.threads, ('torch', 'timm')),
        f'{a.model} with random weights, {a.batch} x {a.size} px, on {"a GPU" if device == "cuda" else "the CPU"}; '
        f'medians of {a.rounds}.',
        '',
        '| | wall, s | CPU, s | ratio, wall | ratio, CPU | relative difference |',
        '|---|---|---|---|---|---|',
    ]
    for name, (wall, cpu) in times.items():
        error = max(((got[name][k] - want[k]).norm() / want[k].norm()).item() for k in want if k in got[name])
        lines.append(f'| {name} | {wall:.2f} | {cpu:.2f} | {base[0] / wall:.2f} | {base[1] / cpu:.2f} | {error:.0e} |')
    publish(lines, a.out)


if __name__ == '__main__':
    main()
