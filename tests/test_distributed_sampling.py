"""Sampling in several processes gives the images of one."""

from __future__ import annotations

import torch
from ranks import finish, started

from iddpm_ext import Diffusion, sample

# Five images in batches of two: the first process gets two batches, the last of them smaller, the second
# one. Then a single image, of which the second process has nothing.
COUNTS = (5, 1)

PROGRAM = """
import os, sys, torch
from iddpm_ext import Diffusion
from iddpm_ext.sampling.distributed import run_shared
from iddpm_ext.sampling.request import make_request

torch.set_num_threads(1)
found = []
for n in map(int, sys.argv[2].split(",")):
    request = make_request(
        "sample", lambda x, t: 0.5 * x + 0.01 * t.view(-1, 1, 1, 1).cos(), 5, n=n, seed=3,
        batch_size=2, diffusion=Diffusion("cosine", 50, variance="fixed_small"), image_shape=(1, 2, 3),
        progress=False,
    )
    found.append(run_shared(request))
if os.environ["RANK"] == "0":
    torch.save(found, sys.argv[1])
else:
    assert found == [None] * len(found)
"""


def test_two_processes_draw_the_images_of_one(tmp_path):
    path = tmp_path / "x.pt"
    arguments = [str(path), ",".join(map(str, COUNTS))]
    with started(["-c", PROGRAM, *arguments], tmp_path) as ranks:
        finish(ranks)
    for n, found in zip(COUNTS, torch.load(path), strict=True):
        alone = sample(
            lambda x, t: 0.5 * x + 0.01 * t.view(-1, 1, 1, 1).cos(), 5, n=n, seed=3, batch_size=2,
            diffusion=Diffusion("cosine", 50, variance="fixed_small"), image_shape=(1, 2, 3),
            progress=False,
        )  # fmt: skip
        assert torch.equal(found, alone)
