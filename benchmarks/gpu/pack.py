"""The packages that a GPU machine without a network lacks: which, packed for trips of limited size, and unpacked there.

    python -m benchmarks.gpu.pack missing                    # on the machine: what it has, and what it lacks
    python -m benchmarks.gpu.pack fetch WHEELS               # here: download what a machine lacks
    python -m benchmarks.gpu.pack pack WHEELS PARCELS        # here: into parcels of at most 60 MiB
    python -m benchmarks.gpu.pack unpack PARCELS PLACE       # there; then PYTHONPATH=PLACE

Wheels are unpacked, and everything in them is compressed together: one of libraries shrinks to half. Parcels are raw
pieces of one file, whose SHA-256 is checked before it is unpacked. Keep them out of git.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

MOST = 60 * 2**20
PIECE = 2**20
NAME = "packages.tar.xz"


@dataclass(frozen=True)
class Package:
    """A package that the benchmark imports.

    Attributes:
        module: by which Python finds it.
        requirement: as pip takes it.
        why: what needs it.
    """

    module: str
    requirement: str
    why: str


NEEDED = (
    Package("torch", "torch>=2.11,<2.14", "everything; not fetched, a GPU machine has its own build"),
    Package("transformers", "transformers>=5.17,<5.25", "models"),
    Package("onnx", "onnx>=1.18", "steps 3 and 4"),
    Package("onnxscript", "onnxscript>=0.7", "steps 3 and 4"),
    Package("onnx_ir", "onnx-ir", "steps 3 and 4"),
    Package("pydantic", "pydantic>=2.10", "schedules"),
    Package("yaml", "PyYAML>=6", "schedules"),
    Package("typer", "typer>=0.15", "the command line"),
    Package("rich", "rich>=13", "the command line"),
    Package("safetensors", "safetensors>=0.8", "the demo's model in step 5"),
    Package("numpy", "numpy>=1.26", "everything"),
)
# Without them a step says so in its rows. The two packages of TensorRT-RTX must be of one version.
OPTIONAL = (
    Package("tensorrt_rtx", "tensorrt-rtx-cu13-libs==1.7.1.116", "step 3"),
    Package("tensorrt_rtx", "tensorrt-rtx-cu13-bindings==1.7.1.116", "step 3"),
    Package("onnxruntime", "onnxruntime-gpu>=1.22", "step 4; in place of onnxruntime, which has no CUDA"),
)
NEVER_FETCHED = ("torch",)


def missing() -> str:
    """A line for each package: what there is of it on this machine."""
    lines = [f"Python {sys.version.split()[0]}"]
    for package in (*NEEDED, *OPTIONAL):
        there = importlib.util.find_spec(package.module) is not None
        lines.append(f"{'there  ' if there else 'MISSING'}  {package.requirement}  ({package.why}){_version(package)}")
    return "\n".join(lines)


def _version(package: Package) -> str:
    name = package.requirement.partition("=")[0].rstrip("<>")
    try:
        return f": {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return ""


def fetch(folder: Path, names: list[str], python: str) -> None:
    """Download wheels for the machine, and nothing that they depend on."""
    known = {p.requirement.partition("=")[0].rstrip("<>"): p.requirement for p in (*NEEDED, *OPTIONAL)}
    unknown = [name for name in names if name not in known or name in NEVER_FETCHED]
    if unknown:
        raise SystemExit(f"{unknown[0]!r} is none of {', '.join(n for n in known if n not in NEVER_FETCHED)}.")
    wanted = [known[name] for name in names] or [package.requirement for package in OPTIONAL]
    platforms = [f"--platform={p}" for p in ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *platforms]
    subprocess.run([*command, f"--python-version={python}", "-d", str(folder), *wanted], check=True)


def pack(wheels: Path, parcels: Path, most: int = MOST) -> list[Path]:
    """Wheels of a folder as parcels of at most `most` bytes; the last one is `parcels.json`, which lists them.

    Raises:
        SystemExit: there is no wheel.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise SystemExit(f"{wheels} holds no wheel (*.whl).")
    parcels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parcels) as folder:
        place, packed = Path(folder) / "place", Path(folder) / NAME
        for wheel in found:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(place)
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        # Jumps of x86 code compress better as absolute addresses. A dictionary is no larger than what it is for.
        words = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": min(2**28, max(2**16, size))}
        with lzma.open(packed, "wb", filters=[{"id": lzma.FILTER_X86}, words]) as stream:
            with tarfile.open(fileobj=stream, mode="w") as archive:
                archive.add(place, ".")
        return _cut(packed, parcels, most, [wheel.name for wheel in found])


def _cut(packed: Path, parcels: Path, most: int, names: list[str]) -> list[Path]:
    whole, pieces = hashlib.sha256(), []
    with packed.open("rb") as file:
        while block := file.read(min(PIECE, most)):
            whole.update(block)
            if not pieces or pieces[-1].stat().st_size + len(block) > most:
                pieces.append(parcels / f"{NAME}.{len(pieces):02d}")
                pieces[-1].write_bytes(b"")
            with pieces[-1].open("ab") as piece:
                piece.write(block)
    listing = parcels / "parcels.json"
    said = {"wheels": names, "sha256": whole.hexdigest(), "pieces": [piece.name for piece in pieces]}
    listing.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return [*pieces, listing]


def unpack(parcels: Path, place: Path) -> list[str]:
    """Join the parcels and unpack them; the wheels that are there then.

    Raises:
        SystemExit: a parcel is missing or damaged.
    """
    said = json.loads((parcels / "parcels.json").read_text(encoding="utf-8"))
    lost = [name for name in said["pieces"] if not (parcels / name).is_file()]
    if lost:
        raise SystemExit(f"{parcels} lacks {', '.join(lost)} of {len(said['pieces'])} parcels.")
    with tempfile.TemporaryFile() as joined:
        whole = hashlib.sha256()
        for name in said["pieces"]:
            content = (parcels / name).read_bytes()
            whole.update(content)
            joined.write(content)
        if whole.hexdigest() != said["sha256"]:
            raise SystemExit(f"The parcels in {parcels} are damaged: their SHA-256 is not that of parcels.json.")
        joined.seek(0)
        with lzma.open(joined) as stream, tarfile.open(fileobj=stream) as archive:
            archive.extractall(place, filter="data")
    wheels: list[str] = said["wheels"]
    return wheels


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("missing")
    fetching = commands.add_parser("fetch")
    fetching.add_argument("wheels", type=Path)
    fetching.add_argument("names", nargs="*", help="packages by name; none: the optional ones")
    fetching.add_argument("--python", default="3.12", help="of the machine")
    packing = commands.add_parser("pack")
    packing.add_argument("wheels", type=Path)
    packing.add_argument("parcels", type=Path)
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("parcels", type=Path)
    unpacking.add_argument("place", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "missing":
        print(missing())
    elif given.command == "fetch":
        fetch(given.wheels, given.names, given.python)
    elif given.command == "pack":
        for path in pack(given.wheels, given.parcels):
            print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
    else:
        print(f"Unpacked {', '.join(unpack(given.parcels, given.place))}; set PYTHONPATH={given.place}.")


if __name__ == "__main__":
    main()
