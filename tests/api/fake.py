"""A cascade that draws at once, step by step when it is let."""

import threading
import time

import numpy as np
from PIL import Image

from imagen_jax.api.library import Result
from tests import tiny


class Cascade:
    """Of 8 and 16 pixels, in two steps each; a picture is of its seed's colour.

    The prompt "fail" raises. `asked` has the prompts in the order of their turns.
    """

    def __init__(self, seconds: float = 0):
        self.config = (tiny.stage(), tiny.sr_stage())
        self.seconds = seconds  # for each step
        self.gate = threading.Event()  # before the first step
        self.gate.set()
        self.asked = []

    def sample(self, prompt, seed, return_stages=False, callback=None, **settings):
        self.asked.append(prompt)
        self.settings = settings
        if prompt == "fail":
            raise RuntimeError("a secret of the machine")
        assert self.gate.wait(20)
        stages = []
        for number, cfg in enumerate(self.config):
            shape = (1, cfg.image_size, cfg.image_size, 3)
            made = np.full(shape, seed % 256, np.uint8)
            for step in range(2):
                time.sleep(self.seconds)
                if callback:
                    callback(number, step, made + np.uint8(1 - step))
            stages.append(made)
        about = [{"prompt": prompt, "seed": str(seed)}]
        return Result(made, stages, np.array([seed]), about)

    def upscale(self, data, prompt, **how):
        result = self.sample(prompt, **how)
        return Image.fromarray(result.images[0])
