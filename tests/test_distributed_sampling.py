"""Sampling in several processes gives the images of one."""

from __future__ import annotations

import torch
from ranks import finish, started

from iddpm_ext import Diffusion, sample

PROGRAM = """
import sys, torch
from iddpm_ext import Diffusion
from iddpm_ext.sampling.distributed import run_shared
from iddpm_ext.sampling.request import make_request

torch.set_num_threads(1)
request = make_request(
    lambda x, t: 0.5 * x + 0.01 * t.view(-1, 1, 1, 1).cos(), 5, n=5, sampler="ddpm", eta=0.0,
    labels=None, guidance_scale=1.0, low_res=None, seed=3, x_T=None, clip=True, batch_size=1,
    diffusion=Diffusion("cosine", 50, variance="fixed_small"), image_shape=(1, 2, 3), dtype=None,
    engine=True, exact=False, backend="auto", progress=False,
)
x = run_shared(request)
if x is not None:
    torch.save(x, sys.argv[1])
"""


def test_two_processes_draw_the_images_of_one(tmp_path):
    path = tmp_path / "x.pt"
    with started(["-c", PROGRAM, str(path)], tmp_path) as ranks:
        finish(ranks)
    alone = sample(
        lambda x, t: 0.5 * x + 0.01 * t.view(-1, 1, 1, 1).cos(), 5, n=5, seed=3, batch_size=1,
        diffusion=Diffusion("cosine", 50, variance="fixed_small"), image_shape=(1, 2, 3),
        progress=False,
    )  # fmt: skip
    assert torch.equal(torch.load(path), alone)
