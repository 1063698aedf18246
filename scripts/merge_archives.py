"""Put the training windows of several prepared files into one; the first, or --test, gives the test windows.

python scripts/merge_archives.py knmi.h5 mch.h5 fmi.h5 --out all.h5
python scripts/merge_archives.py mch.h5 fmi.h5 --test knmi.h5 --out without-knmi.h5
python scripts/merge_archives.py knmi.h5 mch.h5 fmi.h5 --synthetic 240 --out pretraining.h5
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spatspark_fast.common.errors import UserError
from spatspark_fast.prepare.merging import merge_archives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="files of spatspark_fast.prepare with one --scale")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--test", type=Path, help="its test windows (or all, if it has none) become the test split")
    parser.add_argument("--synthetic", type=int, default=0, help="made-up windows to add, for pretraining")
    args = parser.parse_args()
    try:
        counts = merge_archives(args.files, args.out, args.test, args.synthetic)
    except UserError as error:
        raise SystemExit(f"merge_archives: {error}") from None
    sys.stdout.write(f"{args.out}: {counts['train']} training windows, {counts['test']} test windows\n")


if __name__ == "__main__":
    main()
