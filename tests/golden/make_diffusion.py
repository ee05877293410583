"""Write diffusion.json: numbers of the original code, to compare ours with.

    python tests/golden/make_diffusion.py CHECKOUT_OF_OPENAI_IMPROVED_DIFFUSION

The original looks up its float64 coefficients and rounds them to float32 before it computes; for
``chains`` the look-up is replaced by one that does not round, so that agreement can be asked to
many digits. ``chains_float32`` holds losses of the original as it is.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

CHAINS = {
    "cosine-4000": ("cosine", 4000, ""),
    "cosine-4000-50": ("cosine", 4000, "50"),
    "linear-1000-ddim25": ("linear", 1000, "ddim25"),
    "linear-1000-10,15,20": ("linear", 1000, "10,15,20"),
}
SPACINGS = [
    (4000, "50"), (4000, "25"), (4000, "100"), (4000, "250"), (1000, "7"), (300, "10,15,20"),
    (4000, "ddim50"), (4000, "ddim30"), (1000, "ddim2"), (1000, "1,0,3"), (10, "3,3,3"),
    (4000, "1"), (103, "26,13"),
]  # fmt: skip
SCHEDULES = [("cosine", 4000), ("cosine", 1000), ("linear", 4000), ("linear", 1000), ("linear", 21)]
VARIANCES = {
    "learned_range": "LEARNED_RANGE", "learned": "LEARNED",
    "fixed_large": "FIXED_LARGE", "fixed_small": "FIXED_SMALL",
}  # fmt: skip
PREDICTIONS = {"epsilon": "EPSILON", "x_0": "START_X", "x_prev": "PREVIOUS_X"}
LOSSES = {"hybrid": "RESCALED_MSE", "vlb": "RESCALED_KL"}
ETAS = (0.0, 0.5, 1.0)


def make_inputs() -> dict[str, torch.Tensor]:
    """x_0 on the 256 levels, both edges among them; everything else spread over its range."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 1, 1, 3)
    levels = torch.tensor([0, 255, 128, 3, 77, 254, 1, 200, 133, 90, 255, 0]).view(shape)
    draws = torch.randn((3, *shape), generator=generator).mul(1024).round() / 1024
    v = torch.rand(shape, generator=generator).mul(2048).round() / 1024 - 1
    return {
        "x_0": levels / 127.5 - 1,
        "noise": draws[0],
        "out": draws[0] + draws[1] / 16,  # near the truth, as a network's
        "step_noise": draws[2],
        "v": v,
    }


def flat(values) -> list[float]:
    return [float(f"{v:.10g}") for v in torch.as_tensor(values).double().flatten().tolist()]


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    sys.modules.setdefault("mpi4py", types.SimpleNamespace(MPI=None))
    from improved_diffusion import gaussian_diffusion as gd
    from improved_diffusion import respace

    def extract64(array, timesteps, shape):
        rows = torch.from_numpy(np.asarray(array))[timesteps]
        return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)

    def process(chain, variance, prediction, loss):
        schedule, steps, spacing = CHAINS[chain]
        return respace.SpacedDiffusion(
            use_timesteps=respace.space_timesteps(steps, spacing or [steps]),
            betas=gd.get_named_beta_schedule(schedule, steps),
            model_mean_type=gd.ModelMeanType[PREDICTIONS[prediction]],
            model_var_type=gd.ModelVarType[VARIANCES[variance]],
            loss_type=gd.LossType[loss],
            rescale_timesteps=True,
        )

    def evaluate(chain, variance, prediction, inputs, parts):
        x_0, noise, out = inputs["x_0"], inputs["noise"], inputs["out"]
        learned = variance.startswith("learned")
        out = torch.cat([out, inputs["v"]], dim=1) if learned else out

        def model(x, t):
            return out

        result = {}
        for objective, loss in LOSSES.items():
            if objective == "vlb" or learned:
                diffusion = process(chain, variance, prediction, loss)
                t = times(diffusion)
                losses = diffusion.training_losses(model, x_0, t, noise=noise)
                result[objective] = flat(losses["loss"])
        x_t = diffusion.q_sample(x_0, t, noise)
        result["mse"] = flat(
            process(chain, "fixed_small", prediction, "MSE").training_losses(
                lambda x, t: inputs["out"], x_0, t, noise=noise
            )["mse"]
        )
        if not parts:
            return result
        clipped = diffusion.p_mean_variance(model, x_t, t, clip_denoised=True)
        result["log_variance"] = flat(clipped["log_variance"])
        result["term"] = flat(diffusion._vb_terms_bpd(model, x_0, x_t, t)["output"])
        torch.randn_like, original = lambda x: inputs["step_noise"], torch.randn_like
        result["ddpm"] = flat(diffusion.p_sample(model, x_t, t)["sample"])
        if variance == "fixed_small":  # the rest is the same for every variance
            free = diffusion.p_mean_variance(model, x_t, t, clip_denoised=False)
            result["q_sample"] = flat(x_t)
            result["prior"] = flat(diffusion._prior_bpd(x_0))
            result["x_0"], result["mean"] = flat(free["pred_xstart"]), flat(free["mean"])
            result["x_0 clipped"] = flat(clipped["pred_xstart"])
            result["mean clipped"] = flat(clipped["mean"])
            for eta in ETAS:
                step = diffusion.ddim_sample(model, x_t, t, eta=eta)
                result[f"ddim {eta}"] = flat(step["sample"])
        torch.randn_like = original
        return result

    def times(diffusion):
        last = diffusion.num_timesteps - 1
        return torch.tensor([0, 1, last // 2, last])

    def model_sees(chain):
        diffusion = process(chain, "fixed_small", "epsilon", "MSE")
        seen = diffusion._wrap_model(lambda x, t: t)(None, times(diffusion))
        return flat(seen)

    inputs = make_inputs()
    configurations = [(c, v, p) for c in CHAINS for v in VARIANCES for p in PREDICTIONS]
    float32 = {" ".join(c): evaluate(*c, inputs, False) for c in configurations}
    lookup, gd._extract_into_tensor = gd._extract_into_tensor, extract64
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    float64 = {" ".join(c): evaluate(*c, doubles, True) for c in configurations}
    gd._extract_into_tensor = lookup

    spots = {}
    for name, steps in SCHEDULES:
        betas = gd.get_named_beta_schedule(name, steps)
        index = [0, 1, 2, steps // 3, steps // 2, steps - 2, steps - 1]
        alpha_bar = np.cumprod(1 - betas)
        spots[f"{name} {steps}"] = {
            "t": index, "betas": betas[index].tolist(), "alphas_cumprod": alpha_bar[index].tolist()
        }  # fmt: skip
    golden = {
        "note": "Numbers of openai/improved-diffusion, made by make_diffusion.py (see there).",
        "inputs": {"shape": [4, 1, 1, 3], **{k: v.flatten().tolist() for k, v in inputs.items()}},
        "schedules": spots,
        "space_timesteps": [[t, s, sorted(respace.space_timesteps(t, s))] for t, s in SPACINGS],
        "model_timesteps": {c: model_sees(c) for c in CHAINS},
        "chains": float64,
        "chains_float32": float32,
    }
    lines = [f"{json.dumps(k)}: {dump(v)}" for k, v in golden.items()]
    path = Path(__file__).with_name("diffusion.json")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def dump(value) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "}"


if __name__ == "__main__":
    main(sys.argv[1])
