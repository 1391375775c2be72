"""Options for the images that sampling begins from."""

from __future__ import annotations

import click

IMAGES = (
    click.option(
        "--image",
        "images",
        metavar="FILE",
        multiple=True,
        help="To begin from, instead of the configured ones; a folder, or several in turn.",
    ),
    click.option(
        "--mask",
        "masks",
        metavar="FILE",
        multiple=True,
        help="Of an inpainting model: white is painted anew; one for all images, or one each.",
    ),
    click.option(
        "--control",
        metavar="FILE",
        multiple=True,
        help="Of a ControlNet: steers instead of the configured ones; a folder, or several in "
        "turn.",
    ),
    click.option(
        "--strength",
        type=float,
        metavar="S",
        help="Share of the steps that images are noised and denoised by.",
    ),
)
"""In the order in which help shows them."""
