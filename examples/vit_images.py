"""Train a ViT on images made here: which shape is it, whatever its colours, place and size?

    python examples/vit_images.py                  # half a minute

Attention is this package's. Prints the loss as it falls and the accuracy on images never seen.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn.models.vit import VisionTransformer

SHAPES = ("disc", "square", "triangle", "cross", "ring")
SIZE = 32  # pixels


def draw_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noisy images of one shape each, fp32 ``(count, 3, SIZE, SIZE)``, and its number among
    ``SHAPES``, int64 ``(count,)``."""

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    radius = uniform(7, 13, 1, 1)
    places = torch.arange(SIZE) + 0.5
    x = places - (radius + uniform(0, 1, 1, 1) * (SIZE - 2 * radius))
    y = places[:, None] - (radius + uniform(0, 1, 1, 1) * (SIZE - 2 * radius))
    x, y = x / radius, y / radius  # the shape lies within -1 to 1
    far = (x.square() + y.square()).sqrt()
    is_inside = torch.stack(
        (
            far < 1,
            torch.maximum(x.abs(), y.abs()) < 0.85,
            (y < 0.8) & (y > 2 * x.abs() - 1),
            (torch.minimum(x.abs(), y.abs()) < 0.25) & (torch.maximum(x.abs(), y.abs()) < 1),
            (far < 1) & (far > 0.6),
        ),
        1,
    )[torch.arange(count), labels]
    front, back = uniform(0.2, 1, 3, 1, 1), uniform(-1, -0.2, 3, 1, 1)
    images = torch.where(is_inside[:, None], front, back)
    noise = torch.randn(images.shape, generator=generator)
    return images + 0.15 * noise, labels


def make_model(embed_dim: int = 64, depth: int = 3) -> VisionTransformer:
    """A small ViT over patches of 4 x 4 pixels, 65 tokens an image."""
    return VisionTransformer(
        img_size=SIZE,
        patch_size=4,
        num_classes=len(SHAPES),
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // 32,
        use_flash_attn=True,
        fused_dropout_add_ln=True,
    )


@torch.no_grad()
def accuracy(model: VisionTransformer, images: Tensor, labels: Tensor) -> float:
    """The share of images whose shape the model sees."""
    model.eval()
    parts = zip(images.split(128), labels.split(128))
    right = sum(int((model(x).argmax(-1) == y).sum()) for x, y in parts)
    model.train()
    return right / len(labels)


def train(model, steps: int, batch: int, seconds: float, seed: int = 0) -> list[float]:
    """Train on ever new images for at most ``steps`` and ``seconds``; return the losses."""
    decaying = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.05)
    generator, losses = torch.Generator().manual_seed(seed), []
    start = time.perf_counter()
    for step in range(steps):
        done = max(step / steps, (time.perf_counter() - start) / seconds)
        if done >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (step + 1) / 20) * math.cos(0.5 * math.pi * done)
        images, labels = draw_images(batch, generator)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1}: loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    return losses


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=40.0, help="of training at most")
    parser.add_argument("--embed-dim", type=int, default=64, help="a multiple of 32")
    parser.add_argument("--depth", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = make_model(options.embed_dim, options.depth)
    start = time.perf_counter()
    losses = train(model, options.steps, options.batch, options.seconds)
    seconds = time.perf_counter() - start
    print(f"{len(losses) * options.batch / seconds:.0f} images a second")
    found = accuracy(model, *draw_images(1000, torch.Generator().manual_seed(1 << 20)))
    print(f"accuracy on 1000 new images: {found:.1%} (chance: {1 / len(SHAPES):.0%})")
    return found


if __name__ == "__main__":
    main()
