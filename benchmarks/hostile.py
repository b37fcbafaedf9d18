"""Whether every file of a stranger ends in the same data or in one error.

JAX_PLATFORMS=cpu python -m benchmarks.hostile [--examples=2000]

Repeats the properties of tests/test_hostile.py with so many examples each, drawn anew
every time. Prints the processor's seconds of the slowest reading, and by how many GiB
the process grew; stops with a traceback at the first file that is read wrongly.
"""

import argparse
import functools
import os

from imagen_jax.cli import peak_memory_gib


def main() -> None:
    """Repeats the properties."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000)
    # Before the properties are imported, which are decorated with it.
    os.environ["HOSTILE_EXAMPLES"] = str(parser.parse_args().examples)
    from tests import hostile
    from tests import hostile_files as files
    from tests import test_hostile as tests

    properties = {
        "damaged .npz of records": tests.test_damaged_records,
        "crafted .npz of records": tests.test_crafted_records,
        "crafted .npz of a bundle": tests.test_crafted_batches,
    }
    for name in files.JSON_FILES:
        check = functools.partial(tests.test_hostile_json, name=name)
        properties[f"JSON: {name}"] = check
    for case in files.LARGE:
        check = functools.partial(tests.test_what_would_fill_the_memory, case)
        properties[f"large: {case}"] = check
    print(f"{'':26}{'seconds':>10}{'GiB':>10}")
    for name, check in properties.items():
        hostile.SLOWEST[0] = 0.0
        held = hostile.reset_peak()
        check()
        grown = peak_memory_gib() - held
        print(f"{name:26}{hostile.SLOWEST[0]:10.3f}{grown:10.2f}", flush=True)


if __name__ == "__main__":
    main()
