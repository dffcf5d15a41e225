"""Digests of what training and prediction compute: equal on every x86-64 processor with AVX2.

    python benchmarks/exact.py [--iterations 12] [--out benchmarks/results/exact.md]

From the outputs of stages maskcut, cutler and panoptic: batches, initial weights, gradients and weights of the first
iterations of stages cutler and train, and what the network then predicts, under the pins of u2seg.exact with two
threads. Run it on two machines and compare the columns; on one machine two runs must agree as well.
"""

import argparse, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def digests(n_iters):
    "A row a value: stage, what, digest."
    import numpy as np, torch, yaml
    from u2seg import train
    from u2seg.augment import Augment
    from u2seg.batches import Batches, PseudoLabels
    from u2seg.checkpoints import load_weights
    from u2seg.images import read_json
    from u2seg.model import build_model
    from u2seg.optim import CLASS_LAYERS
    from u2seg.predict import run_network
    from hashlib import sha256

    def digest(values):
        h = sha256()
        for v in values:
            h.update(np.ascontiguousarray(v.detach().numpy() if isinstance(v, torch.Tensor) else v).tobytes())
        return h.hexdigest()[:16]

    def arrays(x):
        if isinstance(x, (torch.Tensor, np.ndarray)):
            return [x]
        inner = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
        return [a for y in inner for a in arrays(y)]

    params, images = yaml.safe_load((ROOT / 'params.yaml').read_text()), ROOT / 'data/embedded'
    torch.set_num_threads(2)
    for stage in ('cutler', 'train'):
        section = lambda k: {**params[k], **params[stage][k]}
        n = dict(n_things=1, n_stuff=0)
        if stage == 'cutler':
            data = PseudoLabels(images, read_json(ROOT / 'out/maskcut/instances.json'), skip_empty=True)
        else:
            labels = ROOT / 'out/panoptic'
            data = PseudoLabels(images, labels / 'instances.json', labels / 'stuff')
            stuff = [c for c in read_json(labels / 'panoptic.json')['categories'] if not c['isthing']]
            n = dict(n_things=len(data.category_ids), n_stuff=len(stuff))
        source = Batches(data, Augment(**section('augment')), batch_size=8, seed=0)
        batches = [source.part(i, 0, 1) for i in range(n_iters)]
        yield stage, 'batches', digest(x for pixels, _, _ in batches for x in pixels)
        torch.manual_seed(0)
        net = build_model({**section('network'), **n}).train()
        yield stage, 'initial weights', digest(net.state_dict().values())
        if stage == 'train':
            load_weights(net, ROOT / 'out/cutler/model.safetensors', without=CLASS_LAYERS)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
        for i, (pixels, targets, _) in enumerate(batches):
            optimizer.zero_grad()
            torch.manual_seed(i)
            losses = net(*train._to(torch.device('cpu'), pixels, targets))
            sum(losses.values()).backward()
            optimizer.step()
            if i in (0, n_iters - 1):
                yield stage, f'gradients, iteration {i + 1}', digest(p.grad for p in net.parameters())
                yield stage, f'weights, iteration {i + 1}', digest(net.state_dict().values())
        net.eval()
        pixels = [x.permute(1, 2, 0).numpy() for x in batches[0][0][:4]]
        yield stage, 'predictions', digest(arrays(run_network(net, pixels, short=128, max_size=128)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--iterations', type=int, default=12)
    parser.add_argument('--out')
    a = parser.parse_args()
    from u2seg.exact import PINS

    pins = dict(PINS, U2SEG_ARITHMETIC='exact', OMP_NUM_THREADS='2', MKL_NUM_THREADS='2', CUDA_VISIBLE_DEVICES='')
    if any(os.environ.get(k) != v for k, v in pins.items()):  # libraries read them once, when they are loaded
        return subprocess.run([sys.executable, *sys.argv], env=os.environ | pins).returncode
    from machine import heading, publish

    rows = [f'| {stage} | {what} | {value} |' for stage, what, value in digests(a.iterations)]
    table = ['| stage | value | sha256, 16 digits |', '|---|---|---|', *rows]
    publish([*heading('Exact arithmetic', 2, ('torch', 'torchvision', 'numpy'), how=''), *table], a.out)


if __name__ == '__main__':
    sys.exit(main())
