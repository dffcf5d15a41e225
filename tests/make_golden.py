"""Writes golden_detectron2.npz: what detectron2 computes on one small network whose weights, images and labels
come from numpy's generator.  Run where detectron2 is installed:

python tests/make_golden.py
"""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from u2seg.model import build_model

path = Path(__file__).parent / 'golden_detectron2.npz'
CONFIG = dict(
    depth=18,
    norm='BN',
    fpn_norm='BN',
    n_things=6,
    n_stuff=4,
    fpn_channels=32,
    fc_dim=64,
    mask_dim=32,
    sem_dim=64,
    roi_batch=64,
    rpn_pre_train=300,
    rpn_pre_test=200,
    rpn_post_train=300,
    rpn_post_test=100,
    panoptic_area=200,
    panoptic_score=0.2,
    min_size=96,
    max_size=160,
)
LOOKED_AT = (
    'backbone.bottom_up.stem.conv1.weight',
    'backbone.bottom_up.res4.0.conv2.weight',
    'backbone.fpn_lateral3.weight',
    'backbone.fpn_output5.norm.bias',
    'proposal_generator.rpn_head.conv.weight',
    'proposal_generator.rpn_head.anchor_deltas.bias',
    'roi_heads.box_head.0.fc1.bias',
    'roi_heads.box_head.2.fc2.weight',
    'roi_heads.box_predictor.1.bbox_pred.weight',
    'roi_heads.mask_head.mask_fcn4.weight',
    'roi_heads.mask_head.predictor.weight',
    'sem_seg_head.p5.4.norm.weight',
    'sem_seg_head.predictor.bias',
)  # gradients


def network():
    "A lively network, the same on every machine."
    model, rng = build_model(CONFIG), np.random.default_rng(0)
    for k, v in sorted(model.state_dict().items()):
        if not v.is_floating_point():
            continue
        x = rng.standard_normal(v.shape)
        if k.endswith('running_var') or '.norm.weight' in k:
            x = 0.9 + 0.1 * np.tanh(x)
        elif v.ndim > 1:
            x *= {
                'cls_score': 0.12,
                'objectness_logits': 0.8,
                'mask_head.predictor': 2,
                'sem_seg_head.predictor': 2,
            }.get(
                next(
                    (
                        n
                        for n in ('cls_score', 'objectness_logits', 'mask_head.predictor', 'sem_seg_head.predictor')
                        if n in k
                    ),
                    '',
                ),
                0.04 if 'anchor_deltas' in k or 'bbox_pred' in k else 1,
            ) * (v[0].numel() / 2) ** -0.5
        else:
            x *= 0.05
        v.copy_(torch.from_numpy(x))
    return model


def scene():  # [3, 96, 128], target
    "An image of waves and noise; rectangles as labels."
    rng, (y, x) = np.random.default_rng(1), np.mgrid[:96, :128]
    image = np.stack(
        [128 + 80 * np.sin(x / a + c) * np.cos(y / b) for a, b, c in ((9, 14, 0), (17, 8, 1), (6, 21, 2))]
    ) + rng.normal(0, 20, (3, 96, 128))
    boxes = torch.tensor([[8.0, 10, 50, 60], [40, 30, 120, 90], [70, 5, 100, 25]])
    masks, sem = (
        torch.zeros(3, 96, 128, dtype=torch.bool),
        torch.from_numpy(rng.integers(0, 5, (12, 16))).repeat_interleave(8, 0).repeat_interleave(8, 1),
    )
    for m, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        m[y0:y1, x0:x1] = True
    sem[:5] = 255
    return torch.from_numpy(image.clip(0, 255).round()).float(), dict(
        boxes=boxes, labels=torch.tensor([0, 3, 5]), masks=masks, sem=sem
    )


@contextmanager
def double():
    "Every cast to single precision is one to double, in either network: a difference that is left is no rounding."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, 'float', torch.Tensor.double)
        patch.setattr(torch, 'float32', torch.float64)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float)


def exact(found) -> dict:
    "The arrays that are compared in double precision."
    parts = dict(boxes=found['boxes'], scores=found['scores'], sem_logits=found['sem_logits'][:, ::12, ::12])
    return {f'exact {k}': v for k, v in parts.items()}


def summary(found, losses, gradients) -> dict:
    "The arrays that are compared: of large ones a part."
    ids, segments = found['panoptic']
    return dict(
        boxes=found['boxes'],
        scores=found['scores'],
        labels=found['labels'].to(torch.uint8),
        mask_area=found['masks'].flatten(1).sum(1).float(),
        mask=np.packbits(found['masks'][:4].numpy()),
        sem_logits=found['sem_logits'][:, ::12, ::12],
        ids=ids.to(torch.uint8)[::2, ::2],
        categories=np.array([s['category_id'] for s in segments], np.uint8),
        **{k: losses[k].detach() for k in sorted(losses)},
        **{f'gradient {k}': gradients[k].flatten()[:8] for k in LOOKED_AT},
        **{f'norm {k}': gradients[k].norm() for k in LOOKED_AT},
    )


def by_detectron2(image) -> tuple:
    "detectron2's network with our weights, and what it finds in the image."
    mine = network()
    theirs = build_detectron2(detectron2_config(mine.config))
    theirs.load_state_dict(mine.state_dict())
    theirs.eval()
    with torch.inference_mode():
        d = as_detectron2([image])
        images = theirs.preprocess_image(d)
        features = theirs.backbone(images.tensor)
        instances = theirs.roi_heads(images, features, theirs.proposal_generator(images, features)[0])[0]
        out = postprocess(theirs, instances, theirs.sem_seg_head(features)[0], d[0], images)
    i, (ids, segments) = out['instances'], out['panoptic_seg']
    segments = [dict(category_id=s['category_id'] + (1 if s['isthing'] else mine.config['n_things'])) for s in segments]
    return theirs, dict(
        boxes=i.pred_boxes.tensor,
        scores=i.scores,
        labels=i.pred_classes,
        masks=i.pred_masks,
        sem_logits=out['sem_seg'],
        panoptic=(ids, segments),
    )


if __name__ == '__main__':
    from detectron2.utils.events import EventStorage
    from test_detectron2_parity import as_detectron2, build_detectron2, detectron2_config, first_ones, postprocess

    image, target = scene()
    with double():
        exactly = exact(by_detectron2(image.double())[1])
    theirs, found = by_detectron2(image)
    theirs.double().train()
    with pytest.MonkeyPatch.context() as m, EventStorage():
        first_ones(m)
        losses = theirs(as_detectron2([image.double()], [dict(target, boxes=target['boxes'].double())]))
    sum(losses.values()).backward()
    arrays = {
        k: np.asarray(v) for k, v in summary(found, losses, {k: p.grad for k, p in theirs.named_parameters()}).items()
    }
    arrays = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in arrays.items()}
    arrays |= {k: v.numpy() for k, v in exactly.items()}
    np.savez_compressed(path, **arrays)
    print(
        path.stat().st_size,
        'bytes;',
        {k: v.shape for k, v in arrays.items()},
        {k: float(v) for k, v in arrays.items() if k.startswith('loss')},
        arrays['scores'][:6],
        arrays['categories'],
    )
