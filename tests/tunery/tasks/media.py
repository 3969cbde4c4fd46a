"""Sounds and pictures made up for tests, as files in bytes."""

from __future__ import annotations

import io
import wave

import numpy as np
from PIL import Image


def tone(hertz: float, seconds: float = 0.2, rate: int = 8000, channels: int = 1) -> bytes:
    """A WAV file of a sine."""
    time = np.arange(int(seconds * rate)) / rate
    samples = (0.5 * np.sin(2 * np.pi * hertz * time) * 32767).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(np.repeat(samples, channels).tobytes())
    return file.getvalue()


def square(shade: int, size: int = 12, kind: str = "PNG") -> bytes:
    """A picture of one shade, with a lighter edge."""
    pixels = np.full((size, size), shade, dtype=np.uint8)
    pixels[0] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
