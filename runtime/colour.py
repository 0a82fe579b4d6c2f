"""Colour profiles: an image that carries one is converted to sRGB, as a browser shows it."""

import io
from typing import cast

import numpy as np
import PIL.Image
from PIL import ImageCms

from ..errors import one_line

SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # what a profile calls the colours of a Pillow mode
GREYS, COLOURS = {"1", "L", "LA"}, {"RGB", "RGBA", "RGBa", "RGBX", "P", "PA"}
SAME = 2  # of 255 levels: profiles that are sRGB in other words differ by their rounding


def to_srgb(image: PIL.Image.Image, notes: list[str]) -> PIL.Image.Image:
    """Return the image in sRGB: mode RGB, or RGBA where it has transparency; as it is if its colours are sRGB already.

    A profile that is damaged, or made for other colours than the image has, is not applied. `notes` say what was done.
    """
    data = image.info.get("icc_profile")
    if not data or image.mode == "LAB":  # which has its own meaning
        return image
    if image.mode not in {*GREYS, *COLOURS, "CMYK"}:
        notes.append("colour profile not applied")
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space.strip()
        name = one_line(profile.profile.profile_description or "an unnamed profile", longest=60)
        colours = _without_alpha(image, grey=space == SPACES["L"])
        if SPACES[colours.mode] != space:
            notes.append(f"colour profile not applied: it is for {one_line(space)}")
            return image
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), colours.mode, "RGB")
        if colours.mode == "RGB" and _changes_nothing(transform):
            return image
        converted = cast("PIL.Image.Image", ImageCms.applyTransform(colours, transform))
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        notes.append("colour profile damaged, so not applied")
        return image
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    notes.append(f"colours converted from {name} to sRGB")
    return converted


def _without_alpha(image: PIL.Image.Image, *, grey: bool) -> PIL.Image.Image:
    """Return the colours alone. Only a grey image can have a grey profile; with another it is a colour image."""
    if image.mode == "CMYK":
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
    return image.convert("L" if grey and image.mode in GREYS else "RGB")


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    converted = ImageCms.applyTransform(PIL.Image.fromarray(lattice), transform)
    return bool(np.abs(np.asarray(converted).astype(int) - lattice).max() <= SAME)
