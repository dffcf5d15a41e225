"""Inference and training step of our engine beside detectron2's: equal weights, equal images, alternating, medians.

python benchmarks/model.py                          # the embedded student alone: images and iterations a second
python benchmarks/model.py --detectron2             # R50, k = 800, against detectron2 (it must be importable)
"""

import argparse, statistics, sys, time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests'))
import u2seg.model as ours
from u2seg.roialign import Pooler
from machine import SIDES, heading, publish

STUDENT = dict(
    n_things=24,
    n_stuff=12,
    depth=18,
    width=24,
    n_blocks=[1, 1, 2, 2],
    stem_kernel=5,
    stem_pool=False,
    norm='BN',
    fpn_norm='BN',
    fpn_first=3,
    fpn_channels=64,
    anchor_sizes=[16, 32, 56, 84],
    anchor_ratios=[0.6, 1.0, 1.6],
    rpn_batch=64,
    rpn_pre_train=400,
    rpn_pre_test=200,
    rpn_post_train=150,
    rpn_post_test=100,
    roi_batch=48,
    roi_positive=0.34,
    canonical_size=112,
    sampling_ratio=2,
    fc_dim=256,
    mask_pool=12,
    mask_dim=48,
    n_mask_convs=2,
    sem_dim=48,
    sem_loss_stride=2,
    decode='objectness',
    panoptic_area=64,
    min_size=128,
    max_size=128,
)


def alternate(functions: dict, rounds: int) -> dict[str, list[tuple[float, float]]]:
    "(Wall, CPU) seconds of each function, one after the other in each round; the first round is not counted."
    out = {k: [] for k in functions}
    for i in range(rounds + 1):
        for k, f in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            f()
            if i:
                out[k].append((time.perf_counter() - wall, time.process_time() - cpu))
    return out


def median(times, which):
    return statistics.median(t[which] for t in times)


def pictures(n, h, w, n_things, n_stuff, n_labels=6):
    g = torch.Generator().manual_seed(0)
    images, targets = [torch.randint(0, 256, (3, h, w), generator=g).float() for _ in range(n)], []
    for _ in range(n):
        masks = torch.zeros(n_labels, h, w, dtype=torch.bool)
        at = (torch.rand(n_labels, 2, generator=g) * torch.tensor([h * 0.6, w * 0.6])).int().tolist()
        size = (torch.rand(n_labels, 2, generator=g) * torch.tensor([h * 0.3, w * 0.3]) + 8).int().tolist()
        for m, (y, x), (a, b) in zip(masks, at, size):
            m[y : y + a, x : x + b] = True
        boxes = torch.tensor([[x, y, x + b, y + a] for (y, x), (a, b) in zip(at, size)]).float()
        targets.append(
            dict(
                boxes=boxes,
                labels=torch.randint(0, n_things, (n_labels,), generator=g),
                masks=masks,
                sem=torch.randint(0, n_stuff + 1, (h, w), generator=g),
            )
        )
    return images, targets


def step(model, optimizer, images, targets):
    loss = sum(model(images, targets).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def student(rounds):
    torch.manual_seed(0)
    model, (images, targets) = ours.build_model(STUDENT), pictures(8, 128, 128, 24, 12, 3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    train = alternate(dict(train=lambda: step(model.train(), optimizer, images, targets)), rounds)['train']
    model.eval()
    with torch.inference_mode():
        infer = alternate(dict(infer=lambda: model(images)), rounds)['infer']
    return median(train, 1), median(infer, 1) / 8


def beside_torchvision(rounds):
    "RoIAlign forward and backward at the student's size: 384 regions, 64 channels, 32 x 32 cells, 7 x 7 bins."
    torch.manual_seed(0)
    x, corner = (
        torch.randn(8, 64, 32, 32).to(memory_format=torch.channels_last).requires_grad_(),
        torch.rand(384, 2) * 70,
    )
    boxes, image = torch.cat([corner, corner + 8 + torch.rand(384, 2) * 48], 1), torch.arange(384) // 48
    pooler, rois = (
        Pooler([2], size=7, sampling_ratio=2, canonical_size=1, canonical_level=0),
        torch.cat([image[:, None].float(), boxes], 1),
    )
    run = lambda f: f().sum().backward()
    return alternate(
        dict(
            ours=lambda: run(lambda: pooler([x], boxes, image)),
            theirs=lambda: run(lambda: ours.roi_align(x, rois, 7, 0.25, 2, aligned=True)),
        ),
        5 * rounds,
    )


def beside_detectron2(rounds, height, width):
    from test_detectron2_parity import as_detectron2, detectron2_config
    from detectron2.modeling import build_model as build_detectron2
    from detectron2.utils.events import EventStorage

    torch.manual_seed(0)
    mine = ours.build_model(
        dict(n_things=800, n_stuff=27, norm='BN', fpn_norm='BN', score_threshold=0.0012, panoptic_score=0.0012)
    )  # random weights: thresholds low enough for 100 detections
    theirs = build_detectron2(detectron2_config(mine.config))
    theirs.load_state_dict(mine.state_dict())
    images, targets = pictures(2, height, width, 800, 27)
    own, other = (torch.optim.SGD(m.parameters(), 1e-6) for m in (mine, theirs))

    def other_step():
        with EventStorage():
            loss = sum(theirs(as_detectron2(images, targets)).values())
        other.zero_grad()
        loss.backward()
        other.step()

    mine.train()
    theirs.train()
    train = alternate(dict(ours=lambda: step(mine, own, images, targets), theirs=other_step), rounds)
    mine.eval()
    theirs.eval()
    with torch.inference_mode():
        infer = alternate(dict(ours=lambda: mine(images[:1]), theirs=lambda: theirs(as_detectron2(images[:1]))), rounds)
    return train, infer


def row(name, times):
    cells = []
    for which in 0, 1:
        pairs = sorted(b[which] / a[which] for a, b in zip(times['ours'], times['theirs']))
        cells.append(
            f"{median(times['ours'], which):.3g} | {median(times['theirs'], which):.3g} | "
            f"{median(times['theirs'], which) / median(times['ours'], which):.2f} ({pairs[0]:.2f} to "
            f"{pairs[-1]:.2f})"
        )
    return f'| {name} | {" | ".join(cells)} |'


def table(theirs):
    return [
        '',
        f'| | ours, wall s | {theirs}, wall s | ratio | ours, CPU s | {theirs}, CPU s | ratio |',
        '|---|---|---|---|---|---|---|',
    ]


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--detectron2', action='store_true')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    p.add_argument(
        '--size', type=int, nargs=2, default=[800, 1088], help='height and width of the pictures beside detectron2'
    )
    p.add_argument('--out', help='write the result to this file')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    lines = heading(
        'The network',
        a.threads,
        ['torch', 'torchvision'] + ['detectron2'] * a.detectron2,
        f'{SIDES} Medians of {a.rounds} rounds after one that is not counted; in brackets the range over the pairs.',
    )
    if a.detectron2:
        t, i = beside_detectron2(a.rounds, *a.size)
        lines += [
            f'R50, 800 clusters, 27 stuff labels, pictures of {a.size[0]} x {a.size[1]}, equal weights, 100 '
            'detections a picture:',
            *table('detectron2'),
            row('training step, 2 pictures', t),
            row('inference, 1 picture', i),
            '',
        ]
    lines += [
        'RoIAlign, forward and backward, 384 regions of the student:',
        *table('torchvision'),
        row('RoIAlign', beside_torchvision(a.rounds)),
        '',
    ]
    train, infer = student(a.rounds)
    lines += [
        f'The embedded student alone (128 px): {train:.2f} CPU seconds a training iteration of 8 pictures, '
        f'{infer * 1000:.0f} ms a picture at inference.'
    ]
    publish(lines, a.out)
