"""Prepared records, read as training batches."""

import os
import sys


def start_tensorflow() -> None:
    """Imports TensorFlow and seqio and hides the accelerators from them."""
    # They print from C++, before any log level is read: stderr is shut meanwhile.
    sys.stderr.flush()
    stderr, level = os.dup(2), os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1")
    # As it is imported it reads how much to tell. At JAX's "1" it warns of every PNG
    # whose colour profile libpng finds odd.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2" if level == "1" else level
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        import seqio  # noqa: F401
        import tensorflow as tf

        # TensorFlow would take all of a GPU's memory for itself.
        if tf.config.get_visible_devices("GPU"):
            tf.config.set_visible_devices([], "GPU")
    finally:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = level
        os.dup2(stderr, 2)
        os.close(stderr)
