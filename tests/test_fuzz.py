"""Readers before files of strangers: what comes out is right or a ValueError that names the file; nothing runs,
nothing hangs.

Cases are drawn from a seed: a few thousand here, `U2SEG_FUZZ=100000` for a night (so many in all; another
`U2SEG_FUZZ_SEED` draws others).
"""

import copy, io, json, os, pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from u2seg import convert, evaluate
from u2seg.truth import things_only
from u2seg.coco import read_instances
from u2seg.images import read_image, read_json, write_json
from u2seg.masks import decode_rle, encode_rle, filled, read_ids, write_ids
from u2seg.segments import read_panoptic
from u2seg.metrics import instance_ap, panoptic_quality
from u2seg.checkpoints import save_weights
from u2seg.model import build_model, read_config
from u2seg.png import read_map
from u2seg.names import names_of, read_names
from u2seg.stage import load_params, stage_values
from u2seg.weights import find_weights, read_weights

root = Path(__file__).parents[1]
CASES, SEED = int(os.environ.get('U2SEG_FUZZ', 4000)), int(os.environ.get('U2SEG_FUZZ_SEED', 0))
SHARE = dict(images=0.2, maps=0.05, rle=0.3, coco=0.23, panoptic=0.1, params=0.1, checkpoints=0.02)


def cases(kind):
    return (
        (i, np.random.default_rng([SEED, sorted(SHARE).index(kind), i]))
        for i in range(max(int(CASES * SHARE[kind]), 20))
    )


def spoil(data, rng):
    "Bytes with bits flipped, cut, doubled, zeroed or put in, in one to four places."
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        at, n = int(rng.integers(len(data))), int(rng.integers(1, 40))
        how = rng.integers(6)
        if how == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            del data[at:]
        elif how == 2:
            data[at : at + n] = bytes(n)
        elif how == 3:
            data[at:at] = data[at : at + n]
        elif how == 4:
            data[at : at + n] = rng.bytes(n)
        else:
            data[at : at + 4] = int(rng.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1])).to_bytes(
                4, rng.choice(['big', 'little'])
            )
    return bytes(data)


ODD = [
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    '',
    'x',
    '../../x',
    [],
    [[]],
    {},
    {'a': 1},
    float('nan'),
    [1, 2, 3],
    '\0',
    '1',
    '0',
    1.0,
    'true',
    float('inf'),
    [[1, 1, 2e8, 3.5e8, 9, 9]],
    [[1, 1, float('nan'), 1, 9, 9]],
    [[26, 31, 50, 31]],
    [[0, 0, 9e5, 9e5] * 90],
    dict(size=[9, 12], counts=[100, 10]),
    dict(size=[9, 12], counts=[5, 2**62, 2**62]),
]


def spoil_tree(x, rng, depth=0):
    "A JSON value with one to three places changed: lost, odd, doubled."
    x = copy.deepcopy(x)
    for _ in range(rng.integers(1, 4)):
        node = x
        while isinstance(node, (dict, list)) and node:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            k = keys[rng.integers(len(keys))]
            if not isinstance(node[k], (dict, list)) or not node[k] or rng.random() < 0.3:
                how = rng.integers(3)
                if how == 0:
                    del node[k]
                elif how == 1 or not isinstance(node, list):
                    node[k] = copy.deepcopy(ODD[rng.integers(len(ODD))])
                else:
                    node.append(copy.deepcopy(node[k]))
                break
            node = node[k]
    return x


def refused(fn, *args):
    "What `fn` gives; None if it raised ValueError with a message of one reasonable line."
    try:
        return fn(*args)
    except ValueError as e:
        assert 0 < len(str(e)) < 600, e


@pytest.fixture(autouse=True)
def calm(recwarn, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4_000_000)


def test_images(tmp_path):
    rng, pixels, given = (
        np.random.default_rng(0),
        np.random.default_rng(1).integers(0, 256, (17, 23, 3), dtype=np.uint8),
        [],
    )
    for mode, kind in (
        ('RGB', 'PNG'),
        ('L', 'PNG'),
        ('RGBA', 'PNG'),
        ('P', 'PNG'),
        ('I;16', 'PNG'),
        ('RGB', 'JPEG'),
        ('CMYK', 'JPEG'),
        ('RGB', 'BMP'),
        ('RGB', 'GIF'),
        ('RGB', 'TIFF'),
        ('RGB', 'WEBP'),
        ('RGB', 'PPM'),
        ('RGB', 'TGA'),
    ):
        im = (
            Image.fromarray((pixels[..., 0].astype(np.uint16) * 200))
            if mode == 'I;16'
            else Image.fromarray(pixels).convert(mode)
        )
        b = io.BytesIO()
        im.save(b, kind)
        given.append(b.getvalue())
    n_read = 0
    for i, rng in cases('images'):
        (tmp_path / 'x.img').write_bytes(spoil(given[i % len(given)], rng))
        found = refused(read_image, tmp_path / 'x.img')
        if found is not None:
            n_read += 1
            assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    assert n_read > 0


def test_metadata_never_decides_over_pixels(tmp_path):
    "A camera's EXIF block with one to three bytes changed, in three formats: what Pillow decodes is read."
    exif = Image.Exif()
    exif[0x10F], exif[0x112], exif[0x11A], exif[0x132] = 'Maker', 6, 72.0, '2024:05:01 10:11:12'
    exif.get_ifd(0x8769)[0x9204] = -0.3
    exif.get_ifd(0x8825)[2] = (48.0, 8.0, 14.5)
    block, pixels = exif.tobytes()[6:], np.full((20, 30, 3), 90, np.uint8)

    def spoilt(rng):
        b = bytearray(block)
        for _ in range(rng.integers(1, 4)):
            b[rng.integers(len(b))] = rng.integers(256)
        return b'Exif\0\0' + bytes(b)

    n_read = 0
    for i, rng in cases('images'):
        Image.fromarray(pixels).save(tmp_path / 'x', ('JPEG', 'PNG', 'WEBP')[i % 3], exif=spoilt(rng))
        try:
            Image.open(tmp_path / 'x').convert('RGB')
        except Exception:
            continue
        n_read += 1
        assert sorted(read_image(tmp_path / 'x').shape) == [3, 20, 30]
    assert n_read > 0


def test_panoptic_maps(tmp_path):
    "The quick reader and the general one agree, or both refuse."
    n_read = 0
    for i, rng in cases('maps'):
        shape = (260, 256) if i % 3 == 0 else tuple(rng.integers(1, 40, 2))  # the quick reader takes large ones
        ids = np.kron(rng.integers(0, 2**24, (4, 4)), np.ones((65, 64), int))[: shape[0], : shape[1]]
        write_ids(tmp_path / 'x.png', ids)
        if i % 2:
            assert (read_map(tmp_path / 'x.png') == ids).all()
        (tmp_path / 'x.png').write_bytes(spoil((tmp_path / 'x.png').read_bytes(), rng))
        a, b = refused(read_map, tmp_path / 'x.png'), refused(read_ids, tmp_path / 'x.png')
        assert (a is None) == (b is None) and (a is None or (a == b).all())
        n_read += a is not None
    assert n_read > 0


def test_run_lengths():
    for i, rng in cases('rle'):
        h, w = rng.integers(1, 30, 2)
        mask = rng.random((h, w)) > rng.random()
        rle = encode_rle(mask)
        assert (decode_rle(rle) == mask).all()
        runs = np.diff(np.flatnonzero(np.diff(np.r_[-1, mask.T.ravel(), -1]) != 0))
        runs = runs.tolist() if not mask[0, 0] else [0, *runs.tolist()]
        assert (decode_rle(dict(size=[int(h), int(w)], counts=runs)) == mask).all()
        cut, wrong = (
            rle['counts'][: rng.integers(len(rle['counts']) + 1)],
            [int(n) for n in rng.choice([-1, 0, 1, h * w, 2**31, 2**63], 3)],
        )
        assert filled([rle['counts'], cut], [h * w] * 2).tolist() == [True, cut == rle['counts']]
        for counts in (runs[:-1], runs + [1], wrong, spoil(rle['counts'].encode(), rng)):
            m = refused(decode_rle, dict(size=[int(h), int(w)], counts=counts))
            assert m is None or m.shape == (h, w)
        panoptic = [dict(id=1, image_id=1, category_id=1, segmentation=dict(rle, counts=cut))]
        found = refused(
            things_only,
            dict(
                images=[dict(id=1, file_name='a', height=int(h), width=int(w))],
                annotations=panoptic,
                categories=[dict(id=1, name='x')],
            ),
            'a.json',
        )
        if found is not None:
            assert 0 <= found[1]['annotations'][0]['area'] <= h * w


def test_coco_files(tmp_path):
    mask = np.zeros((9, 12), bool)
    mask[2:5, 3:9] = True
    coco = dict(
        images=[dict(id=i, file_name=f'{i}.jpg', height=9, width=12) for i in (1, 2)],
        categories=[dict(id=1, name='a', isthing=1), dict(id=2, name='b', isthing=1)],
        annotations=[
            dict(
                id=i,
                image_id=1 + i % 2,
                category_id=1 + i % 2,
                iscrowd=0,
                area=18,
                bbox=[3, 2, 6, 3],
                score=0.5,
                segmentation=encode_rle(mask) if i else [[3, 2, 9, 2, 9, 5, 3, 5]],
            )
            for i in range(3)
        ],
    )
    path, n_read = tmp_path / 'a.json', 0
    for i, rng in cases('coco'):
        given = spoil_tree(coco, rng)
        found = refused(read_instances, given)
        if found is not None:
            n_read += 1
            assert (
                all(type(a[k]) is int for a in found['annotations'] for k in ('image_id', 'category_id', 'iscrowd'))
                and filled(
                    [a['segmentation']['counts'] for a in found['annotations']],
                    [a['segmentation']['size'][0] * a['segmentation']['size'][1] for a in found['annotations']],
                ).all()
            )
        refused(things_only, given, path)
        for iou_type in ('segm', 'bbox'):
            scores = refused(
                scored,
                *(
                    (given, coco['annotations'])
                    if i % 2
                    else (coco, given['annotations'] if isinstance(given, dict) and 'annotations' in given else given)
                ),
                iou_type,
            )
            assert scores is None or all(-1 <= s <= 1 + 1e-9 for s in scores.values())
        if i % 4 == 0:
            path.write_bytes(spoil(json.dumps(coco).encode(), rng) if i % 8 else json.dumps(given).encode())
            refused(convert.convert_instances, path, tmp_path / 'out')
    assert n_read > 0
    assert {p.name for p in tmp_path.iterdir()} <= {'a.json', 'out'} and {
        p.name for p in (tmp_path / 'out').iterdir()
    } <= {'instances.json'}


def scored(gt, dt, iou_type):
    return instance_ap(gt, dt, iou_type=iou_type)


def test_panoptic_files():
    ids = np.zeros((9, 12), np.int32)
    ids[2:5] = 7
    ids[5:] = 9
    coco = dict(
        images=[dict(id=i, file_name=f'{i}.jpg', height=9, width=12) for i in (1, 2)],
        categories=[dict(id=1, name='a', isthing=1), dict(id=2, name='b', isthing=0)],
        annotations=[
            dict(
                image_id=i,
                file_name='m',
                segments_info=[
                    dict(id=7, category_id=1, iscrowd=0, area=36),
                    dict(id=9, category_id=2, iscrowd=0, area=48),
                ],
            )
            for i in (1, 2)
        ],
    )
    n_read = 0
    for i, rng in cases('panoptic'):
        given = spoil_tree(coco, rng)
        n_read += refused(read_panoptic, given) is not None
        s = refused(
            panoptic_quality,
            *((given, Maps(m=ids), coco, Maps(m=ids)) if i % 2 else (coco, Maps(m=ids), given, Maps(m=ids))),
        )
        assert s is None or 0 <= s['All']['pq'] <= 1
    assert n_read > 0


class Maps(dict):
    "Maps in memory, by any name."

    def __getitem__(self, name):
        return dict.__getitem__(self, 'm')


def test_params(tmp_path):
    text = (root / 'params.yaml').read_text()
    params = yaml.safe_load(text)
    defaults = {s: dict(v) | dict(root='.') for s, v in params.items() if s != 'data'}
    for i, rng in cases('params'):
        if i % 5 == 0:
            (tmp_path / 'params.yaml').write_bytes(spoil(text.encode()[:2000], rng))
            found = refused(load_params, tmp_path)
        else:
            found = spoil_tree(params, rng)
        if not isinstance(found, dict):
            continue
        for s, d in defaults.items():
            values = refused(stage_values, s, found, d)
            assert values is None or values.keys() == d.keys() - {'root'}
    for text in ('!!python/object/apply:os.system ["touch sprung"]', 'a: !!python/name:os.system', '- &a [*a]'):
        (tmp_path / 'params.yaml').write_text(text)
        assert refused(load_params, tmp_path) is None
    assert not Path('sprung').exists()


def test_checkpoints(tmp_path):
    torch.manual_seed(0)
    model = build_model(
        dict(
            n_things=1,
            n_stuff=1,
            depth=18,
            width=4,
            n_blocks=[1, 1, 1, 1],
            norm='BN',
            fpn_norm='BN',
            fpn_channels=4,
            fc_dim=4,
            mask_dim=4,
            n_mask_convs=1,
            sem_dim=32,
            box_pool=2,
            mask_pool=2,
        )
    )
    save_weights(model, tmp_path / 'a.safetensors')
    state = {k: v for k, v in list(model.state_dict().items())[:12]}
    torch.save(dict(model=state, iteration=3), tmp_path / 'a.pth')
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(dict(model={k: v.numpy() for k, v in state.items()})))
    small = dict(list(state.items())[:3])
    wrapped = dict(
        model=small,
        ema={'module': {f'_orig_mod.{k}': v for k, v in small.items()}},
        state_dict={f'net.{k}': v for k, v in small.items()},
        args=[1],
    )
    kinds = ['safetensors', 'pth', 'pkl']
    names = dict(
        n_things=2,
        n_stuff=1,
        things={'1a': 'cat', '1b': None, 2: 'dog'},
        stuff={3: 'sky'},
        discarded=[2],
        parts={1: [[0.0], [1.0]]},
    )
    given, config = {k: (tmp_path / f'a.{k}').read_bytes() for k in kinds}, (tmp_path / 'model.yaml').read_text()
    for i, rng in cases('checkpoints'):
        kind = kinds[i % 3]
        path = tmp_path / f'x.{kind}'
        head = rng.random() < 0.7  # where the structure is
        path.write_bytes(spoil(given[kind][:3000], rng) + given[kind][3000:] if head else spoil(given[kind], rng))
        found = refused(read_weights, path)
        assert found is None or all(
            isinstance(v, torch.Tensor) and (not v.is_floating_point() or v.isfinite().all()) for v in found.values()
        )
        if i % 6 < 3:  # the values sound, the tree odd
            torch.save(spoil_tree(wrapped, rng), tmp_path / 'x.pth')
            found = refused(find_weights, tmp_path / 'x.pth', state.__contains__)
            assert (
                found is None
                or all(isinstance(v, torch.Tensor) for v in found.state.values())
                and not set(found.others) & {found.taken}
            )
        (tmp_path / 'x.yaml').write_text(yaml.safe_dump(spoil_tree(yaml.safe_load(config), rng)))
        refused(read_config, tmp_path / 'x.yaml')
        write_json(tmp_path / 'mapping.json', spoil_tree({'1': 'cat', 'model': 'x', 'names': {'2': 'dog'}}, rng))
        refused(names_of, tmp_path / 'model.safetensors', 2, 1, 'x')
        (tmp_path / 'x.yaml').write_text(yaml.safe_dump(spoil_tree(names, rng)))
        refused(read_names, tmp_path / 'x.yaml')


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize('suffix', ['pth', 'pkl', 'safetensors'])
def test_no_pickle_runs_anything(tmp_path, suffix):
    "Traps at any depth, in any protocol, in torch's archive or bare."
    for protocol in range(6):
        for wrap in (lambda t: t, lambda t: [t], lambda t: {'model': {'a': t}}, lambda t: {t: 1}):
            path = tmp_path / f'a.{suffix}'
            try:
                path.write_bytes(pickle.dumps(wrap(Trap(tmp_path / 'sprung')), protocol=protocol))
            except TypeError:
                continue  # not hashable in this protocol
            assert refused(read_weights, path) is None and not (tmp_path / 'sprung').exists()
