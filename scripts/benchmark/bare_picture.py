"""The yardstick for pictures: one call of stable-diffusion.cpp's function for a picture, and nothing else.

A process of its own, like the server's, with the same threads, options and environment. It takes commands as JSON lines
on standard input and answers each with one line.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import time
from typing import Any

import stable_diffusion_cpp.stable_diffusion_cpp as native


def load(params: dict[str, Any]) -> Any:
    """Return the context of a model, loaded as the server's child is told to."""
    settings = native.sd_ctx_params_t()
    _defaults("sd_ctx_params_init", settings)
    setattr(settings, "model_path" if params["whole"] else "diffusion_model_path", params["path"].encode())
    for part, path in params["parts"].items():
        setattr(settings, f"{part}_path", path.encode())
    settings.vae_decode_only = not params["encodes"]
    settings.free_params_immediately = False
    settings.diffusion_flash_attn = params["flash_attention"]
    settings.vae_conv_direct = True
    settings.n_threads = params["threads"]
    context = native.new_sd_ctx(ctypes.byref(settings))
    if not context:
        raise SystemExit("stable-diffusion.cpp can't load the model")
    return context


def draw(context: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Make a picture, and return the seconds that it took and the sum of its pixels."""
    settings = native.sd_img_gen_params_t()
    _defaults("sd_img_gen_params_init", settings)
    settings.prompt, settings.negative_prompt = job["prompt"].encode(), b""
    settings.width, settings.height, settings.seed = job["width"], job["height"], job["seed"]
    settings.sample_params.sample_steps = job["steps"]
    settings.sample_params.guidance.txt_cfg = 1.0
    start = time.perf_counter()
    pictures = native.generate_image(context, ctypes.byref(settings))
    seconds = time.perf_counter() - start
    if not pictures:
        raise SystemExit("stable-diffusion.cpp could not make the picture")
    image = pictures[0]
    pixels = ctypes.string_at(image.data, image.width * image.height * image.channel)
    return {"seconds": seconds, "pixels": hashlib.sha256(pixels).hexdigest()}


def _defaults(function: str, settings: Any) -> None:
    fill = getattr(native._lib, function)
    fill.argtypes, fill.restype = [ctypes.c_void_p], None
    fill(ctypes.byref(settings))


_quiet = native.sd_log_callback(lambda _level, _text, _data: None)
_still = native.sd_progress_callback(lambda _step, _steps, _time, _data: None)


_answers = os.fdopen(os.dup(1), "w")


def main() -> None:
    """Answer commands until standard input closes."""
    os.dup2(2, 1)  # where the library writes an empty line now and then
    native.sd_set_log_callback(_quiet, None)
    native.sd_set_progress_callback(_still, None)
    _say({"imported": True})
    context: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "load":
            context = load(command["params"])
            _say({"loaded": True})
        else:
            _say(draw(context, command["job"]))


def _say(value: Any) -> None:
    _answers.write(json.dumps(value) + "\n")
    _answers.flush()


if __name__ == "__main__":
    main()
