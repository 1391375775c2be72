#!/usr/bin/env python
"""Train the packaged models on Fashion-MNIST and write them into the package.

    python scripts/train_zoo.py classifier vq unet record   # all, in this order
    python scripts/train_zoo.py unet --steps 6000           # one part again

Data: the Debian package dataset-fashion-mnist, or any folder with the same four IDX files
(--data DIR). Images are padded from 28x28 to 32x32. Everything is seeded; training runs in
bfloat16 autocast on the CPU. Each part appends what it did (data digest, steps, loss, seed,
quality reached) to training.json beside the weights.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qncd_cli.metrics.features import FashionClassifier
from qncd_cli.models.pipelines import ClassConditionalLDMPipeline, ClassEmbedder

ZOO = Path(__file__).resolve().parent.parent / "src" / "qncd_cli" / "zoo"
LDM = ZOO / "fashion-ldm"
FEATURES = ZOO / "features"
DATA = Path("/usr/share/datasets/fashion-mnist")
NUM_CODES = 8192


def read_idx(path: Path) -> np.ndarray:
    """One gzipped IDX file of unsigned bytes (LeCun's MNIST format)."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", dims, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def load_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 32, 32] uint8 and labels [N] int64; split is 'train' or 't10k'."""
    images = torch.from_numpy(read_idx(folder / f"{split}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(folder / f"{split}-labels-idx1-ubyte.gz").copy())
    return F.pad(images, (2, 2, 2, 2))[:, None], labels.long()


def data_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*-ubyte.gz")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def signed(images: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batches(count: int, size: int, generator: torch.Generator):
    """Endless shuffled index batches."""
    while True:
        order = torch.randperm(count, generator=generator)
        for i in range(0, count - size + 1, size):
            yield order[i : i + size]


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def write_record(folder: Path, part: str, record: dict) -> None:
    path = folder / "training.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    record["torch"] = torch.__version__
    record["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    record["date"] = time.strftime("%Y-%m-%d")
    everything[part] = record
    path.write_text(json.dumps(everything, indent=2, sort_keys=True) + "\n")


def save_half(module: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, path)


# ---------------------------------------------------------------- classifier


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 2 pixels, flip, and blur half of the batch a little, as a first stage does."""
    n = len(images)
    dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
    images = torch.roll(images, (dx, dy), dims=(2, 3))
    flip = torch.rand(n, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1)), 3, stride=1)
    amount = (torch.rand(n, 1, 1, 1, generator=generator) - 0.5).clamp(min=0) * 1.4
    return images * (1 - amount) + blurred * amount


def classifier_outputs(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    net.eval()
    with torch.no_grad():
        parts = [net(chunk.float() / 255) for chunk in images.split(500)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def train_classifier(args: argparse.Namespace) -> None:
    images, labels = load_split(args.data, "train")
    steps = args.steps or 3750  # 8 epochs
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    net = FashionClassifier().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=5e-2)
    draw = batches(len(images), 128, generator)
    start, running = time.time(), 0.0
    for step in range(steps):
        index = next(draw)
        batch = augment(images[index].float() / 255, generator)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cosine(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            _, logits = net(batch)
        loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running = 0.99 * running + 0.01 * loss.item() if step else loss.item()
        if step % 200 == 0:
            log(f"classifier {step}/{steps} loss {running:.3f} {time.time() - start:.0f} s")
    save_half(net, FEATURES / "classifier.safetensors")
    net.load_state_dict(load_file(FEATURES / "classifier.safetensors"))
    net.float()
    test_images, test_labels = load_split(args.data, "t10k")
    features, logits = classifier_outputs(net, test_images)
    accuracy = (logits.argmax(1) == test_labels).float().mean().item()
    features = features.double()
    save_file(
        {
            "mu": features.mean(0),
            "sigma": torch.cov(features.T),
            "features": features.half(),  # for KID, precision and recall
        },
        FEATURES / "reference.safetensors",
    )
    log(f"classifier: test accuracy {accuracy:.4f}")
    record = {"data": data_digest(args.data), "steps": steps, "batch": 128, "seed": args.seed}
    record |= {"loss": running, "test_accuracy": accuracy, "seconds": time.time() - start}
    write_record(FEATURES, "classifier", record)


# ---------------------------------------------------------------- VQ autoencoder


def make_vq() -> VQModel:
    return VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 96),
        layers_per_block=1,
        latent_channels=3,
        vq_embed_dim=3,
        num_vq_embeddings=NUM_CODES,
        norm_num_groups=16,
        sample_size=32,
        mid_block_add_attention=False,
    )


def k_means(points: Tensor, k: int, rounds: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm; points [N, D] -> centres [k, D]. Empty cells are re-seeded."""
    centres = points[torch.randperm(len(points), generator=generator)[:k]].clone()
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(chunk, centres).argmin(1) for chunk in points.split(8192)])
        count = torch.bincount(nearest, minlength=k)
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = total / count.clamp(min=1)[:, None]
        empty = count == 0
        fresh = torch.randint(len(points), (int(empty.sum()),), generator=generator)
        centres[empty] = points[fresh]
    return centres


def vq_psnr(model: VQModel, images: Tensor) -> float:
    """Reconstruction PSNR in dB of [N, 1, 32, 32] uint8 images, through the codebook."""
    model.eval()
    error = 0.0
    with torch.no_grad():
        for chunk in images.split(500):
            out = model.decode(model.encode(signed(chunk)).latents).sample
            restored = ((out / 2 + 0.5).clamp(0, 1) * 255).round()
            error += F.mse_loss(restored, chunk.float(), reduction="sum").item()
    model.train()
    return 10 * math.log10(255**2 / (error / images.numel()))


def train_vq(args: argparse.Namespace) -> None:
    """Phase 1: continuous latents with a little noise; phase 2: codebook from k-means."""
    images, _ = load_split(args.data, "train")
    test_images, _ = load_split(args.data, "t10k")
    steps = args.steps or 6000
    switch = int(steps * 0.6)
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    model = make_vq().train()
    log(f"vq: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4, betas=(0.9, 0.95))
    draw = batches(len(images), args.batch or 32, generator)
    start, running = time.time(), 0.0
    for step in range(steps):
        if step == switch:
            with torch.no_grad():
                model.eval()
                z = torch.cat([model.encode(signed(c)).latents for c in images[:6000].split(500)])
                points = z.permute(0, 2, 3, 1).reshape(-1, 3)
                centres = k_means(points[::2].contiguous(), NUM_CODES, 10, generator)
                model.quantize.embedding.weight.copy_(centres)
                model.train()
            log(f"vq: codebook set; test PSNR {vq_psnr(model, test_images[:2000]):.2f} dB")
        x = signed(images[next(draw)])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cosine(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            z = model.encode(x).latents.float()
            # keeps the scale of the latents near one, so that the noise below means something
            penalty = (z.pow(2).mean(dim=(0, 2, 3)) - 1).pow(2).mean() + z.mean(dim=(0, 2, 3)).pow(
                2
            ).mean()
            if step < switch:
                noisy = z + 0.05 * torch.randn(z.shape, generator=generator)
                out = model.decode(noisy, force_not_quantize=True).sample
                commit = torch.zeros(())
            else:
                decoded = model.decode(z)
                out, commit = decoded.sample, decoded.commit_loss.mean()
        out = out.float()
        reconstruction = F.mse_loss(out, x) + 0.1 * F.l1_loss(out, x)
        loss = reconstruction + 0.05 * commit + 0.01 * penalty
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = 0.99 * running + 0.01 * loss.item() if step else loss.item()
        if step % 200 == 0:
            text = f"vq {step}/{steps} loss {running:.4f} {time.time() - start:.0f} s"
            if step % 1000 == 0 and step > switch:
                text += f" test PSNR {vq_psnr(model, test_images[:2000]):.2f} dB"
            log(text)
    model.eval()
    with torch.no_grad():
        z = torch.cat([model.encode(signed(c)).latents for c in images[:10000].split(500)])
    model.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    model.half().save_pretrained(LDM / "vqvae")
    model = VQModel.from_pretrained(LDM / "vqvae", low_cpu_mem_usage=False).float()
    psnr = vq_psnr(model, test_images)
    with torch.no_grad():
        codes = [model.quantize(chunk)[2][2] for chunk in z[:5000].split(500)]
    used = torch.cat(codes).unique().numel()
    log(f"vq: test PSNR {psnr:.2f} dB, {used} of {NUM_CODES} codes used")
    record = {
        "data": data_digest(args.data),
        "steps": steps,
        "batch": args.batch or 32,
        "seed": args.seed,
    }
    record |= {
        "loss": running,
        "test_psnr_db": psnr,
        "codes_used": used,
        "seconds": time.time() - start,
    }
    write_record(LDM, "vqvae", record)


# ---------------------------------------------------------------- U-Net


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=32,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class Ema:
    """Exponential moving average of parameters, with warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.shadow = [p.detach().clone() for p in module.parameters()]

    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_(self.shadow, list(module.parameters()), 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        with torch.no_grad():
            for p, s in zip(module.parameters(), self.shadow, strict=True):
                p.copy_(s)


def train_unet(args: argparse.Namespace) -> None:
    images, labels = load_split(args.data, "train")
    vq = VQModel.from_pretrained(LDM / "vqvae", low_cpu_mem_usage=False).float().eval()
    with torch.no_grad():
        latents = torch.cat([vq.encode(signed(c)).latents for c in images.split(500)])
    latents *= vq.config.scaling_factor
    steps, batch = args.steps or 6000, args.batch or 128
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    model = nn.ModuleDict({"unet": make_unet(), "embedder": ClassEmbedder(10, 128)})
    model["unet"].set_attn_processor(AttnProcessor())  # SDPA's backward is slow on a CPU
    nn.init.normal_(model["embedder"].embedding.weight, std=1.0)
    log(f"unet: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    scheduler = make_scheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=1e-2, fused=True)
    ema = Ema(model, 0.9995)
    draw = batches(len(latents), batch, generator)
    start, running = time.time(), 0.0
    for step in range(steps):
        index = next(draw)
        x0, y = latents[index], labels[index].clone()
        y[torch.rand(batch, generator=generator) < 0.1] = 10  # null class
        t = torch.randint(0, 1000, (batch,), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * cosine(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            x_t = scheduler.add_noise(x0, eps, t)
            out = model["unet"](x_t, t, encoder_hidden_states=model["embedder"](y)).sample
        loss = F.mse_loss(out.float(), eps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
        running = 0.995 * running + 0.005 * loss.item() if step else loss.item()
        if step % 100 == 0:
            log(f"unet {step}/{steps} loss {running:.4f} {time.time() - start:.0f} s")
        if step and step % 1000 == 0:
            save_pipeline(model, ema, vq, scheduler)
    save_pipeline(model, ema, vq, scheduler)
    record = {"data": data_digest(args.data), "steps": steps, "batch": batch, "seed": args.seed}
    record |= {"loss": running, "ema": 0.9995, "label_dropout": 0.1, "seconds": time.time() - start}
    write_record(LDM, "unet", record)


def save_pipeline(model: nn.ModuleDict, ema: Ema, vq: VQModel, scheduler: DDIMScheduler) -> None:
    unet, embedder = make_unet(), ClassEmbedder(10, 128)
    averaged = nn.ModuleDict({"unet": unet, "embedder": embedder})
    ema.copy_to(averaged)
    pipeline = ClassConditionalLDMPipeline(unet, vq, embedder, scheduler)
    pipeline.to(torch.float16)
    pipeline.save_pretrained(LDM)
    for config in LDM.glob("*/config.json"):  # diffusers notes the folder a part was read from
        entries = json.loads(config.read_text())
        entries.pop("_name_or_path", None)
        config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    vq.float()


# ---------------------------------------------------------------- quality record


def record_quality(args: argparse.Namespace) -> None:
    """Guided samples of the saved pipeline: share classified as asked, feature distance."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    pipeline = ClassConditionalLDMPipeline.from_pretrained(LDM).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    net = FashionClassifier()
    net.load_state_dict(load_file(FEATURES / "classifier.safetensors"))
    reference = load_file(FEATURES / "reference.safetensors")
    count = args.steps or 1000
    quality = {}
    for guidance in (2.0, 3.0):
        labels = torch.arange(count) % 10
        parts = []
        for i in range(0, count, 100):
            generators = [torch.Generator().manual_seed(s) for s in range(i, i + 100)]
            out = pipeline(labels[i : i + 100], guidance, 20, generators, "np").images
            parts.append(torch.from_numpy((out * 255).round().astype(np.uint8)))
        images = torch.cat(parts).permute(0, 3, 1, 2)
        features, logits = classifier_outputs(net, images)
        as_asked = (logits.argmax(1) == labels).float().mean().item()
        features = features.double()
        ours = {"mu": features.mean(0).numpy(), "sigma": torch.cov(features.T).numpy()}
        theirs = {k: reference[k].numpy() for k in ("mu", "sigma")}
        distance = float(
            fid_statistics_to_metric(ours, theirs, False)["frechet_inception_distance"]
        )
        quality[f"guidance_{guidance:g}"] = {
            "class_agreement": as_asked,
            "fd_fashion": distance,
        }
        log(f"guidance {guidance}: {as_asked:.3f} as asked, fd_fashion {distance:.3f}")
    write_record(
        LDM, "samples", {"count": count, "steps": 20, "scheduler": "ddim", "quality": quality}
    )


PARTS = {
    "classifier": train_classifier,
    "vq": train_vq,
    "unet": train_unet,
    "record": record_quality,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the four IDX files")
    parser.add_argument("--steps", type=int, help="training steps (samples for record)")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for part in args.parts:
        PARTS[part](args)


if __name__ == "__main__":
    main()
