"""Tars as img2dataset and webdataset write them, by the standard library."""

import io
import tarfile


def write(path, members, end=True):
    """A tar of (name, bytes); without its end when `end` is False."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        length = tar.offset
    if not end:
        path.write_bytes(path.read_bytes()[:length])
    return path


def read(path):
    """The contents of a tar's files, in order."""
    with tarfile.open(path) as tar:
        return [tar.extractfile(member).read() for member in tar if member.isfile()]
