"""What people bring, written as they have it; and what `prepare` makes of it."""

import io
import json
import os
import tarfile

import numpy as np
from PIL import Image

from imagen_jax import prepare


def png(i=0, kind="PNG"):
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


PNG, JPEG = png(), png(1, "JPEG")


def tar(path, members):
    """Of (name, bytes), or (name, type, where a link leads)."""
    with tarfile.open(path, "w") as tar:
        for name, *content in members:
            info = tarfile.TarInfo(name)
            if len(content) == 2:
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content[0])
                tar.addfile(info, io.BytesIO(content[0]))
    return f"webdataset:{path}"


def tree(root, files):
    """Files by their paths; text is a link."""
    for name, content in files.items():
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if isinstance(content, str):
            os.symlink(os.fsencode(content), path)
        else:
            with open(path, "wb") as file:
                file.write(content)
    return f"folder:{root}"


def outcome(source, output, **options):
    """Captions, sorted; reasons by name; what was passed over; how many parts."""
    options = {"encoder": "none", "max_bad_share": 1.0, "progress": False} | options
    manifest = prepare.prepare(source, str(output), **options)
    captions = []
    for path in sorted(output.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    captions.append(json.load(tar.extractfile(member))["caption"])
    lines = (output / "quarantine.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    reasons = {row["file"]: row["reason"] for row in rows}
    assert len(rows) == manifest.skipped
    account = dict(manifest.account)
    assert sum(account.values()) == manifest.holds
    found = account.pop("used"), account.pop("quarantined")
    return sorted(captions), reasons, account, (*found, manifest.holds)
