"""TensorFlow as a reader of files: quiet, and without the accelerators."""

import contextlib
import os
import sys


def start_tensorflow() -> None:
    """Imports TensorFlow and seqio and hides the accelerators from them.

    What they print on starting comes from C++, before any log level is read, so
    stderr itself is shut meanwhile; TF_CPP_MIN_LOG_LEVEL=0 leaves it open.
    """
    loud = os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0"
    with contextlib.nullcontext() if loud else _stderr_shut():
        import seqio  # noqa: F401
        import tensorflow as tf

        # TensorFlow would take all of a GPU's memory for itself.
        if tf.config.get_visible_devices("GPU"):
            tf.config.set_visible_devices([], "GPU")


@contextlib.contextmanager
def _stderr_shut():
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
