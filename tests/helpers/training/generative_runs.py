"""Short runs of autoencoders, GANs and diffusion models, several in one process, which starts only once."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from faults import trained

from configs import load
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader
from trainer.record.lines import read_metrics
from trainer.run.folder import prepare_run

STEPS, EVERY = 4, 2
SHORT = (
    f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "train.global_batch=24", "train.micro_batch=8",
    "train.eval_every=0", "train.eval_sequences=16", "train.grad_clip=0", "optim.name=sgd", "optim.lr=1e-3",
    "tracking.enabled=false",
)  # fmt: skip
"""Of every run. Adam would divide what rounding leaves of a gradient of 0 by its own size."""
RUNS: dict[str, tuple[str, ...]] = {
    "vae": ("digits-vae",),
    "vqvae": ("digits-vqvae",),
    "denoising": ("digits-autoencoder",),
    "contractive": (
        "digits-autoencoder", "model.contractive=0.1", "model.sparsity=kl", "model.norm=batch", "model.input_noise=0",
    ),
    "unet": ("digits-diffusion", "model.guidance=2", "model.sample_steps=3", "train.eval_sequences=20"),
    "dit": (
        "digits-diffusion", "model.network=dit", "model.prediction=flow", "model.sampler=heun", "model.sample_steps=3",
        "model.measure_samples=false", "optim.ema_decay=null",
    ),
    "gan": ("digits-gan", "model.discriminator_lr=null"),
    "wgan": (
        "digits-gan", "model.discriminator_lr=null", "model.loss=wgan", "model.discriminator_norm=none",
        "model.discriminator_steps=2", "optim.ema_decay=null",
    ),
    "wgan_gp": (
        "digits-gan", "model.discriminator_lr=null", "model.loss=wgan_gp", "model.discriminator_norm=layer",
        "model.classes=null",
    ),
    "style": ("digits-gan", "model.discriminator_lr=null", "model.generator_network=style"),
}  # fmt: skip
"""Preset and overrides of each."""
NOT_ZERO_3 = ("contractive", "gan", "wgan", "wgan_gp", "style")
"""Refused there."""
TIMES = ("time", "second", "flops", "mfu", "memory", "attempt", "wait")


def make(name: str, root: Path, *overrides: str) -> Path:
    preset, *own = RUNS[name]
    return prepare_run(load(preset, [*SHORT, f"run.root={root}", f"run.name={name}", *own, *overrides]))


def trained_in_turn(run_dirs: Sequence[Path]) -> list[str]:
    """The status of each."""
    return [trained(run_dir) for run_dir in run_dirs]


def numbers(run_dir: Path) -> dict[tuple[int, str], float]:
    """By step and name, every metric of a run, as last measured, that is not of its machine."""
    return {
        (m["step"], key): value
        for m in read_metrics(run_dir)
        for key, value in m.items()
        if isinstance(value, int | float) and not any(word in key for word in TIMES)
    }


def weights(run_dir: Path) -> Mapping[str, object]:
    reader = Reader(folder(run_dir, STEPS))
    return {name: reader.weight(name) for name in reader.manifest.shapes["weight"]}
