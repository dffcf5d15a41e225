"What several test files train: a small network, a short solver, and the call that puts them together."

from u2seg.augment import Augment
from u2seg.batches import Batches
from u2seg.solver import Solver

SMALL = dict(
    depth=18,
    width=8,
    n_blocks=[1, 1, 1, 1],
    norm='BN',
    fpn_norm='BN',
    fpn_channels=16,
    fc_dim=16,
    mask_dim=8,
    n_mask_convs=1,
    sem_dim=16,
)  # the least that runs; a test adds what it is about
PREDICTS = dict(SMALL, n_things=3, rpn_pre_test=40, rpn_post_test=20, decode='objectness', max_detections=4)
PREDICTS |= dict(panoptic_area=20, min_size=64, max_size=128)
EMBEDDED = dict(SMALL, stem_pool=False, norm='SyncBN', fpn_first=3, sampling_ratio=2)  # its shape
STEPS = dict(
    schedule='step',
    gamma=0.1,
    flat_fraction=0.0,
    optimizer='sgd',
    sgd_momentum=0.9,
    cls_lr_multiplier=2.0,
    clip_type='parameter',
    clip_value=1.0,
    loss_weights={},
    amp=None,
    accumulate=1,
    ema_decay=0.0,
    precise_bn=0,
)  # of a solver


def made(dataset, kind=Batches, *, batch_size, seed, **augment):
    return kind(dataset, Augment(**augment), batch_size=batch_size, seed=seed)


def run(fit, model, batches, *, folder, log_every=20, n_workers=0, **solver):
    "Train by `fit`; rows of the log."
    solver = Solver(batch_size=batches.batch_size, **solver)
    return fit(model, batches, solver, folder=folder, log_every=log_every, n_workers=n_workers)
