"""Views for contrastive recipes: random resized crop, mirror, colour jitter and greyscale of a whole batch on its device.

Every image has its own draw. Numbers and formulas are those of SupContrast's CIFAR recipe (Khosla et al. 2020, main_supcon.py),

    RandomResizedCrop(size, scale=(0.2, 1)), RandomHorizontalFlip(), RandomApply([ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
    RandomGrayscale(p=0.2)

with torchvision's meaning of each, except that all is in fp32 from the crop on, where torchvision rounds 8-bit images after
every operation. No size depends on a value and nothing is read back, so all of it can run inside a captured graph.
Adversarial training on such crops costs robust accuracy: ASCL's authors noted 43.46 % under PGD-200 at best (dataset.py of their
code), against 52.93 % with crop and flip (their README).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastanchor.errors import UserError

SCALE, RATIO, ATTEMPTS = (0.2, 1.0), (3 / 4, 4 / 3), 10
JITTER, HUE = 0.4, 0.1
JITTER_SHARE, GREY_SHARE = 0.8, 0.2
BRIGHTNESS, CONTRAST, SATURATION = range(3)


class Jitter(NamedTuple):
    """A colour jitter of every image. Factors 1 and shift 0 leave an image as it is, to the bit."""

    factors: Tensor  # fp32 (3, B) in [0.6, 1.4]: of brightness, contrast, saturation
    shift: Tensor  # fp32 (B,) in [-0.1, 0.1]: of the hue, in turns of the colour circle
    order: Tensor  # int64 (3, B): brightness, contrast, saturation in the order in which they are applied
    before: Tensor  # int64 (B,) in [0, 3]: how many of these come before the hue


class Draw(NamedTuple):
    """All that is random about one view of every image."""

    boxes: Tensor  # int64 (4, B): top, left, height, width of the crop, in pixels
    mirrored: Tensor  # bool (B,)
    jitter: Jitter
    greyed: Tensor  # bool (B,)


def draw_boxes(
    batch: int, height: int | Tensor, width: int | Tensor, generator: torch.Generator, *, scale: tuple[float, float] = SCALE
) -> Tensor:
    """Crops of images of this size, as torchvision's RandomResizedCrop draws them: int64 (4, batch), see `Draw`.

    height, width: in pixels, of all images or, int64 (batch,), of each. The share of the area is uniform in `scale`,
    the ratio width / height log-uniform in RATIO, sides are rounded. The first of ATTEMPTS that fits is taken, at a uniform
    place; where none fits, the largest central crop whose ratio is within RATIO.
    All attempts are made at once: shapes must not depend on how many it takes.
    """
    shape, device = (ATTEMPTS, batch), generator.device
    area = torch.empty(shape, device=device).uniform_(*scale, generator=generator).mul_(height * width)
    ratio = torch.empty(shape, device=device).uniform_(*map(math.log, RATIO), generator=generator).exp_()
    rows, columns = (area / ratio).sqrt_().round_(), (area * ratio).sqrt_().round_()
    fits = (rows >= 1) & (rows <= height) & (columns >= 1) & (columns <= width)
    first, none = fits.float().argmax(0, keepdim=True), ~fits.any(0)
    starts, sides = [], []
    central = central_sizes(height, width) if isinstance(height, Tensor) else _central_size(height, width)
    for side, candidates, fallback in ((height, rows, central[0]), (width, columns, central[1])):
        taken = torch.where(none, fallback, candidates.gather(0, first)[0])
        free = side - taken
        # Below free + 1: the largest fp32 number below 1, times a whole number, is not rounded up to that number.
        start = torch.rand(batch, generator=generator, device=device).mul_(free + 1).floor_()
        starts.append(torch.where(none, (side - fallback) // 2, start))
        sides.append(taken)
    return torch.stack(starts + sides).long()


def _central_size(height: int, width: int) -> tuple[int, int]:
    narrowest, widest = RATIO
    if width / height < narrowest:
        return round(width / narrowest), width
    if width / height > widest:
        return height, round(height * widest)
    return height, width


def central_sizes(height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """`_central_size` of many images, int64 (B,) each."""
    sizes = [_central_size(h, w) for h, w in zip(height.tolist(), width.tolist(), strict=True)]
    return tuple(torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2).unbind(1))


def draw_resized_crop_flip(
    batch: int, height: int | Tensor, width: int | Tensor, generator: torch.Generator, *, scale: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Boxes as `draw_boxes` gives them, and mirrored, bool (batch,), true with probability 1/2."""
    boxes = draw_boxes(batch, height, width, generator, scale=scale)
    return boxes, torch.rand(batch, generator=generator, device=generator.device) < 0.5


def draw_jitter(batch: int, generator: torch.Generator) -> Jitter:
    """ColorJitter(0.4, 0.4, 0.4, 0.1) for 8 images of 10, all 24 orders equally likely; nothing for the others."""
    device = generator.device
    factors = torch.empty(3, batch, device=device).uniform_(1 - JITTER, 1 + JITTER, generator=generator)
    shift = torch.empty(batch, device=device).uniform_(-HUE, HUE, generator=generator)
    # One of six orders of three: half the number is the first of them, its last bit tells which of the others is next.
    number = torch.randint(6, (batch,), generator=generator, device=device)
    first = number // 2
    second = (first + 1 + number % 2) % 3
    order = torch.stack([first, second, 3 - first - second])
    before = torch.randint(4, (batch,), generator=generator, device=device)
    left = torch.rand(batch, generator=generator, device=device) >= JITTER_SHARE
    return Jitter(factors.masked_fill_(left, 1), shift.masked_fill_(left, 0), order, before)


def draw_simclr(batch: int, height: int | Tensor, width: int | Tensor, generator: torch.Generator) -> Draw:
    """One view of each of `batch` images of this size (or these, int64 (batch,)), drawn on the generator's device."""
    boxes, mirrored = draw_resized_crop_flip(batch, height, width, generator, scale=SCALE)
    jitter = draw_jitter(batch, generator)
    greyed = torch.rand(batch, generator=generator, device=generator.device) < GREY_SHARE
    return Draw(boxes, mirrored, jitter, greyed)


def resized_crop(images_u8: Tensor, boxes: Tensor, mirrored: Tensor) -> Tensor:
    """Cut every image's box out, enlarge it bilinearly to the image's size, mirror it left and right where told.

    images_u8: uint8 (B, H, W, 3); boxes: int64 (4, B), within the image; mirrored: bool (B,). Returns fp32 (B, 3, H, W) in
    [0, 1], contiguous. As torchvision's resized_crop: pixels are squares, and beyond the box its own edge goes on.
    Antialiasing would change nothing, as a box is never larger than the result.
    """
    batch, height, width, channels = images_u8.shape
    device = images_u8.device
    top, left, rows, columns = boxes.to(device, non_blocking=True)[:, :, None]
    mirrored = mirrored.to(device, non_blocking=True)[:, None]
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    upper, lower, down = _neighbours(y, height, top, rows)
    near, far, along = _neighbours(torch.where(mirrored, width - 1 - x, x), width, left, columns)
    # Rows first: they are gathered as whole lines of bytes.
    line = height * torch.arange(batch, device=device)[:, None]
    lines = images_u8.reshape(batch * height, width * channels)
    upper, lower = (lines.index_select(0, (line + at).flatten()).float() for at in (upper, lower))
    pixels = torch.lerp(upper, lower, down.reshape(-1, 1)).view(-1, channels)
    pixel = width * torch.arange(batch * height, device=device).view(batch, height, 1)
    near, far = (pixels.index_select(0, (pixel + at[:, None]).flatten()) for at in (near, far))
    resized = torch.lerp(near.view(images_u8.shape), far.view(images_u8.shape), along[:, None, :, None])
    # Planes: on a CPU the jitter takes a fraction of the time that it takes on interleaved channels.
    return resized.permute(0, 3, 1, 2).contiguous().div_(255)


def _neighbours(at: Tensor, count: int, start: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two source pixels of each of `count` results of an axis, as indices, and the share of the second; each (B, count)."""
    source = ((at + 0.5) * (size / count) - 0.5).clamp_(min=0)
    first = source.floor()
    share = source - first
    first = first.long()
    return start + first, start + torch.minimum(first + 1, size - 1), share


def greyscale(images: Tensor) -> Tensor:
    """0.2989 R + 0.587 G + 0.114 B, torchvision's weights: (B, 3, H, W) to (B, 1, H, W). White becomes 0.9999."""
    red, green, blue = images.split(1, dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def jitter_colours(images: Tensor, jitter: Jitter) -> Tensor:
    """torchvision's ColorJitter with these draws: fp32 (B, 3, H, W) in [0, 1], and the same out of it.

    Brightness, contrast and saturation f are clamp(f x + (1 - f) y, 0, 1) with y = 0, the mean of the image's grey, and its
    grey; the hue turns in HSV. What is applied where differs from image to image, so three blends are made before the hue and
    three after it, and those that are not an image's turn have factor 1: half the operations of trying all four in four places.
    """
    factors, shift, order, before = (part.to(images.device, non_blocking=True) for part in jitter)
    factors = factors.gather(0, order)
    for slot in range(3):
        images = _blend(images, order[slot], factors[slot].masked_fill(before <= slot, 1))
    images = shift_hue(images, shift)
    for slot in range(3):
        images = _blend(images, order[slot], factors[slot].masked_fill(before > slot, 1))
    return images


def _blend(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """kind: (B,), BRIGHTNESS, CONTRAST or SATURATION; factor: (B,)."""
    kind, factor = kind.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1)
    grey = greyscale(images)
    mean = grey.mean((1, 2, 3), keepdim=True)
    other = torch.where(kind == SATURATION, grey, mean * (kind == CONTRAST))
    return torch.lerp(other, images, factor).clamp_(0, 1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (B,) turns at equal saturation and value (HSV): fp32 (B, 3, H, W) in [0, 1], and the same back.

    With max and min over the channels of a pixel, C = max - min and h in sixths of a turn, channel n = 5, 3, 1 (R, G, B) is
    max - C clamp(2 - |k - 2|, 0, 1) where k = (n + h + 6 shift) mod 6. Equal to the usual table of six cases.
    """
    red, green, blue = images.unbind(1)
    high = images.amax(1)
    chroma = high - images.amin(1)
    divisor = chroma.clamp_min(1e-12)  # a grey pixel has no hue, and needs none
    sixths = torch.where(high == green, blue - red + 2 * divisor, red - green + 4 * divisor)
    sixths = torch.where(high == red, green - blue, sixths) / divisor + 6 * shift[:, None, None]
    channel = torch.arange(5, 0, -2, device=images.device).view(3, 1, 1)
    away = (sixths[:, None] + channel).remainder_(6).sub_(2).abs_()
    turned = high[:, None] - chroma[:, None] * (2 - away).clamp_(0, 1)
    return torch.where(shift[:, None, None, None] == 0, images, turned)


def apply_simclr(images_u8: Tensor, draw: Draw) -> Tensor:
    """The views that `draw` tells of: uint8 (B, H, W, 3) to fp32 (B, 3, H, W) in [0, 1], channels_last."""
    return colour(resized_crop(images_u8, draw.boxes, draw.mirrored), draw.jitter, draw.greyed)


def colour(images: Tensor, jitter: Jitter, greyed: Tensor) -> Tensor:
    """Jitter, then grey where told: fp32 (B, 3, H, W) in [0, 1] to the same, channels_last."""
    images = jitter_colours(images, jitter)
    greyed = greyed.to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    images = torch.where(greyed, greyscale(images), images)
    return images.contiguous(memory_format=torch.channels_last)


def simclr(images_u8: Tensor, generator: torch.Generator) -> Tensor:
    """One random view of every image: uint8 (B, H, W, 3) to fp32 (B, 3, H, W) in [0, 1], channels_last.

    Random numbers come from `generator`, on its own device. Raises UserError for images of another number of channels.
    """
    batch, height, width, channels = images_u8.shape
    if channels != 3:
        raise UserError(f"augmentation is 'simclr', which needs images of 3 channels (RGB): these have {channels}")
    return apply_simclr(images_u8, draw_simclr(batch, height, width, generator))
