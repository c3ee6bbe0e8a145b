"""The files of the package, written and read byte by byte from the description of their format, without its code.

8 bytes, the length of the header, little-endian; the header, JSON: of each array its dtype, shape and place in what follows, and
in `__metadata__` one string of JSON, the document; the bytes of the arrays. The document's `sha256` is over the rest of it, with
sorted keys, and over each array in the order of their names: its name, dtype and shape as JSON, and its bytes.
"""

import hashlib
import json
import struct

import numpy as np

TYPES = {"F64": np.dtype("<f8"), "I64": np.dtype("<i8")}
NAMES = {"F64": "torch.float64", "I64": "torch.int64"}


def kind_of(array: np.ndarray) -> str:
    return "I64" if array.dtype.kind == "i" else "F64"


def digest(arrays: dict[str, np.ndarray], document: dict) -> str:
    rest = {key: value for key, value in document.items() if key != "sha256"}
    found = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        found.update(json.dumps([name, NAMES[kind_of(array)], list(array.shape)]).encode())
        found.update(array.tobytes())
    return found.hexdigest()


def sealed(arrays: dict[str, np.ndarray], document: dict) -> dict:
    """The document with its digest."""
    return document | {"sha256": digest(arrays, document)}


def written(arrays: dict[str, np.ndarray], key: str, document: dict) -> bytes:
    """A file of these arrays and this document, as it is."""
    header: dict = {"__metadata__": {key: json.dumps(document)}}
    place, body = 0, b""
    # As safetensors orders them: whole numbers first, and by name.
    for name, array in sorted(arrays.items(), key=lambda item: (kind_of(item[1]) != "I64", item[0])):
        end = place + array.nbytes
        header[name] = {"dtype": kind_of(array), "shape": list(array.shape), "data_offsets": [place, end]}
        place, body = end, body + array.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def read(content: bytes, key: str) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and the document of a file."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    document = json.loads(header.pop("__metadata__")[key])
    arrays = {}
    for name, about in header.items():
        begin, end = (8 + length + place for place in about["data_offsets"])
        arrays[name] = np.frombuffer(content[begin:end], TYPES[about["dtype"]]).reshape(about["shape"]).copy()
    return arrays, document


def resealed(content: bytes, key: str, edit=lambda document: None, change=lambda arrays: None) -> bytes:
    """The file with its document and its arrays edited in place, and the digest made anew."""
    arrays, document = read(content, key)
    edit(document)
    change(arrays)
    return written(arrays, key, sealed(arrays, document))
