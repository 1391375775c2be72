#!/usr/bin/env python
"""Train the packaged models and write them into the package.

    python training/train_zoo.py classifier vq unet ddpm dit record   # on Fashion-MNIST
    python training/train_zoo.py unet --steps 6000                    # one part again
    python training/train_zoo.py emoji-vae emoji-unet emoji-classifier emoji-record

Data: the Debian package dataset-fashion-mnist, or any folder with the same four IDX files
(--data DIR); images are padded from 28x28 to 32x32. The emoji parts are in emoji_ldm.py, their
images and classes in emoji_data.py. Everything is seeded; training runs in bfloat16 autocast on
the CPU. Each part appends what it did (data digest, steps, loss, seed, quality reached) to
training.json beside the weights.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import emoji_data
import emoji_ldm
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from training_loop import (
    ZOO,
    Ema,
    batches,
    cosine,
    log,
    make_scheduler,
    plain_attention,
    save_half,
    save_pipeline,
    signed,
    write_record,
)

from qncd_cli.metrics.features import FashionClassifier
from qncd_cli.models.pipelines import (
    ClassConditionalDiTPipeline,
    ClassConditionalLDMPipeline,
    ClassConditionalPixelPipeline,
    ClassEmbedder,
)

LDM = ZOO / "fashion-ldm"
DDPM = ZOO / "fashion-ddpm"
DIT = ZOO / "fashion-dit"
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
            "features": features[:6000].half(),  # for KID, precision and recall
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


def fit(
    args: argparse.Namespace,
    part: str,
    model: nn.Module,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    x0: Tensor,
    labels: Tensor,
    scheduler: DDIMScheduler,
    save: Callable[[Ema], None],
    steps: int,
    batch: int,
    learning_rate: float,
    decay: float,
) -> dict:
    """Train a class-conditional denoiser with label dropout; returns its record.

    predict: (x_t, t, labels) -> prediction of what scheduler.config.prediction_type names;
    save: called with the averaged parameters every 1000 steps and at the end.
    """
    steps, batch = args.steps or steps, args.batch or batch
    generator = torch.Generator().manual_seed(args.seed)
    count = sum(p.numel() for p in model.parameters())
    log(f"{part}: {count / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=1e-2, fused=True
    )
    ema = Ema(model, decay)
    draw = batches(len(x0), batch, generator)
    velocity = scheduler.config.prediction_type == "v_prediction"
    start, running = time.time(), 0.0
    for step in range(steps):
        index = next(draw)
        x, y = x0[index], labels[index].clone()
        y[torch.rand(batch, generator=generator) < 0.1] = 10  # null class
        t = torch.randint(0, 1000, (batch,), generator=generator)
        eps = torch.randn(x.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * cosine(step, steps)
        target = scheduler.get_velocity(x, eps, t) if velocity else eps
        with torch.autocast("cpu", torch.bfloat16):
            out = predict(scheduler.add_noise(x, eps, t), t, y)
        loss = F.mse_loss(out.float(), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
        running = 0.995 * running + 0.005 * loss.item() if step else loss.item()
        if step % 100 == 0:
            log(f"{part} {step}/{steps} loss {running:.4f} {time.time() - start:.0f} s")
        if step and step % 1000 == 0:
            save(ema)
    save(ema)
    return {
        "data": data_digest(args.data),
        "steps": steps,
        "batch": batch,
        "seed": args.seed,
        "loss": running,
        "ema": decay,
        "label_dropout": 0.1,
        "parameters": count,
        "seconds": time.time() - start,
    }


def load_vq() -> VQModel:
    return VQModel.from_pretrained(LDM / "vqvae", low_cpu_mem_usage=False).float().eval()


def encode(vq: VQModel, images: Tensor) -> Tensor:
    """uint8 [N, 1, 32, 32] -> scaled latents [N, 3, 8, 8]."""
    with torch.no_grad():
        latents = torch.cat([vq.encode(signed(c)).latents for c in images.split(500)])
    return latents * vq.config.scaling_factor


def train_unet(args: argparse.Namespace) -> None:
    images, labels = load_split(args.data, "train")
    vq = load_vq()
    torch.manual_seed(args.seed)
    model = nn.ModuleDict({"unet": make_unet(), "embedder": ClassEmbedder(10, 128)})
    plain_attention(model)
    nn.init.normal_(model["embedder"].embedding.weight, std=1.0)
    scheduler = make_scheduler()

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model["unet"](x, t, encoder_hidden_states=model["embedder"](y)).sample

    def save(ema: Ema) -> None:
        unet, embedder = make_unet(), ClassEmbedder(10, 128)
        ema.copy_to(nn.ModuleDict({"unet": unet, "embedder": embedder}))
        save_pipeline(LDM, ClassConditionalLDMPipeline(unet, vq, embedder, scheduler))
        vq.float()

    record = fit(
        args,
        "unet",
        model,
        predict,
        encode(vq, images),
        labels,
        scheduler,
        save,
        steps=6000,
        batch=128,
        learning_rate=5e-4,
        decay=0.9995,
    )
    write_record(LDM, "unet", record)


# ---------------------------------------------------------------- pixel-space U-Net


def make_pixel_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=11,  # the last is the null class
        attention_head_dim=32,
        norm_num_groups=8,
    )


def train_ddpm(args: argparse.Namespace) -> None:
    images, labels = load_split(args.data, "train")
    torch.manual_seed(args.seed)
    model = make_pixel_unet()
    plain_attention(model)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)

    def save(ema: Ema) -> None:
        unet = make_pixel_unet()
        ema.copy_to(unet)
        save_pipeline(DDPM, ClassConditionalPixelPipeline(unet, scheduler))

    record = fit(
        args,
        "ddpm",
        model,
        lambda x, t, y: model(x, t, y).sample,
        signed(images),
        labels,
        scheduler,
        save,
        steps=2200,
        batch=64,
        learning_rate=1e-3,
        decay=0.999,
    )
    write_record(DDPM, "unet", record)


# ---------------------------------------------------------------- diffusion transformer


def make_transformer() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        num_layers=6,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=10,
    )


def train_dit(args: argparse.Namespace) -> None:
    """v-prediction, so that corrections for it meet a trained model."""
    images, labels = load_split(args.data, "train")
    vq = load_vq()
    torch.manual_seed(args.seed)
    model = make_transformer()
    plain_attention(model)
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # one draw for all blocks: in fit
        nn.init.zeros_(block.norm1.linear.weight)  # every block starts as the identity (DiT)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(model.proj_out_2.weight)
    scheduler = DDIMScheduler.from_config(make_scheduler().config, prediction_type="v_prediction")

    def save(ema: Ema) -> None:
        transformer = make_transformer()
        ema.copy_to(transformer)
        save_pipeline(DIT, ClassConditionalDiTPipeline(transformer, vq, scheduler))
        vq.float()

    record = fit(
        args,
        "dit",
        model,
        lambda x, t, y: model(x, timestep=t, class_labels=y).sample,
        encode(vq, images),
        labels,
        scheduler,
        save,
        steps=2000,
        batch=128,
        learning_rate=1e-3,
        decay=0.999,
    )
    write_record(DIT, "transformer", record)


# ---------------------------------------------------------------- quality record


def record_quality(args: argparse.Namespace) -> None:
    """Guided samples of the saved pipelines: share classified as asked, feature distance."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    net = FashionClassifier()
    net.load_state_dict(load_file(FEATURES / "classifier.safetensors"))
    reference = load_file(FEATURES / "reference.safetensors")
    theirs = {k: reference[k].numpy() for k in ("mu", "sigma")}
    count = args.steps or 1000
    for folder, kind in PIPELINES.items():
        pipeline = kind.from_pretrained(folder).to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
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
            distance = float(
                fid_statistics_to_metric(ours, theirs, False)["frechet_inception_distance"]
            )
            quality[f"guidance_{guidance:g}"] = {
                "class_agreement": as_asked,
                "fd_fashion": distance,
            }
            log(f"{folder.name}, guidance {guidance}: {as_asked:.3f} as asked, fd {distance:.3f}")
        record = {"count": count, "steps": 20, "scheduler": "ddim", "quality": quality}
        write_record(folder, "samples", record)


PIPELINES = {
    LDM: ClassConditionalLDMPipeline,
    DDPM: ClassConditionalPixelPipeline,
    DIT: ClassConditionalDiTPipeline,
}
PARTS = {
    "classifier": train_classifier,
    "vq": train_vq,
    "unet": train_unet,
    "ddpm": train_ddpm,
    "dit": train_dit,
    "record": record_quality,
    **emoji_ldm.PARTS,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the four IDX files")
    parser.add_argument(
        "--emoji",
        type=Path,
        default=emoji_data.CACHE,
        help="folder of the npm package, fetched there once",
    )
    parser.add_argument(
        "--state",
        type=Path,
        default=emoji_data.CACHE / "state",
        help="folder from which stopped emoji parts go on",
    )
    parser.add_argument("--steps", type=int, help="training steps (samples for record)")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for part in args.parts:
        PARTS[part](args)


if __name__ == "__main__":
    main()
