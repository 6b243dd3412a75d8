"""The tables of docs/results.md: held-out quality of all methods, output maps, the criterion, views, and speed.

    python examples/benchmarks --data DIR [--full] [--only quality] [--out DIR]
    python examples/benchmarks --only device --full [--parts resnet maps]

The second, for a GPU, reads no data. Prints Markdown; writes ``quality.csv`` and ``quality.png`` into the output
folder. Small sizes take some minutes on two cores, ``--full`` two hours. Peers take part where they are installed:
``pip install -e . --group benchmarks --group peers``.
"""

import argparse
import platform
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import criterion
import device
import maps
import quality
import speed
import torch
import views


def main() -> None:
    """Run what was asked for and print it as it comes."""
    parser = argparse.ArgumentParser(
        prog="python examples/benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with what cases.py and maps.py name")
    parser.add_argument("--again", type=Path, nargs="+", metavar="CSV", help="only the tables of these files, as one")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="all networks, shifts, sizes and directions")
    size.add_argument("--smoke", action="store_true", help="as little as shows that it runs")
    sections = ("quality", "maps", "criterion", "views", "speed", "device")
    parser.add_argument("--only", choices=sections, help="one of the six")
    parser.add_argument("--parts", nargs="+", choices=device.PARTS, default=list(device.PARTS), help="of --only device")
    parser.add_argument("--case", action="append", help='one case of the quality tables, such as "nuclei-unet"; again')
    parser.add_argument("--device", help="where networks run: by default on the CPU, and for --only device on a GPU")
    parser.add_argument("--sizes", type=int, nargs="+", help="other calibration sizes for them, such as 250 1000")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="for CSV and figure (default: benchmarks)")
    options = parser.parse_args()
    if not options.again and not options.data and options.only != "device":
        parser.error("--data DIR (or --again CSV) is needed")
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    print(
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.processor() or platform.machine()}"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")
    )
    if options.again:
        show([row for path in options.again for row in quality.saved(path)], options.out)
        return
    if options.only in (None, "quality"):
        print("\n## Quality", flush=True)
        plan = plan_of(quality, options)
        if options.case:
            plan = plan._replace(cases=options.case)
        if options.sizes:
            plan = plan._replace(sizes=sorted(options.sizes))
        rows = []
        try:
            for row in quality.run(plan, options.data, options.device or "cpu"):
                rows.append(row)
                quality.save(rows, options.out / "quality.csv")
        except KeyboardInterrupt:
            print("Interrupted: these are the tables of what was done.")
        show(rows, options.out)
    if options.only in (None, "maps"):
        print(flush=True)
        for part in maps.report(options.data, plan_of(maps, options)):
            print(part, flush=True)
    if options.only == "device":
        where = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        for part in device.report(where, plan_of(device, options), options.parts):
            print(part, flush=True)
    for name, section in {"criterion": criterion, "views": views, "speed": speed}.items():
        if options.only in (None, name) and not options.smoke:
            for part in section.report(options.data, options.full):
                print(part, flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s in all.")


def plan_of(section: ModuleType, options: argparse.Namespace) -> Any:
    """The section's plan of the size that was asked for."""
    return section.FULL if options.full else section.SMOKE if options.smoke else section.SMALL


def show(rows: list[quality.Row], out: Path) -> None:
    """Print the tables and draw the figure."""
    print("\n".join(quality.tables(rows)), flush=True)
    quality.draw(rows, out / "quality.png")


if __name__ == "__main__":
    main()
