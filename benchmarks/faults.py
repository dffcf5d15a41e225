"""Long runs under accidents: killed at random moments, and fed with files that are no images.

    python benchmarks/faults.py [--images 200] [--kills 10] [--out benchmarks/results/faults.md]

`label_images` (ViT, MaskCut, dense CRF, RLE) runs over drawn images with a dozen bad or strange files among them,
once from beginning to end, and once killed (SIGKILL) at random moments and started again each time; the COCO file and
every shard are compared byte by byte. Then the same run is shared by three processes as torchrun would start them.
The table says what became of each strange file.
"""

import argparse, hashlib, json, os, random, signal, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
from PIL import Image

from machine import heading, publish

SIZE = 64


def strange(folder):
    "Write the strange files; {name: what it is}."
    picture = Image.open(folder / '0000.png').convert('RGB')

    def truncated(p):
        picture.save(p)
        p.write_bytes(p.read_bytes()[:2000])

    def rotated(p):
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.crop((0, 0, 128, 96)).save(p, exif=exif)

    make = {
        'truncated.png': ('truncated', truncated),
        'empty.jpg': ('empty file', lambda p: p.write_bytes(b'')),
        'text.jpg': ('not an image', lambda p: p.write_text('hello')),
        'bomb.png': ('20,000 x 20,000 px', lambda p: Image.new('1', (20000, 20000)).save(p)),
        'pixel.png': ('1 x 1 px', lambda p: picture.resize((1, 1)).save(p)),
        'wide.png': ('20,000 px wide', lambda p: picture.resize((20000, 40)).save(p)),
        'deep.png': (
            '16 bits a pixel',
            lambda p: Image.fromarray(np.asarray(picture.convert('L')).astype(np.uint16) * 257).save(p),
        ),
        'cmyk.jpg': ('CMYK', lambda p: picture.convert('CMYK').save(p)),
        'palette.png': ('palette', lambda p: picture.convert('P').save(p)),
        'alpha.png': ('alpha channel', lambda p: picture.convert('RGBA').save(p)),
        'turned.jpg': ('EXIF-rotated', rotated),
        'grey.png': ('grey', lambda p: picture.convert('L').save(p)),
    }
    for name, (_, write) in make.items():
        write(folder / name)
    return {name: what for name, (what, _) in make.items()}


def worker(folder, to):
    "Label all images of `folder`; the result is to/instances.json."
    import torch
    from u2seg.features import ViTFeatures
    from u2seg.images import list_images, write_json
    from u2seg.maskcut import label_images

    torch.set_num_threads(1)
    torch.manual_seed(0)
    vit = ViTFeatures(dict(img_size=SIZE, embed_dim=48, depth=1, num_heads=3, patch_size=8))
    found = label_images(
        list_images(folder, ['pictures']),
        vit,
        root=folder,
        folder=to / 'shards',
        size=SIZE,
        feature='patches',
        tau=0.3,
        n_masks=3,
        crf=True,
        min_agreement=0.5,
        batch_size=4,
        shard_size=8,
        desc='',
    )
    write_json(to / f"instances{os.environ.get('RANK', '')}.json", found)


def start(folder, to, **env):
    to.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, __file__, '--worker', str(folder), str(to)],
        env={**os.environ, **{k: str(v) for k, v in env.items()}},
    )


def shards(to):
    return {p.name: p.read_bytes() for p in sorted(to.rglob('shard_*.json'))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--images', type=int, default=200)
    parser.add_argument('--kills', type=int, default=10)
    parser.add_argument('--out')
    parser.add_argument('--worker', nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    from u2seg.scenes import draw_scene

    rng, lines = (
        random.Random(0),
        [*heading('Runs that are killed, and pictures that are none', 1, ('torch', 'PIL'), '')],
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pictures = folder / 'pictures'
        pictures.mkdir()
        for i in range(args.images - 12):
            Image.fromarray(draw_scene(i, 'objects')[0]).save(pictures / f'{i:04d}.png')
        kinds = strange(pictures)
        begin = time.perf_counter()
        assert start(folder, folder / 'whole').wait() == 0
        whole, n, moments = time.perf_counter() - begin, len(shards(folder / 'whole')), []
        for goal in sorted(
            rng.sample(range(n), args.kills)
        ):  # in the shard after so many finished ones, a moment into it
            p = start(folder, folder / 'killed')
            while len(shards(folder / 'killed')) < goal and p.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
            p.send_signal(signal.SIGKILL)
            assert p.wait() == -signal.SIGKILL, 'it was finished before the blow'
            moments.append(len(shards(folder / 'killed')))
        assert start(folder, folder / 'killed').wait() == 0
        ps = [start(folder, folder / 'shared', RANK=r, WORLD_SIZE=3) for r in range(3)]
        assert [p.wait() for p in ps] == [0, 0, 0]
        whole_bytes = (folder / 'whole' / 'instances.json').read_bytes()
        same = (folder / 'killed' / 'instances.json').read_bytes() == whole_bytes and shards(
            folder / 'killed'
        ) == shards(folder / 'whole')
        shared = all((folder / 'shared' / f'instances{r}.json').read_bytes() == whole_bytes for r in range(3))
        coco, skipped = json.loads(whole_bytes)
        reason = {s['file_name']: s['reason'].replace(str(pictures), 'pictures') for s in skipped}
        size = {im['file_name']: (im['width'], im['height']) for im in coco['images']}
        masks = {
            name: sum(a['image_id'] == im['id'] for a in coco['annotations'])
            for im in coco['images']
            for name in [im['file_name']]
        }

        def seen(name):
            return '{} x {} px, {} masks'.format(*size[name], masks[name])

        lines += [
            f"{args.images} files, {len(coco['images'])} labelled with {len(coco['annotations'])} masks, "
            f"{len(skipped)} skipped and named; {n} shards.",
            '',
            f"- **Killed at {args.kills} random moments** (when {', '.join(map(str, moments))} of {n} shards were "
            f"finished) and started again: COCO file and shards **{'byte-identical' if same else 'DIFFER'}** "
            f"(sha256 {hashlib.sha256(whole_bytes).hexdigest()[:16]}).",
            "- Shared by three processes (RANK, WORLD_SIZE): the result of each "
            f"**{'byte-identical' if shared else 'DIFFERS'}**.",
            '',
            '| file | result |',
            '|---|---|',
            *(
                f"| {what} (`{name}`) | {reason.get(f'pictures/{name}') or seen(f'pictures/{name}')} |"
                for name, what in kinds.items()
            ),
        ]
        assert same and shared and len(reason) + len(size) == args.images
    publish(lines, args.out)


if __name__ == '__main__':
    main()
