"""Captioned pictures as files: the ImageFolder convention, or name.png by name.txt."""

import dataclasses
import json
import pathlib

from imagen_jax.errors import UserError

_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
_METADATA = "metadata.jsonl"


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a folder holds.

    Attributes:
      pairs: (path of the picture relative to the folder, caption), sorted by path.
      problems: (path, reason) of what has a caption or a picture only, or a caption
        that is empty or not UTF-8.
    """

    pairs: list[tuple[str, str]]
    problems: list[tuple[str, str]]


def list_folder(folder: str) -> Listing:
    """Finds the pictures of `folder` and their captions, without opening a picture.

    With a metadata.jsonl (one object a line, `file_name` and `text`) the captions are
    those of its lines, else those of the .txt files beside the pictures.

    Raises:
      UserError: for a missing folder, one without pictures, a line that is not of
        that form, or two captions or pictures of one name.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise UserError(f"there is no folder {folder!r} to take pictures from")
    files = sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()
    )
    pictures = {name for name in files if name.lower().endswith(_PICTURES)}
    if not pictures:
        raise UserError(
            f"the folder {folder!r} has no pictures ({', '.join(_PICTURES)})"
        )
    if _METADATA in files:
        captions = _read_metadata(root / _METADATA)
        no_caption = f"not in {_METADATA}"
    else:
        captions = _read_text_files(root, files, pictures)
        no_caption = "has no .txt file beside it"
    pairs, problems = [], [(name, no_caption) for name in pictures - set(captions)]
    for name, caption in captions.items():
        if name not in pictures:
            problems.append((name, "has a caption, but there is no such picture"))
        elif caption is None:
            problems.append((name, "the caption is not UTF-8 text"))
        elif not caption:
            problems.append((name, "the caption is empty"))
        else:
            pairs.append((name, caption))
    return Listing(sorted(pairs), sorted(problems))


def _read_metadata(path: pathlib.Path) -> dict[str, str]:
    captions, line_of = {}, {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        where = f"{str(path)!r} line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not valid JSON: {error.msg}") from None
        fields = values if isinstance(values, dict) else {}
        name, caption = fields.get("file_name"), fields.get("text")
        if not isinstance(name, str) or not isinstance(caption, str):
            raise UserError(
                f'{where} must be an object with "file_name" and "text", both strings'
            )
        name = pathlib.PurePosixPath(name).as_posix()
        if name in captions:
            raise UserError(
                f"{where} captions {name!r} again, after line {line_of[name]}: keep one"
            )
        captions[name], line_of[name] = caption.strip(), number
    return captions


def _read_text_files(root, files, pictures) -> dict[str, str | None]:
    picture_of = {}
    for name in sorted(pictures):
        stem = pathlib.PurePosixPath(name).with_suffix("").as_posix()
        if stem in picture_of:
            raise UserError(
                f"{picture_of[stem]!r} and {name!r} in {str(root)!r} would share the "
                f"caption {stem + '.txt'!r}: rename or remove one"
            )
        picture_of[stem] = name
    texts = [name for name in files if name.lower().endswith(".txt")]
    if not any(name[:-4] in picture_of for name in texts):
        raise UserError(
            f"the folder {str(root)!r} has pictures but no captions: give it a "
            f'{_METADATA} (lines of {{"file_name": ..., "text": ...}}) or a NAME.txt '
            "beside each NAME.png"
        )
    return {
        picture_of.get(name[:-4], name): decode_caption((root / name).read_bytes())
        for name in texts
    }


def decode_caption(data: bytes) -> str | None:
    """The text of a caption's file without the space around it; None if not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return None


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 text: {error}") from None
