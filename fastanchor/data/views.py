"""Augmentations: from stored uint8 images to the views that a model sees, whole batches at a time, on their device.

Nothing here reads a value back to the host, so all of it can run inside a captured graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastanchor.data.simclr import Jitter, colour, draw_resized_crop_flip, resized_crop, simclr
from fastanchor.errors import UserError
from fastanchor.ops import images as operators
from fastanchor.reference.images import apply_crop_flip, to_float

# "crop" is for digits and letters, where a mirror image is another symbol; "resized_crop_flip" for photographs of many sizes;
# "simclr" for contrastive recipes.
AUGMENTATIONS = ("crop_flip", "crop", "resized_crop_flip", "simclr", "none")
CROPS = ("crop_flip", "crop")
# Share of the area that "resized_crop_flip" keeps, torchvision's default and ImageNet's custom.
RESIZED_SCALE = (0.08, 1.0)


class Rows(NamedTuple):
    """Images of a store that are not gathered yet: uint8 (M, H, W, C), and which of them, int64 (B,) on the same device."""

    store: Tensor
    index: Tensor

    def gather(self) -> Tensor:
        """The images, uint8 (B, H, W, C)."""
        return self.store.index_select(0, self.index)


class Colours(NamedTuple):
    """What is left to do about a view that has been cut out: `simclr.Jitter`'s four draws and who turns grey."""

    factors: Tensor
    shift: Tensor
    order: Tensor
    before: Tensor
    greyed: Tensor


class Prepared(NamedTuple):
    """Views that a feed has cut out, by name, and the colours of those that have any.

    images: uint8 (B, H, W, 3), or fp32 (B, 3, H, W) in [0, 1].
    """

    images: dict[str, Tensor]
    colours: dict[str, Colours]

    def view(self, name: str) -> Tensor:
        """The finished view: fp32 (B, 3, H, W) in [0, 1], channels_last."""
        image = self.images[name]
        image = to_float(image) if image.dtype == torch.uint8 else image
        if name in self.colours:
            *jitter, greyed = self.colours[name]
            return colour(image.contiguous(), Jitter(*jitter), greyed)
        return image.contiguous(memory_format=torch.channels_last)


def draw_crop_flip(batch: int, generator: torch.Generator, *, pad: int = 4, flip: bool = True) -> tuple[Tensor, Tensor | None]:
    """What a random crop and flip needs, drawn on the generator's device.

    Returns offsets, int64 (2, batch), rows then columns, uniform in [0, 2 * pad]; and mirrored, bool (batch,), true
    with probability 1/2, or None without flip.
    """
    offsets = torch.randint(2 * pad + 1, (2, batch), generator=generator, device=generator.device)
    mirrored = torch.rand(batch, generator=generator, device=generator.device) < 0.5 if flip else None
    return offsets, mirrored


def crop_flip(images_u8: Tensor, generator: torch.Generator, *, pad: int = 4, flip: bool = True) -> Tensor:
    """Random crop after zero padding and, with flip, a left-right mirror with p = 1/2, for each image by itself.

    The semantics of torchvision's RandomCrop(size, padding=pad) and RandomHorizontalFlip. images_u8: uint8
    (B, H, W, C), returned in the same shape. Random numbers come from `generator`, on its own device.
    """
    offsets, mirrored = draw_crop_flip(len(images_u8), generator, pad=pad, flip=flip)
    return apply_crop_flip(images_u8, offsets, mirrored, pad=pad)


def augment(images_u8: Tensor | Rows, kind: str, generator: torch.Generator, *, pad: int = 4, fused: bool = False) -> Tensor:
    """One random view of every image: uint8 (B, H, W, C), or the Rows of a store, to fp32 (B, C, H, W) in [0, 1], channels_last.

    kind: one of AUGMENTATIONS; "none" draws nothing, and only crop and crop_flip have a `pad`. fused: crop, flip and scale, and
    the gathering of Rows, by the operator `ops.images.augment`: the same draws and the same bits in one launch. Raises UserError.
    """
    if kind not in AUGMENTATIONS:
        raise UserError(f"augmentation is {kind!r} and must be one of {', '.join(AUGMENTATIONS)}")
    if fused and kind in CROPS:
        store, index = images_u8 if isinstance(images_u8, Rows) else (images_u8, None)
        batch = len(store) if index is None else len(index)
        offsets, mirrored = draw_crop_flip(batch, generator, pad=pad, flip=kind == "crop_flip")
        offsets, mirrored = (x if x is None else x.to(store.device, non_blocking=True) for x in (offsets, mirrored))
        return operators.augment(store, offsets, mirrored, index=index, pad=pad)
    if isinstance(images_u8, Rows):
        images_u8 = images_u8.gather()
    if kind == "simclr":
        return simclr(images_u8, generator)
    if kind == "resized_crop_flip":
        height, width = images_u8.shape[1:3]
        boxes, mirrored = draw_resized_crop_flip(len(images_u8), height, width, generator, scale=RESIZED_SCALE)
        return resized_crop(images_u8, boxes, mirrored).contiguous(memory_format=torch.channels_last)
    if kind != "none":
        images_u8 = crop_flip(images_u8, generator, pad=pad, flip=kind == "crop_flip")
    return to_float(images_u8)
