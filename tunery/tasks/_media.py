"""Sounds and pictures decoded: untrusted bytes in, arrays out. Errors name the row, no more."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from tunery.errors import InvalidData

if TYPE_CHECKING:
    import numpy as np

MOST_PIXELS = 50_000_000


def audio(data: bytes, rate: int, most_seconds: float, index: int) -> np.ndarray:
    """One channel at `rate` samples a second, cut at `most_seconds`: float32, -1..1.

    Raises:
        InvalidData: it cannot be decoded, or is empty.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            have = int(file.samplerate)
            samples_TC = file.read(int(most_seconds * have), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        raise InvalidData(
            f"row {index}: the audio cannot be decoded ({type(error).__name__})", code="bad_media"
        ) from error
    if not len(samples_TC):
        raise InvalidData(f"row {index}: the audio is empty", code="bad_media")
    return resampled(samples_TC.mean(axis=1), have, rate)


def resampled(samples_T: np.ndarray, have: int, want: int) -> np.ndarray:
    """The same sound at another rate, float32.

    Band-limited interpolation with a Hann-windowed sinc of six zero crossings to either side
    (Smith: Digital Audio Resampling, ccrma.stanford.edu/~jos/resample).
    """
    import torch
    from torch.nn import functional

    if have == want:
        return samples_T
    common = math.gcd(have, want)
    step, phases = have // common, want // common
    cutoff = min(step, phases) * 0.99  # a little below half the lower rate, against aliasing
    reach = math.ceil(6 * step / cutoff)
    taps = torch.arange(-reach, reach + step, dtype=torch.float64) / step
    shifts = -torch.arange(phases, dtype=torch.float64)[:, None] / phases
    place = ((shifts + taps) * cutoff).clamp(-6, 6)
    kernel = torch.sinc(place) * torch.cos(place * math.pi / 12) ** 2 * cutoff / step
    padded = functional.pad(torch.from_numpy(samples_T)[None, None], (reach, reach + step))
    found = functional.conv1d(padded, kernel[:, None].float(), stride=step)
    length = math.ceil(len(samples_T) * phases / step)
    made: np.ndarray = found[0].T.reshape(-1)[:length].numpy()
    return made


def image(data: bytes, index: int) -> Any:
    """An RGB picture of Pillow's.

    Raises:
        InvalidData: it cannot be decoded, or has too many pixels.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            if math.prod(picture.size) > MOST_PIXELS:
                raise InvalidData(
                    f"row {index}: a picture of more than {MOST_PIXELS} pixels", code="bad_media"
                )
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InvalidData(
            f"row {index}: the image cannot be decoded ({type(error).__name__})", code="bad_media"
        ) from error
