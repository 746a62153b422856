"""How fast one thread casts: GB of input per second, beside plain copies of the same bytes.

    python benchmarks/cast.py FOLDER --gb 1 --repeat 5

Writes a float32 and a float16 file into FOLDER, converts each to bfloat16 and removes everything again. Files stay in
the page cache, so the figures are the processor's and not the disk's; the best of all repetitions counts.
`cores` is processor time per elapsed time: above 1 the work was not done by one thread.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moemerge.checkpoint.convert import CHUNK_ELEMENTS, convert
from moemerge.checkpoint.copy import copy_range, write_all
from moemerge.checkpoint.header import TensorInfo
from moemerge.checkpoint.writer import CHUNK_BYTES
from moemerge.dtypes import BITS, CONFIG_DTYPES, HeaderDType

BLOCK_ELEMENTS = 2**22
BUFFER_BYTES = 2**20
BINARY = getattr(os, "O_BINARY", 0)


def unbuffered(tensor: TensorInfo) -> io.FileIO:
    """The file of a tensor, which is one of this machine."""
    assert isinstance(tensor.path, Path)
    return tensor.path.open("rb", buffering=0)


def cast(tensor: TensorInfo, target: int) -> None:
    with unbuffered(tensor) as source:
        for chunk in convert(source, tensor, "BF16", CHUNK_ELEMENTS):
            write_all(target, chunk)


def copy(tensor: TensorInfo, target: int) -> None:
    with unbuffered(tensor) as source:
        copy_range(source.fileno(), 0, target, 0, tensor.nbytes, lambda _: None, chunk_bytes=CHUNK_BYTES)


def read_and_write(tensor: TensorInfo, target: int) -> None:
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with unbuffered(tensor) as source:
        while count := source.readinto(buffer):
            write_all(target, buffer[:count])


WAYS = {"copied by the kernel": copy, "read and written": read_and_write, "cast to BF16": cast}


def make(path: Path, dtype: HeaderDType, nbytes: int) -> TensorInfo:
    """A file of normal numbers, one block of them over and over."""
    block = (
        torch.randn(BLOCK_ELEMENTS).mul_(0.02).to(getattr(torch, CONFIG_DTYPES[dtype])).view(torch.uint8).numpy().data
    )
    with path.open("wb") as file:
        for start in range(0, nbytes, len(block)):
            file.write(block[: nbytes - start])
        file.flush()
        os.fsync(file.fileno())  # no write-back of the input while the clock runs
    return TensorInfo("weight", path, dtype, (nbytes * 8 // BITS[dtype],), 0, nbytes)


def seconds(way: Callable[[TensorInfo, int], None], tensor: TensorInfo, path: Path) -> tuple[float, float]:
    """Elapsed and processor time of one run into a new file, its space reserved as the merge does."""
    nbytes = tensor.shape[0] * 2 if way is cast else tensor.nbytes
    target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | BINARY)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(target, 0, nbytes)
        start, start_cpu = time.perf_counter(), time.process_time()
        way(tensor, target)
        elapsed, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        assert os.fstat(target).st_size == nbytes
        return elapsed, cpu
    finally:
        os.close(target)
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for dtype in ("F32", "F16"):
            tensor = make(Path(folder, dtype), dtype, int(options.gb * 1e9) // 4 * 4)
            runs = [  # in turns, so that a busy moment of the machine meets all ways
                {name: seconds(way, tensor, Path(folder, "out")) for name, way in WAYS.items()}
                for _ in range(options.repeat)
            ]
            best = {name: min(run[name] for run in runs) for name in WAYS}
            for name, (elapsed, cpu) in best.items():
                ratio = best["copied by the kernel"][0] / elapsed
                rate = tensor.nbytes / elapsed / 1e9
                print(
                    f"{dtype} {name:20} {rate:5.2f} GB/s  {cpu / elapsed:.2f} cores  {ratio:.2f} of the kernel's copy"
                )
            Path(folder, dtype).unlink()


if __name__ == "__main__":
    main()
