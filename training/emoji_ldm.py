"""The parts of train_zoo.py that make the packaged emoji-ldm, in this order.

emoji-vae: the first stage, on random crops of all images, then on whole images.
emoji-unet: the class-conditional denoiser, on latents that are encoded once.
emoji-classifier: the feature network and the statistics of the images.
emoji-sheet: samples.png in the folder of --state, a row a class, of the denoiser as it stands.
emoji-record: guided samples of the saved pipeline: share classified as asked, feature distance.

A part that was stopped goes on from its file in the folder of --state. Fewer --steps than it
has made end it at once, with the averaged weights that it has.
"""

from __future__ import annotations

import argparse
import math

import emoji_data
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from training_loop import (
    ZOO,
    Ema,
    Progress,
    cosine,
    log,
    make_scheduler,
    plain_attention,
    save_half,
    save_pipeline,
    signed,
    write_record,
)

from qncd_cli.metrics.features import SmallClassifier
from qncd_cli.models.pipelines import ClassConditionalLDMPipeline, ClassEmbedder

EMOJI = ZOO / "emoji-ldm"
FEATURES = ZOO / "features"
NUM_CLASSES = len(emoji_data.CLASSES)
CROP = 32
LATENT_NOISE = 0.05
"""Noise on the latents that the decoder learns to ignore, in units of their standard deviation."""
CONTEXT = 128
LABEL_DROPOUT = 0.1
SNR_LIMIT = 5.0
"""gamma of Min-SNR weighting (Hang et al. 2023); a larger value weighs low noise more."""


def read(args: argparse.Namespace) -> tuple[Tensor, Tensor, str]:
    """Images [N, 3, 64, 64] uint8, labels [N] with -1 for none, digest of the package."""
    path = emoji_data.fetch(args.emoji)
    images, labels = emoji_data.load(path)
    return images, labels, emoji_data.digest(path)


# ---------------------------------------------------------------- first stage


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=emoji_data.IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def vae_psnr(model: AutoencoderKL, images: Tensor) -> float:
    """Reconstruction PSNR in dB of uint8 images [N, 3, 64, 64]."""
    model.eval()
    error = 0.0
    with torch.no_grad():
        for chunk in images.split(100):
            out = model.decode(model.encode(signed(chunk)).latent_dist.mean).sample
            restored = ((out / 2 + 0.5).clamp(0, 1) * 255).round()
            error += F.mse_loss(restored, chunk.float(), reduction="sum").item()
    model.train()
    return 10 * math.log10(255**2 / (error / images.numel()))


def slopes(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels."""
    across = (images[..., 1:] - images[..., :-1]).abs().mean()
    return across + (images[..., 1:, :] - images[..., :-1, :]).abs().mean()


def train_vae(args: argparse.Namespace) -> None:
    images, labels, digest = read(args)
    steps, batch = args.steps or 3000, args.batch or 16
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    model = make_vae().train().to(memory_format=torch.channels_last)
    log(f"emoji-vae: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, weight_decay=1e-4, betas=(0.9, 0.95), fused=True
    )
    used = (labels >= 0).nonzero()[:, 0]
    progress = Progress(args.state / "emoji-vae.pt", generator, model=model, optimizer=optimizer)
    first = progress.restore()
    steps = max(steps, first)
    for step in range(first, steps):
        whole = step >= 0.75 * steps
        count = batch // 4 if whole else batch
        # half of a batch from the classes, half from the whole package
        own = used[torch.randint(len(used), (count // 2,), generator=generator)]
        other = torch.randint(len(images), (count - len(own),), generator=generator)
        x = images[torch.cat([own, other])]
        if not whole:
            limit = emoji_data.IMAGE_SIZE - CROP + 1
            top, left = torch.randint(limit, (2,), generator=generator).tolist()
            x = x[:, :, top : top + CROP, left : left + CROP]
        x = signed(x.flip(3) if torch.rand((), generator=generator) < 0.5 else x)
        x = x.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cosine(step, steps, warmup=100)
        with torch.autocast("cpu", torch.bfloat16):
            z = model.encode(x).latent_dist.mean.float()
            # latents near zero mean and unit scale, so that the noise below means something
            scale = (z.pow(2).mean(dim=(0, 2, 3)) - 1).pow(2).mean()
            offset = z.mean(dim=(0, 2, 3)).pow(2).mean()
            noise = LATENT_NOISE * torch.randn(z.shape, generator=generator)
            out = model.decode(z + noise).sample
        error = out.float() - x
        loss = error.pow(2).mean() + 0.1 * (error.abs().mean() + slopes(error))
        loss = loss + 0.01 * (scale + offset)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.average(loss.item())
        if step % 100 == 0:
            log(f"emoji-vae {step}/{steps} loss {progress.loss:.4f} {progress.elapsed():.0f} s")
        progress.keep(step + 1)
    progress.keep(steps, now=True)
    model.eval()
    with torch.no_grad():
        latents = [model.encode(signed(c)).latent_dist.mean for c in images[used].split(100)]
    model.register_to_config(scaling_factor=round(1 / torch.cat(latents).std().item(), 5))
    model.half().save_pretrained(EMOJI / "vqvae")
    psnr = vae_psnr(load_vae(), images[used])
    log(f"emoji-vae: PSNR {psnr:.2f} dB")
    record = {"data": digest, "steps": steps, "batch": batch, "seed": args.seed}
    record |= {"loss": progress.loss, "psnr_db": psnr, "seconds": progress.elapsed()}
    write_record(EMOJI, "vqvae", record)


def load_vae() -> AutoencoderKL:
    model = AutoencoderKL.from_pretrained(EMOJI / "vqvae", low_cpu_mem_usage=False)
    return model.float().eval()


# ---------------------------------------------------------------- denoiser


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=emoji_data.IMAGE_SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_parts() -> nn.ModuleDict:
    return nn.ModuleDict({"unet": make_unet(), "embedder": ClassEmbedder(NUM_CLASSES, CONTEXT)})


def encode_all(vae: AutoencoderKL, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled latents [M, 4, 16, 16] and labels [M] of the labelled images and their mirror images.

    Classes in NOT_MIRRORED stay as they are.
    """
    names = list(emoji_data.CLASSES)
    fixed = torch.tensor([names.index(name) for name in emoji_data.NOT_MIRRORED])
    mirrored = (labels >= 0) & ~torch.isin(labels, fixed)
    pixels = torch.cat([images[labels >= 0], images[mirrored].flip(3)])
    with torch.no_grad():
        parts = [vae.encode(signed(chunk)).latent_dist.mean for chunk in pixels.split(100)]
    latents = torch.cat(parts) * vae.config.scaling_factor
    return latents, torch.cat([labels[labels >= 0], labels[mirrored]])


def draw_weights(labels: Tensor) -> Tensor:
    """Probability of each image [M]: a class is drawn by the square root of its size."""
    counts = torch.bincount(labels, minlength=NUM_CLASSES).float()
    weights = counts.rsqrt()[labels]
    return weights / weights.sum()


def mean_noise(
    noisy: Tensor, level: Tensor, labels: Tensor, x0: Tensor, x0_labels: Tensor, weights: Tensor
) -> Tensor:
    """The expected noise of noisy latents over all images that could have led to them.

    The stable target of Xu et al. 2023 (arXiv 2302.00670): what the noise of one image estimates
    with variance, computed exactly, because the images are few.
    noisy: [B, C, H, W]; level: [B, 1], alpha-bar; labels: [B], NUM_CLASSES for any class.
    x0: [M, C, H, W] with x0_labels [M] and the probabilities of their draw, weights [M].
    """
    flat, candidates = noisy.flatten(1), x0.flatten(1)
    scale, variance = level.sqrt(), 1 - level
    # log of the normal density of noisy around scale * x0, without what all x0 share
    products = scale * (flat @ candidates.T) - level * candidates.pow(2).sum(1) / 2
    fits = (labels[:, None] == x0_labels) | (labels[:, None] == NUM_CLASSES)
    odds = (products / variance + weights.log()).masked_fill(~fits, -math.inf)
    expected = odds.softmax(1) @ candidates
    return ((flat - scale * expected) / variance.sqrt()).view_as(noisy)


def train_unet(args: argparse.Namespace) -> None:
    images, labels, digest = read(args)
    vae = load_vae()
    x0, x0_labels = encode_all(vae, images, labels)
    weights = draw_weights(x0_labels)
    steps, batch = args.steps or 6000, args.batch or 32
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    model = make_parts().to(memory_format=torch.channels_last)
    plain_attention(model)
    nn.init.normal_(model["embedder"].embedding.weight, std=1.0)
    count = sum(p.numel() for p in model.parameters())
    log(f"emoji-unet: {count / 1e6:.2f} M parameters, {len(x0)} latents")
    scheduler = make_scheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=1e-2, fused=True)
    ema = Ema(model, decay=0.999)
    progress = Progress(
        args.state / "emoji-unet.pt", generator, model=model, optimizer=optimizer, ema=ema
    )
    first = progress.restore()
    steps = max(steps, first)
    for step in range(first, steps):
        index = torch.multinomial(weights, batch, replacement=True, generator=generator)
        x, y = x0[index], x0_labels[index].clone()
        y[torch.rand(batch, generator=generator) < LABEL_DROPOUT] = NUM_CLASSES
        t = torch.randint(0, 1000, (batch,), generator=generator)
        noisy = scheduler.add_noise(x, torch.randn(x.shape, generator=generator), t)
        level = scheduler.alphas_cumprod[t][:, None]
        target = mean_noise(noisy, level, y, x0, x0_labels, weights)
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * cosine(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            inputs = noisy.contiguous(memory_format=torch.channels_last)
            out = model["unet"](inputs, t, encoder_hidden_states=model["embedder"](y)).sample
        snr = (level / (1 - level))[:, 0]
        errors = (out.float() - target).pow(2).mean(dim=(1, 2, 3))
        loss = (errors * snr.clamp(max=SNR_LIMIT) / snr).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
        progress.average(loss.item(), 0.995)
        if step % 100 == 0:
            log(f"emoji-unet {step}/{steps} loss {progress.loss:.4f} {progress.elapsed():.0f} s")
        progress.keep(step + 1)
    progress.keep(steps, now=True)
    save_unet(ema, vae, scheduler)
    record = {"data": digest, "steps": steps, "batch": batch, "seed": args.seed, "ema": 0.999}
    record |= {"label_dropout": LABEL_DROPOUT, "loss": progress.loss, "parameters": count}
    write_record(EMOJI, "unet", record | {"seconds": progress.elapsed()})


def save_unet(ema: Ema, vae: AutoencoderKL, scheduler: DDIMScheduler) -> None:
    averaged = make_parts()
    ema.copy_to(averaged)
    pipeline = ClassConditionalLDMPipeline(averaged["unet"], vae, averaged["embedder"], scheduler)
    save_pipeline(EMOJI, pipeline)


def draw_sheet(args: argparse.Namespace) -> None:
    """Eight samples of each class at guidance 3 and 20 DDIM steps, written as one picture."""
    made = torch.load(args.state / "emoji-unet.pt", weights_only=True)
    parts = make_parts()
    ema = Ema(parts, decay=0.0)
    ema.load_state_dict(made["ema"])
    ema.copy_to(parts)
    pipeline = ClassConditionalLDMPipeline(
        parts["unet"], load_vae(), parts["embedder"], make_scheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for label in range(NUM_CLASSES):
        generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
        rows.append(np.concatenate(pipeline([label] * 8, 3.0, 20, generators, "np").images, 1))
    path = args.state / "samples.png"
    pipeline.numpy_to_pil(np.concatenate(rows, 0)[None])[0].save(path)
    log(f"{path}: step {made['step']}, rows {', '.join(emoji_data.CLASSES)}")


# ---------------------------------------------------------------- feature network


def make_classifier() -> SmallClassifier:
    return SmallClassifier(3, NUM_CLASSES, stride=2)


def classify(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, 64, 64] -> features [N, 128], logits [N, classes]."""
    net.eval()
    with torch.no_grad():
        parts = [net(chunk.float() / 255) for chunk in images.split(100)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 4 pixels on white and blur half of the batch a little, as a first stage does.

    images: float [N, 3, 64, 64] in [0, 1].
    """
    top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
    side = images.shape[-1]
    padded = F.pad(images, (4, 4, 4, 4), value=1.0)
    images = padded[:, :, top : top + side, left : left + side]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    draws = torch.rand(len(images), 1, 1, 1, generator=generator)
    amount = (draws - 0.5).clamp(min=0) * 1.4
    return images * (1 - amount) + blurred * amount


def train_classifier(args: argparse.Namespace) -> None:
    """Every eighth image is held out for the accuracy; statistics are those of all of them."""
    images, labels, digest = read(args)
    images, labels = images[labels >= 0], labels[labels >= 0]
    held = torch.arange(len(labels)) % 8 == 0
    steps, batch = args.steps or 600, args.batch or 32
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    net = make_classifier().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=5e-2)
    weights = draw_weights(labels) * ~held
    progress = Progress(
        args.state / "emoji-classifier.pt", generator, model=net, optimizer=optimizer
    )
    first = progress.restore()
    steps = max(steps, first)
    for step in range(first, steps):
        index = torch.multinomial(weights, batch, replacement=True, generator=generator)
        x = augment(images[index].float() / 255, generator)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cosine(step, steps, warmup=50)
        with torch.autocast("cpu", torch.bfloat16):
            _, logits = net(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.average(loss.item(), 0.98)
        if step % 100 == 0:
            seconds = progress.elapsed()
            log(f"emoji-classifier {step}/{steps} loss {progress.loss:.3f} {seconds:.0f} s")
        progress.keep(step + 1)
    save_half(net, FEATURES / "emoji-classifier.safetensors")
    net = load_classifier()
    features, logits = classify(net, images)
    accuracy = (logits.argmax(1) == labels)[held].float().mean().item()
    features = features.double()
    statistics = {"mu": features.mean(0), "sigma": torch.cov(features.T)}
    save_file(statistics | {"features": features.half()}, FEATURES / "emoji-reference.safetensors")
    log(f"emoji-classifier: accuracy on held-out images {accuracy:.4f}")
    record = {
        "data": digest,
        "steps": steps,
        "batch": batch,
        "seed": args.seed,
        "loss": progress.loss,
    }
    record |= {"held_out_accuracy": accuracy, "seconds": progress.elapsed()}
    write_record(FEATURES, "emoji-classifier", record)


def load_classifier() -> SmallClassifier:
    net = make_classifier()
    net.load_state_dict(load_file(FEATURES / "emoji-classifier.safetensors"))
    return net.float()


# ---------------------------------------------------------------- quality record


def record_quality(args: argparse.Namespace) -> None:
    """Guided samples of the saved pipeline: share classified as asked, feature distance."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    net = load_classifier()
    reference = load_file(FEATURES / "emoji-reference.safetensors")
    theirs = {k: reference[k].numpy() for k in ("mu", "sigma")}
    count = args.steps or 480
    pipeline = ClassConditionalLDMPipeline.from_pretrained(EMOJI).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    quality = {}
    for guidance in (2.0, 3.0):
        labels = torch.arange(count) % NUM_CLASSES
        parts = []
        for first in range(0, count, 48):
            asked = labels[first : first + 48]
            generators = [torch.Generator().manual_seed(first + i) for i in range(len(asked))]
            out = pipeline(asked, guidance, 20, generators, "np").images
            parts.append(torch.from_numpy((out * 255).round().astype(np.uint8)))
        features, logits = classify(net, torch.cat(parts).permute(0, 3, 1, 2))
        as_asked = (logits.argmax(1) == labels).float().mean().item()
        features = features.double()
        ours = {"mu": features.mean(0).numpy(), "sigma": torch.cov(features.T).numpy()}
        metric = fid_statistics_to_metric(ours, theirs, False)
        distance = float(metric["frechet_inception_distance"])
        quality[f"guidance_{guidance:g}"] = {"class_agreement": as_asked, "fd_emoji": distance}
        log(f"emoji-ldm, guidance {guidance}: {as_asked:.3f} as asked, fd {distance:.3f}")
    record = {"count": count, "steps": 20, "scheduler": "ddim", "quality": quality}
    write_record(EMOJI, "samples", record)


PARTS = {
    "emoji-vae": train_vae,
    "emoji-unet": train_unet,
    "emoji-classifier": train_classifier,
    "emoji-sheet": draw_sheet,
    "emoji-record": record_quality,
}
